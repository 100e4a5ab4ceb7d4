"""The seam between a search and the work: a request goes in, a future of its result comes out.

Requests and results are plain, picklable data, so that one seam serves the calling process, worker processes and a
cluster. A search knows of a runner only `submit` and `close`; it sets nothing on it and reads nothing from it. What a
runner needs for a trial travels in the request: the recipe, the limits that end it early, the scores of its rivals.

Every kind of request says with its type parameter what its result is, so that a type checker knows the result of
`submit` (one `Outcome` for all kinds, as first designed, would have been a union that every caller has to take apart).

A trial that fails is a result: the future of a `RunTrial` gives an `Outcome` with a `Failure`. The future of any other
request raises what went wrong. Errors that are no `TrialError` are raised by the future of a trial, too: they stop a
study.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import OverBudget, Stopped, TrialError
from ..objectives.cost import FileOverhead
from ..objectives.excess import check_budget
from ..objectives.measurement import Estimate, Measurement
from ..objectives.objective import Budget, Objective
from ..spaces.recipe import Recipe
from ..spaces.rules import Axis
from ..spaces.structure import Structure
from ..spaces.techniques.student import Student
from .evaluate import EvaluationPlan, Watch
from .progress import Progress, silent
from .racing import Rival, race

Result = TypeVar("Result")
OVER_BUDGET: Literal["over_budget"] = "over_budget"
STOPPED: Literal["stopped"] = "stopped"
FAILED: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Request(Generic[Result]):
    """Something a runner is asked for; the base of all requests."""


@dataclass(frozen=True)
class TaskFacts:
    """What a search may know of a task, once and for all.

    Args:
        structure: Layers, groups, blocks, and those of the students.
        weights: Hash of the network's weights.
        student_weights: By name the hash of the weights that a student begins with.
        samples: By split the number of samples; a split that is missing is not in it.
        criteria: Names of the user's functions that choose zeros.
        environment: Processor and versions, see `runners.environment`.
        exact_products: Whether the target adds up products of 8 bits exactly on this processor.
    """

    structure: Structure
    weights: str
    student_weights: Mapping[str, str]
    samples: Mapping[str, int]
    criteria: tuple[str, ...]
    environment: Mapping[str, str]
    exact_products: bool = True


@dataclass(frozen=True)
class Inspect(Request[TaskFacts]):
    """Load and trace the task's network."""


@dataclass(frozen=True)
class MeasureBaseline(Request[tuple[Measurement, bytes]]):
    """Export, pack and measure the original network; the measurement and the packed file."""


@dataclass(frozen=True)
class RestoreBaseline(Request[None]):
    """Take a packed baseline that was measured before as what latencies are relative to.

    Args:
        packed: The packed file.
        latency_ms: What it took when it was measured.
        plan: How candidates are evaluated; the runner's own when None.
    """

    packed: bytes
    latency_ms: float
    plan: EvaluationPlan | None = None


@dataclass(frozen=True)
class MeasureOverhead(Request[FileOverhead]):
    """The bytes of packed files around the layers' tensors; see `runners.compression.overhead`.

    Args:
        axes: The axes of the space that decide about this network.
        baseline_size: Bytes of the packed baseline, where they are known.
        student: The network whose files they are, "" for the original.
    """

    axes: tuple[Axis, ...]
    baseline_size: int | None = None
    student: str = ""


@dataclass(frozen=True)
class TrainStudent(Request[Mapping[str, Mapping[str, float]]]):
    """Train a student unless it comes trained or was trained before.

    The result is what few bits round to zero in it, as `FileOverhead.nonzero`. Raises `Diverged`.
    """

    student: Student
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class TunePlan(Request[tuple[EvaluationPlan, float]]):
    """Find the fastest way to evaluate such packed files, and use it from now on; gives it and its gain."""

    files: tuple[bytes, ...]


@dataclass(frozen=True)
class TimeTraining(Request[float]):
    """About how many seconds an epoch of training takes."""


@dataclass(frozen=True)
class TimeParity(Request[float]):
    """About how many seconds the comparison of a packed file with its simulation takes."""

    packed: bytes


