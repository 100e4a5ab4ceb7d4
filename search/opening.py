"""The beginning of a study: what is measured once, before the first trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..errors import Diverged, TaskError
from ..objectives.measurement import Measurement
from ..results.folder import StudyFolder
from ..runners.runner import MeasureBaseline, Runner, TimeParity, TimeTraining, TrainStudent, TunePlan
from ..spaces.rules import Axis
from ..spaces.space import Space
from .listener import Listener
from .preflight import Preflight
from .resume import Asked, Beginning
from .schedule import Guess
from .suggest import OURS


def measure_baseline(runner: Runner, task: str, listener: Listener) -> tuple[Measurement, bytes]:
    """Measure the original model.

    Returns:
        Its numbers and its packed file.

    Raises:
        TaskError: It cannot be measured.
    """
    listener.phase("measuring the baseline")
    try:
        return runner.submit(MeasureBaseline()).result()
    except Diverged as error:  # a valid result for a candidate, but an error in the task for the original model
        raise TaskError(
            f"task {task!r}: the untouched network cannot be measured: {error}. Every candidate is compared "
            "with it, so check the metric, the validation data and the checkpoint"
        ) from error


def begin(
    runner: Runner,
    asked: Asked,
    space: Space,
    preflight: Preflight,
    packed: bytes,
    folder: StudyFolder,
    listener: Listener,
) -> Beginning:
    """Decide how candidates are evaluated and whether rungs are worthwhile, and measure how long trials take."""
    listener.phase("finding the fastest way to evaluate")
    works = preflight.smallest.steps and preflight.metric in preflight.smallest_measured.metrics
    smallest = folder.candidates.packed(preflight.smallest).read_bytes() if works else packed
    plan, gain = runner.submit(TunePlan((packed, smallest) if works else (packed,))).result()
    faster = f", {gain:.1f} times as fast as one batch on all threads, with the same predictions" if gain > 1 else ""
    listener.say(f"evaluates {plan.describe()}{faster}")
    laps = preflight.smallest_measured.seconds
    parity, epoch = runner.submit(TimeParity(smallest)).result(), 0.0
    if any(choice and choice.epochs for choice in space.recovery):
        listener.phase("timing a few steps of training")
        epoch = runner.submit(TimeTraining()).result()
    guess = Guess(math.fsum(laps.values()), laps.get("evaluate", 0.0), epoch, parity)
    wanted = asked.rungs or (asked.rungs is None and asked.sampler == OURS and guess.pays(space))
    ladder = bool(wanted) and space.as_ladder().ladder
    return Beginning(preflight.baseline, preflight.overheads, plan, guess, ladder)


def train_students(
    runner: Runner, space: Space, axes: Sequence[Axis], beginning: Beginning, listener: Listener
) -> Beginning:
    """Train the students that come untrained, and measure which share of their trained weights few bits round to zero.

    They are trained once, before the first trial. Otherwise the first trial of each student would include its training,
    and the expected time of a trial would be many times too long.

    Raises:
        TaskError: The training of a student diverged.
    """
    overheads = dict(beginning.overheads)
    for student in filter(None, space.students):
        name = student.factory
        own = tuple(axis for axis in axes if axis.student == name)
        try:
            shares = runner.submit(TrainStudent(student, own), listener.phase).result()
        except Diverged as error:  # no candidate of this student could be measured
            raise TaskError(
                f"student {name!r} cannot be taught: {error}; set a lower learning_rate than "
                f"{student.learning_rate:g} in space.students, or leave it out"
            ) from error
        overheads[name] = replace(overheads[name], nonzero=shares)
    return replace(beginning, overheads=overheads)
