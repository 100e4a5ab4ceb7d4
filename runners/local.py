"""Carries recipes out on this machine, one after the other, in this process.

`LocalRunner.run(recipe)` compresses, recovers, exports, packs, and measures the packed file: it is read back, and what
runs on the target is what was read. Equal recipes give equal bytes: everything random is seeded by the recipe.
"""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..errors import ArtifactError, ExportFailed, TaskError
from ..objectives.cost import macs
from ..objectives.measurement import Estimate, Measurement
from ..spaces.recipe import Recipe
from ..spaces.structure import Structure
from ..spaces.techniques.ensemble import Ensemble
from ..spaces.techniques.prune import Prune
from ..spaces.techniques.recover import Recover
from ..spaces.techniques.student import Student
from .compression.calibration import Calibration
from .compression.compress import chunks, compress
from .compression.freeze import freeze, one_factor
from .compression.library import LayerLibrary
from .compression.trace import trace
from .evaluate import Watch, evaluate, fastest, obvious, predictions, rebatched
from .files import packing
from .files.atomic import read_scores, write_atomic, write_scores
from .files.entropy import zstd_bytes
from .graphs.merge import merge
from .graphs.onnx_export import batch_of, quantized_graph
from .operators.attention import open_attention
from .operators.fold import calibration_bias, fold_batchnorms, reestimate_batchnorms
from .operators.moments import Moments, match_moments, output_moments
from .targets.target import DEFAULT, Network, Target, as_target
from .task import Task, batches, dataset, example_input, inputs
from .training.distill import WORTH, teacher_logits
from .training.finetune import State, finetune

# The callback of a study: the phase in words and what is known so far; it may raise OverBudget.
Report = Callable[[str, Mapping[str, Estimate]], None]
# Images at a time for BatchNorm statistics, in the layout that convolutions on a CPU like best: 1.5 to 2.5 times as fast
# as 128 images in the layout they come in (ResNet-20, ResNet-18, mobilenet_v2 at 96 and 224 pixels).
_CHUNK = 32
# Up to so many weights zstd may take its time. On ResNet-20's 270 thousand level 19 takes 0.2 s of a trial, level 1 takes
# 0.01 s and 0.2% to 3% more bytes (12% more at 2 bits and 90% zeros).
_ZSTD_19 = 1 << 19
_IN_MEMORY = 1 << 30  # bytes of validation images that are kept decoded between trials


def _ignore(phase: str, metrics: Mapping[str, Estimate]) -> None:
    pass


def _layout(x: Tensor) -> torch.memory_format:
    """The layout in which networks on such inputs run fastest."""
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


