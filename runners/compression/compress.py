"""A recipe carried out on a live network: the one table that joins decisions (`spaces`) and acts (`runners.operators`).

The order is the order of surgery (`spaces.recipe.ORDER`). Whole blocks and channels go for good, and so does a layer that
becomes two of low rank; what a recipe does to that layer afterwards it does to both. Then channels are equalised, which
changes weights and not what the network computes. Sparsity, codebooks and weight bits are parametrizations, so that recovery
trains what will ship; `freeze` then turns them into indices, integers and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import RecipeError
from ...spaces.recipe import Cluster, Ensemble, Equalize, LowRank, Prune, Quantize, Recipe, Sparsify, Student
from ...spaces.space import refusal
from ...spaces.structure import Layer, Structure, inside, largest_rank, no_pairs, shapes, sides
from ..operators.cluster import SharedWeights, shared
from ..operators.equalize import channel_peaks, equalizing_scales, find_pairs, scale_channels
from ..operators.fold import channel_factors
from ..operators.lowrank import factored, parts
from ..operators.moments import DIVIDED
from ..operators.prune import prune_channels
from ..operators.quantize import FakeQuantize, codes
from .calibration import Calibration
from .library import LayerLibrary, Method, compress_layer


@dataclass(frozen=True)
class FrozenWeight:
    """A layer's weight as it ships: integer codes (float tensor) and a scale per output channel, or just its width.

    group_size: then there is a scale for each group of so many weights of a row.

    zero: the zero point of an affine grid; then the scale is one for the whole weight, codes are counted from the zero point, and a
    channel's step was `scale / factor`, where factor is what folding multiplied the output channels by, None for no folding.

    codebook: `[values]`; then the codes are indices into it. dynamic: the range of 8-bit activations is found at run time.
    """

    weight_bits: int
    activation_bits: int = 32
    codes: Tensor | None = None
    scale: Tensor | None = None
    codebook: Tensor | None = None
    dynamic: bool = False
    group_size: int = 0
    zero: int | None = None
    factor: Tensor | None = None


@dataclass(frozen=True)
class CompressionContext:
    """What every act is given: the network, the recipe, and what is known of the network before any step."""

    model: nn.Module
    recipe: Recipe
    structure: Structure
    example: Tensor
    library: LayerLibrary | None
    calibration: Calibration | None


class Skip(nn.Module):
    """What a block that is left out leaves behind: its first input, whatever else it was given (masks, for one)."""

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return x


def drop_blocks(context: CompressionContext) -> None:
    for step in context.recipe.of(Student):
        for name in step.drop:
            context.model.set_submodule(name, Skip())


def remove_channels(context: CompressionContext) -> None:
    group_of = {layer.name: layer.output for layer in context.structure.layers if layer.output}
    keep = {step.group: step.keep for step in context.recipe.of(Prune)}
    prune_channels(context.model, keep, group_of, context.example)


def factor_layers(context: CompressionContext) -> None:
    model, recipe, library = context.model, context.recipe, context.library
    for step in recipe.of(LowRank):
        layer = model.get_submodule(step.layer)
        vectors = library.basis(layer.weight) if library else None  # type: ignore[arg-type]
        model.set_submodule(step.layer, factored(layer, step.rank, vectors))
    try:
        with torch.no_grad():
            model(context.example)
    except Exception as error:  # whatever a network raises that reads its layers' attributes itself
        names = ", ".join(step.layer for step in recipe.of(LowRank))
        raise RecipeError(f"the network does not run with layers of low rank in the place of {names}: "
                          f"{type(error).__name__}: {error}; leave out the step of the layer that it names") from error  # fmt: skip


def equalize_channels(context: CompressionContext) -> None:
    """Scales of a network that was cut down are found in a copy whose BatchNorms fit it again; what it computes stays."""
    model, calibration = context.model, context.calibration
    (step,) = context.recipe.of(Equalize)
    pairs, reasons = find_pairs(model, context.example)
    if not pairs:
        raise RecipeError(f"the recipe does not fit this network: equalize: {no_pairs(reasons.items())}")
    if step.by == "activations" and calibration is None:
        raise ValueError("equalize by activations needs the ranges of channels: give compress() a calibration")
    repaired = calibration.after(model).model if calibration and _cut(context.recipe) else model
    peaks = channel_peaks(repaired, pairs, calibration.parts) if calibration and step.by == "activations" else None
    for pair, scales in zip(pairs, equalizing_scales(repaired, pairs, peaks), strict=True):
        scale_channels(model, pair, scales)
        # Whoever compares the outputs with those of the original has to know. No part of the state: it is found anew.
        if not pair.norm:
            model.get_submodule(pair.maker).register_buffer(DIVIDED, scales, persistent=False)


def _cut(recipe: Recipe) -> bool:
    """Whether blocks or channels are gone, or layers were factored."""
    return any(isinstance(step, Student | Prune | LowRank) for step in recipe.steps)


def shape_weights(context: CompressionContext) -> None:
    """Zeros first: one parametrization per layer, because neither scales nor codebooks must see what is zeroed."""
    model, recipe, library, calibration = context.model, context.recipe, context.library, context.calibration
    sparse = {part: step for step in recipe.of(Sparsify) for part in parts(model, step.layer)}
    quantized = {part: step for step in recipe.of(Quantize) for part in parts(model, step.layer)}
    clustered = {part: step.bits for step in recipe.of(Cluster) for part in parts(model, step.layer)}
    names = sorted({*sparse, *quantized, *clustered})
    levels = {name: _level(sparse.get(name), quantized.get(name)) for name in names}
    statistics = None
    if calibration and any(method.at(bits, ratio).needs for bits, ratio, method in levels.values()):
        if _cut(recipe):
            statistics = calibration.after(model)
        else:
            statistics = calibration.of(model) if recipe.of(Equalize) else calibration.untouched
    norms = folded_norms(model, context.structure)
    for name, (bits, ratio, method) in levels.items():
        layer = model.get_submodule(name)
        weight = layer.weight.detach()  # type: ignore[operator,union-attr]
        layer_statistics = statistics[name] if statistics else None
        norm = norms.get(name) if method.scheme == "affine" else None
        factor = channel_factors(norm) if norm is not None else None
        made = (library.compress_layer if library else compress_layer)(
            weight, bits, ratio, method, layer_statistics, factor=factor
        )
        if made.weight is not None:
            weight.copy_(made.weight)
        shows: nn.Module = FakeQuantize(
            weight, bits, made.mask, made.scale, method.pattern, method.group_size, made.zero, norm
        )
        if name in clustered:
            indices, codebook = shared(weight, clustered[name], made.mask)
            shows = SharedWeights(indices, codebook, clustered[name], zero=made.mask is not None)
        parametrize.register_parametrization(layer, "weight", shows, unsafe=True)


def folded_norms(model: nn.Module, structure: Structure) -> dict[str, nn.Module]:
    """By layer the BatchNorm that will be folded into it; of a layer of low rank, into its second part."""
    modules = dict(model.named_modules())
    there = [(layer, norm) for layer, norm in structure.folds if layer in modules and norm in modules]
    return {parts(model, layer)[-1]: modules[norm] for layer, norm in there}


def one_factor(frozen: Mapping[str, FrozenWeight], model: nn.Module, structure: Structure) -> set[str]:
    """The layers whose weights have one scale for all channels, and the names of the BatchNorms behind these.

    What comes after `freeze` must multiply all output channels of such a layer by the same factor.
    """
    whole = {name for name, weight in frozen.items() if weight.zero is not None}
    behind = set(map(id, (norm for layer, norm in folded_norms(model, structure).items() if layer in whole)))
    return whole | {name for name, module in model.named_modules() if id(module) in behind}


def _level(sparse: Sparsify | None, quantized: Quantize | None) -> tuple[int, float, Method]:
    zeros, codes = sparse or Sparsify("", 0.0), quantized or Quantize("", 32)
    return (
        codes.weight_bits,
        zeros.ratio,
        Method(zeros.criterion, zeros.pattern, codes.rounding, codes.ranges, codes.group_size, codes.scheme),
    )


# Sparsify, Cluster and Quantize share one act; a new technique is one line here and one step in `spaces.recipe`.
PASSES: tuple[tuple[tuple[type, ...], Callable[[CompressionContext], None]], ...] = (
    ((Student,), drop_blocks),
    ((Prune,), remove_channels),
    ((LowRank,), factor_layers),
    ((Equalize,), equalize_channels),
    ((Sparsify, Cluster, Quantize), shape_weights),
)


def check_fits(recipe: Recipe, structure: Structure) -> None:
    """Raises `RecipeError` with every step that names what this network does not have, or a rank that saves nothing."""
    if recipe.of(Ensemble):
        for network in recipe.networks():
            check_fits(network, structure)
        return
    structure = structure.of(recipe)
    layers = {layer.name: layer for layer in structure.layers}
    groups = {group.name: group for group in structure.groups}
    dropped = tuple(name for step in recipe.of(Student) for name in step.drop)
    problems = [f"block {name!r} cannot be left out here" for name in dropped if name not in structure.blocks]
    for step in recipe.of(Prune):
        if step.group not in groups:
            problems.append(f"no dependency group {step.group!r}")
            continue
        channels, unit = groups[step.group].channels, groups[step.group].unit
        if step.keep > channels:
            problems.append(f"group {step.group!r} has {channels} channels, {step.keep} cannot be kept")
        elif step.keep % unit:
            problems.append(
                f"group {step.group!r} is {channels // unit} attention heads of {unit} channels, which go whole: "
                f"keep a multiple of {unit}, not {step.keep}"
            )
    for one in recipe.steps:
        if not isinstance(one, LowRank | Sparsify | Cluster | Quantize):
            continue
        if one.layer not in layers:
            problems.append(f"no layer {one.layer!r} that can be compressed")
        elif inside(one.layer, dropped):
            problems.append(f"layer {one.layer!r} is in a block that the recipe leaves out")
        elif isinstance(one, LowRank):
            problems += _rank_problems(one, layers[one.layer], shapes(structure, recipe)[one.layer])
    if recipe.of(Equalize) and not structure.pairs:
        problems.append(f"equalize: {no_pairs(structure.unpaired)}")
    problems += _impossible(recipe, structure)
    if problems:
        choices = {"layers": sorted(layers), "groups of channels": sorted(groups), "blocks": structure.blocks}
        here = [f"{kind} here: {', '.join(names) or 'none'}" for kind, names in choices.items()]
        raise RecipeError("\n".join(["the recipe does not fit this network:", *(f"  - {p}" for p in problems), *here]))


def _rank_problems(step: LowRank, layer: Layer, shape: tuple[int, int]) -> list[str]:
    rows, columns = sides(layer, shape)
    most = largest_rank(rows, columns)
    if not layer.factorable:
        return [f"layer {layer.name!r} is a {layer.kind} convolution, whose weight is not one matrix of low rank"]
    if step.rank > most:
        other = f"choose at most {most}, or leave the step out" if most else "leave the step out"
        return [f"layer {layer.name!r}: rank {step.rank} of a {rows} x {columns} matrix saves nothing; {other}"]
    return []


def _impossible(recipe: Recipe, structure: Structure) -> list[str]:
    """What a layer's shape rules out."""
    problems = []
    for layer in structure.layers:
        steps: list[Sparsify | Quantize] = [*recipe.of(Sparsify), *recipe.of(Quantize)]
        for step in steps:
            if step.layer == layer.name:
                asked = {
                    name: getattr(step, name, "")
                    for name in ("criterion", "rounding", "pattern", "activations", "group_size")
                }
                problems += [
                    f"layer {layer.name!r}: {why}"
                    for key, value in asked.items()
                    if (why := refusal(layer, key, value))
                ]
    return problems


