"""Weights that share few values, a codebook and indices into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import RecipeError
from ..rules import Axis
from ..steps import LayerStep, Step, counted, span
from ..structure import Layer
from ..values import OneOf
from .technique import Encoding, Key, RuleWords, Technique


@dataclass(frozen=True)
class Cluster(LayerStep):
    """Store a layer's weights as indices of `bits` (2..8) into a codebook of float32 values that k-means finds."""

    rounds: ClassVar[bool] = True

    bits: int


def _check(step: Cluster) -> None:
    if not 2 <= step.bits <= 8:
        raise RecipeError(f"cluster {step.layer}: bits = {step.bits}; choose from 2..8")


def _describe(steps: Sequence[Cluster]) -> list[str]:
    return [f"{counted(steps, 'layer')} in {span([step.bits for step in steps])}-bit codebooks"]


def _step(layer: Layer, chosen: Mapping[str, Any], shape: tuple[int, int], stored: Step | None) -> Step | None:
    bits = chosen.get("cluster_bits", 32)
    return Cluster(layer.name, bits) if bits < 32 else None


def _chosen(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    clustered = of.by_layer(Cluster)
    return {clustered[name].bits if name in clustered else 32 for name in targets if not of.taken(name, Cluster)}


CLUSTER_BITS = Key(
    "cluster_bits",
    OneOf((2, 3, 4, 5, 6, 7, 8, 32)),
    "Bits of indices into a layer's own codebook of floats: 2..8, or 32 for none. Where a layer has a codebook,\n"
    "`weight_bits` and `activation_bits` do not count: it runs as float. Choices or rules.",
    _chosen,
    of="layer",
    rule=RuleWords(
        "ClusterRule",
        "Bits of the indices that the weights of the selected layers may become.",
        "2..8 bits, or 32 for no codebook. Required.",
    ),
    allowed="2..8, 32",
)
TECHNIQUE = Technique(
    Cluster,
    check=_check,
    describe=_describe,
    stores="indices into a codebook",
    keys=(CLUSTER_BITS,),
    layer_step=_step,
    form=lambda step: {"bits": step.bits, "codebook": True, "inputs": "float"},
)