def environment(target: Target | None = None) -> dict[str, str]:
    """What the numbers depend on outside the recipe."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        **(target.environment if target else {}),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class LocalRunner:
    """Runs recipes of one task. Files go to `directory`, named by the recipe's key.

    threads, batch, seconds: how latency is measured (CPU threads, inputs per run, time box). calibration_images: how
    many training inputs serve BatchNorm statistics and activation ranges. target: what runs the files, see
    `target.as_target`. library: where compressed layers are kept; the user's own when None. Raises `TaskError` when the task cannot be used.
    """

    def __init__(
        self,
        task: Task,
        directory: Path,
        *,
        threads: int = 1,
        batch: int = 1,
        seconds: float = 0.5,
        calibration_images: int = 512,
        seed: int = 0,
        target: Target | str | Mapping[str, Any] = DEFAULT,
        library: LayerLibrary | None = None,
    ) -> None:
        self.task, self.directory, self.seed = task, directory, seed
        self.library = LayerLibrary() if library is None else library
        self.threads, self.batch, self.seconds = threads, batch, seconds
        self.target = as_target(target)
        self.model = _made(task, task.model, "its model function")
        self.example = example_input(task)
        self.calibration = inputs(task, "train", calibration_images, seed)
        traced = torch.cat([self.example, self.calibration[:64]])
        self.structure: Structure = trace(self.model, traced)
        self.students = {name: self._student(name) for name in task.students}
        self._taught: dict[Student, nn.Module] = {}
        others = (replace(trace(model, traced), student=name) for name, model in self.students.items())
        self.structure = replace(self.structure, students=tuple(others))
        weights = sum(layer.params for layer in self.structure.layers)
        self.zstd_level = 19 if weights <= _ZSTD_19 else 1  # one level for a study, or its sizes could not be compared
        self._validation: list[tuple[Tensor, Tensor]] | None = None
        self.plan = obvious()
        self._baseline: Network | None = None
        self.baseline_ms: float | None = None

    def _student(self, name: str) -> nn.Module:
        """Another network of the task's, with weights drawn from the seed where it comes untrained."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = _made(self.task, self.task.students[name], f"the function of its student {name!r}")
        with torch.no_grad():
            expected = self.model(self.example).shape
            try:
                found = model(self.example)
            except Exception as error:  # whatever the user's network raises
                raise TaskError(f"student {name!r} does not run on the task's inputs of shape {tuple(self.example.shape)}: "
                                f"{type(error).__name__}: {error}") from error  # fmt: skip
        if not isinstance(found, Tensor) or found.shape != expected:
            shown = f"the shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise TaskError(
                f"student {name!r} returns {shown}, the network {tuple(expected)}; it must give the same outputs"
            )
        return model

    def network(self, recipe: Recipe, report: Report = _ignore) -> nn.Module:
        """What a recipe begins with: the network, or the student that it names, trained as it says, once.

        The weights of a trained student are kept at `trained_path` of the recipe of this step alone. Raises `RecipeError`
        for an unknown student, `TrialError` when its training fails.
        """
        self.structure.of(recipe)
        student = recipe.student
        if student is None or not student.epochs:
            return self.students[student.factory] if student else self.model
        if student not in self._taught:
            model = copy.deepcopy(self.students[student.factory])
            alone = Recipe((student,))
            path, step = self.trained_path(alone), student.training
            assert step is not None
            if not _restored(model, path):
                told = f"student {student.factory}"
                state = State.read(self.partial_path(alone), model)
                self._finetune(model, alone, step, lambda phase, known: report(f"{told}: {phase}", known), state)
                model.to(memory_format=_layout(self.calibration))  # type: ignore[call-overload]
                reestimate_batchnorms(model, self.calibration_parts, None)
                model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
                write_atomic(path, save({k: v.clone() for k, v in model.state_dict().items()}))
            self._taught[student] = model.eval()
        return self._taught[student]

    def take_student(self, recipe: Recipe, directory: Path) -> None:
        """Take the weights of a recipe's trained student from another runner's folder, if they are there, to spare its training."""
        if (student := recipe.student) is not None and student.epochs:
            kept = self.trained_path(Recipe((student,)))
            if (directory / kept.name).exists():
                write_atomic(kept, (directory / kept.name).read_bytes())

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

    @cached_property
    def calibration_parts(self) -> list[Tensor]:
        """The calibration images as BatchNorm statistics are taken from them."""
        parts = chunks(self.calibration, _CHUNK)
        return [part.contiguous(memory_format=_layout(part)) for part in parts]

    @cached_property
    def teacher_logits(self) -> Tensor | None:
        """The untouched network's outputs for all training samples, or None where they cannot be reused."""
        return teacher_logits(self.task, self.model)

    @cached_property
    def statistics(self) -> Calibration:
        """What rounding and criteria may ask the calibration images."""
        return Calibration(self.comparable(), self.calibration_parts, self.library, self.seed, self.task.criteria)

    @cached_property
    def calibration_bias(self) -> dict[str, tuple[Tensor, Tensor]]:
        return calibration_bias(self.comparable(), self.calibration_parts)

    @cached_property
    def output_moments(self) -> list[Moments]:
        """For each of `calibration_parts`, mean and variance of what layers give that no BatchNorm follows."""
        return self._moments(self.model, Recipe())

    def _moments(self, model: nn.Module, recipe: Recipe) -> list[Moments]:
        folded = {layer for layer, _ in self.structure.of(recipe).folds}
        return output_moments(self.comparable(model), self.calibration_parts, folded)

    def comparable(self, model: nn.Module | None = None) -> nn.Module:
        """A copy of the network (or of a student) in the layout of `calibration_parts`."""
        return copy.deepcopy(self.model if model is None else model).to(memory_format=_layout(self.calibration))  # type: ignore[call-overload,no-any-return]

    def path(self, recipe: Recipe) -> Path:
        return self.directory / f"{recipe.key}.safetensors"

    def trained_path(self, recipe: Recipe) -> Path:
        """Where the weights of a trained candidate are, before they became integers: others go on from them."""
        return self.directory / f"{recipe.key}.trained"

    def partial_path(self, recipe: Recipe) -> Path:
        """Where the last training step of a recipe is between two epochs, in case it is killed; the study removes it."""
        return self.directory / f"{recipe.key}.partial-training"

    def scores_path(self, recipe: Recipe) -> Path:
        """Where the metric of a candidate on every validation sample is."""
        return self.directory / f"{recipe.key}.npy"

    def stored_scores(self, recipe: Recipe) -> NDArray[np.floating] | None:
        """What was scored on every validation sample, if that is still there and readable."""
        return read_scores(self.scores_path(recipe))

    def _keep_scores(self, recipe: Recipe, scores: NDArray[np.float64]) -> Estimate:
        write_scores(self.scores_path(recipe), scores)
        return Estimate.of(scores)

    def seconds_per_epoch(self, seconds: float = 1.0) -> float:
        """About how long a pass over the training images takes, from as many steps as fit into some time, 2 to 16."""
        steps = len(dataset(self.task, "train")) / self.task.batch_size  # type: ignore[arg-type]
        model, count, took = copy.deepcopy(self.model), 2, 0.0
        for _ in range(2):  # the first steps prepare much that later ones find ready
            begin = time.perf_counter()
            finetune(model, self.model, Recover("finetune", epochs=count / steps), self.task, self.seed)
            took = (time.perf_counter() - begin) / count
            count = max(2, min(16, int(seconds / took)))
        return took * steps

    def tune_evaluation(self, files: Sequence[bytes]) -> float:
        """Evaluate from now on in the way that is fastest for such files; gives the gain over the obvious way."""
        self.plan, gain = fastest(files, self.task, self.validation(), self.target.load)
        return gain

    def build(
        self, recipe: Recipe, report: Report = _ignore, *, recovery: bool = True, keep_trained: bool = False
    ) -> bytes:
        """The packed file of a recipe; without `recovery` a file of the same size and speed, sooner.

        keep_trained: keep the trained weights at `trained_path(recipe)`, so that a recipe which trains on needs not
        begin anew. What is kept saves time and changes no bit.
        """
        if recipe.of(Ensemble):
            networks = [self._network(network, report, recovery) for network in recipe.networks()]
            report("merging", {})
            return packing.pack(merge(networks))
        if not recovery and recipe.student not in self._taught:
            recipe = Recipe(tuple(replace(s, epochs=0.0) if isinstance(s, Student) else s for s in recipe.steps))
        source = self.network(recipe, report)
        model = copy.deepcopy(source)
        report("compressing", {})
        compress(model, recipe, self.structure, self.example, self.library, self.statistics)
        steps = recipe.of(Recover) if recovery else []
        if any(step.epochs for step in steps):
            self._train(model, recipe, report)
            if keep_trained:
                write_atomic(self.trained_path(recipe), save({k: v.clone() for k, v in model.state_dict().items()}))
        frozen = freeze(model, recipe)
        factors: dict[str, Tensor] = {}
        if steps:
            report("BatchNorm", {})
            # After surgery a channel's statistics have no counterpart in the original any more, and a network that was
            # trained on crops wants the statistics of crops.
            operated = any(isinstance(step, Student | Prune) for step in recipe.steps)
            comparable = not operated and not any(step.epochs for step in steps)
            model.to(memory_format=_layout(self.calibration))  # type: ignore[call-overload]
            known = self.calibration_bias if comparable else None
            together = one_factor(frozen, model, self.structure.of(recipe))
            reestimate_batchnorms(model, self.calibration_parts, known, one_factor=together)
            if any(step.method == "statistics" for step in steps):
                moments = self.output_moments if source is self.model else self._moments(source, recipe)
                factors = match_moments(model, self.calibration_parts, moments, together)
                # of what lies behind such layers
                reestimate_batchnorms(model, self.calibration_parts, known, one_factor=together)
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        report("exporting", {})
        factors |= fold_batchnorms(model, self.structure.of(recipe).folds)
        ranges = chunks(self.calibration[:256], 32)
        graph = quantized_graph(model, self.example, frozen, factors, ranges, self.target.int8_products)
        return packing.pack(graph)

    def _network(self, recipe: Recipe, report: Report, recovery: bool) -> onnx.ModelProto:
        """The graph of an ensemble's network: that of its packed file where it was kept, which gives the same bytes."""
        try:
            return packing.unpack(self.path(recipe).read_bytes())
        except (FileNotFoundError, ArtifactError):  # never built here, or damaged
            return packing.unpack(self.build(recipe, report, recovery=recovery))

    def _train(self, model: nn.Module, recipe: Recipe, report: Report) -> None:
        """Carry out the training steps of a recipe, from the last one of which anything was kept."""
        training = recipe.of(Recover)
        others = [step for step in recipe.steps if not isinstance(step, Recover)]
        prefixes = [Recipe((*others, *training[: count + 1])) for count in range(len(training))]
        begin = 0
        for position, prefix in enumerate(prefixes[:-1], 1):
            if _restored(model, self.trained_path(prefix)):
                begin = position
        for position, prefix in reversed([*enumerate(prefixes)][begin:]):
            if (state := State.read(self.partial_path(prefix), model)) is not None:
                begin = position
                break
        for prefix in prefixes[begin:]:
            self._finetune(model, prefix, prefix.of(Recover)[-1], report, state)
            state = None

    def _finetune(self, model: nn.Module, recipe: Recipe, step: Recover, report: Report, state: State | None) -> None:
        """One training step, the last of a recipe, from the state between two of its epochs, if there is one."""
        reused = step.epochs >= WORTH and step.distill and not step.features
        finetune(
            model, self.model, step, self.task, (int(recipe.key[:8], 16) ^ self.seed) % 2**31, lambda text: report(text, {}),
            teacher_logits=self.teacher_logits if reused else None,
            state=state, keep=lambda state: write_atomic(self.partial_path(recipe), state.to_bytes()),
        )  # fmt: skip

    def baseline(self) -> tuple[Measurement, bytes]:
        """The untouched network, exported, packed, reloaded and measured; raises `TaskError` when it does not survive."""
        started = time.perf_counter()
        data = self.build(Recipe())
        self.use_baseline(data)
        self._check_parity()
        baseline_latency = self.target.baseline_latency(_model(data), self._batch(), self.seconds, self.threads)
        self.baseline_ms = baseline_latency.value
        metrics = self._sizes(Recipe(), data) | {
            "latency_ms": baseline_latency,
            self.task.metric_name: self._keep_scores(Recipe(), self.scores(data)),
        }
        return Measurement(metrics, {"total": time.perf_counter() - started}, environment(self.target)), data

    def use_baseline(self, data: bytes, milliseconds: float | None = None) -> None:
        """Take a packed baseline as the yardstick of latency; `milliseconds` is what it took when it was measured."""
        self._baseline = self.target.load(_model(data), self.threads)
        self.baseline_ms = milliseconds

    def _check_parity(self) -> None:
        assert self._baseline is not None
        x, _ = next(iter(self.validation()))
        with torch.no_grad():
            expected = copy.deepcopy(self.model)(x)
        found = next(predictions(self._baseline, [(x, x)]))[0]
        if found.shape == expected.shape:
            error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
            if error <= 1e-2:
                return
            difference = f"its outputs differ by up to {100 * error:.1f}% of the largest"
        else:
            difference = f"its outputs have the shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
        raise TaskError(f"the exported network does not compute what the torch network does: {difference}; the model may depend "
                        "on something that tracing freezes, such as control flow on the input")  # fmt: skip

    def _batch(self) -> np.ndarray:  # type: ignore[type-arg]
        return batch_of(next(iter(self.validation()))[0], self.batch)

    def scores(self, data: bytes, split: str = "validation", watch: Watch | None = None) -> NDArray[np.float64]:
        """The metric of a packed file on every sample of a split, in the split's order."""
        network = self.target.load(_model(data), self.plan.threads)
        images = self.validation() if split == "validation" else batches(self.task, split)  # type: ignore[arg-type]
        return evaluate(network, self.task, images, self.plan, watch)

    def outputs(self, data: bytes) -> Tensor:
        """What a packed file gives for all validation samples, in the split's order."""
        network = self.target.load(_model(data), self.plan.threads)
        found = predictions(network, rebatched(self.validation(), self.plan.batch), self.plan.workers)
        return torch.cat([outputs for outputs, _ in found])

    def targets(self) -> Tensor:
        """The targets of all validation samples, in the split's order."""
        return torch.cat([targets for _, targets in self.validation()])

    def _sizes(self, recipe: Recipe, data: bytes) -> dict[str, Estimate]:
        model = packing.unpack(data)
        return {
            "size_bytes": Estimate.exact(len(data)),
            "onnx_bytes": Estimate.exact(model.ByteSize()),
            "zstd_bytes": Estimate.exact(zstd_bytes(model, data, self.zstd_level)),
            "macs": Estimate.exact(macs(self.structure, recipe)),
        }

    def run(
        self,
        recipe: Recipe,
        report: Report = _ignore,
        *,
        watch: Watch | None = None,
        gate_latency: bool = False,
        keep_trained: bool = False,
        seconds: float | None = None,
    ) -> Measurement:
        """Carry out a recipe, keep its packed file at `path(recipe)`, and measure it.

        `report` hears of every phase and number and may raise `OverBudget`, `watch` of the scores of ever more samples
        and may raise `Stopped`. With `gate_latency` a recipe that trains is exported and timed once before training,
        since its speed does not depend on the weights. keep_trained: as in `build`. seconds: of timing, this once.
        Raises `TrialError`.
        """
        if self._baseline is None:
            raise ValueError("call baseline() or use_baseline() first")
        laps: dict[str, float] = {}
        clock = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            laps[phase] = laps.get(phase, 0.0) + now - clock
            clock = now

        if gate_latency and any(step.method == "finetune" for step in recipe.of(Recover)):
            preview = self.build(recipe, report, recovery=False)
            known = self._sizes(recipe, preview) | {"latency_ms": self._latency(preview, seconds)}
            report("measured before training", known)
            lap("preview")
        data = self.build(recipe, report, keep_trained=keep_trained)
        lap("build")
        metrics = self._sizes(recipe, data)
        report("timing", metrics)
        metrics["latency_ms"] = self._latency(data, seconds)
        lap("latency")
        report("evaluating", metrics)
        metrics[self.task.metric_name] = self._keep_scores(recipe, self.scores(data, watch=watch))
        lap("evaluate")
        write_atomic(self.path(recipe), data)
        lap("store")
        return Measurement(metrics, laps, environment(self.target))

    def _latency(self, data: bytes, seconds: float | None = None) -> Estimate:
        assert self._baseline is not None
        box = self.seconds if seconds is None else seconds
        found, ratio = self.target.latency(
            _model(data), self._baseline, self._batch(), self.baseline_ms, box, self.threads
        )
        if not ratio.value > 0:
            raise ExportFailed("the clock measured no time at all for the exported network")
        return found

    def measure_again(self, data: bytes, split: str = "test") -> dict[str, Estimate]:
        """A stored file on another split, with a latency of four times the usual time box."""
        found = Estimate.of(self.scores(data, split))
        timed = self._latency(data, 4 * self.seconds)
        return {self.task.metric_name: found, "latency_ms": timed, "size_bytes": Estimate.exact(len(data))}


def _restored(model: nn.Module, path: Path) -> bool:
    """Load weights that were kept; False where there are none, or what is there is damaged or of something else."""
    try:
        model.load_state_dict(load(path.read_bytes()))
    except (FileNotFoundError, SafetensorError, RuntimeError):
        return False
    return True


def _made(task: Task, function: Callable[[], Any], what: str) -> nn.Module:
    """The network that a function of the user's returns."""
    try:
        model = function()
    except TaskError:
        raise
    except Exception as error:  # whatever the user's factory raises
        raise TaskError(f"task {task.name!r}: {what} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise TaskError(f"task {task.name!r}: {what} returned {type(model).__name__}, not a torch module")
    return open_attention(model.eval())


def _model(data: bytes) -> bytes:
    """The ONNX file in a packed one."""
    return packing.unpack(data).SerializeToString()  # type: ignore[no-any-return]
