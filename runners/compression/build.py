"""From a recipe to the packed file that ships: compress, recover, freeze, export, pack.

Equal recipes give equal bytes: everything random is seeded by the recipe and the settings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ...errors import ArtifactError, TaskError
from ...spaces.recipe import Recipe
from ...spaces.structure import Structure
from ...spaces.techniques.ensemble import Ensemble
from ...spaces.techniques.prune import Prune
from ...spaces.techniques.recover import Recover
from ...spaces.techniques.student import Student
from ..files import packing
from ..files.atomic import write_atomic
from ..files.candidates import CandidateFiles
from ..graphs.merge import merge
from ..graphs.onnx_export import quantized_graph
from ..operators.attention import open_attention
from ..operators.fold import calibration_bias, fold_batchnorms, reestimate_batchnorms
from ..operators.moments import Moments, match_moments, output_moments
from ..progress import Progress, silent
from ..task import Task, example_input, inputs
from ..training import distill
from ..training.finetune import State, finetune
from .calibration import Calibration
from .compress import chunks, compress
from .freeze import freeze, one_factor
from .library import LayerLibrary
from .trace import trace

# Images at a time for BatchNorm statistics. In the memory format that convolutions on a CPU run fastest in, that is 1.5
# to 2.5 times as fast as 128 images in their own format (ResNet-20, ResNet-18, mobilenet_v2 at 96 and 224 pixels).
_CHUNK = 32


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format in which networks on such inputs run fastest."""
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


