"""Channels that are really removed, a dependency group at a time.

Width is no step of its own: it narrows every group, so it is written into the recipe as `Prune` steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import RecipeError
from ..rules import Axis
from ..steps import Step, Steps, counted
from ..structure import Group, Structure, inside, kept_channels
from ..values import Number
from .student import blocks, dropped
from .technique import Choices, Encoding, Key, RuleWords, Technique


@dataclass(frozen=True)
class Prune(Step):
    """Keep `keep` channels of a dependency group (named by its first layer); the others are really removed."""

    removes: ClassVar[bool] = True

    group: str
    keep: int

    @property
    def target(self) -> str:
        """The group."""
        return self.group


def _check(step: Prune) -> None:
    if step.keep < 1:
        raise RecipeError(f"prune {step.group}: keep = {step.keep}; at least 1 channel must stay")


def _describe(steps: Sequence[Prune]) -> list[str]:
    return [f"{counted(steps, 'group')} narrowed"]


def _fits(step: Prune, recipe: Steps, structure: Structure) -> list[str]:
    group = next((group for group in structure.groups if group.name == step.group), None)
    if group is None:
        return [f"no dependency group {step.group!r}"]
    if step.keep > group.channels:
        return [f"group {step.group!r} has {group.channels} channels, {step.keep} cannot be kept"]
    if step.keep % group.unit:
        return [
            f"group {step.group!r} is {group.channels // group.unit} attention heads of {group.unit} channels, "
            "which go "
            f"whole: keep a multiple of {group.unit}, not {step.keep}"
        ]
    return []


def kept(group: Group, width: float, removed: float) -> int:
    """The channels of a group that stay at a width, when a share of the rest is removed."""
    return kept_channels(group.channels, width * (1 - removed), group.round_to)


def makers(structure: Structure, drop: tuple[str, ...]) -> set[str | None]:
    """The groups whose channels some layer makes when these blocks are left out."""
    return {layer.output for layer in structure.layers if not inside(layer.name, drop)}


def _steps(space: Any, choices: Choices) -> list[Step]:
    made = makers(choices.structure, blocks(choices.structure, choices.network["depth"]))
    steps: list[Step] = []
    for group in choices.structure.groups:
        keep = kept(group, choices.network["width"], choices.targets.get(("channels", group.name), 0.0))
        if group.name in made and keep < group.channels:
            steps.append(Prune(group.name, keep))
    return steps


def _width_axes(key: Key, entries: Any, structure: Structure, idle: dict[str, str]) -> Iterable[Axis]:
    return (
        [Axis("width", "width", tuple(group.name for group in structure.groups), entries)] if structure.groups else []
    )


def _common(axis: Axis, targets: Iterable[str], of: Encoding, keep: Mapping[str, int], width: float) -> Any:
    """The least share whose removal keeps these channels of all targets at a width, or None."""
    shares = set(axis.choices)
    for name in targets:
        group = of.structure.group(name)
        shares &= {share for share in axis.choices if kept(group, width, share) == keep.get(name, group.channels)}
    return min(shares, default=None)


def _explains(width: float, of: Encoding) -> bool:
    """Whether the removed channels of a recipe can come of a width."""
    keep = {step.group: step.keep for step in of.recipe.of(Prune)}
    drop = dropped(of.recipe)
    removed = {}
    for axis in of.axes:
        if axis.kind == "channels":
            share = _common(axis, [name for name in axis.targets if not inside(name, drop)], of, keep, width)
            if share is None:
                return False
            removed.update(dict.fromkeys(axis.targets, share))
    made = makers(of.structure, drop)
    return all(
        kept(group, width, removed.get(group.name, 0.0)) == keep.get(group.name, group.channels)
        for group in of.structure.groups
        if group.name in made
    )


def _width(of: Encoding) -> Any:
    return next((width for width in of.space.width if _explains(width, of)), None)


def _chosen_width(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    return {_width(of)}


def _chosen_channels(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    width = _width(of)
    keep = {step.group: step.keep for step in of.recipe.of(Prune)}
    return {None if width is None else _common(axis, targets, of, keep, width)}


WIDTH = Key(
    "width",
    Number(above=0, most=1),
    "Shares of all channels that stay, 0 < x <= 1. Default: [1.0], all.",
    _chosen_width,
    allowed="shares above 0, up to 1",
    default=(1.0,),
    axes=_width_axes,
)
CHANNELS = Key(
    "channels",
    Number(least=0, below=1),
    "Shares of a dependency group's channels that are really removed, 0 <= x < 1. Choices or rules.",
    _chosen_channels,
    of="group",
    rule=RuleWords(
        "ShareRule",
        "Shares of the selected groups' channels that may be removed.",
        "Shares, 0 <= x < 1, in ascending or descending order. Required.",
    ),
    allowed="shares from 0, below 1",
)
TECHNIQUE = Technique(
    Prune,
    check=_check,
    describe=_describe,
    fits=_fits,
    keys=(WIDTH, CHANNELS),
    network_steps=_steps,
)
