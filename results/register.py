"""Registration of a candidate as a version of an MLflow model, which loads and serves without paretorch and torch.

The registered model is an MLflow pyfunc model from code: `registered_model.py` with the files of an export beside it.
MLflow runs that file and unpickles nothing, so it loads with `MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false`.

This module decides what is registered and checks the names; `results.tracking.registry` writes it. All files are
exported to a temporary folder before the store is modified.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from ..errors import ConfigError, StudyError
from ..runners.targets.runtime import DISABLED_OPTIMIZERS, session
from .candidate import Candidate
from .front import Front
from .tracking.names import accepted
from .tracking.registry import NewVersion, Registered, Registry

CODE = Path(__file__).with_name("registered_model.py")
_LONGEST = 250  # characters of a name, below the limit of the databases
_TEXT = 5000  # characters of a description or a tag


def register(
    front: Front,
    candidate: Candidate,
    name: str,
    alias: str | None = None,
    uri: str | None = None,
    force: bool = False,
) -> Registered:
    """Register a candidate as the next version of a registered model.

    The candidate's run in the store becomes the source of the version.

    Args:
        front: The front of the study.
        candidate: One of its candidates, whose file was kept.
        name: The name of the registered model.
        alias: The alias that points to this version from now on.
        uri: The tracking URI of the store; by default the one that the study was logged to. For a study without
            MLflow the default is `MLFLOW_TRACKING_URI`, or else a store in the study's folder.
        force: Register it even if its file does not compute what was simulated.

    Returns:
        The registered version.

    Raises:
        ConfigError: The names cannot be used.
        StudyError: The candidate's file was not kept or does not compute what was simulated, or the store cannot be
            used.
    """
    _check_names(name, alias)
    if front.folder is None:
        raise StudyError(f"candidate {candidate.number} has no file")
    with tempfile.TemporaryDirectory() as folder:
        exported = front.export(str(candidate.number), Path(folder) / "exported", force)
        version = _version(front, candidate, exported, name, alias)
        return Registry.of_study(front.folder.root, candidate, uri).add(version)


def _check_names(name: str, alias: str | None) -> None:
    """Check a model's name and alias.

    Raises:
        ConfigError: MLflow would reject one of them, or it would need quotes in a URI or a filter.
    """
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_. -]*", name) or name != name.strip() or len(name) > _LONGEST:
        problems.append(
            f"--name {name!r}: write letters, digits, '_', '-', '.' and inner spaces, {_LONGEST} at most, "
            "a letter or digit first, such as digits-small"
        )
    if alias is not None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", alias) or len(alias) > _LONGEST:
            problems.append(
                f"--alias {alias!r}: write letters, digits, '_' and '-', {_LONGEST} at most, such as champion"
            )
        elif alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
            problems.append(
                f"--alias {alias!r}: MLflow keeps 'latest' and 'v' before a number for itself; write another, "
                "such as champion"
            )
    if problems:
        raise ConfigError(problems, "registered model")


def _version(front: Front, candidate: Candidate, exported: Path, name: str, alias: str | None) -> NewVersion:
    """The version to register for an exported candidate."""
    import numpy as np
    import onnxruntime

    network = session((exported / "model.onnx").read_bytes())
    return NewVersion(
        name=name,
        alias=alias,
        tags=_tags(front, candidate),
        text=_description(front, candidate),
        code=CODE,
        exported=exported,
        config={"threads": 1, "disabled_optimizers": DISABLED_OPTIMIZERS},
        inputs=("batch", *network.get_inputs()[0].shape[1:]),
        outputs=("batch", *network.get_outputs()[0].shape[1:]),
        requirements=(f"numpy=={np.__version__}", f"onnxruntime=={onnxruntime.__version__}"),
    )


def _tags(front: Front, candidate: Candidate) -> dict[str, str]:
    """The tags of a candidate on the registry's pages."""
    assert front.directory is not None
    assert candidate.measurement is not None
    numbers = dict(candidate.measurement.values)
    numbers |= {f"test_{name}": metric.value for name, metric in candidate.test.items()}
    return {
        "paretorch.study": front.directory.name[:_TEXT],
        "paretorch.number": str(candidate.number),
        "paretorch.state": candidate.state,
        "paretorch.recipe_key": candidate.recipe.key,
        "paretorch.what": candidate.recipe.describe()[:_TEXT],
    } | accepted({name: f"{value:.10g}" for name, value in numbers.items()})


def _description(front: Front, candidate: Candidate) -> str:
    """The description of a candidate in markdown, with its numbers beside the baseline's."""
    assert front.directory is not None
    rows = "\n".join(f"| {' | '.join(row)} |" for row in front.beside_baseline(candidate))
    over = f"\n\nOver the budget: {candidate.reason}" if candidate.state != "ok" else ""
    return (
        f"{candidate.recipe.describe()}. Candidate {candidate.number} of the study {front.directory.name}, measured on "
        f"{front.machine}.\n\n| | this model | baseline |\n|---|---|---|\n{rows}{over}"
    )[:_TEXT]