@dataclass(frozen=True)
class Failure:
    """Why a trial gave no candidate in full.

    Args:
        state: `over_budget`, `stopped` or `failed`.
        reason: In words.
        excess: By limit, by what share of the limit it is exceeded, where that is known.
        error: Of a trial that failed, the name of its `TrialError`.
    """

    state: Literal["over_budget", "stopped", "failed"]
    reason: str
    excess: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Args:
        measurement: What was measured; of a trial that was stopped, as far as it came.
        failure: None when the trial came to its end.
        seconds: How long the runner took.
    """

    measurement: Measurement | None
    failure: Failure | None
    seconds: float


@dataclass(frozen=True)
class RunTrial(Request[Outcome]):
    """Carry out a recipe, keep its packed file, and measure it.

    Args:
        recipe: What to do.
        budget: Limits on costs; a recipe that trains is timed before training, and ends there when it exceeds one.
            None to measure whatever it costs and whatever others are worth.
        baseline: The original network's numbers, which limits are relative to.
        time_first: Whether latency is among the limits, so that timing before training is worth it.
        rivals: Whom the candidate must not be significantly worse than, to be evaluated to its end.
        cost_objectives: The objectives beside the task's metric, in the order of `Rival.losses`.
        keep_trained: Whether a later trial may continue from the trained weights.
        seconds: Of timing; as the settings say when None.
    """

    recipe: Recipe
    budget: Budget | None = None
    baseline: Mapping[str, float] = field(default_factory=dict)
    time_first: bool = False
    rivals: tuple[Rival, ...] = ()
    cost_objectives: tuple[Objective, ...] = ()
    keep_trained: bool = False
    seconds: float | None = None

    def check_costs(self, estimates: Mapping[str, Estimate], metric: str) -> None:
        """Raises `OverBudget` when costs that were measured before training exceed a limit."""
        if self.budget is not None:
            values = {name: estimate.value for name, estimate in estimates.items() if name != metric}
            check_budget(self.budget, values, self.baseline)

    def watch(self, estimates: Mapping[str, Estimate], metric: str) -> Watch | None:
        """What ends an evaluation early; `estimates` are the candidate's costs by the time it is first asked."""
        if not self.rivals:
            return None

        def in_its_class() -> list[Rival]:
            objectives = self.cost_objectives
            mine = [o.loss(estimates[o.metric].value, self.baseline[o.metric]) for o in objectives]
            return [r for r in self.rivals if all(a <= b for a, b in zip(r.losses, mine, strict=bool(r.losses)))]

        return race(in_its_class, metric)


@dataclass(frozen=True)
class BuildFile(Request[bytes]):
    """The packed file of a recipe, without measuring it; raises `TrialError`."""

    recipe: Recipe


@dataclass(frozen=True)
class PredictValidation(Request[NDArray[np.float32]]):
    """The outputs of a packed file for all validation samples, in the split's order."""

    packed: bytes


@dataclass(frozen=True)
class ScoreAverages(Request[Sequence[float]]):
    """The task's metric on the validation split of the mean of some outputs.

    Args:
        outputs: What each network gives for all validation samples.
        combinations: Of each ensemble the places of its networks in `outputs`.
    """

    outputs: tuple[NDArray[np.float32], ...]
    combinations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MeasureFinalist(Request[tuple[NDArray[np.float64], Estimate | None]]):
    """A packed file on the test split, read back by a clean process; see `runners.timing.clean_process`.

    The result is the metric on every test sample, and the latency as a share of that of `against`.

    Args:
        path: The packed file.
        against: The packed baseline; None to measure no latency.
    """

    path: Path
    against: Path | None = None


@dataclass(frozen=True)
class CompareSimulation(Request[Mapping[str, Estimate]]):
    """A packed file beside the simulation of its graph, on inputs of the test split (of validation where there is
    none).

    Args:
        packed: The packed file.
        seconds: After which fewer inputs than usual will do.
    """

    packed: bytes
    seconds: float


@dataclass(frozen=True)
class Sample:
    """What a network gives for some validation inputs: outputs, the metric of each, and the bytes of its file."""

    outputs: NDArray[np.float32]
    scores: NDArray[np.float64]
    size_bytes: int


@dataclass(frozen=True)
class EvaluateSample(Request[Sample]):
    """Build a recipe and evaluate it on some validation samples, always the same ones.

    Args:
        recipe: What to build; None for the original network in torch.
        count: How many samples.
    """

    recipe: Recipe | None
    count: int


class Runner(Protocol):
    """Whatever carries out the requests of one task."""

    def submit(self, request: Request[Result], progress: Progress = silent) -> Future[Result]:
        """The future result of a request; `progress` hears in words what is being done."""

    def close(self) -> None:
        """End what was started; a runner that is closed is asked for nothing more."""


def done(work: Callable[[], Result]) -> Future[Result]:
    """The finished future of work that is done at once, in this process."""
    future: Future[Result] = Future()
    try:
        future.set_result(work())
    except Exception as error:  # it is the future's, whatever it is; Ctrl-C comes through
        future.set_exception(error)
    return future


def outcome_of(
    measure: Callable[[dict[str, Estimate]], Measurement], metric: str, environment: Mapping[str, str]
) -> Outcome:
    """Carry out a trial and turn what it raises into a typed failure.

    Args:
        measure: Gives the measurement; writes into the mapping what is known on the way.
        metric: Name of the task's metric.
        environment: Recorded with a trial that was stopped.
    """
    known: dict[str, Estimate] = {}
    begin = time.perf_counter()
    try:
        measurement = measure(known)
    except OverBudget as refusal:
        failure = Failure(OVER_BUDGET, f"refused: {refusal}", refusal.excess)
        return Outcome(None, failure, time.perf_counter() - begin)
    except Stopped as stop:
        seconds = time.perf_counter() - begin
        estimates = known | {metric: stop.estimate}
        part = Measurement(estimates, {"total": seconds}, dict(environment), f"{stop.estimate.n} images")
        return Outcome(part, Failure(STOPPED, str(stop)), seconds)
    except TrialError as error:
        name = type(error).__name__
        failure = Failure(FAILED, f"{name}: {error}", error=name)
        return Outcome(None, failure, time.perf_counter() - begin)
    return Outcome(measurement, None, time.perf_counter() - begin)
