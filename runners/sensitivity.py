"""The sensitivity of each layer to each level of compression, alone in the otherwise original network.

The score is the divergence of the outputs from the original network's, on calibration images, after BatchNorm
re-estimation as `LocalRunner.build` does it: for outputs `[n, classes]` the KL divergence of the softmax (temperature
1), for any other the mean squared difference relative to the outputs' variance. Neither the error of the weights nor
the curvature of the loss is used: they rank the levels of a layer, but not the layers of a network.

The modules before the changed layer compute the same as in the original network, so they are run once and their outputs
are recorded. A network is any torch module, and the arguments of a module are unknown. So calls are numbered in the
order in which they begin. A call that ended before the changed layer is called returns its recorded output and runs
nothing inside (`Prefix`). For a network of stages that leaves a few tensors per stage, which are updated from layer to
layer. They are recorded in two modes, because BatchNorm normalises with the statistics of the batch while its own are
estimated. What does not fit into memory is run again. Records are used only if the outputs with them equal those
without on two images.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, ConfigError, RecipeError
from ..objectives.cost import layer_bytes
from ..spaces.recipe import Recipe
from ..spaces.space import Space
from ..spaces.steps import Step
from ..spaces.structure import Layer, Structure
from ..spaces.techniques.quantize import quantize
from ..spaces.techniques.sparsify import sparsify, zeros_of
from ..spaces.techniques.table import METHODS
from .compression.build import Builder
from .compression.compress import compress
from .compression.freeze import freeze, one_factor
from .operators.fold import batchnorms, reestimate_batchnorms
from .operators.layers import set_weight, weight_of

if TYPE_CHECKING:
    import pandas

KL, SQUARED = "KL divergence (nats)", "squared difference / variance"
VERSION = 1
Level = tuple[int, float | str]  # weight bits, and the sparsity: a share or a pattern
UNTOUCHED: Level = (32, 0.0)
# Called with the number of rows that are done, the number of all rows, and the layer being measured.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class SensitivityRow:
    """One layer at one level of compression.

    Args:
        layer: The name of the layer.
        weight_bits: Bits of a weight.
        sparsity: The share of zero weights, or their pattern.
        divergence: The divergence of the network's outputs.
        bytes: The packed bytes of the layer (weight, scales, bias).
    """

    layer: str
    weight_bits: int
    sparsity: float | str
    divergence: float
    bytes: int


@dataclass(frozen=True)
class Sensitivity:
    """The divergence of every layer at every level, each changed alone; infinite where outputs are not finite.

    Attributes:
        rows: One for each layer and level.
        unit: What a divergence is, `KL` or `SQUARED`.
        images: On how many calibration images it was measured.

    Example:
        >>> sensitivity = Sensitivity((SensitivityRow("fc", 4, 0.0, 0.02, 36),), KL, 512)
        >>> sensitivity.divergence("fc", 4), sensitivity.divergence("fc")
        (0.02, 0.0)
    """

    rows: tuple[SensitivityRow, ...]
    unit: str
    images: int

    def divergence(self, layer: str, weight_bits: int = 32, sparsity: float | str = 0.0) -> float:
        """The divergence of one layer at one level; 0 for the original level.

        Args:
            layer: The name of the layer.
            weight_bits: Bits of a weight.
            sparsity: The share of zero weights, or their pattern.

        Raises:
            RecipeError: The level was not measured.
        """
        if (weight_bits, sparsity) == UNTOUCHED:
            return 0.0
        if (layer, weight_bits, sparsity) not in self._by_level:
            level = f"{weight_bits} bits and {100 * zeros_of(sparsity):g}% zeros"
            raise RecipeError(
                f"the sensitivity of layer {layer!r} at {level} was not measured; "
                "measure it again with this network and space"
            )
        return self._by_level[layer, weight_bits, sparsity]

    @cached_property
    def _by_level(self) -> dict[tuple[str, int, float | str], float]:
        return {(row.layer, row.weight_bits, row.sparsity): row.divergence for row in self.rows}

    def by_axis(self, space: Space, structure: Structure) -> dict[str, tuple[float, ...]]:
        """The divergence of each choice of the axes of weight bits and sparsity.

        For an axis that layers share, it is the sum over the layers: their divergences add up well while they are
        small.

        Args:
            space: The space that has the axes.
            structure: The structure of the network.

        Returns:
            By axis, the divergence of each choice.

        Raises:
            RecipeError: A choice was not measured.
        """
        divergences = {}
        for axis in space.axes(structure):
            if axis.student != "":
                continue
            if axis.kind == "weight_bits":
                levels: list[Level] = [(bits, 0.0) for bits in axis.choices]
            elif axis.kind == "sparsity":
                levels = [(32, ratio) for ratio in axis.choices]
            else:
                continue
            divergences[axis.name] = tuple(
                math.fsum(self.divergence(target, *level) for target in axis.targets) for level in levels
            )
        return divergences

    def table(self) -> pandas.DataFrame:
        """A row per layer and level; `unit` is a column, so that a CSV file states its unit."""
        import pandas

        columns = [field.name for field in fields(SensitivityRow)]
        table = pandas.DataFrame([asdict(row) for row in self.rows], columns=columns)
        return table.assign(unit=self.unit)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no infinity: an infinite divergence becomes None."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["divergence"] = row["divergence"] if math.isfinite(row["divergence"]) else None
        return {"version": VERSION, "unit": self.unit, "images": self.images, "rows": rows}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """The reverse of `to_dict`.

        Raises:
            ArtifactError: The data is something else.
        """
        try:
            if data["version"] > VERSION:
                raise ArtifactError(f"a sensitivity of version {data['version']}; this paretorch reads up to {VERSION}")
            rows = [SensitivityRow(**row) for row in data["rows"]]
            rows = [replace(row, divergence=_from_json(row.divergence)) for row in rows]
            return cls(tuple(rows), str(data["unit"]), int(data["images"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"not a sensitivity: {error!r}") from error

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """The reverse of `to_json`.

        Raises:
            ArtifactError: The text is something else.
        """
        try:
            return cls.from_dict(json.loads(text))
        except ValueError as error:
            raise ArtifactError(f"not a sensitivity: {error}") from error


def _from_json(divergence: float | None) -> float:
    """A divergence as JSON holds it, where None is infinity."""
    return math.inf if divergence is None else float(divergence)


def order(level: Level) -> tuple[float, str, int]:
    """The sort key of a level: increasing sparsity, then decreasing bits."""
    bits, zeros = level
    return zeros_of(zeros), str(zeros), -bits


def levels(space: Space, structure: Structure) -> dict[str, list[Level]]:
    """The levels at which each layer is measured: every combination of its choices, and each choice alone.

    Args:
        space: The space that names the choices.
        structure: The structure of the network.

    Returns:
        By layer, its levels in the order of `order`, without the original level.

    Raises:
        ConfigError: The space leaves nothing to measure.
    """
    axes = [axis for axis in space.axes(structure) if axis.student == ""]
    by_layer: dict[str, list[Level]] = {}
    for layer in structure.layers:
        bits, ratios = (
            next((axis.choices for axis in axes if axis.kind == kind and layer.name in axis.targets), ())
            for kind in ("weight_bits", "sparsity")
        )
        both = [
            (b, r) for r in ratios for b in bits if b > 1 or not r
        ]  # weights of one bit are signs, which are never zero
        alone = [*((b, 0.0) for b in bits), *((32, r) for r in ratios)]
        distinct = sorted({*both, *alone} - {UNTOUCHED}, key=order)
        if distinct:
            by_layer[layer.name] = distinct
    if not by_layer:
        raise ConfigError(
            "space: no layer has a choice of weight_bits below 32 or of sparsity above 0, so there is nothing "
            "to measure; "
            "write weight_bits: [4, 8] or sparsity: [0.0, 0.5], or leave `space` out"
        )
    return by_layer


def divergence(dense: Tensor, outputs: Tensor) -> float:
    """The divergence of outputs from the original network's, averaged over the images; infinite if not finite.

    Args:
        dense: The original network's outputs. `[n, classes]` with at least two classes gives KL(softmax(dense) ||
            softmax(outputs)) in nats, any other shape the mean squared difference over the variance of `dense`.
        outputs: As `dense`.

    Example:
        >>> round(divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])), 4)
        0.1201
    """
    if not bool(outputs.isfinite().all()):
        return math.inf
    dense, outputs = dense.double(), outputs.double()
    if unit_of(dense) == KL:
        p, q = dense.log_softmax(1), outputs.log_softmax(1)
        return max(0.0, float((p.exp() * (p - q)).sum(1).mean()))
    variance = (dense - dense.mean()).square().mean().clamp_min(1e-30)
    return float((outputs - dense).square().mean() / variance)


def unit_of(outputs: Tensor) -> str:
    """The unit of the divergence of such outputs: `KL` for `[n, classes]`, else `SQUARED`."""
    return KL if outputs.ndim == 2 and outputs.shape[1] > 1 else SQUARED


def measure_sensitivity(
    runner: Builder,
    space: Space,
    progress: Progress | None = None,
    *,
    reuse: bool = True,
    memory: int = 1 << 30,
) -> Sensitivity:
    """Measure every layer at every level of the space, each alone, on all calibration images of the runner.

    The criterion, the ranges and the rounding are the first methods of the space.

    Args:
        runner: The runner whose network is measured.
        space: The space that names the levels.
        progress: Called with the number of rows that are done, the number of all rows, and the layer being measured.
        reuse: Whether the outputs of modules before a layer are recorded instead of computed again. It affects only the
            time.
        memory: Bytes of records at most. It affects only the time.

    Raises:
        ConfigError: The space leaves nothing to measure.
    """
    structure = runner.structure
    wanted = levels(space, structure)
    axes = [axis for axis in space.axes(structure) if axis.student == ""]
    total, done = sum(map(len, wanted.values())), 0
    bench = _Bench(runner, memory if reuse else 0)
    rows = []
    for layer in structure.layers:
        if layer.name not in wanted:
            continue
        if reuse:
            bench.advance(layer.name)
        for level in wanted[layer.name]:
            if progress:
                progress(done, total, layer.name)
            methods = {
                axis.kind: axis.choices[0]
                for axis in axes
                if axis.kind in (*METHODS, "group_size") and layer.name in axis.targets
            }
            recipe = _recipe(layer.name, level, methods)
            size = layer_bytes(Structure((layer,)), recipe)
            rows.append(SensitivityRow(layer.name, *level, bench.divergence(layer, recipe), size))
            done += 1
    return Sensitivity(tuple(rows), unit_of(bench.dense), len(runner.calibration))


def _recipe(layer: str, level: Level, methods: Mapping[str, Any]) -> Recipe:
    bits, zeros = level
    steps: list[Step] = [quantize(layer, bits, 32, methods)] if bits < 32 else []
    return Recipe((*steps, *([sparsify(layer, zeros, methods)] if zeros else [])))


class _Bench:
    """A network in which one layer at a time is compressed, measured and restored."""

    def __init__(self, runner: Builder, memory: int) -> None:
        self.runner = runner
        self.parts = runner.calibration_parts
        self.bias = runner.calibration_bias
        self.model = runner.comparable().eval().requires_grad_(False)
        self.norms = batchnorms(self.model)
        self.statistics = {name: copy.deepcopy(norm.state_dict()) for name, norm in self.norms.items()}
        with torch.no_grad():
            self.dense = torch.cat([self.model(part) for part in self.parts])
        self.prefix = Prefix(self.model, self.parts, memory, modes=2 if self.norms else 1)

    def restore(self, layer: str | None = None) -> None:
        """Restore the original network: the BatchNorm statistics, and the weight of a layer if one is named."""
        for name, norm in self.norms.items():
            norm.load_state_dict(self.statistics[name])
        if layer:
            set_weight(self.model.get_submodule(layer), weight_of(self.runner.model.get_submodule(layer)))

    @torch.no_grad()
    def advance(self, layer: str) -> None:
        """Record all that runs before a layer, in both modes of BatchNorm."""

        def estimating(active: bool) -> None:
            for norm in self.norms.values():
                norm.train(active)

        self.prefix.advance(layer, estimating)
        self.restore()

    @torch.no_grad()
    def divergence(self, layer: Layer, recipe: Recipe) -> float:
        """The divergence with one layer compressed by a recipe; the layer is restored afterwards."""
        runner = self.runner
        compress(self.model, recipe, runner.structure, runner.example, runner.library, runner.statistics)
        together = one_factor(freeze(self.model, recipe), self.model, runner.structure)
        if self.norms:
            live = [name for name in self.norms if name not in self.prefix.replayed]
            reestimate_batchnorms(self.model, self.prefix.feed(1), self.bias, live, together)
        outputs = torch.cat([self.model(part) for part in self.prefix.feed(0)])
        self.restore(layer.name)
        return divergence(self.dense, outputs)


@dataclass(frozen=True)
class _Call:
    """One call of a module in a forward pass.

    Args:
        module: The name of the module.
        end: The number of the next call that is not inside this one.
        bytes: The bytes of its output for one image; 0 if the output cannot be recorded.
        frail: Whether the output is changed in place later.
    """

    module: str
    end: int
    bytes: int
    frail: bool


class _Reached(Exception):
    """The forward pass has reached the layer up to which it is recorded."""


class _Astray(Exception):
    """The forward pass differs from the one that was recorded."""


class Prefix:
    """The calls of a network's modules before one layer, recorded for some batches.

    After `advance(layer, switch)` the network is run on the batches of `feed(mode)`. The modules named in `replayed`
    are then not run.

    Args:
        model: The network. Its modules get forward methods that record and replay. Between calls of `advance` the layer
            and what follows it may change, but nothing before it.
        batches: The batches of inputs.
        memory: Bytes of records at most.
        modes: The number of modes in which the network is run; each has records of its own.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], memory: int, modes: int = 1) -> None:
        self.model, self.batches, self.memory, self.modes = model, batches, memory, modes
        self.replayed: frozenset[str] = frozenset()
        self._names = {module: name for name, module in model.named_modules() if name}
        self._records: dict[tuple[int, int], dict[int, Tensor]] = {}
        self._known: dict[int, Tensor] = {}  # by number, what calls return without running
        self._wanted: frozenset[int] = frozenset()
        self._taken: dict[int, Tensor] = {}
        self._count, self._stop = 0, -1
        self._calls: list[_Call] = []
        if memory:
            self._calls = self._look(batches[0][:2])
            for module, name in self._names.items():
                if not isinstance(module, torch.jit.ScriptModule):  # its forward method cannot be replaced
                    module.forward = partial(self._call, name, module.forward)

    def feed(self, mode: int) -> Iterator[Tensor]:
        """The batches of a mode; run the network on each before the next is taken."""
        for number, batch in enumerate(self.batches):
            self._begin(self._records.get((mode, number), {}))
            yield batch
        self._begin({})

    def advance(self, layer: str, switch: Callable[[bool], None]) -> None:
        """Record up to a layer that is called once.

        The network must be in its original state. When the records would exceed the memory, those of an earlier layer
        stay.

        Args:
            layer: The name of the layer.
            switch: `switch(True)` begins mode 1, `switch(False)` ends it.
        """
        stop = next((number for number, call in enumerate(self._calls) if call.module == layer), None)
        if stop is None:
            return
        frontier = self._frontier(stop)
        size = sum(self._calls[number].bytes for number in frontier) * self.modes * sum(map(len, self.batches))
        if size > self.memory or not self._agrees(stop, frontier):
            return
        records = {}
        for mode in range(self.modes):
            switch(mode == 1)
            for number, batch in enumerate(self.batches):
                try:
                    records[mode, number] = self._record(self._records.pop((mode, number), {}), batch, stop, frontier)
                except _Astray:  # this batch takes another path through the network than the two images
                    self._records, self.replayed, self._calls = {}, frozenset(), []
                    switch(False)
                    return
        switch(False)
        self._records = records
        inside = (i for number in frontier for i in range(number, self._calls[number].end))
        self.replayed = frozenset(self._calls[i].module for i in inside)

    def _call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The replacement of a module's forward method."""
        number, self._count = self._count, self._count + 1
        if number == self._stop:
            raise _Reached
        if number in self._known:
            call = self._calls[number]
            if call.module != name:
                raise _Astray
            self._count = call.end
            output = self._known[number]
            if number in self._wanted:
                self._taken[number] = output
            return output.clone() if call.frail else output
        output = forward(*args, **kwargs)
        if number in self._wanted:
            call = self._calls[number]
            if call.module != name or call.end != self._count or not isinstance(output, Tensor):
                raise _Astray
            self._taken[number] = output.clone() if call.frail else output
        return output

    def _begin(self, known: dict[int, Tensor], stop: int = -1, wanted: frozenset[int] = frozenset()) -> None:
        self._count, self._stop, self._known, self._wanted, self._taken = 0, stop, known, wanted, {}

    def _record(self, known: dict[int, Tensor], batch: Tensor, stop: int, wanted: frozenset[int]) -> dict[int, Tensor]:
        """The outputs of the wanted calls on a batch, which is run up to the call `stop`."""
        self._begin(known, stop, wanted)
        with contextlib.suppress(_Reached):
            self.model(batch)
        taken = self._taken
        self._begin({})
        if set(taken) != wanted:
            raise _Astray
        return taken

    def _look(self, images: Tensor) -> list[_Call]:
        """All calls of a forward pass on a few images."""
        calls: list[_Call | None] = []
        outputs: dict[int, tuple[Tensor, int]] = {}

        def watch(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            number = len(calls)
            calls.append(None)
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            before = [_version(value) for value in given]
            output = forward(*args, **kwargs)
            size = 0
            # A module that changes its input in place must run again, so its output is not recorded.
            if isinstance(output, Tensor) and before == [_version(value) for value in given]:
                outputs[number] = output, _version(output)
                size = output.nbytes // len(images)
            calls[number] = _Call(name, len(calls), size, False)
            return output

        watched = [module for module in self._names if not isinstance(module, torch.jit.ScriptModule)]
        for module in watched:
            module.forward = partial(watch, self._names[module], module.forward)
        try:
            with torch.no_grad():
                self.model(images)
        finally:
            for module in watched:
                del module.forward
        seen = []
        for number, call in enumerate(calls):
            assert call is not None
            frail = number in outputs and _version(outputs[number][0]) != outputs[number][1]
            seen.append(_Call(call.module, call.end, call.bytes, frail))
        return seen

    def _frontier(self, stop: int) -> frozenset[int]:
        """The outermost calls that have ended before the call `stop` and can be recorded.

        A BatchNorm that is called both before and after `stop` gets other statistics because of the changed layer, so
        everything after its first call changes, too.
        """
        norms = batchnorms(self.model)
        while shared := {call.module for call in self._calls[stop:] if call.module in norms} & {
            call.module for call in self._calls[:stop]
        }:
            stop = next(number for number, call in enumerate(self._calls) if call.module in shared)
        outermost, number = [], 0
        while number < stop:
            call = self._calls[number]
            if call.end <= stop and call.bytes:
                outermost.append(number)
                number = call.end
            else:
                number += 1
        return frozenset(outermost)

    def _agrees(self, stop: int, frontier: frozenset[int]) -> bool:
        """Whether the outputs with recorded calls equal those without on two images."""
        images = self.batches[0][:2]
        self._begin({})
        expected = self.model(images)
        try:
            known = self._record({}, images, stop, frontier)
            self._begin(known)
            return torch.equal(self.model(images), expected)
        except _Astray:
            return False
        finally:
            self._begin({})


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return -1 if tensor.is_inference() else tensor._version
