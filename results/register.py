"""A candidate in MLflow's model registry, to be loaded and served where neither paretorch nor torch is installed.

What is registered is a pyfunc model from code: `registered_model.py`, and beside it the files of an export. MLflow runs
that file and unpickles nothing, so it loads with `MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false`. Everything is checked and
written to a temporary folder before the store is touched; what has come into the store is taken back when a later step
fails, and the alias, by which production finds the model, moves last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..errors import ConfigError, StudyError
from ..runners.targets.runtime import DISABLED_OPTIMIZERS, session
from .candidate import Candidate
from .export import compared, export_candidate, machine
from .front import Front
from .tracking.tracker import Store, Tracker, accepted, same_store, saved_uri, study_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

_CODE = Path(__file__).with_name("registered_model.py")
_LONGEST = 250  # characters of a name, below what databases hold
_TEXT = 5000  # characters of a description or a tag


@dataclass(frozen=True)
class Registered:
    """A version of a registered model.

    store: the tracking URI without a password. moved_from: the version that had the alias before. shape: of the input,
    with a name in the place of what is open. files: where the model lies, when that is on this machine.
    """

    store: str
    name: str
    version: str
    alias: str | None
    moved_from: str | None
    shape: tuple[int | str, ...]
    files: Path | None

    @property
    def uri(self) -> str:
        """What MLflow loads: `models:/NAME@ALIAS`, or `models:/NAME/VERSION` without an alias."""
        return f"models:/{self.name}@{self.alias}" if self.alias else f"models:/{self.name}/{self.version}"


def register(
    front: Front,
    candidate: Candidate,
    name: str,
    alias: str | None = None,
    uri: str | None = None,
    force: bool = False,
) -> Registered:
    """Register a candidate as the next version of `name`, and let `alias` point to it.

    The store is `uri`, or the one that the study was logged to; a study without MLflow takes `MLFLOW_TRACKING_URI`, or
    a store in its folder. A candidate's run in that store becomes the model's source. Raises `ConfigError` for names
    that cannot be used, and `StudyError` when the candidate's file was not kept, does not compute what was simulated (unless
    `force`), or the store cannot be used.
    """
    _check_names(name, alias)
    if front.directory is None:
        raise StudyError(f"candidate {candidate.number} has no file")
    with tempfile.TemporaryDirectory() as folder:
        exported = export_candidate(front, candidate, Path(folder) / "exported", force)
        store, experiment, run = _open(front.directory, candidate, uri)
        return _Registration(store, experiment, run).write(front, candidate, exported, name, alias)


def _check_names(name: str, alias: str | None) -> None:
    """What MLflow accepts, less what would need quotes in a URI or a filter."""
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_. -]*", name) or name != name.strip() or len(name) > _LONGEST:
        problems.append(f"--name {name!r}: write letters, digits, '_', '-', '.' and inner spaces, {_LONGEST} at most, "
                        "a letter or digit first, such as digits-small")  # fmt: skip
    if alias is not None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", alias) or len(alias) > _LONGEST:
            problems.append(f"--alias {alias!r}: write letters, digits, '_' and '-', {_LONGEST} at most, "
                            "such as champion")  # fmt: skip
        elif alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
            problems.append(f"--alias {alias!r}: MLflow keeps 'latest' and 'v' before a number for itself; write another, "
                            "such as champion")  # fmt: skip
    if problems:
        raise ConfigError(problems, "registered model")


def _open(directory: Path, candidate: Candidate, uri: str | None) -> tuple[Store, str, Run | None]:
    """The store, the id of the study's experiment in it, and the candidate's run there, if it has one."""
    if saved_uri(directory) is None or (uri is not None and not same_store(directory, uri)):
        tracker = Tracker(directory.name, directory, uri)
        return tracker, tracker.experiment_id, None
    found = study_run(directory, uri)
    if found is None:
        raise StudyError(f"the study in {directory} has no MLflow run yet; the same search brings it there: "
                         "paretorch search CONFIG.yaml")  # fmt: skip
    store, parent = found
    runs = store._call(
        store._client.search_runs, [parent.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`paretorch.number` = '{candidate.number}' "
        f"and tags.`paretorch.recipe_key` = '{candidate.recipe.key}'",
    )  # fmt: skip
    return store, parent.info.experiment_id, runs[0] if runs else None


class _Registration:
    """The steps of a registration in one store."""

    def __init__(self, store: Store, experiment: str, run: Run | None) -> None:
        from mlflow import MlflowClient

        self._store, self._call, self._experiment = store, store._call, experiment
        self._run, self._run_id = run, run.info.run_id if run else None
        # Its registry is the store itself, whatever MLFLOW_REGISTRY_URI says.
        self._client: MlflowClient = self._call(MlflowClient, store.uri, store.uri)

    def write(self, front: Front, candidate: Candidate, exported: Path, name: str, alias: str | None) -> Registered:
        call, client = self._call, self._client
        tags, text = _tags(front, candidate), _description(front, candidate)
        params = dict(self._run.data.params) if self._run else None
        with _process_wide(self._store.uri), contextlib.ExitStack() as undo:
            title = re.sub(r"[^A-Za-z0-9_ -]", "_", name)  # it may hold fewer characters than a registered name
            model = call(
                client.create_logged_model, self._experiment, title, self._run_id,
                tags | {"mlflow.note.content": text}, params,
            )  # fmt: skip
            undo.callback(_quietly, client.delete_logged_model, model.model_id)
            shape = self._upload(model, exported)
            there = call(client.search_registered_models, f"name = '{name}'")
            if not there:
                call(client.create_registered_model, name)
                undo.callback(_quietly, client.delete_registered_model, name)
            version = call(
                client.create_model_version, name, f"models:/{model.model_id}", self._run_id, tags,
                description=text, model_id=model.model_id,
            ).version  # fmt: skip
            undo.callback(_quietly, client.delete_model_version, name, version)
            self._link(model, name, version)
            if alias:
                call(client.set_registered_model_alias, name, alias, version)
            undo.pop_all()
        moved_from = there[0].aliases.get(alias) if there and alias else None
        return Registered(self._store.address, name, str(version), alias, moved_from and str(moved_from), shape,
                          _local(model.artifact_location))  # fmt: skip

    def _upload(self, model: LoggedModel, exported: Path) -> tuple[int | str, ...]:
        """Write the model's files; gives the shape of its input."""
        import mlflow.pyfunc
        import numpy as np
        import onnxruntime
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        network = session((exported / "model.onnx").read_bytes())
        shape: tuple[int | str, ...] = ("batch", *network.get_inputs()[0].shape[1:])

        def schema(dims: Sequence[int | str]) -> Schema:
            return Schema([TensorSpec(np.dtype("float32"), (-1, *(n if isinstance(n, int) else -1 for n in dims[1:])))])

        folder = exported.with_name("model")
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(_CODE),
            artifacts={"exported": str(exported)},
            model_config={"threads": 1, "disabled_optimizers": DISABLED_OPTIMIZERS},
            signature=ModelSignature(schema(shape), schema(network.get_outputs()[0].shape)),
            # Zeros, because the data are not at hand here, and a large image of other numbers makes megabytes of JSON.
            input_example=np.zeros([n if isinstance(n, int) else 1 for n in shape], np.float32),
            pip_requirements=[f"numpy=={np.__version__}", f"onnxruntime=={onnxruntime.__version__}"],
            mlflow_model=Model(
                model.artifact_location, self._run_id, model_uuid=model.model_id, model_id=model.model_id
            ),
        )
        for cache in folder.rglob("__pycache__"):
            shutil.rmtree(cache)
        self._call(self._client.log_model_artifacts, model.model_id, str(folder))
        self._call(self._client.finalize_logged_model, model.model_id, "READY")
        return shape

    def _link(self, model: LoggedModel, name: str, version: object) -> None:
        """Let the pages of the model, of the version and of the candidate's run lead to each other."""
        from mlflow.entities import Estimate, LoggedModelOutput

        links = json.dumps([{"name": name, "version": str(version)}])
        self._call(self._client.set_logged_model_tags, model.model_id, {"mlflow.modelVersions": links})
        if self._run is None:
            return
        self._call(self._client.log_outputs, self._run_id, [LoggedModelOutput(model.model_id, 0)])
        known = [
            self._call(self._client.get_metric_history, self._run_id, metric)[-1] for metric in self._run.data.metrics
        ]
        # With the time that they have on the run they become the model's, too, and are not on the run once more.
        metrics = [Estimate(m.key, m.value, m.timestamp, m.step, model.model_id) for m in known]
        self._call(self._client.log_batch, self._run_id, metrics=metrics)


