"""A compressed network with the numbers that ship in the place of its parametrizations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...spaces.recipe import Recipe
from ...spaces.steps import LayerStep
from ...spaces.structure import Structure
from ...spaces.techniques.table import technique_of
from ..operators.frozen import Freezable, FrozenWeight
from ..operators.lowrank import parts


@torch.no_grad()
def freeze(model: nn.Module, recipe: Recipe) -> dict[str, FrozenWeight]:
    """Replace every parametrized weight by the numbers that ship, in place, and return how they are stored by layer.

    Weights that ship as floats are not listed.
    """
    storing = [step for step in recipe.of(LayerStep) if (technique := technique_of(step)) and technique.stores]
    steps = {part: step for step in storing for part in parts(model, step.layer)}
    frozen = {}
    model.eval()
    for name, layer in list(model.named_modules()):
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        shown = layer.parametrizations["weight"]  # type: ignore[index,union-attr]  # torch has no type for it
        assert isinstance(shown, parametrize.ParametrizationList)
        weight: Tensor = shown.original.detach()  # type: ignore[operator]  # a parameter, under a name set at run time
        for fake in shown:
            assert isinstance(fake, Freezable)
            weight, stored = fake.frozen(weight, steps.get(name))
            if stored is not None:
                frozen[name] = stored
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        assert isinstance(layer.weight, Tensor)
        layer.weight.copy_(weight)
    return frozen


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
