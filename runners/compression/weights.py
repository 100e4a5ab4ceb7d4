"""Weights that are shown to the network as they will ship: zeros, codebooks and integers.

`Sparsify`, `Cluster` and `Quantize` are carried out together, one parametrization for each layer: zeros first, because
neither scales nor codebooks must see what is zeroed.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize

from ...spaces.recipe import Recipe
from ...spaces.structure import Structure
from ...spaces.techniques.cluster import Cluster
from ...spaces.techniques.equalize import Equalize
from ...spaces.techniques.quantize import Quantize
from ...spaces.techniques.sparsify import Sparsify
from ..operators.cluster import SharedWeights, shared
from ..operators.fold import channel_factors
from ..operators.layers import weight_of
from ..operators.lowrank import parts
from ..operators.quantize import FakeQuantize
from .calibration import Calibration, Statistics
from .freeze import folded_norms
from .library import LayerLibrary, Method, compress_layer

_Level = tuple[int, float, Method]  # bits, share of zeros, and how both are chosen


def shape_weights(
    model: nn.Module,
    recipe: Recipe,
    structure: Structure,
    library: LayerLibrary | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Register a parametrization for the weight of every layer that is sparse, clustered or quantized.

    With a library, layers are compressed once and then looked up. calibration: of the network before any step, which
    some methods need.
    """
    sparse = {part: step for step in recipe.of(Sparsify) for part in parts(model, step.layer)}
    quantized = {part: step for step in recipe.of(Quantize) for part in parts(model, step.layer)}
    clustered = {part: step.bits for step in recipe.of(Cluster) for part in parts(model, step.layer)}
    names = sorted({*sparse, *quantized, *clustered})
    levels = {name: _level(sparse.get(name), quantized.get(name)) for name in names}
    statistics = _statistics(model, recipe, levels, calibration)
    norms = folded_norms(model, structure)
    for name, (bits, ratio, method) in levels.items():
        layer = model.get_submodule(name)
        weight = weight_of(layer).detach()
        norm = norms.get(name) if method.scheme == "affine" else None
        factor = channel_factors(norm) if norm is not None else None
        made = (library.compress_layer if library else compress_layer)(
            weight, bits, ratio, method, statistics[name] if statistics else None, factor=factor
        )
        if made.weight is not None:
            weight.copy_(made.weight)
        shows: nn.Module = FakeQuantize(
            weight, bits, made.mask, made.scale, method.pattern, method.group_size, made.zero, norm
        )
        if name in clustered:
            indices, codebook = shared(weight, clustered[name], made.mask)
            shows = SharedWeights(indices, codebook, clustered[name], zero=made.mask is not None)
        parametrize.register_parametrization(layer, "weight", shows, unsafe=True)


def _level(sparse: Sparsify | None, quantized: Quantize | None) -> _Level:
    zeros, codes = sparse or Sparsify("", 0.0), quantized or Quantize("", 32)
    method = Method(zeros.criterion, zeros.pattern, codes.rounding, codes.ranges, codes.group_size, codes.scheme)
    return codes.weight_bits, zeros.ratio, method


def _statistics(
    model: nn.Module, recipe: Recipe, levels: Mapping[str, _Level], calibration: Calibration | None
) -> Statistics | None:
    """What calibration knows of the layers as they are now, where some level asks for it."""
    if not calibration or not any(method.at(bits, ratio).needs for bits, ratio, method in levels.values()):
        return None
    if any(step.removes for step in recipe.steps):
        return calibration.after(model)
    return calibration.of(model) if recipe.of(Equalize) else calibration.untouched
