"""A recipe carried out on a live network: the one table that joins decisions (`spaces`) and acts (`runners.operators`).

The order is the order of surgery (`spaces.recipe.ORDER`). Whole blocks and channels go for good; sparsity and weight
bits are parametrizations, so that recovery trains what will ship; `freeze` then turns them into integers and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import RecipeError
from ..spaces.recipe import ORDER, Prune, Quantize, Recipe, Sparsify, Student
from ..spaces.space import refusal
from ..spaces.structure import Structure, inside
from .calibration import Calibration
from .library import LayerLibrary, Method, shaped
from .operators.prune import prune_channels
from .operators.quantize import FakeQuantize, codes


@dataclass(frozen=True)
class FrozenWeight:
    """A layer's weight as it ships: integer codes (float tensor) and a scale per output channel, or just its width."""

    weight_bits: int
    activation_bits: int = 32
    codes: Tensor | None = None
    scale: Tensor | None = None


# What every act is given: the network, the recipe, its structure, an example input, the library and the calibration if there are.
_Act = Callable[[nn.Module, Recipe, Structure, Tensor, LayerLibrary | None, Calibration | None], None]


def drop_blocks(
    model: nn.Module,
    recipe: Recipe,
    structure: Structure,
    example: Tensor,
    library: LayerLibrary | None,
    calibration: Calibration | None,
) -> None:
    for step in recipe.of(Student):
        for name in step.drop:
            model.set_submodule(name, nn.Identity())


def remove_channels(
    model: nn.Module,
    recipe: Recipe,
    structure: Structure,
    example: Tensor,
    library: LayerLibrary | None,
    calibration: Calibration | None,
) -> None:
    group_of = {layer.name: layer.output for layer in structure.layers if layer.output}
    prune_channels(model, {step.group: step.keep for step in recipe.of(Prune)}, group_of, example)


def shape_weights(
    model: nn.Module,
    recipe: Recipe,
    structure: Structure,
    example: Tensor,
    library: LayerLibrary | None,
    calibration: Calibration | None,
) -> None:
    """Zeros first, then integers: one parametrization per layer, because the scale must not see what is zeroed."""
    sparse = {step.layer: step for step in recipe.of(Sparsify)}
    quantized = {step.layer: step for step in recipe.of(Quantize)}
    levels = {name: _level(sparse.get(name), quantized.get(name)) for name in sorted({*sparse, *quantized})}
    statistics = None
    if calibration and any(method.at(bits, ratio).needs for bits, ratio, method in levels.values()):
        operated = any(ORDER.index(type(step)) < ORDER.index(Sparsify) for step in recipe.steps)
        statistics = calibration.after(model) if operated else calibration.untouched
    for name, (bits, ratio, method) in levels.items():
        layer = model.get_submodule(name)
        weight = layer.weight.detach()  # type: ignore[operator,union-attr]
        evidence = statistics[name] if statistics else None
        made = (library.shaped if library else shaped)(weight, bits, ratio, method, evidence)
        if made.weight is not None:
            weight.copy_(made.weight)
        fake = FakeQuantize(weight, bits, made.mask, made.scale)
        parametrize.register_parametrization(layer, "weight", fake, unsafe=True)


def _level(sparse: Sparsify | None, quantized: Quantize | None) -> tuple[int, float, Method]:
    zeros, codes = sparse or Sparsify("", 0.0), quantized or Quantize("", 32)
    return codes.weight_bits, zeros.ratio, Method(zeros.criterion, zeros.pattern, codes.rounding, codes.ranges)


# Sparsify and Quantize share one act; a new technique is one line here and one step in `spaces.recipe`.
ACTS: tuple[tuple[tuple[type, ...], _Act], ...] = (
    ((Student,), drop_blocks),
    ((Prune,), remove_channels),
    ((Sparsify, Quantize), shape_weights),
)


def check_fits(recipe: Recipe, structure: Structure) -> None:
    """Raises `RecipeError` with every step that names a layer, group or block which this network does not have."""
    layers = {layer.name for layer in structure.layers}
    groups = {group.name: group.channels for group in structure.groups}
    dropped = tuple(name for step in recipe.of(Student) for name in step.drop)
    problems = [f"block {name!r} cannot be left out here" for name in dropped if name not in structure.blocks]
    for step in recipe.of(Prune):
        if step.group not in groups:
            problems.append(f"no dependency group {step.group!r}")
        elif step.keep > groups[step.group]:
            problems.append(f"group {step.group!r} has {groups[step.group]} channels, {step.keep} cannot be kept")
    for name in [*(step.layer for step in recipe.of(Sparsify)), *(step.layer for step in recipe.of(Quantize))]:
        if name not in layers:
            problems.append(f"no layer {name!r} that can be compressed")
        elif inside(name, dropped):
            problems.append(f"layer {name!r} is in a block that the recipe leaves out")
    problems += _impossible(recipe, structure)
    if problems:
        choices = {"layers": sorted(layers), "groups of channels": sorted(groups), "blocks": structure.blocks}
        here = [f"{kind} here: {', '.join(names) or 'none'}" for kind, names in choices.items()]
        raise RecipeError("\n".join(["the recipe does not fit this network:", *(f"  - {p}" for p in problems), *here]))


def _impossible(recipe: Recipe, structure: Structure) -> list[str]:
    """What a layer's shape rules out."""
    problems = []
    for layer in structure.layers:
        steps: list[Sparsify | Quantize] = [*recipe.of(Sparsify), *recipe.of(Quantize)]
        for step in steps:
            if step.layer == layer.name:
                asked = {name: getattr(step, name, "") for name in ("criterion", "rounding", "pattern")}
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

    With a library layers are compressed once and then looked up; the network is the same to the bit. calibration: of the
    network before any step; raises `ValueError` when a step needs it and it is None.
    """
    check_fits(recipe, structure)
    model.eval()
    for kinds, act in ACTS:
        if any(recipe.of(kind) for kind in kinds):
            act(model, recipe, structure, example, library, calibration)
    return model


@torch.no_grad()
def freeze(model: nn.Module, recipe: Recipe) -> dict[str, FrozenWeight]:
    """Replace every parametrized weight by the numbers that ship, in place, and return them by layer."""
    activations = {step.layer: step.activation_bits for step in recipe.of(Quantize)}
    frozen = {}
    model.eval()
    for name, layer in list(model.named_modules()):
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        fake = layer.parametrizations["weight"][0]  # type: ignore[index,union-attr]
        assert isinstance(fake, FakeQuantize)
        weight = layer.parametrizations["weight"].original.detach()  # type: ignore[index,union-attr]
        if fake.mask is not None:
            weight = weight * fake.mask
        if fake.scale is not None:
            scale = fake.scale.detach().clamp_min(1e-12)
            frozen[name] = FrozenWeight(fake.bits, activations[name], codes(weight, scale, fake.bits), scale.clone())
        elif fake.bits == 16:
            frozen[name] = FrozenWeight(16)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        if name in frozen and frozen[name].codes is not None:
            whole = frozen[name].codes * scale.view(-1, *[1] * (weight.ndim - 1))  # type: ignore[operator]
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
