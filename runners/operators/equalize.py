"""Cross-layer equalization: channels get similar ranges without a change of what the network computes.

Where nothing but a positively homogeneous function (`f(s x) = s f(x)` for s > 0: ReLU, pooling) lies between a layer
and those that read its outputs, a channel may be divided by any s > 0 at the one end and multiplied by it at the
other (Nagel et al. 2019, data-free quantization through weight equalization, section 4.1). ReLU6 is no such function,
nor are sigmoids and GELU, nor is a sum with another branch, which would need the same s.

For each channel `s = sqrt(r1 / r2)`, with which both ranges become `sqrt(r1 r2)` (of values a multiple of it, the
same for all). r2: its largest weight in what reads it. r1: its largest weight where it is made (the paper's, with a
BatchNorm folded in), or the largest value that it takes on calibration images. Output channels have a scale of their
own here, so that rows of a weight need no equalising; what is gained is that the columns of the next weight become
alike, which share the scales of its rows, and the channels of an activation, which share one range. For activations
the first r1 leaves out the bias: a channel that a BatchNorm makes of next to nothing but its bias becomes huge. The
second is what SmoothQuant (Xiao et al. 2023) does at strength 1/2.

Pairs are found by running the network once and writing down every function of torch that reads or makes a tensor.
Whatever that does not see (scripted modules) shows when channels are scaled at random: a pair counts only if the
outputs stay the same.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...errors import RecipeError
from ...spaces.techniques.equalize import Equalize, no_pairs
from .fold import fold_factors
from .hooks import attached
from .layers import (
    FUNCTIONS,
    bias_of,
    channels_last,
    channels_of,
    groups_of,
    layers_of,
    parameter_of,
    per_output,
    row_shape,
    rows,
    set_weight,
    weight_of,
)
from .moments import DIVIDED

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_THEIRS = FUNCTIONS | {"batch_norm"}  # the functions that layers and these run as
# Functions of torch, by name, with f(s x) = s f(x) for a positive s of each channel.
_HOMOGENEOUS = (
    {"flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "clone", "dropout", "dropout1d", "dropout2d"}
    | {"relu", "relu_", "leaky_relu", "leaky_relu_", "rrelu", "prelu", "interpolate", "mean", "sum", "amax"}
    | {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"}
    | {"adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
)
_SHOWN = {"hardtanh": "ReLU6 (hardtanh)"}
_DEAD = 1e-6  # of the largest range: what weight decay has left of a channel is no range to go by
_ROUNDS, _CONVERGED = 100, 1e-3  # of the iteration: how many at most, and the largest |log s| at which it ends


@dataclass(frozen=True)
class Pair:
    """A layer and all that read its output channels. norm: the BatchNorm behind it, "" for none."""

    maker: str
    readers: tuple[str, ...]
    norm: str = ""


@dataclass(frozen=True)
class _Call:
    """One call of a function of torch: whose parameters it was given, the tensors that it read and made, by number."""

    function: str
    owner: str
    reads: frozenset[int]
    makes: tuple[int, ...]


class _Recorder(TorchFunctionMode):
    """Records every function of torch that makes a tensor.

    Args:
        owners: By `id` of a parameter, the name of its module.
    """

    def __init__(self, owners: Mapping[int, str]) -> None:
        super().__init__()
        self.owners, self.calls = owners, list[_Call]()
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is only unique among living objects

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            owner = next((self.owners[id(leaf)] for leaf in given if id(leaf) in self.owners), "")
            reads = frozenset(self._numbers[id(leaf)] for leaf in given if id(leaf) in self._numbers)
            # What a function changes in place is another tensor from there on.
            numbers = range(len(self._alive), len(self._alive) + len(made))
            self._alive += made
            self._numbers |= {id(leaf): number for leaf, number in zip(made, numbers, strict=True)}
            self.calls.append(_Call(getattr(func, "__name__", str(func)), owner, reads, tuple(numbers)))
        return result


@torch.no_grad()
def find_pairs(model: nn.Module, example: Tensor) -> tuple[list[Pair], dict[str, str]]:
    """All pairs of a network in evaluation mode. Only layers that run once count.

    Args:
        model: The network.
        example: A few inputs.

    Returns:
        The pairs, and by layer why its channels cannot be scaled.
    """
    layers = layers_of(model)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) and module.affine and module.running_mean is not None
    }
    owners = {id(parameter_of(layer)): name for name, layer in layers.items()}
    owners |= {id(norm.weight): name for name, norm in norms.items()}
    recorder = _Recorder(owners)
    with recorder:
        expected = model.eval()(example)
    readers: dict[int, list[_Call]] = {}
    for call in recorder.calls:
        for number in call.reads:
            readers.setdefault(number, []).append(call)
    uses = Counter(call.owner for call in recorder.calls)
    once = {call.owner for call in recorder.calls if call.function in _THEIRS and uses[call.owner] == 1}
    pairs: list[Pair] = []
    reasons: dict[str, str] = {}
    for call in recorder.calls:
        if call.owner in layers and call.owner in once:
            pair = _followed(call, readers, layers, {name for name in norms if name in once}, once)
            if isinstance(pair, Pair):
                pairs.append(pair)
            else:
                reasons[call.owner] = pair
    if not pairs or _same(model, pairs, example, expected):
        return pairs, reasons
    kept = [pair for pair in pairs if _same(model, [pair], example, expected)]
    reasons |= {pair.maker: "the outputs do not stay the same" for pair in pairs if pair not in kept}
    return kept, reasons


def _followed(
    start: _Call,
    readers: Mapping[int, Sequence[_Call]],
    layers: Mapping[str, nn.Module],
    norms: Iterable[str],
    once: Iterable[str],
) -> Pair | str:
    """The pair of the layer that made a tensor, or why there is none."""
    channels, norm, waiting = channels_of(layers[start.owner])[1], "", list(start.makes)
    readers_behind: list[str] = []
    while waiting:
        number = waiting.pop()
        behind = readers.get(number, ())
        if not behind:
            return "its outputs are the network's, or are read by what cannot be seen"
        for call in behind:
            if call.owner in layers:
                if call.owner not in once:
                    return f"{call.owner} reads them, whose weight has other uses"
                if channels_of(layers[call.owner])[0] % channels:
                    return f"{call.owner} reads them with others"
                readers_behind.append(call.owner)
            elif call.owner in norms and number in start.makes and len(behind) == 1:
                norm = call.owner
                waiting += call.makes
            elif call.function in _HOMOGENEOUS and len(call.makes) == 1:
                waiting += call.makes
            else:
                return f"{_SHOWN.get(call.function, call.function)} reads them"
    return Pair(start.owner, tuple(dict.fromkeys(readers_behind)), norm)


def _same(model: nn.Module, pairs: Sequence[Pair], example: Tensor, expected: Tensor) -> bool:
    """Whether random factors leave the outputs as they are."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for pair in pairs:
        count = channels_of(other.get_submodule(pair.maker))[1]
        scale_channels(other, pair, torch.exp2(2 * torch.rand(count, generator=generator) - 1))
    return torch.allclose(other(example), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def _by_input(weight: Tensor, groups: int) -> Tensor:
    """A weight `[outputs, inputs / groups, ...]` as `[groups, outputs / groups, inputs / groups, ...]`, a view of
    it.
    """
    return weight.view(groups, len(weight) // groups, *weight.shape[1:])


def _spread(scales: Tensor, layer: nn.Module) -> Tensor:
    """A number per channel as one per input of a layer that reads it, `[groups, 1, inputs / groups]`."""
    count, groups = channels_of(layer)[0], groups_of(layer)
    return scales.repeat_interleave(count // len(scales)).view(groups, 1, count // groups)


@torch.no_grad()
def scale_channels(model: nn.Module, pair: Pair, scales: Tensor) -> None:
    """Divide the channels of a pair where they are made and multiply them where they are read, in place.

    Args:
        model: The network.
        pair: The pair.
        scales: `[channels]`.
    """
    maker = model.get_submodule(pair.maker)
    if pair.norm:
        norm = model.get_submodule(pair.norm)
        vectors: list[object] = [norm.weight, norm.bias]
    else:
        weight = weight_of(maker)
        set_weight(maker, weight / per_output(scales, weight))
        vectors = [bias_of(maker)]
    for vector in vectors:
        if isinstance(vector, Tensor):
            vector.div_(scales)
    for name in pair.readers:
        layer = model.get_submodule(name)
        weight, wide = weight_of(layer), _spread(scales, layer)
        scaled = _by_input(weight, len(wide)) * wide.view(*wide.shape, *[1] * (weight.ndim - 2))
        set_weight(layer, scaled.reshape(weight.shape))


@torch.no_grad()
def channel_peaks(model: nn.Module, pairs: Sequence[Pair], batches: Sequence[Tensor]) -> list[Tensor]:
    """For each pair the largest magnitudes `[channels]` of what is read, averaged over the batches."""
    modules = dict(model.named_modules())
    peaks: dict[str, list[Tensor]] = {name: [] for pair in pairs for name in pair.readers}

    def keep(name: str, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        peaks[name].append(channels_last(layer, arguments[0]).abs().flatten(0, -2).amax(0))

    with attached([modules[name].register_forward_pre_hook(partial(keep, name)) for name in peaks]):
        for batch in batches:
            model.eval()(batch)
    mean = {name: torch.stack(values).mean(0) for name, values in peaks.items()}

    def of(pair: Pair) -> Tensor:
        channels = channels_of(modules[pair.maker])[1]
        return torch.stack([mean[name].view(channels, -1).amax(1) for name in pair.readers]).amax(0)

    return [of(pair) for pair in pairs]


@torch.no_grad()
def equalizing_scales(model: nn.Module, pairs: Sequence[Pair], peaks: Sequence[Tensor] | None = None) -> list[Tensor]:
    """For each pair what its channels are divided by where they are made, `[channels]`.

    All pairs are updated in turn until nothing changes: a layer between two others has both its rows and its columns
    scaled.

    Args:
        model: The network.
        pairs: Its pairs.
        peaks: From `channel_peaks`, used for r1 in place of the weights.

    Example:
        >>> first, last = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = first.weight.data.copy_(torch.tensor([[4.0], [1.0]]))
        >>> _ = last.weight.data.copy_(torch.tensor([[1.0, 4.0]]))
        >>> equalizing_scales(nn.Sequential(first, last), [Pair("0", ("1",))])[0].tolist()
        [2.0, 0.5]
    """
    names = {name for pair in pairs for name in (pair.maker, *pair.readers)}
    modules = {name: model.get_submodule(name) for name in names}
    # The largest magnitude of each kernel is all that ranges hang on.
    largest = {name: _kernel_peaks(weight_of(layer)) for name, layer in modules.items()}
    for pair in pairs:
        if pair.norm:
            largest[pair.maker] = largest[pair.maker] * fold_factors(model.get_submodule(pair.norm))[0].abs()[:, None]
    made = None if peaks is None else list(peaks)
    total = [torch.ones(len(largest[pair.maker])) for pair in pairs]
    for _ in range(_ROUNDS):
        moved = 0.0
        for number, pair in enumerate(pairs):
            r1 = largest[pair.maker].amax(1) if made is None else made[number]
            each = []
            for name in pair.readers:
                wide = _spread(r1, modules[name])
                each.append(_by_input(largest[name], len(wide)).amax(1).flatten().view(len(r1), -1).amax(1))
            r2 = torch.stack(each).amax(0)
            logs = _log_scales(r1, r2, made is not None)
            scales = logs.exp()
            moved = max(moved, float(logs.abs().max()))
            total[number] = total[number] * scales
            largest[pair.maker] = largest[pair.maker] / scales[:, None]
            if made is not None:
                made[number] = made[number] / scales
            for name in pair.readers:
                wide = _spread(scales, modules[name])
                largest[name] = (_by_input(largest[name], len(wide)) * wide).flatten(0, 1)
        if moved < _CONVERGED:
            break
    return total


def _kernel_peaks(weight: Tensor) -> Tensor:
    """The largest magnitude of each kernel, `[outputs, inputs of a group]`."""
    channels, positions = row_shape(weight)
    return rows(weight).abs().reshape(-1, channels, positions).amax(2)


def _log_scales(r1: Tensor, r2: Tensor, relative: bool) -> Tensor:
    """The logarithm of `sqrt(r1 / r2)`; relative: up to a factor for all channels, where the two have no unit in
    common.

    A channel that has no range at one end (it is never active, or nothing reads it) gets what others have at the
    other end, or it would decide alone on the scale there. One that has none at either stays.
    """
    has1, has2 = r1 > _DEAD * r1.max(), r2 > _DEAD * r2.max()
    one, two = torch.where(has1, r1, 1.0).log(), torch.where(has2, r2, 1.0).log()
    both = has1 & has2
    if not bool(both.any()):
        return torch.zeros_like(one)
    logs = (one - two) / 2
    logs = logs - logs[both].mean() if relative else logs
    logs = torch.where(has1 & ~has2, one - (one - logs)[both].mean(), logs)
    logs = torch.where(~has1 & has2, (two + logs)[both].mean() - two, logs)
    return torch.where(has1 | has2, logs, 0.0)


def equalize_channels(
    model: nn.Module,
    step: Equalize,
    example: Tensor,
    repaired: nn.Module | None = None,
    batches: Sequence[Tensor] | None = None,
) -> None:
    """Scale the channels of all pairs of a network in place.

    Args:
        model: The network, which computes what it did.
        step: By what the scales are found.
        example: A few inputs.
        repaired: The same network with BatchNorms that fit it, where it was cut down, so that their scales are found in
            it; None for the network itself.
        batches: Calibration images in parts, which equalizing by activations needs.

    Raises:
        RecipeError: When the network has no pair.
        ValueError: Without images that are needed.
    """
    pairs, reasons = find_pairs(model, example)
    if not pairs:
        raise RecipeError(f"the recipe does not fit this network: equalize: {no_pairs(reasons.items())}")
    if step.by == "activations" and batches is None:
        raise ValueError("equalize by activations needs the ranges of channels: give compress() a calibration")
    repaired = model if repaired is None else repaired
    peaks = channel_peaks(repaired, pairs, batches) if batches is not None and step.by == "activations" else None
    for pair, scales in zip(pairs, equalizing_scales(repaired, pairs, peaks), strict=True):
        scale_channels(model, pair, scales)
        # Whoever compares the outputs with those of the original has to know. No part of the state: it is found anew.
        if not pair.norm:
            model.get_submodule(pair.maker).register_buffer(DIVIDED, scales, persistent=False)