def compress(
    model: nn.Module,
    recipe: Recipe,
    structure: Structure,
    example: Tensor,
    library: LayerLibrary | None = None,
    calibration: Calibration | None = None,
) -> nn.Module:
    """Carry out all steps but recovery on `model`, in place; raises `RecipeError` when the recipe does not fit.

    model: the network that the recipe begins with, so the student where it names one.
    With a library layers are compressed once and then looked up; the network is the same to the bit. calibration: of the
    network before any step; raises `ValueError` when a step needs it and it is None.
    """
    check_fits(recipe, structure)
    context = CompressionContext(model.eval(), recipe, structure.of(recipe), example, library, calibration)
    for kinds, act in PASSES:
        if any(recipe.of(kind) for kind in kinds):
            act(context)
    return model


@torch.no_grad()
def freeze(model: nn.Module, recipe: Recipe) -> dict[str, FrozenWeight]:
    """Replace every parametrized weight by the numbers that ship, in place, and return them by layer."""
    steps = {part: step for step in recipe.of(Quantize) for part in parts(model, step.layer)}
    frozen = {}
    model.eval()
    for name, layer in list(model.named_modules()):
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        fake = layer.parametrizations["weight"][0]  # type: ignore[index,union-attr]
        if isinstance(fake, SharedWeights):
            frozen[name] = FrozenWeight(
                fake.bits, codes=fake.indices.float(), codebook=fake.codebook().detach().clone()
            )
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            continue
        assert isinstance(fake, FakeQuantize)
        weight = layer.parametrizations["weight"].original.detach()  # type: ignore[index,union-attr]
        if fake.mask is not None:
            weight = weight * fake.mask
        if fake.scale is not None:
            scale = fake.scale.detach().clamp_min(1e-12)
            wide = fake.step(scale, weight)
            step = steps[name]
            frozen[name] = FrozenWeight(
                fake.bits, step.activation_bits, codes(weight, wide, fake.bits, fake.zero), scale.clone(),
                dynamic=step.activations == "dynamic", group_size=fake.group_size, zero=fake.zero, factor=fake.factor,
            )  # fmt: skip
        elif fake.bits == 16:
            frozen[name] = FrozenWeight(16)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        if name in frozen and frozen[name].codes is not None:
            whole = frozen[name].codes * wide  # type: ignore[operator]
            layer.weight.copy_(whole)  # type: ignore[operator,union-attr]
        elif fake.bits != 16:
            layer.weight.copy_(weight)  # type: ignore[operator,union-attr]
    return frozen


def chunks(inputs: Tensor, size: int) -> Sequence[Tensor]:
    """Batches of `size`, the last one possibly smaller but never a single input, which BatchNorm cannot use."""
    parts: list[Tensor] = list(inputs.split(size))  # type: ignore[no-untyped-call]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
