"""Whether a recipe fits a network, before anything is done to it."""

from __future__ import annotations

from ...errors import RecipeError
from ...spaces.recipe import Recipe
from ...spaces.steps import LayerStep
from ...spaces.structure import Structure, inside
from ...spaces.techniques.student import dropped
from ...spaces.techniques.table import technique_of


def check_fits(recipe: Recipe, structure: Structure) -> None:
    """Raises `RecipeError` with every step that names what this network does not have, or that it cannot have."""
    networks = recipe.networks()
    if networks != [recipe]:
        for network in networks:
            check_fits(network, structure)
        return
    structure = structure.of(recipe)
    layers = {layer.name for layer in structure.layers}
    gone = dropped(recipe)
    problems = []
    for step in recipe.steps:
        if isinstance(step, LayerStep) and step.layer not in layers:
            problems.append(f"no layer {step.layer!r} that can be compressed")
        elif isinstance(step, LayerStep) and inside(step.layer, gone):
            problems.append(f"layer {step.layer!r} is in a block that the recipe leaves out")
        elif technique := technique_of(step):
            problems += technique.fits(step, recipe, structure)
    if problems:
        choices = {
            "layers": sorted(layers),
            "groups of channels": sorted(group.name for group in structure.groups),
            "blocks": structure.blocks,
        }
        here = [f"{kind} here: {', '.join(names) or 'none'}" for kind, names in choices.items()]
        raise RecipeError("\n".join(["the recipe does not fit this network:", *(f"  - {p}" for p in problems), *here]))
