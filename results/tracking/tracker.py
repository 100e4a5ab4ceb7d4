"""A study as runs in MLflow.

MLflow gets one parent run per study and one child run per finished candidate, whatever its state. The runs can be
restored from the study's journal at any time (`Tracker.sync`): after a `kill -9`, after runs were deleted, or when the
study continues in another store. So nothing here is ever read back to decide anything.

A candidate is written in one go at its end (create, one batch, terminate): a kill leaves at most one RUNNING run.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ArtifactError, StudyError
from ...objectives.measurement import flat
from ..candidate import FAILED, Candidate
from ..folder import StudyFolder
from ..report.tables import rows
from ..report.write import FILES
from . import charts
from .names import NOTE, PARAM_LENGTH, PARENT, TAG_LENGTH, accepted, description
from .store import Store, explain, is_local, opened, save_run, saved_run, store_uri, study_run

if TYPE_CHECKING:
    from mlflow.entities import Run, RunInfo

    from ..front import Front

_UNFINISHED = ("RUNNING", "SCHEDULED")
_NO_MEMBER = {"paretorch.front": "false", "paretorch.cluster": "false", "paretorch.recommended": "false"}
_ABOUT = (
    "Each top-level run is one compression search; its children are the candidates it tried. "
    "Open a search for its front (front.html), its report and how to use the best recipe."
)


class _Child:
    """What this process knows of a child run."""

    def __init__(self, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        self.run_id, self.metrics, self.tags = run_id, dict(metrics), dict(tags)


class Tracker:
    """Writes one study into MLflow: `start`, `sync` after a resume, `log` per candidate, `finish`.

    Which run is the study's is kept in `mlflow_run.json` in the study's folder. The caller makes sure that one process
    at a time writes a study; different studies may share a store at the same time.

    Args:
        study_name: the name of the parent run.
        directory: the study's folder.
        uri: of the store; by default `MLFLOW_TRACKING_URI`, then an SQLite store in the study's folder.
        experiment: by default `paretorch/STUDY_NAME`.

    Raises:
        StudyError: the store cannot be used, is full or does not answer; with what to do. One that is busy for a moment
            (`database is locked`) is tried again.
    """

    _run: RunInfo  # the parent's, from `start` on

    def __init__(self, study_name: str, directory: Path, uri: str | None = None, experiment: str | None = None) -> None:
        self.study_name = study_name
        self.directory = Path(directory).resolve()
        self.experiment = experiment or f"paretorch/{study_name}"
        self.run_id = ""  # until `start`
        self._children: dict[int, _Child] = {}
        self._steps: set[int] = set()
        chosen = store_uri(self.directory, uri)
        self._own = is_local(self.directory, chosen)
        with opened(chosen, self._own) as (store, artifacts):
            self.store = store
            self.experiment_id = self._open_experiment(artifacts)

    def _open_experiment(self, artifacts: str | None) -> str:
        """The id of the study's experiment, created if it is not there."""
        call, client = self.store.call, self.store.client
        known = call(client.get_experiment_by_name, self.experiment)
        if known and known.lifecycle_stage == "deleted":
            raise StudyError(
                f"MLflow experiment {self.experiment!r} was deleted in {self.store.address}; restore it "
                f"(mlflow experiments restore -x {known.experiment_id}) or name another one"
            )
        if known and self._own and known.artifact_location != artifacts:
            # The study's folder was moved or copied: artifact addresses in the store are absolute, so the runs are
            # written again here; the old ones can be restored under the experiment's new name.
            call(client.rename_experiment, known.experiment_id, f"{self.experiment} (moved {uuid.uuid4().hex[:6]})")
            call(client.delete_experiment, known.experiment_id)
            known = None
        return str(known.experiment_id) if known else self._create_experiment(artifacts)

    def _create_experiment(self, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        client = self.store.client
        tags = {"mlflow.experimentKind": "custom_model_development", NOTE: _ABOUT}
        try:
            return client.create_experiment(self.experiment, artifact_location=artifacts, tags=tags)
        except MlflowException as error:
            # On a server another search may have created it in the meantime.
            known = client.get_experiment_by_name(self.experiment)
            if known is None:
                explain(error, self.store.uri)
            return str(known.experiment_id)

    def start(self, params: Mapping[str, str], texts: Mapping[str, str], environment: Mapping[str, str]) -> str:
        """Create the study's parent run, or attach to it again, and give its id.

        `params` are written once: those that are there already keep their first value. `texts` become artifacts by
        their file names; `environment` becomes `environment.json` and tags.
        """
        saved = saved_run(self.directory)
        study = saved.get("study") or uuid.uuid4().hex
        self._save(study)
        run = self._find(study, saved.get("run_id", ""))
        tags = {
            "paretorch.role": "search",
            "paretorch.study": study,
            "paretorch.study_dir": str(self.directory),
            "paretorch.host": socket.gethostname(),
        }
        call, client = self.store.call, self.store.client
        if run is None:
            self._close_strays(tags)
            run = call(client.create_run, self.experiment_id, tags=tags, run_name=self.study_name)
        else:
            call(client.update_run, run.info.run_id, status="RUNNING")
        self._run, self.run_id = run.info, run.info.run_id
        self._save(study)

        there = run.data.params
        tags |= {f"paretorch.env.{name}": value[:TAG_LENGTH] for name, value in environment.items()}
        new = {name: value[:PARAM_LENGTH] for name, value in accepted(params).items() if name not in there}
        self.store.log(self.run_id, params=new, tags=accepted(tags))
        for name, text in texts.items():
            self.store.put(self._run, name, text)
        self.store.put(self._run, "environment.json", json.dumps(dict(environment), indent=1))
        _put_sensitivity(self.store, self._run, self.directory)
        _put_targets(self.store, self._run, self.directory)
        return self.run_id

    def _save(self, study: str) -> None:
        save_run(self.directory, self.store.uri, study, self.run_id, self.experiment_id)

    def _find(self, study: str, run_id: str) -> Run | None:
        """The study's parent run in this store, if it is there."""
        from mlflow.exceptions import MlflowException

        if run_id:
            try:
                run = self.store.client.get_run(run_id)
                if self._belongs(run, study):
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    explain(error, self.store.uri)
        runs = self._search(f"tags.`paretorch.study` = '{study}' and tags.`paretorch.role` = 'search'")
        return next((run for run in runs if self._belongs(run, study)), None)

    def _belongs(self, run: Run, study: str) -> bool:
        return bool(
            run.info.lifecycle_stage == "active"
            and run.info.experiment_id == self.experiment_id
            and run.data.tags.get("paretorch.study") == study
            and run.data.tags.get("paretorch.role") == "search"
        )

    def _close_strays(self, tags: Mapping[str, str]) -> None:
        """End the runs that an earlier study in this folder, since removed, has left RUNNING."""
        # MLflow's filters know no escape, so a value with a quote matches nothing.
        values = {
            name: tags[name].replace("'", "") for name in ("paretorch.role", "paretorch.study_dir", "paretorch.host")
        }
        for parent in self._search(" and ".join(f"tags.`{name}` = '{value}'" for name, value in values.items())):
            for run in (*self._search(f"tags.`{PARENT}` = '{parent.info.run_id}'"), parent):
                if run.info.status in _UNFINISHED:
                    self.store.call(self.store.client.set_terminated, run.info.run_id, "KILLED")

    def _search(self, where: str) -> list[Run]:
        return self.store.search(self.experiment_id, where)

    def log(self, candidate: Candidate, hypervolume: float, on_front: bool, picks: Mapping[str, object]) -> None:
        """Write one finished candidate as a child run, and the hypervolume after it on the parent.

        A candidate that is there already is left alone. `picks` are the choices in readable values.
        """
        if candidate.number not in self._children:
            self._children[candidate.number] = self._write_child(candidate, on_front, picks)
        if candidate.number not in self._steps:
            self.store.log(self.run_id, metrics={"hypervolume": hypervolume}, step=candidate.number)
            self._steps.add(candidate.number)

    def _write_child(self, candidate: Candidate, on_front: bool, picks: Mapping[str, object]) -> _Child:
        call, client = self.store.call, self.store.client
        now = int(time.time() * 1000)
        seconds = sum(candidate.measurement.seconds.values()) if candidate.measurement else 0.0
        tags = {
            PARENT: self.run_id,
            "paretorch.role": "trial",
            "paretorch.number": str(candidate.number),
            "paretorch.state": candidate.state,
            "paretorch.reason": candidate.reason[:500],
            "paretorch.label": candidate.label[:500],
            "paretorch.recipe_key": candidate.recipe.key,
            "paretorch.what": candidate.recipe.describe()[:500],
            "paretorch.front": str(on_front).lower(),
        }
        run = call(
            client.create_run,
            self.experiment_id,
            # Set back, so that MLflow's column of durations tells how long the candidate took.
            start_time=now - round(1000 * seconds),
            tags={name: value for name, value in tags.items() if value},
            run_name=f"trial-{candidate.number:04d}" + (f" {candidate.label}"[:200] if candidate.label else ""),
        )
        run_id, metrics = run.info.run_id, accepted(_numbers(candidate))
        params = {name: str(value)[:PARAM_LENGTH] for name, value in accepted(picks).items()}
        self.store.log(run_id, metrics=metrics, params=params, now=now)
        self.store.put(run.info, "recipe.json", json.dumps(candidate.recipe.to_dict(), indent=1))
        call(client.set_terminated, run_id, "FAILED" if candidate.state == FAILED else "FINISHED", now)
        return _Child(run_id, metrics, tags)

    def sync(
        self,
        candidates: Sequence[Candidate],
        hypervolumes: Sequence[float],
        picks_of: Callable[[Candidate], Mapping[str, object]],
    ) -> int:
        """Make the child runs those of the candidates: after `start` of a resumed study.

        Runs left RUNNING by a kill, duplicates and runs that fit no candidate are removed; candidates without a run are
        logged. `hypervolumes` has a value per candidate. Returns how many candidates' runs had to be corrected.
        """
        known = {candidate.number: candidate for candidate in candidates}
        self.store.remove_parts(self._run)
        self._children.clear()
        corrected: set[str] = set()
        for run in self._search(f"tags.`{PARENT}` = '{self.run_id}'"):
            text = run.data.tags.get("paretorch.number", "")
            candidate = known.get(int(text)) if text.isdigit() else None
            if candidate is None or candidate.number in self._children or not _is_complete(run, candidate):
                self._delete_child(run)
                corrected.add(text)
                continue
            self._children[candidate.number] = _Child(run.info.run_id, run.data.metrics, run.data.tags)
        history = self.store.call(self.store.client.get_metric_history, self.run_id, "hypervolume")
        self._steps = {entry.step for entry in history}
        for candidate, volume in zip(candidates, hypervolumes, strict=True):
            if candidate.number not in self._children:
                corrected.add(str(candidate.number))
            self.log(candidate, volume, False, picks_of(candidate))
        return len(corrected)

    def _delete_child(self, run: Run) -> None:
        if run.info.status in _UNFINISHED:  # a deleted run keeps its status, and this one runs no more
            self.store.call(self.store.client.set_terminated, run.info.run_id, "KILLED")
            self.store.remove_parts(run.info)
        self.store.call(self.store.client.delete_run, run.info.run_id)

    def finish(
        self, front: Front, report: Path, note: str, status: str = "FINISHED", more: Mapping[str, float] | None = None
    ) -> None:
        """Write the study's result onto the parent run and end it.

        Children get the finalists' test metrics, whether they are on the final front, and as tags the verdicts on
        members (`Front.verdicts`).

        Args:
            front: of the whole study.
            report: the folder with the files of `write_report`; those that are there are uploaded.
            note: markdown for the run's description.
            status: of the run from now on.
            more: further metrics of the run.
        """
        store = self.store
        for name in FILES:
            if (path := Path(report) / name).is_file():
                store.put(self._run, name, path.read_bytes())
        store.put_table(self._run, "front_table.json", rows(front))
        _put_sensitivity(store, self._run, self.directory)
        _put_targets(store, self._run, self.directory)
        self._finish_children(front)

        states = [candidate.state for candidate in front.candidates]
        numbers = {f"baseline.{name}": metric.value for name, metric in front.baseline.metrics.items()}
        numbers |= {f"candidates.{state}": float(states.count(state)) for state in sorted(set(states))}
        numbers |= {"front.size": float(len(front.members)), **(more or {})}
        there = store.call(store.client.get_run, self.run_id).data.metrics
        new = {name: value for name, value in accepted(numbers).items() if there.get(name) != value}
        store.log(self.run_id, metrics=new, tags={NOTE: description(note)})
        saved_view = f"mlflow.sharedViewState.{charts.view_key(self.run_id)}"
        store.call(store.client.set_experiment_tag, self.experiment_id, saved_view, charts.view(front, self.run_id))
        store.call(store.client.set_terminated, self.run_id, status)

    def _finish_children(self, front: Front) -> None:
        members = {member.number for member in front.members}
        for candidate in front.candidates:
            child = self._children.get(candidate.number)
            if child is None:
                continue
            tests = accepted({f"test_{name}": value for name, value in flat(candidate.test).items()})
            tests = {name: value for name, value in tests.items() if child.metrics.get(name) != value}
            tags = _verdicts(front, candidate) if candidate.number in members else _NO_MEMBER
            tags = {name: value for name, value in tags.items() if child.tags.get(name, "false") != value}
            if tests or tags:
                self.store.log(child.run_id, metrics=tests, tags=tags)
                child.metrics |= tests
                child.tags |= tags


def add_sensitivity(directory: Path, uri: str | None = None) -> bool:
    """Put the sensitivity files of a study's folder into its MLflow run; False without a run.

    `uri` is the store that the configuration names. Nothing else in the store is touched. Raises `StudyError` when the
    store cannot be used or the run is no longer there.
    """
    return _add(directory, uri, _put_sensitivity)


def add_targets(directory: Path, uri: str | None = None) -> bool:
    """Put what `retarget` wrote into a study's folder into its MLflow run; like `add_sensitivity`."""
    return _add(directory, uri, _put_targets)


def _add(directory: Path, uri: str | None, put: Callable[[Store, RunInfo, Path], None]) -> bool:
    logged = study_run(directory, uri)
    if logged is None:
        return False
    store, run = logged
    put(store, run.info, Path(directory).resolve())
    return True


def _put_sensitivity(store: Store, run: RunInfo, directory: Path) -> None:
    """Write the sensitivity files of a study's folder, when it has them, and the heat map as a table."""
    source = directory / "sensitivity.json"
    if not source.is_file():
        return
    from ...runners.sensitivity import Sensitivity
    from ..report.heatmap import FILES, heat_rows

    for name in FILES:
        if (path := directory / name).is_file():
            store.put(run, f"sensitivity/{name}", path.read_bytes())
    try:
        sensitivity = Sensitivity.from_json(source.read_text(errors="replace"))
    except ArtifactError:  # of a newer version, or edited by hand: the files are shown as they are
        return
    store.put_table(run, "sensitivity/sensitivity_table.json", heat_rows(sensitivity), digits=3)


def _put_targets(store: Store, run: RunInfo, directory: Path) -> None:
    """Write what was measured of a study's front on other targets, each file as it is and as a table."""
    from ..retarget import table_rows

    folder = StudyFolder(directory).targets
    for path in sorted(folder.glob("*.json")):
        text = path.read_text(errors="replace")
        store.put(run, f"{folder.name}/{path.name}", text)
        try:
            data = table_rows(json.loads(text))
        except (ValueError, KeyError, TypeError):  # of a newer version, or edited by hand: the file is shown as it is
            continue
        store.put_table(run, f"{folder.name}/{path.stem}_table.json", data)


def _is_complete(run: Run, candidate: Candidate) -> bool:
    """Whether a child run has ended and is of this candidate."""
    tags = run.data.tags
    same = (tags.get("paretorch.recipe_key"), tags.get("paretorch.state")) == (candidate.recipe.key, candidate.state)
    return same and run.info.status not in _UNFINISHED


def _numbers(candidate: Candidate) -> dict[str, float]:
    """All metrics of a candidate, by their MLflow names."""
    out: dict[str, float] = {}
    if candidate.measurement:
        out |= flat(candidate.measurement.metrics)
        out.update({f"seconds.{phase}": value for phase, value in candidate.measurement.seconds.items()})
    out.update({f"excess.{_limit_name(text)}": value for text, value in candidate.excess.items()})
    return out


def _limit_name(text: str) -> str:
    """A limit's text in the characters of a metric name: `size_bytes at most 25 percent`."""
    return text.replace("<=", "at most").replace(">=", "at least").replace("%", " percent").replace("  ", " ")


def _verdicts(front: Front, member: Candidate) -> dict[str, str]:
    """The tags of a member of the front: `speed`, `cluster`, `recommended` (the one of its cluster), `parity`."""
    said = front.verdicts(member)
    tags = {f"paretorch.{name}": str(value)[:TAG_LENGTH] for name, value in said.items()}
    return tags | {
        "paretorch.front": "true",
        "paretorch.recommended": str(said.get("cluster") == member.number).lower(),
    }
