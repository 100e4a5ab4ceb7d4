"""Layers that become two thinner ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...errors import RecipeError
from ..rules import Axis, rule_axes
from ..shapes import kept_rank, largest_rank, shapes, sides
from ..steps import LayerStep, Step, Steps, counted
from ..structure import Layer, Structure
from ..values import Number
from .technique import Encoding, Key, RuleWords, Technique


@dataclass(frozen=True)
class LowRank(LayerStep):
    """Replace a linear layer or a convolution by two of inner width `rank`; later steps for its name apply to both."""

    removes: ClassVar[bool] = True

    rank: int


def _check(step: LowRank) -> None:
    if step.rank < 1:
        raise RecipeError(f"lowrank {step.layer}: rank = {step.rank}; at least 1 must stay")


def _describe(steps: Sequence[LowRank]) -> list[str]:
    return [f"{counted(steps, 'layer')} of low rank"]


def _fits(step: LowRank, recipe: Steps, structure: Structure) -> list[str]:
    layer = structure.layer(step.layer)
    if not layer.factorable:
        return [f"layer {layer.name!r} is a {layer.kind} convolution, whose weight is not one matrix of low rank"]
    rows, columns = sides(layer, shapes(structure, recipe)[layer.name])
    most = largest_rank(rows, columns)
    if step.rank > most:
        other = f"choose at most {most}, or leave the step out" if most else "leave the step out"
        return [f"layer {layer.name!r}: rank {step.rank} of a {rows} x {columns} matrix saves nothing; {other}"]
    return []


def _step(layer: Layer, chosen: Mapping[str, Any], shape: tuple[int, int], stored: Step | None) -> Step | None:
    share = chosen.get("rank", 1.0)
    rank = kept_rank(*sides(layer, shape), share) if share < 1 else None
    return LowRank(layer.name, rank) if rank else None


def _axes(key: Key, entries: Any, structure: Structure, idle: dict[str, str]) -> Iterable[Axis]:
    """Without layers that cannot be factored and without shares that save nothing in any layer."""
    for axis in rule_axes("rank", entries, [layer.name for layer in structure.layers], structure, idle):
        layers = [layer for name in axis.targets if (layer := structure.layer(name)).factorable]
        matrices = [sides(layer, (layer.weight_shape[0], layer.weight_shape[1])) for layer in layers]
        choices = tuple(
            share for share in axis.choices if share == 1 or any(kept_rank(*matrix, share) for matrix in matrices)
        )
        if any(share < 1 for share in choices):
            yield replace(axis, targets=tuple(layer.name for layer in layers), choices=choices)


def _chosen(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    ranks = {step.layer: step.rank for step in of.recipe.of(LowRank)}
    narrowed = shapes(of.structure, of.recipe)
    shares = set(axis.choices)
    for name in targets:
        matrix = sides(of.structure.layer(name), narrowed[name])
        shares &= {share for share in shares if (kept_rank(*matrix, share) if share < 1 else None) == ranks.get(name)}
    return {min(shares, default=None)}


RANK = Key(
    "rank",
    Number(above=0, most=1),
    "Shares of a layer's full rank at which it becomes two thinner layers, 0 < x <= 1; 1 leaves it as it is. A share "
    "that\nwould save neither bytes nor MACs is left out (about 0.5 and more for square linear layers). Choices or "
    "rules.",
    _chosen,
    of="layer",
    rule=RuleWords(
        "RankRule",
        "Ranks that the selected layers may be reduced to.",
        "Shares of the full rank, 0 < x <= 1, in ascending or descending order; 1 leaves the layer as it is. Required.",
    ),
    allowed="shares above 0, up to 1",
    axes=_axes,
)


TECHNIQUE = Technique(
    LowRank,
    check=_check,
    describe=_describe,
    fits=_fits,
    keys=(RANK,),
    layer_step=_step,
    form=lambda step: {"rank": step.rank},
)