def _tags(front: Front, candidate: Candidate) -> dict[str, str]:
    """What the registry's pages show of a candidate."""
    assert front.directory is not None
    assert candidate.measurement is not None
    numbers = {name: metric.value for name, metric in candidate.measurement.metrics.items()}
    numbers |= {f"test_{name}": metric.value for name, metric in candidate.test.items()}
    return {
        "paretorch.study": front.directory.name[:_TEXT],
        "paretorch.number": str(candidate.number),
        "paretorch.state": candidate.state,
        "paretorch.recipe_key": candidate.recipe.key,
        "paretorch.what": candidate.recipe.describe()[:_TEXT],
    } | accepted({name: f"{value:.10g}" for name, value in numbers.items()})


def _description(front: Front, candidate: Candidate) -> str:
    """The same in markdown, against the baseline."""
    assert front.directory is not None
    rows = "\n".join(f"| {' | '.join(row)} |" for row in compared(front, candidate))
    over = f"\n\nOver the budget: {candidate.reason}" if candidate.state != "ok" else ""
    return (
        f"{candidate.recipe.describe()}. Candidate {candidate.number} of the study {front.directory.name}, measured on "
        f"{machine(front)}.\n\n| | this model | baseline |\n|---|---|---|\n{rows}{over}"
    )[:_TEXT]


def _local(address: str) -> Path | None:
    parts = urlsplit(address)
    return Path(url2pathname(parts.path)) if parts.scheme in ("", "file") else None


def _quietly(action: Callable[..., object], *args: object) -> None:
    """Take a step back; what cannot be taken back must not hide why it should be."""
    with contextlib.suppress(Exception):
        action(*args)


@contextlib.contextmanager
def _process_wide(uri: str) -> Iterator[None]:
    """Settings that MLflow takes from the process alone.

    Its SQL registry asks the process's store, and not the client's, about the model of a new version. The files of a uv
    project in the current folder would become part of the model. A progress bar of six small files says nothing.
    """
    import mlflow

    settings = {"MLFLOW_UV_AUTO_DETECT": "false", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", *settings)}
    store = mlflow.get_tracking_uri() if before["MLFLOW_TRACKING_URI"] else None  # to set one sets the variable, too
    mlflow.set_tracking_uri(uri)
    os.environ.update(settings)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(store)  # type: ignore[arg-type]
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
