"""`study.json`: what a study writes when it begins and compares itself with when it is resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import StudyError
from ..objectives.cost import FileOverhead
from ..objectives.measurement import Measurement
from ..objectives.objective import Budget, Objective
from ..results.folder import VERSION, StudyFolder
from ..results.journal import locked
from ..runners.evaluate import EvaluationPlan
from ..runners.files.atomic import write_atomic
from ..runners.files.candidates import OWNED_FILES
from ..runners.runner import TaskFacts
from ..runners.settings import MeasurementSettings
from ..runners.targets.catalog import DEFAULT
from ..spaces.plain import plain
from ..spaces.space import Space
from .schedule import Guess

_PARTIAL = re.compile(r"\..*\.\d+\.(partial|part)")  # left behind by a process that was killed while writing


@dataclass(frozen=True)
class Beginning:
    """What was measured before the first trial and holds for the whole study.

    Args:
        baseline: The original model's numbers.
        overheads: For each network by name, the bytes of its files besides its layers' tensors; "" is the original
            model.
        plan: How candidates are evaluated.
        guess: How long a trial and its phases take.
        ladder: Whether the choices of recovery are rungs.
    """

    baseline: Measurement
    overheads: Mapping[str, FileOverhead]
    plan: EvaluationPlan
    guess: Guess
    ladder: bool


@dataclass(frozen=True)
class Asked:
    """The request that a study carries out.

    Args:
        task: The name of the task.
        objectives: The objectives.
        budget: The limits.
        sampler: The name of the sampler.
        rungs: As in `Study`.
        settings: How files are measured.
    """

    task: str
    objectives: tuple[Objective, ...]
    budget: Budget
    sampler: str
    rungs: bool | None
    settings: MeasurementSettings

    def snapshot(self, facts: TaskFacts, space: Space) -> dict[str, Any]:
        """What must not change when a study is resumed: all that decides which recipes are tried and how they rank."""
        # Pairs follow from the network, so they are left out; studies from before there were pairs can be resumed.
        bare = replace(facts.structure, students=(), pairs=(), unpaired=())
        structure = json.dumps(plain(bare), sort_keys=True, default=list)
        students = {s.factory: facts.student_weights[s.factory] for s in space.students if s}
        measure = {name: getattr(self.settings, name) for name in ("threads", "batch", "seconds", "calibration_images")}
        target = self.settings.target
        snapshot = {
            "task": self.task,
            "network": hashlib.sha256(structure.encode()).hexdigest()[:16],
            "weights": facts.weights,
            "data": {split: facts.samples[split] for split in ("train", "validation")},
            "space": plain(space),
            "objectives": [f"{'max' if o.maximize else 'min'} {o.metric}" for o in self.objectives],
            "budget": [limit.text for limit in self.budget.limits],
            "sampler": self.sampler,
            "rungs": self.rungs,
            "seed": self.settings.seed,
            **({"students": students} if students else {}),
            # The default target is not written: studies from before there were other targets do not name one.
            "measure": ({} if target == DEFAULT else {"target": target}) | measure,
        }
        stored: dict[str, Any] = json.loads(json.dumps(snapshot))  # tuples become lists, as in a file that was read
        return stored


def write_beginning(
    folder: StudyFolder,
    beginning: Beginning,
    asked: Asked,
    snapshot: Mapping[str, Any],
    environment: Mapping[str, str],
    config: Mapping[str, Any] | None,
    config_file: Path | None,
) -> None:
    """Write `study.json`; from then on the study can be resumed."""
    record = {
        "version": VERSION,
        "snapshot": snapshot,
        "baseline": beginning.baseline.to_dict(),
        "overhead": asdict(beginning.overheads[""]),
        "overheads": {name: asdict(overhead) for name, overhead in beginning.overheads.items() if name},
        "way": asdict(beginning.plan),
        "seconds": asdict(beginning.guess),
        "rungs": beginning.ladder,
        "environment": environment,
        "objectives": [asdict(o) for o in asked.objectives],
        "config": config,
        "config_file": str(config_file) if config_file else None,
    }
    write_atomic(folder.about, json.dumps(record, indent=1))


def read_beginning(folder: StudyFolder, snapshot: Mapping[str, Any]) -> Beginning:
    """Read what `write_beginning` wrote.

    Raises:
        StudyError: The study was begun with another snapshot, that is, another configuration.
    """
    stored = folder.read_about()
    changed = [key for key in snapshot if stored["snapshot"].get(key) != snapshot[key]]
    if changed:
        raise StudyError(_changed(folder.root, changed, stored["snapshot"], snapshot))
    overheads = {"": stored["overhead"], **stored.get("overheads", {})}
    return Beginning(
        Measurement.from_dict(stored["baseline"]),
        {name: FileOverhead(**coefficients) for name, coefficients in overheads.items()},
        EvaluationPlan(**stored["way"]),
        Guess(**stored["seconds"]),
        bool(stored["rungs"]),
    )


def prepare_folder(folder: StudyFolder) -> None:
    """Create what is missing in a study's folder, and remove partial files that a killed process left."""
    if folder.journal.exists() and not folder.about.exists():
        raise StudyError(
            f"{folder.root} holds trials.jsonl without the study.json they belong to; restore that file, or name "
            "another folder with --output DIR or the key `output`"
        )
    folder.candidates.directory.mkdir(exist_ok=True)
    for directory in folder.written_into:
        for path in directory.glob(".*"):
            if _PARTIAL.fullmatch(path.name):
                path.unlink()


@contextlib.contextmanager
def held(folder: StudyFolder) -> Iterator[None]:
    """Lock a study's folder for this process; a new folder in which no study has begun is removed at the end.

    Raises:
        StudyError: The folder cannot be written, or another process holds its lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.root))
        except OSError as error:
            raise StudyError(
                f"the study's folder {folder.root} cannot be written: {error.strerror or error}; put that right, or "
                "name another one with --output DIR or the key `output`"
            ) from error
        try:
            yield
        finally:
            _remove_attempt(folder)


def _remove_attempt(folder: StudyFolder) -> None:
    """Remove what an attempt to begin a study left in its folder, and the folder if nothing else is in it."""
    if folder.about.exists() or folder.journal.exists():
        return
    with contextlib.suppress(OSError):  # what cannot be removed does no harm: the next study overwrites it
        candidates = folder.candidates.directory
        for path in candidates.glob("*"):
            if OWNED_FILES.fullmatch(path.name) or _PARTIAL.fullmatch(path.name):
                path.unlink()
        for path in (folder.baseline, folder.lock):
            path.unlink(missing_ok=True)
        for directory in (candidates, folder.root):
            directory.rmdir()


def _changed(directory: Path, changed: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    def short(value: object) -> str:
        text = json.dumps(value)
        return text if len(text) <= 80 else text[:77] + "..."

    lines = [f"  - {key}: {short(before.get(key))} then, {short(now.get(key))} now" for key in changed]
    if changed == ["weights"]:
        lines[0] += (
            "; a network that is trained anew at every start needs a seed and one thread, or its weights in a file"
        )
    return "\n".join(
        [
            f"{directory} holds a study of another configuration:",
            *lines,
            "Undo the change to go on with it, or search anew under another name or --output.",
        ]
    )
