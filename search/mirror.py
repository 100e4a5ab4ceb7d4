"""The MLflow mirror of a running study. A failure of the store never stops the study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StudyError
from ..results.candidate import Candidate
from ..results.folder import StudyFolder
from ..results.front import Front
from ..spaces.rules import Axis
from ..spaces.techniques.recover import how
from .listener import Listener
from .resume import Asked

if TYPE_CHECKING:
    from ..results.tracking.tracker import Tracker


class Mirror:
    """Logs every candidate to MLflow as it finishes, and catches up after a failure of the store.

    Args:
        folder: The study's folder.
        axes: The axes of the space, to describe choices.
        listener: Receives warnings.
    """

    def __init__(self, folder: StudyFolder, axes: Sequence[Axis], listener: Listener) -> None:
        self.folder, self.listener = folder, listener
        self.tracker: Tracker | None = None
        self.behind = False  # whether MLflow has missed a candidate
        self._axes = {axis.name: axis for axis in axes}

    def start(
        self,
        front: Front,
        uri: str | bool | None,
        experiment: str | None,
        params: Mapping[str, str],
        texts: Mapping[str, str],
        environment: Mapping[str, str],
    ) -> None:
        """Open the store and bring it up to date; without effect if `uri` is False.

        Raises:
            StudyError: The store cannot be used.
        """
        if uri is False:
            return
        from ..results.tracking.tracker import Tracker  # MLflow takes seconds to import

        self.listener.phase("opening the MLflow store")
        root = self.folder.root
        self.tracker = Tracker(root.name, root, uri if isinstance(uri, str) else None, experiment)
        self.tracker.start(dict(params), dict(texts), dict(environment))
        if added := self._sync(self.tracker, front):
            self.listener.say(f"brought up to date in MLflow: {added} trial{'s' * (added != 1)}")

    def log(self, candidate: Candidate, front: Front) -> None:
        """Log a candidate that has just finished; `front` includes it."""
        if not self.tracker or self.behind:
            return
        members = {member.number for member in front.members}
        choices = self._choices(candidate)
        try:
            self.tracker.log(candidate, front.hypervolume(), candidate.number in members, choices)
        except StudyError as error:
            self.behind = True
            self.listener.say(
                f"warning: {error}. The search goes on without MLflow, which is brought up to date at its end"
            )

    def finish(self, front: Front, report: Path, note: str, status: str, taus: Mapping[str, float]) -> None:
        """End the run."""
        if not (self.tracker and self.tracker.run_id):
            return
        self.listener.phase("closing the MLflow run")
        try:
            if self.behind:
                self._sync(self.tracker, front)
            self.tracker.finish(front, report, note, status, dict(taus))
        except StudyError as error:
            self.listener.say(f"warning: {error}")

    def fail(self, front: Front, report: Path, note: str) -> None:
        """End the run as failed."""
        if self.tracker and self.tracker.run_id:
            self.tracker.finish(front, report, note, "FAILED")

    def _sync(self, tracker: Tracker, front: Front) -> int:
        volumes = [front.hypervolume(c.number + 1) for c in front.candidates]
        return tracker.sync(list(front.candidates), volumes, self._choices)

    def _choices(self, candidate: Candidate) -> dict[str, object]:
        """The choices by axis in readable form: `weight_bits/fc: 4`."""
        choices: dict[str, object] = {}
        for name, index in (candidate.picks or {}).items():
            axis = self._axes[name]
            if axis.student in (candidate.recipe.factory, None):
                choices[name] = _readable(axis.kind, axis.choices[index])
        return choices


def _readable(kind: str, choice: Any) -> object:
    if kind == "student":
        return choice.factory if choice else "teacher"
    if kind == "recovery":
        return (
            "none"
            if choice is None
            else choice.method + (f" {choice.epochs:g}" if choice.epochs else "") + how([choice])
        )
    return choice


def mirrored_texts(folder: StudyFolder, config_text: str, config: Mapping[str, Any] | None) -> dict[str, str]:
    """The texts that are logged: the configuration as it was written, and with every default filled in."""
    texts = {"study.json": folder.about.read_text()}
    if config_text:
        texts["config.yaml"] = config_text
    if config is not None:
        texts["config_resolved.json"] = json.dumps(config, indent=1)
    return texts


def mirrored_params(asked: Asked, dimensions: int, target: str) -> dict[str, str]:
    """The parameters of a study's run."""
    return {
        "objectives": ", ".join(f"{'max' if o.maximize else 'min'} {o.metric}" for o in asked.objectives),
        "budget": ", ".join(limit.text for limit in asked.budget.limits) or "none",
        "sampler": asked.sampler,
        "seed": str(asked.settings.seed),
        "task": asked.task,
        "target": target,
        "dimensions": str(dimensions),
    }
