"""MLflow's settings while a version is registered; what is registered is in test_register.py, one folder up."""

from __future__ import annotations

import os

import pytest

from paretorch.results.tracking.registry import _process_wide

mlflow = pytest.importorskip("mlflow")


@pytest.mark.parametrize("uri", [None, "sqlite:////tmp/never-made/mlflow.db"])
def test_the_settings_of_the_process_stay(monkeypatch: pytest.MonkeyPatch, uri: str | None) -> None:
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_UV_AUTO_DETECT", "true")
    before, store = dict(os.environ), mlflow.get_tracking_uri()
    with _process_wide("sqlite:////tmp/another/mlflow.db"):
        assert mlflow.get_tracking_uri() == "sqlite:////tmp/another/mlflow.db"
        assert os.environ["MLFLOW_UV_AUTO_DETECT"] == "false"
    assert (dict(os.environ), mlflow.get_tracking_uri()) == (before, store)
    mlflow.set_tracking_uri(None)
