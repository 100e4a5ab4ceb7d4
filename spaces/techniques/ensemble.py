"""Several compressed networks in one file, whose outputs are averaged.

What needs to read the recipes of the members stands in `spaces.recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import RecipeError
from ..steps import Step, Steps
from .technique import Technique


@dataclass(frozen=True)
class Ensemble(Step):
    """Average the outputs of 2 to 4 compressed networks, each the JSON of its recipe; it stands alone in a recipe."""

    members: tuple[str, ...]


def _check(step: Ensemble) -> None:
    count = len(step.members)
    if not 2 <= count <= 4:
        raise RecipeError(f"ensemble: {count} different network{'s' * (count != 1)}; it averages 2 to 4")


def _problems(recipe: Steps) -> None:
    if recipe.of(Ensemble) and len(recipe.steps) > 1:
        raise RecipeError("ensemble: it stands alone in a recipe; write other steps into the recipes of its networks")


TECHNIQUE = Technique(Ensemble, check=_check, problems=_problems)
