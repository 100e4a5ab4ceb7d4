"""What the tests of results share: an MLflow store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from paretorch.results.tracking.tracker import Tracker


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with nothing but its tables: to make them takes seconds, so the tests copy the file."""
    directory = tmp_path_factory.mktemp("fresh")
    Tracker("fresh", directory, experiment="Default")
    return directory


@pytest.fixture
def directory(fresh: Path, tmp_path: Path) -> Path:
    for path in fresh.glob("mlflow.db*"):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path
