"""The table of techniques: the one place that joins them.

A technique of your own is a file beside this one, an import and a line in `TECHNIQUES`, a field of `SpaceKeys` for each
of its keys, and a line in `runners.compression.compress.PASSES` (see docs/techniques.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..plain import later
from ..rules import Rule
from ..steps import LayerStep, Step
from ..structure import Layer
from . import cluster, ensemble, equalize, lowrank, prune, quantize, recover, sparsify, student
from .recover import Recover
from .student import Student
from .technique import Key, Technique, WeightForm

# The order of the passes: a step may rely on all that stand before it. (Beside an ensemble no other stands.)
TECHNIQUES: tuple[Technique, ...] = (
    student.TECHNIQUE,
    prune.TECHNIQUE,
    lowrank.TECHNIQUE,
    equalize.TECHNIQUE,
    sparsify.TECHNIQUE,
    cluster.TECHNIQUE,
    quantize.TECHNIQUE,
    recover.TECHNIQUE,
    ensemble.TECHNIQUE,
)


@dataclass(frozen=True)
class SpaceKeys:
    """What a space may say, a field for each key of a technique, in the order in which studies have written them."""

    weight_bits: tuple[Rule, ...] = ()
    activation_bits: tuple[Rule, ...] = ()
    cluster_bits: tuple[Rule, ...] = later(())
    rank: tuple[Rule, ...] = later(())
    sparsity: tuple[Rule, ...] = ()
    channels: tuple[Rule, ...] = ()
    width: tuple[float, ...] = (1.0,)
    depth: tuple[int, ...] = (0,)
    recovery: tuple[Recover | None, ...] = (None,)
    ladder: bool = False
    criterion: tuple[Rule, ...] = later(())
    rounding: tuple[Rule, ...] = later(())
    ranges: tuple[Rule, ...] = later(())
    activations: tuple[Rule, ...] = later(())
    group_size: tuple[Rule, ...] = later(())
    scheme: tuple[Rule, ...] = later(())
    students: tuple[Student | None, ...] = later(())
    equalize: tuple[str, ...] = later(("none",))


# The order of the axes, which stored picks and random draws depend on; keys that it does not name come last.
_AXES = (
    "students",
    "width",
    "depth",
    "equalize",
    "channels",
    "sparsity",
    "weight_bits",
    "activation_bits",
    "cluster_bits",
    "rank",
    "criterion",
    "rounding",
    "ranges",
    "activations",
    "scheme",
    "group_size",
)


def _keys() -> tuple[Key, ...]:
    keys = [key for technique in TECHNIQUES for key in technique.keys]
    return tuple(sorted(keys, key=lambda key: _AXES.index(key.name) if key.name in _AXES else len(_AXES)))


KEYS = _keys()
# The keys whose choices are made by rules, for layers or groups, and those of them whose choices are names of methods.
RULE_KEYS = tuple(key.name for key in KEYS if key.of)
METHODS = tuple(key.name for key in KEYS if key.names)

STEPS: Mapping[str, Technique] = {technique.name: technique for technique in TECHNIQUES}
_TECHNIQUE_OF = {technique.step: technique for technique in TECHNIQUES}
_RANK = {technique.step: rank for rank, technique in enumerate(TECHNIQUES)}


def technique_of(step: Step) -> Technique | None:
    """The technique of a step, None for what is no step of the table."""
    return _TECHNIQUE_OF.get(type(step))


def rank_of(kind: type[Step]) -> int:
    """The position of a kind of step in the order of the passes."""
    return _RANK[kind]


def layer_steps(layer: Layer, chosen: Mapping[str, Any], shape: tuple[int, int]) -> list[Step]:
    """The steps that choices mean for one layer of a shape, in the order of the passes.

    Of the techniques that store the weight the first that has a step is the only one.
    """
    makers = [technique for technique in TECHNIQUES if technique.layer_step]
    storing = (t.layer_step(layer, chosen, shape, None) for t in makers if t.stores and t.layer_step)
    stored = next((step for step in storing if step), None)
    others = (t.layer_step(layer, chosen, shape, stored) for t in makers if not t.stores and t.layer_step)
    return [step for step in (*others, stored) if step]


def form_of(steps: Iterable[Step]) -> WeightForm:
    """How the weight of a layer is stored after the steps for it.

    >>> form_of([quantize.Quantize("fc", 4, 8), sparsify.Sparsify("fc", 0.5)])
    WeightForm(bits=4, codebook=False, zeros=0.5, rank=0, inputs='static', group_size=0, affine=False)
    """
    fields: dict[str, Any] = {}
    for step in steps:
        fields |= _TECHNIQUE_OF[type(step)].form(step)
    return WeightForm(**fields)


def stored_twice(steps: Iterable[Step]) -> tuple[list[Technique], list[str]]:
    """Two techniques of steps, in the order of the passes, that would store the weights of the same layers, and
    these.
    """
    by_layer: dict[str, list[Technique]] = {}
    for step in steps:
        if isinstance(step, LayerStep) and (technique := _TECHNIQUE_OF[type(step)]).stores:
            by_layer.setdefault(step.layer, []).append(technique)
    both = {layer: techniques for layer, techniques in by_layer.items() if len(techniques) > 1}
    first = next(iter(both.values()), [])
    return first[:2], sorted(layer for layer, techniques in both.items() if techniques[:2] == first[:2])