def in_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The same network with its weights in a memory format, in place."""
    return model.to(memory_format=layout)  # type: ignore[call-overload,no-any-return]  # torch's stubs lack it


class Builder:
    """Builds the packed files of one task's recipes; each network is loaded and traced once.

    Args:
        task: The user's task.
        files: Where trained weights and students are kept.
        calibration_images: How many training inputs serve BatchNorm statistics and activation ranges.
        seed: Seed of calibration inputs, training and student weights.
        int8_products: Whether products of two activations are int8 in the files, see `Target.int8_products`.
        library: Where compressed layers are kept; the user's own when None.
        other_students: Where another runner of the same task may have kept trained students, which are then reused.

    Raises:
        TaskError: The task cannot be used.
    """

    def __init__(
        self,
        task: Task,
        files: CandidateFiles,
        *,
        calibration_images: int = 512,
        seed: int = 0,
        int8_products: bool = False,
        library: LayerLibrary | None = None,
        other_students: CandidateFiles | None = None,
    ) -> None:
        self.task, self.files, self.seed, self.int8_products = task, files, seed, int8_products
        self.library = LayerLibrary() if library is None else library
        self.other_students = other_students
        self.model = _made(task, task.model, "its model function")
        self.example = example_input(task)
        self.calibration = inputs(task, "train", calibration_images, seed)
        traced = torch.cat([self.example, self.calibration[:64]])
        structure = trace(self.model, traced)
        self.students = {name: self._student(name) for name in task.students}
        self._taught: dict[Student, nn.Module] = {}
        others = (replace(trace(model, traced), student=name) for name, model in self.students.items())
        self.structure: Structure = replace(structure, students=tuple(others))

    def _student(self, name: str) -> nn.Module:
        """A student network of the task; weights that its function draws at random are drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = _made(self.task, self.task.students[name], f"the function of its student {name!r}")
        with torch.no_grad():
            expected = self.model(self.example).shape
            try:
                outputs = model(self.example)
            except Exception as error:  # whatever the user's network raises
                raise TaskError(
                    f"student {name!r} does not run on the task's inputs of shape {tuple(self.example.shape)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        if not isinstance(outputs, Tensor) or outputs.shape != expected:
            shown = f"the shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TaskError(
                f"student {name!r} returns {shown}, the network {tuple(expected)}; it must give the same outputs"
            )
        return model

    def network(self, recipe: Recipe, progress: Progress = silent) -> nn.Module:
        """The network that a recipe begins with: the original model, or the student that the recipe names.

        A student is trained once, as the recipe says. Its weights are kept in `CandidateFiles.trained` of a recipe that
        has this step alone.

        Args:
            recipe: The recipe.
            progress: Called with a description of what is being done.

        Raises:
            RecipeError: The task makes no such student.
            TrialError: Its training failed.
        """
        self.structure.of(recipe)
        student = recipe.student
        if student is None or not student.epochs:
            return self.students[student.factory] if student else self.model
        if student not in self._taught:
            model = copy.deepcopy(self.students[student.factory])
            alone = Recipe((student,))
            path, step = self.files.trained(alone), student.training
            assert step is not None
            if self.other_students and not path.exists() and (other := self.other_students.trained(alone)).exists():
                write_atomic(path, other.read_bytes())
            if not _restored(model, path):
                name = f"student {student.factory}"
                state = State.read(self.files.partial(alone), model)
                self._finetune(model, alone, step, lambda phase: progress(f"{name}: {phase}"), state)
                in_layout(model, memory_format_of(self.calibration))
                reestimate_batchnorms(model, self.calibration_parts, None)
                in_layout(model, torch.contiguous_format)
                write_atomic(path, save({k: v.clone() for k, v in model.state_dict().items()}))
            self._taught[student] = model.eval()
        return self._taught[student]

    @cached_property
    def calibration_parts(self) -> list[Tensor]:
        """The calibration images in the batches and the memory format in which BatchNorm statistics are estimated."""
        parts = chunks(self.calibration, _CHUNK)
        return [part.contiguous(memory_format=memory_format_of(part)) for part in parts]

    @cached_property
    def teacher_logits(self) -> Tensor | None:
        """The original model's outputs for all training samples, or None where they cannot be reused."""
        return distill.teacher_logits(self.task, self.model)

    @cached_property
    def statistics(self) -> Calibration:
        """The statistics of the calibration images that rounding and criteria may use."""
        return Calibration(self.comparable(), self.calibration_parts, self.library, self.seed, self.task.criteria)

    @cached_property
    def calibration_bias(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`operators.fold.calibration_bias` of the original model."""
        return calibration_bias(self.comparable(), self.calibration_parts)

    @cached_property
    def output_moments(self) -> list[Moments]:
        """For each of `calibration_parts`, mean and variance of the layer outputs that no BatchNorm follows."""
        return self._moments(self.model, Recipe())

    def _moments(self, model: nn.Module, recipe: Recipe) -> list[Moments]:
        folded = {layer for layer, _ in self.structure.of(recipe).folds}
        return output_moments(self.comparable(model), self.calibration_parts, folded)

    def comparable(self, model: nn.Module | None = None) -> nn.Module:
        """A copy of the network (or of a student) in the layout of `calibration_parts`."""
        return in_layout(copy.deepcopy(self.model if model is None else model), memory_format_of(self.calibration))

    def build(
        self, recipe: Recipe, progress: Progress = silent, *, recovery: bool = True, keep_trained: bool = False
    ) -> bytes:
        """The packed file of a recipe.

        Args:
            recipe: The recipe; it must fit the network.
            progress: Called with a description of what is being done.
            recovery: False skips recovery, which gives a file of the same size and speed sooner.
            keep_trained: Whether to keep the trained weights, so that a recipe which trains further continues from
                them. That saves time and changes no bit of a file.

        Raises:
            RecipeError: The recipe does not fit the network.
            TrialError: Training failed, or the network cannot be exported.
        """
        if recipe.of(Ensemble):
            networks = [self._network(network, progress, recovery) for network in recipe.networks()]
            progress("merging")
            return packing.pack(merge(networks))
        if not recovery and recipe.student not in self._taught:
            recipe = Recipe(tuple(replace(s, epochs=0.0) if isinstance(s, Student) else s for s in recipe.steps))
        source = self.network(recipe, progress)
        model = copy.deepcopy(source)
        progress("compressing")
        compress(model, recipe, self.structure, self.example, self.library, self.statistics)
        steps = recipe.of(Recover) if recovery else []
        if any(step.epochs for step in steps):
            self._train(model, recipe, progress)
            if keep_trained:
                write_atomic(self.files.trained(recipe), save({k: v.clone() for k, v in model.state_dict().items()}))
        frozen = freeze(model, recipe)
        factors: dict[str, Tensor] = {}
        if steps:
            progress("BatchNorm")
            together = one_factor(frozen, model, self.structure.of(recipe))
            factors = self._reestimate(model, source, recipe, together)
        progress("exporting")
        factors |= fold_batchnorms(model, self.structure.of(recipe).folds)
        ranges = chunks(self.calibration[:256], 32)
        graph = quantized_graph(model, self.example, frozen, factors, ranges, self.int8_products)
        return packing.pack(graph)

    def _reestimate(
        self, model: nn.Module, source: nn.Module, recipe: Recipe, one_factor: set[str]
    ) -> dict[str, Tensor]:
        """Re-estimate the statistics of a compressed network in place.

        Returns:
            By layer, the factors that its outputs were multiplied with to match the statistics.
        """
        steps = recipe.of(Recover)
        # After pruning, the statistics of a channel have no counterpart in the original any more, and a network that
        # was trained on crops needs the statistics of crops.
        pruned = any(isinstance(step, Student | Prune) for step in recipe.steps)
        comparable = not pruned and not any(step.epochs for step in steps)
        bias = self.calibration_bias if comparable else None
        factors: dict[str, Tensor] = {}
        in_layout(model, memory_format_of(self.calibration))
        reestimate_batchnorms(model, self.calibration_parts, bias, one_factor=one_factor)
        if any(step.method == "statistics" for step in steps):
            moments = self.output_moments if source is self.model else self._moments(source, recipe)
            factors = match_moments(model, self.calibration_parts, moments, one_factor)
            # Once more, for the BatchNorms behind the layers that were just corrected.
            reestimate_batchnorms(model, self.calibration_parts, bias, one_factor=one_factor)
        in_layout(model, torch.contiguous_format)
        return factors

    def _network(self, recipe: Recipe, progress: Progress, recovery: bool) -> onnx.ModelProto:
        """The graph of an ensemble's network, read from its packed file if there is one; both give the same bytes."""
        try:
            return packing.unpack(self.files.packed(recipe).read_bytes())
        except (FileNotFoundError, ArtifactError):  # never built here, or damaged
            return packing.unpack(self.build(recipe, progress, recovery=recovery))

    def _train(self, model: nn.Module, recipe: Recipe, progress: Progress) -> None:
        """Run the training steps of a recipe, resuming from the last one whose weights or state were kept."""
        training = recipe.of(Recover)
        others = [step for step in recipe.steps if not isinstance(step, Recover)]
        prefixes = [Recipe((*others, *training[: count + 1])) for count in range(len(training))]
        begin = 0
        for position, prefix in enumerate(prefixes[:-1], 1):
            if _restored(model, self.files.trained(prefix)):
                begin = position
        for position, prefix in reversed([*enumerate(prefixes)][begin:]):
            if (state := State.read(self.files.partial(prefix), model)) is not None:
                begin = position
                break
        for prefix in prefixes[begin:]:
            self._finetune(model, prefix, prefix.of(Recover)[-1], progress, state)
            state = None

    def _finetune(
        self, model: nn.Module, recipe: Recipe, step: Recover, progress: Progress, state: State | None
    ) -> None:
        """Run the last training step of a recipe, resuming from a state between two of its epochs if there is one."""
        reused = step.epochs >= distill.WORTH and step.distill and not step.features
        finetune(
            model,
            self.model,
            step,
            self.task,
            (int(recipe.key[:8], 16) ^ self.seed) % 2**31,
            progress,
            teacher_logits=self.teacher_logits if reused else None,
            state=state,
            keep=lambda state: write_atomic(self.files.partial(recipe), state.to_bytes()),
        )


def _restored(model: nn.Module, path: Path) -> bool:
    """Load kept weights; returns False if the file is missing, damaged or of another network."""
    try:
        model.load_state_dict(load(path.read_bytes()))
    except (FileNotFoundError, SafetensorError, RuntimeError):
        return False
    return True


def _made(task: Task, function: Callable[[], Any], what: str) -> nn.Module:
    """The network that a function of the user returns; raises `TaskError` when it fails or returns something else."""
    try:
        model = function()
    except TaskError:
        raise
    except Exception as error:  # whatever the user's factory raises
        raise TaskError(f"task {task.name!r}: {what} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise TaskError(f"task {task.name!r}: {what} returned {type(model).__name__}, not a torch module")
    return open_attention(model.eval())
