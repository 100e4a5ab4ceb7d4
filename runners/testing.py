"""For authors of runners and of searches: a runner whose numbers a function makes up, and the contract of every runner.

With `FunctionRunner` a search runs in milliseconds, without a network, data or files that compute anything; what stands
around the runner (the journal, the sampler, the rungs, the report) is the real thing. `check_runner` needs no pytest.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError, RecipeError
from ..objectives.cost import FileOverhead, macs
from ..objectives.measurement import Estimate, Measurement
from ..objectives.objective import Budget
from ..spaces.recipe import Recipe
from ..spaces.structure import Structure
from ..spaces.techniques.quantize import Quantize
from ..spaces.techniques.recover import Recover
from .compression.fits import check_fits
from .evaluate import EvaluationPlan
from .files.candidates import CandidateFiles
from .progress import Progress, silent
from .runner import (
    BuildFile,
    CompareSimulation,
    EvaluateSample,
    Inspect,
    MeasureBaseline,
    MeasureFinalist,
    MeasureOverhead,
    Outcome,
    PredictValidation,
    Request,
    RestoreBaseline,
    Result,
    Runner,
    RunTrial,
    Sample,
    ScoreAverages,
    TaskFacts,
    TimeParity,
    TimeTraining,
    TrainStudent,
    TunePlan,
    done,
    outcome_of,
)

# Results that are the same for everybody.
_FIXED: dict[type, object] = {
    TrainStudent: {},
    TunePlan: (EvaluationPlan(), 1.0),
    TimeParity: 0.0,
    RestoreBaseline: None,
}
# The numbers of a recipe, by metric; may raise what a trial raises.
Measure = Callable[[Recipe], Mapping[str, Estimate]]


class FunctionRunner:
    """A runner whose numbers a function makes up.

        >>> from paretorch.spaces.structure import Layer
        >>> structure = Structure((Layer("fc", "linear", (4, 8), 32),))
        >>> numbers = {"accuracy": Estimate.rate(9, 10), "size_bytes": Estimate.exact(40)}
        >>> runner = FunctionRunner(structure, lambda recipe: numbers)
        >>> runner.submit(RunTrial(Recipe((Quantize("fc", 4),)))).result().measurement.value("accuracy")
        0.9

    Args:
        structure: Of the network that there is not.
        measure: The numbers of a recipe; `macs` is added.
        directory: Where the file of each recipe, its key, is written; nowhere when None.
        metric: Name of the task's metric.
        samples: By split the number of samples.
        overhead: What the preflight finds.
        seconds_per_epoch: What timing a few steps of training finds.
        finalist: The metric on every test sample, and the latency as a share of the baseline's, of a file.
        requests: Is given all requests; a list of its own when None.
        facts: What `Inspect` gives in place of what is made up here.
    """

    def __init__(
        self,
        structure: Structure,
        measure: Measure,
        directory: Path | None = None,
        *,
        metric: str = "accuracy",
        samples: Mapping[str, int] | None = None,
        overhead: FileOverhead | None = None,
        seconds_per_epoch: float = 1.0,
        finalist: Callable[[Path], tuple[NDArray[np.float64], Estimate]] | None = None,
        requests: list[Request[Any]] | None = None,
        facts: TaskFacts | None = None,
    ) -> None:
        self.structure, self.measure, self.metric = structure, measure, metric
        self.files = CandidateFiles(directory) if directory else None
        self.samples = dict(samples or {"train": 128, "validation": 100, "test": 100})
        self.overhead, self.seconds_per_epoch = overhead or FileOverhead(), seconds_per_epoch
        self.finalist = finalist or _finalist
        self.requests = [] if requests is None else requests
        self.facts = facts or TaskFacts(structure, "0" * 16, {}, self.samples, (), {"processor": "made up"})

    @property
    def ran(self) -> list[Recipe]:
        """The recipes of all trials, in their order."""
        return [request.recipe for request in self.requests if isinstance(request, RunTrial)]

    def submit(self, request: Request[Result], progress: Progress = silent) -> Future[Result]:
        """Make the result up; see `runners.runner`."""
        self.requests.append(request)
        return done(lambda: self._do(request, progress))  # type: ignore[arg-type, return-value]  # by kind of request

    def close(self) -> None:
        """Nothing was started."""

    def _do(self, request: Request[Any], progress: Progress) -> object:
        match request:
            case Inspect():
                return self.facts
            case MeasureBaseline():
                return self._measurement(Recipe()), Recipe().key.encode()
            case MeasureOverhead():
                return self.overhead
            case TimeTraining():
                return self.seconds_per_epoch
            case RunTrial():
                return self._trial(request, progress)
            case BuildFile(recipe):
                return self._build(recipe)
            case PredictValidation():
                return np.zeros((self.samples["validation"], 2), np.float32)
            case ScoreAverages(combinations=combinations):
                return [0.5] * len(combinations)
            case MeasureFinalist(path, against):
                scores, ratio = self.finalist(path)
                return scores, ratio if against else None
            case CompareSimulation():
                count = self.samples.get("test", self.samples["validation"])
                rate = Estimate.rate(round(0.9 * count), count)
                equal, same = Estimate.rate(count, count), Estimate(0.0, -0.01, 0.01, count)
                return {"parity_metric": same, "parity_simulated": rate, "parity_agreement": equal}
            case EvaluateSample(recipe, count):
                return Sample(
                    np.zeros((count, 2), np.float32), np.full(count, 0.5), len(self._build(recipe or Recipe()))
                )
            case _:
                if type(request) not in _FIXED:
                    raise NotImplementedError(f"{type(request).__name__} is no request that this runner knows")
                return _FIXED[type(request)]

    def _build(self, recipe: Recipe) -> bytes:
        packed = recipe.key.encode()
        if self.files:
            self.files.packed(recipe).write_bytes(packed)
        return packed

    def _measurement(self, recipe: Recipe) -> Measurement:
        estimates = {"macs": Estimate.exact(macs(self.structure, recipe)), **self.measure(recipe)}
        return Measurement(estimates, {"build": 0.0, "evaluate": 0.0}, dict(self.facts.environment))

    def _trial(self, request: RunTrial, progress: Progress) -> Outcome:
        recipe = request.recipe
        check_fits(recipe, self.structure)

        def measure(known: dict[str, Estimate]) -> Measurement:
            progress("compressing")
            measurement = self._measurement(recipe)
            known.update({name: e for name, e in measurement.metrics.items() if name != self.metric})
            if request.time_first and any(step.epochs for step in recipe.of(Recover)):
                progress("measured before training")
                request.check_costs(known, self.metric)
            progress("evaluating")
            self._build(recipe)
            return measurement

        return outcome_of(measure, self.metric, self.facts.environment)


def recording(make: Callable[..., Runner], requests: list[Request[Any]]) -> Callable[..., Runner]:
    """A factory of the same runners, whose requests are written down in `requests`."""

    class Recording:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.runner = make(*arguments, **named)

        def submit(self, request: Request[Result], progress: Progress = silent) -> Future[Result]:
            requests.append(request)
            return self.runner.submit(request, progress)

        def close(self) -> None:
            self.runner.close()

    return Recording


def _finalist(path: Path) -> tuple[NDArray[np.float64], Estimate]:
    if not path.exists():
        raise ArtifactError(f"{path} is missing")
    return np.repeat([1.0, 0.0], [90, 10]), Estimate(0.5, 0.4, 0.6, 20)


def check_runner(make: Callable[[], Runner]) -> None:
    """Whether a runner keeps the promises that studies rely on; raises `AssertionError` with all that it breaks.

    Args:
        make: Makes a runner of a task with at least one layer, anew at each call. It is closed here.
    """
    runner = make()
    try:
        broken = list(_broken(runner))
    finally:
        runner.close()
    if broken:
        lines = "".join(f"\n  - {promise}" for promise in broken)
        raise AssertionError(f"the runner breaks {len(broken)} of its promises:{lines}")


def _broken(runner: Runner) -> Iterator[str]:
    facts = runner.submit(Inspect()).result()
    layers = facts.structure.layers
    if not layers:
        yield "Inspect: the structure has no layer to compress"
        return
    baseline, packed = runner.submit(MeasureBaseline()).result()
    missing = {"size_bytes", "latency_ms", "macs"} - set(baseline.metrics)
    if missing:
        yield f"MeasureBaseline: the measurement has no {', '.join(sorted(missing))}"
        return
    recipe = Recipe(tuple(Quantize(layer.name, 8) for layer in layers))
    phases: list[str] = []
    outcome = runner.submit(RunTrial(recipe), phases.append).result()
    again = runner.submit(RunTrial(recipe)).result()
    for name, value in {"facts": facts, "outcome": outcome, "baseline": baseline, "packed": packed}.items():
        if not _survives_pickle(value):
            yield f"{name}: it is not plain data that pickle can copy"
    if outcome.measurement is None or again.measurement is None:
        yield f"RunTrial: int8 weights gave no measurement: {(outcome.failure or again.failure)}"
        return
    if not phases or not all(isinstance(phase, str) and phase for phase in phases):
        yield "RunTrial: progress is to hear in words what is being done"
    values, others = (
        {name: e.value for name, e in m.metrics.items() if name != "latency_ms"}
        for m in (outcome.measurement, again.measurement)
    )
    if values != others:
        yield f"RunTrial: equal recipes gave different numbers: {values} and {others}"
    if runner.submit(BuildFile(recipe)).result() != runner.submit(BuildFile(recipe)).result():
        yield "BuildFile: equal recipes gave different files"
    yield from _broken_gates(runner, recipe, baseline.values)


def _broken_gates(runner: Runner, recipe: Recipe, baseline: Mapping[str, float]) -> Iterator[str]:
    trained = Recipe((*recipe.steps, Recover("finetune", epochs=0.01)))
    budget = Budget.parse(["latency_ms <= 1e-9"])
    gated = runner.submit(RunTrial(trained, budget=budget, baseline=baseline, time_first=True)).result()
    if gated.failure is None or gated.failure.state != "over_budget":
        yield f"RunTrial: a recipe that is too slow was not rejected before training, but gave {gated}"
    elif gated.failure.excess.get("latency_ms <= 1e-9", 0.0) <= 0:
        yield "RunTrial: the failure does not say by how much the limit is exceeded"
    try:
        runner.submit(RunTrial(Recipe((Quantize("no such layer", 8),)))).result()
        yield "RunTrial: a recipe of another network was carried out"
    except RecipeError:
        pass


def _survives_pickle(value: object) -> bool:
    try:
        return bool(pickle.loads(pickle.dumps(value)) == value)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
