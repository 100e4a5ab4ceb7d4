"""A recipe carried out on a live network: the one table that joins decisions (`spaces.techniques`) and acts
(`runners.operators`).

The order is that of `spaces.techniques.table`. Whole blocks and channels go for good, and so does a layer that becomes
two of low rank; what a recipe does to that layer afterwards it does to both. Then channels are equalised, which changes
weights and not what the network computes. Sparsity, codebooks and weight bits are parametrizations, so that recovery
trains what will ship; `freeze` then turns them into indices, integers and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...spaces.recipe import Recipe
from ...spaces.steps import Step
from ...spaces.structure import Structure
from ...spaces.techniques.cluster import Cluster
from ...spaces.techniques.equalize import Equalize
from ...spaces.techniques.lowrank import LowRank
from ...spaces.techniques.prune import Prune
from ...spaces.techniques.quantize import Quantize
from ...spaces.techniques.sparsify import Sparsify
from ...spaces.techniques.student import Student, dropped
from ..operators.equalize import equalize_channels
from ..operators.lowrank import basis, factor_layers
from ..operators.prune import remove_channels
from ..operators.student import drop_blocks
from .calibration import Calibration
from .fits import check_fits
from .library import LayerLibrary
from .weights import shape_weights


@dataclass(frozen=True)
class CompressionContext:
    """What every pass is given: the network, the recipe, and what is known of the network before any step."""

    model: nn.Module
    recipe: Recipe
    structure: Structure
    example: Tensor
    library: LayerLibrary | None
    calibration: Calibration | None


def _equalize(context: CompressionContext) -> None:
    """The scales of a network that was cut down are found in a copy whose BatchNorms fit it again."""
    (step,) = context.recipe.of(Equalize)
    model, calibration = context.model, context.calibration
    cut = any(other.removes for other in context.recipe.steps)
    repaired = calibration.after(model).model if calibration and cut else None
    equalize_channels(model, step, context.example, repaired, calibration.parts if calibration else None)


# The passes in their order: of the steps of some kinds, what is done. A technique of its own is one line.
PASSES: tuple[tuple[tuple[type[Step], ...], Callable[[CompressionContext], None]], ...] = (
    ((Student,), lambda c: drop_blocks(c.model, dropped(c.recipe))),
    ((Prune,), lambda c: remove_channels(c.model, c.recipe.of(Prune), c.structure, c.example)),
    (
        (LowRank,),
        lambda c: factor_layers(c.model, c.recipe.of(LowRank), c.example, c.library.basis if c.library else basis),
    ),
    ((Equalize,), _equalize),
    ((Sparsify, Cluster, Quantize), lambda c: shape_weights(c.model, c.recipe, c.structure, c.library, c.calibration)),
)


def compress(
    model: nn.Module,
    recipe: Recipe,
    structure: Structure,
    example: Tensor,
    library: LayerLibrary | None = None,
    calibration: Calibration | None = None,
) -> nn.Module:
    """Carry out all steps but recovery on `model`, in place; raises `RecipeError` when the recipe does not fit.

    model: the network that the recipe begins with, so the student where it names one. With a library layers are
    compressed once and then looked up; the network is the same to the bit. calibration: of the network before any step;
    raises `ValueError` when a step needs it and it is None.
    """
    check_fits(recipe, structure)
    context = CompressionContext(model.eval(), recipe, structure.of(recipe), example, library, calibration)
    for kinds, act in PASSES:
        if any(recipe.of(kind) for kind in kinds):
            act(context)
    return model


def chunks(inputs: Tensor, size: int) -> Sequence[Tensor]:
    """Batches of `size`, the last one possibly smaller but never a single input, which BatchNorm cannot use."""
    parts: list[Tensor] = list(inputs.split(size))  # type: ignore[no-untyped-call]  # torch's stub
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
