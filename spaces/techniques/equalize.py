"""Channels of very different range that are made alike where only homogeneous functions lie between two layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import RecipeError
from ..rules import Axis
from ..steps import Step, Steps
from ..structure import Structure
from ..values import OneOf
from .recover import Recover
from .student import Student
from .technique import Choices, Encoding, Key, Technique

EQUALIZATIONS = ("weights", "activations")


@dataclass(frozen=True)
class Equalize(Step):
    """Divide channels where they are made and multiply them where they are read, so that their ranges become alike.

    Cross-layer equalization (Nagel et al. 2019), wherever only functions with f(s x) = s f(x) lie between (ReLU,
    pooling); the network computes what it did. by: weights, the paper's way: the largest weights on both sides;
    activations: the largest values on the calibration images and the largest weights that read them.
    """

    by: str = "weights"


def no_pairs(reasons: Iterable[tuple[str, str]]) -> str:
    """What to say of a network without a pair for `Equalize`, from its `unpaired`."""
    listed = [f"{layer}: {reason}" for layer, reason in reasons]
    more = f"; and {len(listed) - 3} more" if len(listed) > 3 else ""
    return (
        "no layer's outputs reach only other layers, through nothing but ReLU, LeakyReLU, PReLU, pooling and "
        "reshapes; leave it out. "
        f"Outputs of {'; '.join(listed[:3])}{more}"
    )


def _check(step: Equalize) -> None:
    if step.by not in EQUALIZATIONS:
        raise RecipeError(f"equalize: by = {step.by!r}; choose from {', '.join(EQUALIZATIONS)}")


def _problems(recipe: Steps) -> None:
    if recipe.of(Equalize) and any(step.features for step in recipe.of(Recover)):
        raise RecipeError(
            "recover: features beside equalize, which gives channels another scale than they have in the teacher; "
            "leave one out"
        )


def _describe(steps: Sequence[Equalize]) -> list[str]:
    return [f"ranges equalised (by {step.by})" for step in steps]


def _fits(step: Equalize, recipe: Steps, structure: Structure) -> list[str]:
    return [] if structure.pairs else [f"equalize: {no_pairs(structure.unpaired)}"]


def _space_problems(space: Any) -> list[str]:
    if set(space.equalize) - {"none"} and any(choice and choice.features for choice in space.recovery):
        return [
            "equalize: recovery compares features, and equalised channels have another scale than the original's; "
            "leave out one"
        ]
    return []


def _has_effect(steps: Iterable[Step], structure: Structure) -> bool:
    """Whether ranges matter beside these steps, and there is a pair of layers left."""
    steps = list(steps)
    drop = tuple(name for step in steps if isinstance(step, Student) for name in step.drop)
    return any(step.rounds for step in steps) and structure.equalizable(drop)


def _steps(space: Any, choices: Choices, made: Sequence[Step]) -> list[Step]:
    by = choices.network.get("equalize", "none")
    return [Equalize(by)] if by != "none" and _has_effect(made, choices.structure) else []


def _axes(key: Key, entries: Any, structure: Structure, idle: dict[str, str]) -> Iterable[Axis]:
    if not set(entries) - {"none"}:
        return []
    if structure.pairs:
        return [Axis("equalize", "equalize", (), entries)]
    idle["equalize"] = f"equalize: {no_pairs(structure.unpaired)}"
    return []


def _chosen(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    by = next((step.by for step in of.recipe.of(Equalize)), "none")
    return {by} if _has_effect(of.recipe.steps, of.structure) else set()


EQUALIZE = Key(
    "equalize",
    OneOf(("none", *EQUALIZATIONS)),
    "Whether channels of very different range are made alike where only ReLU, pooling and the like lie between "
    "two layers, "
    "before\nweights are rounded; what the network computes stays (Nagel et al. 2019): none; weights, by the "
    "weights on "
    "both sides;\nactivations, by the values on the calibration images and the weights that read them. Not "
    "with `features` "
    "in `recovery`.\nDefault: [none].",
    _chosen,
    default=("none",),
    axes=_axes,
)
TECHNIQUE = Technique(
    Equalize,
    check=_check,
    problems=_problems,
    describe=_describe,
    fits=_fits,
    keys=(EQUALIZE,),
    space_problems=_space_problems,
    final_steps=_steps,
)
