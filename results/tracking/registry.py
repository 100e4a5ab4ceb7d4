"""A version of a registered model in MLflow's model registry: created as a whole, or not at all.

What has been created is deleted when a later step fails. The alias, by which production finds the model, moves last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ...errors import StudyError
from ..candidate import Candidate
from .names import NOTE, PARENT
from .store import Store, same_store, saved_uri, study_run
from .tracker import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.types import Schema

Shape = tuple[int | str, ...]  # with a name in the place of what is open


@dataclass(frozen=True)
class NewVersion:
    """What becomes the next version of a registered model.

    Attributes:
        name: of the registered model.
        alias: that points to this version from then on; None for none.
        tags: of the model and of the version.
        text: markdown, the description of both.
        code: the Python file that MLflow copies and runs; it calls `mlflow.models.set_model`.
        exported: the folder that the code finds as its artifact `exported`.
        config: the code's model configuration.
        inputs: shape of the float32 input.
        outputs: shape of the float32 output.
        requirements: what pip must install where the model runs.
    """

    name: str
    alias: str | None
    tags: Mapping[str, str]
    text: str
    code: Path
    exported: Path
    config: Mapping[str, object]
    inputs: Shape
    outputs: Shape
    requirements: tuple[str, ...]


@dataclass(frozen=True)
class Registered:
    """A version of a registered model.

    Attributes:
        store: the tracking URI without a password.
        name: of the registered model.
        version: its number.
        alias: that points to it, if one was asked for.
        moved_from: the version that had the alias before.
        shape: of the input.
        files: where the model is stored, when that is on this machine.
    """

    store: str
    name: str
    version: str
    alias: str | None
    moved_from: str | None
    shape: Shape
    files: Path | None

    @property
    def uri(self) -> str:
        """What MLflow loads: `models:/NAME@ALIAS`, or `models:/NAME/VERSION` without an alias."""
        return f"models:/{self.name}@{self.alias}" if self.alias else f"models:/{self.name}/{self.version}"


class Registry:
    """The model registry of one store, for one candidate of a study.

    Args:
        store: where the registry is, too, whatever `MLFLOW_REGISTRY_URI` says.
        experiment_id: of the study.
        run: the candidate's, which becomes the source of its model.
    """

    def __init__(self, store: Store, experiment_id: str, run: Run | None) -> None:
        from mlflow import MlflowClient

        self._store, self._call, self._experiment_id = store, store.call, experiment_id
        self._run, self._run_id = run, run.info.run_id if run else None
        self._client: MlflowClient = self._call(MlflowClient, store.uri, store.uri)

    @classmethod
    def of_study(cls, directory: Path, candidate: Candidate, uri: str | None) -> Registry:
        """The registry in the store `uri`, by default in the one that the study was logged to.

        A study without MLflow takes `MLFLOW_TRACKING_URI`, or a store in its folder. Raises `StudyError`.
        """
        if saved_uri(directory) is None or (uri is not None and not same_store(directory, uri)):
            tracker = Tracker(directory.name, directory, uri)
            return cls(tracker.store, tracker.experiment_id, None)
        logged = study_run(directory, uri)
        if logged is None:
            raise StudyError(
                f"the study in {directory} has no MLflow run yet; the same search brings it there: "
                "paretorch search CONFIG.yaml"
            )
        store, parent = logged
        runs = store.search(
            parent.info.experiment_id,
            f"tags.`{PARENT}` = '{parent.info.run_id}' and tags.`paretorch.number` = '{candidate.number}' "
            f"and tags.`paretorch.recipe_key` = '{candidate.recipe.key}'",
        )
        return cls(store, parent.info.experiment_id, runs[0] if runs else None)

    def add(self, new: NewVersion) -> Registered:
        """Create the version, and the registered model if it is the first; raises `StudyError`."""
        call, client = self._call, self._client
        params = dict(self._run.data.params) if self._run else None
        with _process_wide(self._store.uri), contextlib.ExitStack() as undo:
            title = re.sub(r"[^A-Za-z0-9_ -]", "_", new.name)  # fewer characters are accepted than in a registered name
            tags = {**new.tags, NOTE: new.text}
            model = call(client.create_logged_model, self._experiment_id, title, self._run_id, tags, params)
            undo.callback(_undo, client.delete_logged_model, model.model_id)
            self._upload(model, new)
            there = call(client.search_registered_models, f"name = '{new.name}'")
            if not there:
                call(client.create_registered_model, new.name)
                undo.callback(_undo, client.delete_registered_model, new.name)
            version = call(
                client.create_model_version,
                new.name,
                f"models:/{model.model_id}",
                self._run_id,
                dict(new.tags),
                description=new.text,
                model_id=model.model_id,
            ).version
            undo.callback(_undo, client.delete_model_version, new.name, version)
            self._link(model, new.name, version)
            if new.alias:
                call(client.set_registered_model_alias, new.name, new.alias, version)
            undo.pop_all()
        before = there[0].aliases.get(new.alias) if there and new.alias else None
        return Registered(
            store=self._store.address,
            name=new.name,
            version=str(version),
            alias=new.alias,
            moved_from=before and str(before),
            shape=new.inputs,
            files=_local(model.artifact_location),
        )

    def _upload(self, model: LoggedModel, new: NewVersion) -> None:
        """Write the model's files."""
        import mlflow.pyfunc
        import numpy as np
        from mlflow.models import Model, ModelSignature

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            mlflow.pyfunc.save_model(
                str(folder),
                python_model=str(new.code),
                artifacts={"exported": str(new.exported)},
                model_config=dict(new.config),
                signature=ModelSignature(_schema(new.inputs), _schema(new.outputs)),
                # Zeros: the data are not available here, and a large image of other numbers makes megabytes of JSON.
                input_example=np.zeros([n if isinstance(n, int) else 1 for n in new.inputs], np.float32),
                pip_requirements=list(new.requirements),
                mlflow_model=Model(
                    model.artifact_location, self._run_id, model_uuid=model.model_id, model_id=model.model_id
                ),
            )
            for cache in folder.rglob("__pycache__"):
                shutil.rmtree(cache)
            self._call(self._client.log_model_artifacts, model.model_id, str(folder))
        self._call(self._client.finalize_logged_model, model.model_id, "READY")

    def _link(self, model: LoggedModel, name: str, version: object) -> None:
        """Let the pages of the model, of the version and of the candidate's run lead to each other."""
        from mlflow.entities import LoggedModelOutput, Metric

        links = json.dumps([{"name": name, "version": str(version)}])
        self._call(self._client.set_logged_model_tags, model.model_id, {"mlflow.modelVersions": links})
        if self._run is None:
            return
        self._call(self._client.log_outputs, self._run_id, [LoggedModelOutput(model.model_id, 0)])
        known = [
            self._call(self._client.get_metric_history, self._run_id, metric)[-1] for metric in self._run.data.metrics
        ]
        # With the time that they have on the run they become the model's, too, and are not on the run once more.
        metrics = [Metric(m.key, m.value, m.timestamp, m.step, model.model_id) for m in known]
        self._call(self._client.log_batch, self._run_id, metrics=metrics)


def _schema(shape: Sequence[int | str]) -> Schema:
    """Float32 tensors of a shape whose first dimension is the batch."""
    import numpy as np
    from mlflow.types import Schema, TensorSpec

    return Schema([TensorSpec(np.dtype("float32"), (-1, *(n if isinstance(n, int) else -1 for n in shape[1:])))])


def _local(address: str) -> Path | None:
    parts = urlsplit(address)
    return Path(url2pathname(parts.path)) if parts.scheme in ("", "file") else None


def _undo(action: Callable[..., object], *args: Any) -> None:
    """Delete what was created; a failure must not hide the error that made it necessary."""
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
        mlflow.set_tracking_uri(store)  # type: ignore[arg-type]  # it takes None, too, which its signature lacks
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
