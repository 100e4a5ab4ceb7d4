"""Carries out the requests of a search on this machine, one after the other, in this process.

A trial compresses, recovers, exports, packs, and measures the packed file: the file is read back, and what runs on the
target is what was read. Equal recipes give equal bytes: everything random is seeded by the recipe.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ExportFailed, TaskError
from ..objectives.cost import FileOverhead, macs
from ..objectives.measurement import Estimate, Measurement
from ..objectives.paired import paired
from ..spaces.recipe import Recipe
from ..spaces.structure import Structure
from ..spaces.techniques.recover import Recover
from .compression.build import Builder
from .compression.library import LayerLibrary
from .compression.overhead import measure_overhead, nonzero_shares
from .environment import environment
from .evaluate import EvaluationPlan, Watch, evaluate, fastest, obvious, predictions, rebatched
from .files import packing
from .files.atomic import write_atomic
from .files.candidates import CandidateFiles
from .files.entropy import zstd_bytes
from .graphs.onnx_export import batch_of
from .graphs.simulate import Simulation, agreement
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
from .settings import PARITY_INPUTS, PARITY_SECONDS, MeasurementSettings
from .targets.catalog import DEFAULT, as_target
from .targets.runtime import sums_are_exact
from .targets.target import Network, Target
from .task import Split, Task, batches, dataset, scores
from .timing.clean_process import CleanProcess, ThisProcess, process_for
from .training.finetune import finetune

# Up to so many weights zstd may take its time. On ResNet-20's 270 thousand level 19 takes 0.2 s of a trial, level 1
# takes 0.01 s and 0.2% to 3% more bytes (12% more at 2 bits and 90% sparsity).
_ZSTD_19 = 1 << 19
_IN_MEMORY = 1 << 30  # bytes of validation images that are kept decoded between trials
_SIMULATED = 4  # inputs on which the time of a simulation is measured


class LocalRunner:
    """Carries out recipes of one task; the files go to a folder, named by the recipe's key.

    Args:
        task: The user's task.
        directory: The folder of the candidates' files.
        settings: How files are measured.
        target: What runs the files, where it has no name that `settings.target` could say.
        library: Where compressed layers are kept; the user's own when None.
        plan: How files are evaluated; found by `TunePlan`, else one batch at a time on all cores.
        other_students: Folder of another runner of the same task, whose trained students are taken over.

    Raises:
        TaskError: The task cannot be used.
    """

    def __init__(
        self,
        task: Task,
        directory: Path,
        settings: MeasurementSettings | None = None,
        *,
        target: Target | None = None,
        library: LayerLibrary | None = None,
        plan: EvaluationPlan | None = None,
        other_students: Path | None = None,
    ) -> None:
        self.task, self.settings = task, settings or MeasurementSettings()
        self.files = CandidateFiles(directory)
        self.target = target or as_target(self.settings.target)
        self.builder = Builder(
            task,
            self.files,
            calibration_images=self.settings.calibration_images,
            seed=self.settings.seed,
            int8_products=self.target.int8_products,
            library=library,
            other_students=CandidateFiles(other_students) if other_students else None,
        )
        weights = sum(layer.params for layer in self.structure.layers)
        self.zstd_level = 19 if weights <= _ZSTD_19 else 1  # one level for a study, or its sizes could not be compared
        self.plan = plan or obvious()
        self.environment = environment(self.target)  # the same for every trial
        self._validation: list[tuple[Tensor, Tensor]] | None = None
        self._baseline: Network | None = None
        self._baseline_ms: float | None = None
        self._process: CleanProcess | ThisProcess | None = None

    # ------------------------------------------------------------------------------------------------ the seam

    def submit(self, request: Request[Result], progress: Progress = silent) -> Future[Result]:
        """Carry a request out at once; see `runners.runner`."""
        act = cast("Callable[[LocalRunner, Request[Result], Progress], Result]", _ACTS[type(request)])
        return done(lambda: act(self, request, progress))

    def close(self) -> None:
        """End the process that measures finalists, if one was started."""
        if self._process is not None:
            self._process.__exit__(None, None, None)
            self._process = None

    # ----------------------------------------------------------------------------------------------- what is known

    @property
    def structure(self) -> Structure:
        return self.builder.structure

    def inspect(self) -> TaskFacts:
        """What a search may know of the task."""
        splits: tuple[Split, ...] = ("train", "validation", "test")
        return TaskFacts(
            structure=self.structure,
            weights=weights_digest(self.builder.model),
            student_weights={name: weights_digest(model) for name, model in self.builder.students.items()},
            samples={s: _count(self.task, s) for s in splits if getattr(self.task, s) is not None},
            criteria=tuple(self.task.criteria),
            environment=self.environment,
            exact_products=sums_are_exact()
            or not (self.target.name == DEFAULT or self.target.milliseconds is not None),
        )

    def validation(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The validation batches, kept in memory when they fit."""
        if self._validation is not None:
            return self._validation
        kept: list[tuple[Tensor, Tensor]] = []
        size = 0
        for x, y in batches(self.task, "validation"):
            size += x.nbytes
            if size > _IN_MEMORY:
                return batches(self.task, "validation")
            kept.append((x, y))
        self._validation = kept
        return kept

    # ----------------------------------------------------------------------------------------------- the baseline

    def baseline(self) -> tuple[Measurement, bytes]:
        """The original network, exported, packed, reloaded and measured; raises `TaskError` when it does not
        survive.
        """
        started = time.perf_counter()
        packed = self.build(Recipe())
        self.use_baseline(packed)
        self._check_export()
        latency = self.target.baseline_latency(
            packing.onnx_bytes(packed), self._batch(), self.settings.seconds, self.settings.threads
        )
        self._baseline_ms = latency.value
        estimates = self._sizes(Recipe(), packed) | {
            "latency_ms": latency,
            self.task.metric_name: self._keep_scores(Recipe(), self.scores(packed)),
        }
        seconds = {"total": time.perf_counter() - started}
        return Measurement(estimates, seconds, self.environment), packed

    def use_baseline(self, packed: bytes, latency_ms: float | None = None) -> None:
        """Take a packed baseline as what latencies are relative to; `latency_ms` is what it took when it was
        measured.
        """
        self._baseline = self.target.load(packing.onnx_bytes(packed), self.settings.threads)
        self._baseline_ms = latency_ms

    def _restore_baseline(self, request: RestoreBaseline) -> None:
        self.use_baseline(request.packed, request.latency_ms)
        self.plan = request.plan or self.plan

    def _check_export(self) -> None:
        assert self._baseline is not None
        x, _ = next(iter(self.validation()))
        with torch.no_grad():
            expected = copy.deepcopy(self.builder.model)(x)
        outputs = next(predictions(self._baseline, [(x, x)]))[0]
        if outputs.shape == expected.shape:
            error = float((outputs - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
            if error <= 1e-2:
                return
            difference = f"its outputs differ by up to {100 * error:.1f}% of the largest"
        else:
            difference = f"its outputs have the shape {tuple(outputs.shape)} instead of {tuple(expected.shape)}"
        raise TaskError(
            f"the exported network does not compute what the torch network does: {difference}; the model may depend "
            "on something that tracing freezes, such as control flow on the input"
        )

    def _batch(self) -> NDArray[Any]:
        return batch_of(next(iter(self.validation()))[0], self.settings.batch)

    # ----------------------------------------------------------------------------------------------- trials

    def build(self, recipe: Recipe, progress: Progress = silent, *, recovery: bool = True) -> bytes:
        """The packed file of a recipe; see `compression.build.Builder.build`."""
        return self.builder.build(recipe, progress, recovery=recovery)

    def path(self, recipe: Recipe) -> Path:
        """Where the packed file of a recipe is."""
        return self.files.packed(recipe)

    def run(
        self,
        recipe: Recipe,
        progress: Progress = silent,
        *,
        known: dict[str, Estimate] | None = None,
        before_training: Callable[[Mapping[str, Estimate]], None] | None = None,
        watch: Watch | None = None,
        keep_trained: bool = False,
        seconds: float | None = None,
    ) -> Measurement:
        """Carry out a recipe, keep its packed file, and measure it.

        Args:
            recipe: What to do.
            progress: Hears what is being done.
            known: Is given the costs as soon as they are measured.
            before_training: Given the costs of a recipe that trains, which is exported and timed once before training,
                since its speed does not depend on the weights; may raise `OverBudget`.
            watch: Given the scores of ever more samples; may raise `Stopped`.
            keep_trained: As in `Builder.build`.
            seconds: Of timing; as the settings say when None.

        Raises:
            TrialError: The trial failed.
        """
        if self._baseline is None:
            raise ValueError("call baseline() or use_baseline() first")
        known = {} if known is None else known
        laps: dict[str, float] = {}
        clock = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            laps[phase] = laps.get(phase, 0.0) + now - clock
            clock = now

        if before_training and any(step.method == "finetune" for step in recipe.of(Recover)):
            preview = self.build(recipe, progress, recovery=False)
            known.update(self._sizes(recipe, preview))
            known["latency_ms"] = self._latency(preview, seconds)
            progress("measured before training")
            before_training(known)
            lap("preview")
        packed = self.builder.build(recipe, progress, keep_trained=keep_trained)
        lap("build")
        estimates = self._sizes(recipe, packed)
        progress("timing")
        estimates["latency_ms"] = self._latency(packed, seconds)
        lap("latency")
        progress("evaluating")
        known.update(estimates)
        estimates[self.task.metric_name] = self._keep_scores(recipe, self.scores(packed, watch=watch))
        lap("evaluate")
        write_atomic(self.files.packed(recipe), packed)
        lap("store")
        return Measurement(estimates, laps, self.environment)

    def _trial(self, request: RunTrial, progress: Progress) -> Outcome:
        metric = self.task.metric_name

        def measure(known: dict[str, Estimate]) -> Measurement:
            return self.run(
                request.recipe,
                progress,
                known=known,
                before_training=(lambda costs: request.check_costs(costs, metric)) if request.time_first else None,
                watch=request.watch(known, metric),
                keep_trained=request.keep_trained,
                seconds=request.seconds,
            )

        return outcome_of(measure, metric, self.environment)

    def scores(self, packed: bytes, split: Split = "validation", watch: Watch | None = None) -> NDArray[np.float64]:
        """The metric of a packed file on every sample of a split, in the split's order."""
        network = self.target.load(packing.onnx_bytes(packed), self.plan.threads)
        images = self.validation() if split == "validation" else batches(self.task, split)
        return evaluate(network, self.task, images, self.plan, watch)

    def _keep_scores(self, recipe: Recipe, each: NDArray[np.float64]) -> Estimate:
        self.files.write_scores(recipe, each)
        return Estimate.of(each)

    def _sizes(self, recipe: Recipe, packed: bytes) -> dict[str, Estimate]:
        model = packing.unpack(packed)
        return {
            "size_bytes": Estimate.exact(len(packed)),
            "onnx_bytes": Estimate.exact(model.ByteSize()),
            "zstd_bytes": Estimate.exact(zstd_bytes(model, packed, self.zstd_level)),
            "macs": Estimate.exact(macs(self.structure, recipe)),
        }

    def _latency(self, packed: bytes, seconds: float | None = None) -> Estimate:
        assert self._baseline is not None
        latency, ratio = self.target.latency(
            packing.onnx_bytes(packed),
            self._baseline,
            self._batch(),
            self._baseline_ms,
            self.settings.seconds if seconds is None else seconds,
            self.settings.threads,
        )
        if not ratio.value > 0:
            raise ExportFailed("the clock measured no time at all for the exported network")
        return latency

    def measure_again(self, packed: bytes, split: Split = "test") -> dict[str, Estimate]:
        """A stored file on another split, with a latency of four times the usual time box."""
        metric = Estimate.of(self.scores(packed, split))
        latency = self._latency(packed, 4 * self.settings.seconds)
        return {self.task.metric_name: metric, "latency_ms": latency, "size_bytes": Estimate.exact(len(packed))}

    # ----------------------------------------------------------------------------------------------- preparations

    def tune_evaluation(self, files: Sequence[bytes]) -> tuple[EvaluationPlan, float]:
        """Evaluate such files in the fastest way from now on; gives it, and its gain over one batch on all cores."""
        self.plan, gain = fastest(files, self.task, self.validation(), self.target.load)
        return self.plan, gain

    def seconds_per_epoch(self, seconds: float = 1.0) -> float:
        """About how long a pass over the training images takes, from as many steps as fit into some time, 2 to 16."""
        steps = _count(self.task, "train") / self.task.batch_size
        original = self.builder.model
        model, count, took = copy.deepcopy(original), 2, 0.0
        for _ in range(2):  # the first steps prepare much that later ones find ready
            begin = time.perf_counter()
            step = Recover("finetune", epochs=count / steps)
            finetune(model, original, step, self.task, self.settings.seed)
            took = (time.perf_counter() - begin) / count
            count = max(2, min(16, int(seconds / took)))
        return took * steps

    def _overhead(self, request: MeasureOverhead) -> FileOverhead:
        return measure_overhead(self.builder, request.baseline_size, request.axes, request.student)

    def _train_student(self, request: TrainStudent, progress: Progress) -> dict[str, dict[str, float]]:
        model = self.builder.network(Recipe((request.student,)), progress)
        structure = self.structure.named(request.student.factory)
        return nonzero_shares(self.builder, model, structure, request.axes)

    def _seconds_of_parity(self, packed: bytes) -> float:
        simulation = Simulation(packing.unpack(packed))
        inputs = self.builder.calibration[:_SIMULATED]
        took = []
        for _ in range(2):
            begin = time.perf_counter()
            simulation(inputs)
            took.append(time.perf_counter() - begin)
        return min(PARITY_SECONDS, PARITY_INPUTS * min(took) / len(inputs))

    # ------------------------------------------------------------------------------- ensembles, finalists, samples

    def outputs(self, packed: bytes) -> Tensor:
        """What a packed file gives for all validation samples, in the split's order."""
        network = self.target.load(packing.onnx_bytes(packed), self.plan.threads)
        pairs = predictions(network, rebatched(self.validation(), self.plan.batch), self.plan.workers)
        return torch.cat([outputs for outputs, _ in pairs])

    def targets(self) -> Tensor:
        """The targets of all validation samples, in the split's order."""
        return torch.cat([targets for _, targets in self.validation()])

    def _score_averages(self, request: ScoreAverages) -> list[float]:
        targets = self.targets()
        outputs = [torch.from_numpy(array) for array in request.outputs]
        means = (torch.stack([outputs[place] for place in places]).mean(0) for places in request.combinations)
        return [float(scores(self.task, mean, targets).mean()) for mean in means]

    def _finalist(self, request: MeasureFinalist) -> tuple[NDArray[np.float64], Estimate | None]:
        if self._process is None:
            self._process = process_for(self.target).__enter__()
        each = self._process.scores(request.path, self.task, batches(self.task, "test"), self.plan)
        if request.against is None:
            return each, None
        seconds, threads = 4 * self.settings.seconds, self.settings.threads
        return each, self._process.ratio(request.path, request.against, self._batch(), threads, seconds)

    def _compare_simulation(self, request: CompareSimulation) -> dict[str, Estimate]:
        split: Split = "validation" if self.task.test is None else "test"
        targets: list[Tensor] = []

        def inputs() -> Iterator[Tensor]:
            end = time.perf_counter() + request.seconds
            for x, y in batches(self.task, split, batch_size=16, limit=PARITY_INPUTS, shuffle=0):
                targets.append(y)
                yield x
                if time.perf_counter() > end:
                    return

        comparison, simulated, outputs = agreement(request.packed, inputs())
        expected, real = (scores(self.task, given, torch.cat(targets)) for given in (simulated, outputs))
        estimates = {
            "parity_metric": paired(real, expected),
            "parity_simulated": Estimate.of(expected),
            "parity_mean_output": Estimate.exact(comparison.mean_difference),
            "parity_max_output": Estimate.exact(comparison.max_difference),
        }
        if comparison.answers:
            equal = round(comparison.agree * comparison.answers)
            estimates["parity_agreement"] = Estimate.rate(equal, comparison.answers)
        return estimates

    def _sample(self, request: EvaluateSample) -> Sample:
        # In an order of its own: a dataset may be sorted by class, and this takes a part of it.
        images = list(batches(self.task, "validation", limit=request.count, shuffle=self.settings.seed))
        if request.recipe is None:
            packed, pairs = b"", self._in_torch(images)
        else:
            packed = self.build(request.recipe)
            network = self.target.load(packing.onnx_bytes(packed), self.plan.threads)
            pairs = predictions(network, rebatched(images, self.plan.batch), self.plan.workers)
        outputs, points = [], []
        for out, targets in pairs:
            outputs.append(out.numpy())
            points.append(scores(self.task, out, targets))
        return Sample(np.concatenate(outputs), np.concatenate(points), len(packed))

    @torch.no_grad()
    def _in_torch(self, images: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(self.builder.model(x), y) for x, y in images])


# By kind of request, what carries it out. Each is given the runner, the request and who hears of the progress.
_ACTS: dict[type, Callable[[LocalRunner, Any, Progress], Any]] = {
    Inspect: lambda runner, request, progress: runner.inspect(),
    MeasureBaseline: lambda runner, request, progress: runner.baseline(),
    RestoreBaseline: lambda runner, request, progress: runner._restore_baseline(request),
    MeasureOverhead: lambda runner, request, progress: runner._overhead(request),
    TrainStudent: lambda runner, request, progress: runner._train_student(request, progress),
    TunePlan: lambda runner, request, progress: runner.tune_evaluation(request.files),
    TimeTraining: lambda runner, request, progress: runner.seconds_per_epoch(),
    TimeParity: lambda runner, request, progress: runner._seconds_of_parity(request.packed),
    RunTrial: lambda runner, request, progress: runner._trial(request, progress),
    BuildFile: lambda runner, request, progress: runner.build(request.recipe, progress),
    PredictValidation: lambda runner, request, progress: runner.outputs(request.packed).numpy(),
    ScoreAverages: lambda runner, request, progress: runner._score_averages(request),
    MeasureFinalist: lambda runner, request, progress: runner._finalist(request),
    CompareSimulation: lambda runner, request, progress: runner._compare_simulation(request),
    EvaluateSample: lambda runner, request, progress: runner._sample(request),
}


def weights_digest(model: nn.Module) -> str:
    """A hash of a network's weights: a resumed study must not mix two checkpoints."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _count(task: Task, split: Split) -> int:
    return len(dataset(task, split))  # type: ignore[arg-type]  # `dataset` has made sure that it has a length
