"""Fronts that are known exactly: small search problems whose every recipe has been evaluated.

    python benchmarks/truths.py            # builds what is missing, some minutes, into benchmarks/.cache

A truth is a table, `accuracy[levels of layer 1, levels of layer 2, ...]`, and the bytes of every layer at every level;
or, of more recipes than a table holds, a sum whose front the knapsack knows.

- `digits-<width>-<seed>`: a convolutional network with six layers on scikit-learn's digits, every layer with 2, 3, 4,
  5, 6 or 8 bits per weight: 46,656 recipes.
- `joint-<seed>`: four layers, each with {2, 3, 4, 6} bits x {0, 50, 75}% zeros: 20,736 recipes.
- `interacting-<seed>`: made up, six layers of six levels whose losses do not add up: every pair of layers has a random
  interaction as large as the layers' own effects.
- `layers-<seed>`: made up, 60 layers of six levels, 5 * 10^46 recipes. Losses add up (and then break, as accuracies
  do), some layers' are a hundred times others'; so are their bytes, independently.
- `cifar`: ResNet-20 on CIFAR-10 in six groups of layers, each with 2, 3, 4, 6 or 8 bits: 15,625 recipes. It is not
  built here but comes with the repository (`cifar10/build_truth.py` says how it was made, and makes it).

After compression BatchNorm's statistics are estimated anew, layer after layer. Every prefix of layers is evaluated once
and shared by all recipes that begin with it.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from paretorch.configs.digits import splits
from paretorch.objectives.pareto import hypervolume
from paretorch.objectives.storage import weight_bytes
from paretorch.runners.compression.library import compress_layer
from paretorch.runners.operators.quantize import codes
from paretorch.search.knapsack import front as knapsack_front

CACHE = Path(__file__).resolve().parent / ".cache"
CIFAR = Path(__file__).resolve().parent / "cifar10" / "truth.npz"
BITS = (2, 3, 4, 5, 6, 8)
JOINT = tuple((bits, sparsity) for sparsity in (0.75, 0.5, 0.0) for bits in (2, 3, 4, 6))
DIGITS = ((3, 0), (4, 1), (6, 2), (4, 3))  # width and seed of the six-layer networks


@dataclass(frozen=True)
class Problem:
    """What is searched: the error of every recipe. `bytes[layer][level]` adds up; levels in the order of their
    bytes.
    """

    name: str
    bytes: tuple[tuple[float, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.bytes))

    def size(self, picks: tuple[int, ...]) -> float:
        """As a share of the largest recipe's bytes."""
        return sum(row[level] for row, level in zip(self.bytes, picks, strict=True)) / sum(map(max, self.bytes))

    @property
    def reference(self) -> tuple[float, float]:
        """The worst corner: the error of guessing and the largest recipe's bytes (as a share of them: 1)."""
        return 0.9, 1.0

    def error(self, picks: tuple[int, ...]) -> float:
        raise NotImplementedError

    def losses(self, picks: tuple[int, ...]) -> tuple[float, float]:
        """The error, and the bytes as a share of the largest recipe's."""
        return self.error(picks), self.size(picks)

    def front(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Errors, falling, and sizes, rising, of the recipes that no other beats."""
        raise NotImplementedError

    def total(self) -> float:
        """The hypervolume of all recipes together."""
        return hypervolume(np.stack(self.front(), axis=1), self.reference)

    def fewest(self, share: float) -> int:
        """How few recipes have a share of the hypervolume: what somebody would need who knew the front.

        The best `k` points of a front of two objectives, by a dynamic programme over the last one chosen.
        """
        worst_error, worst_size = self.reference
        error, size = self.front()
        error, size = error[error < worst_error], size[error < worst_error]
        alone = (worst_error - error) * (worst_size - size)
        best, count, enough = alone, 1, share * self.total()
        while best.max() < enough:
            # Both boxes less what they share: the last point's size, the error of the one before it.
            joined = [
                (best[:j] - (worst_error - error[:j]) * (worst_size - size[j])).max(initial=-1.0)
                for j in range(len(size))
            ]
            best, count = alone + joined, count + 1
        return count


@dataclass(frozen=True)
class Truth(Problem):
    """Every recipe was evaluated: `accuracy` has one axis per layer."""

    accuracy: NDArray[np.float64]

    def error(self, picks: tuple[int, ...]) -> float:
        return 1.0 - float(self.accuracy[picks])

    def front(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        grids = np.meshgrid(*[np.asarray(row) for row in self.bytes], indexing="ij")
        size = sum(grids).ravel() / sum(max(row) for row in self.bytes)
        error = 1.0 - self.accuracy.ravel()
        order = np.lexsort((error, size))
        best = np.minimum.accumulate(error[order])
        first = np.r_[True, best[1:] < best[:-1]]
        return error[order][first], size[order][first]


@dataclass(frozen=True)
class Layers(Problem):
    """`damage[layer][level]` adds up, and the error is a rising function of the sum."""

    damage: tuple[tuple[float, ...], ...]

    def error(self, picks: tuple[int, ...]) -> float:
        return _broken(sum(row[level] for row, level in zip(self.damage, picks, strict=True)))

    def front(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        found = [self.losses(choice.levels) for choice in knapsack_front(self.damage, self.bytes)]
        error, size = np.array(found).T
        return error, size


class Net(nn.Module):
    """Convolutions with BatchNorm and a linear layer at the end, as a list, so that prefixes can be shared."""

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], classes: int = 10) -> None:
        super().__init__()
        ins = (1, *channels[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride, 1, bias=False) for i, o, stride in zip(ins, channels, strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in channels)
        self.fc = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def trained(channels: tuple[int, ...], strides: tuple[int, ...], seed: int) -> Net:
    """Some seconds on one core."""
    torch.manual_seed(seed)
    net = Net(channels, strides)
    x, y = splits()["train"]
    epochs, batch = 12, 64
    steps = len(x) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=epochs * steps)
    for _ in range(epochs):
        for index in torch.randperm(len(x))[: steps * batch].view(steps, batch):
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def compressed(weight: Tensor, bits: int, sparsity: float) -> Tensor:
    """The weight as it would ship, of at most 8 bits."""
    mask, scale, *_ = compress_layer(weight, bits, sparsity)
    assert scale is not None
    weight = weight if mask is None else weight * mask
    return codes(weight, scale, bits) * scale.view(-1, *[1] * (weight.ndim - 1))


def packed_bytes(weight: Tensor, bits: int, sparsity: float) -> float:
    """The bytes of a packed weight and its scales."""
    return float(
        weight_bytes(weight.numel(), bits, weight.numel() - round(weight.numel() * sparsity)) + 4 * len(weight)
    )


@torch.no_grad()
def exhaust(
    net: Net, levels: tuple[tuple[int, float], ...]
) -> tuple[NDArray[np.float64], tuple[tuple[float, ...], ...]]:
    """The accuracy of every recipe on validation and test images together, and the bytes by layer and level."""
    data = splits()
    calibration = data["train"][0][:256]
    images = torch.cat([data["validation"][0], data["test"][0]])
    labels = torch.cat([data["validation"][1], data["test"][1]])
    layers = [*net.convs, net.fc]
    weights = [[compressed(layer.weight, *level) for level in levels] for layer in layers]
    count = len(levels)
    accuracy = np.zeros((count,) * len(layers))
    last = torch.stack(weights[-1])  # [levels, classes, channels]

    def descend(depth: int, x: Tensor, prefix: tuple[int, ...]) -> None:
        if depth == len(net.convs):
            features = x[len(calibration) :].mean((2, 3))
            logits = torch.einsum("nc,lkc->lnk", features, last) + net.fc.bias
            accuracy[prefix] = (logits.argmax(2) == labels).double().mean(1).numpy()
            return
        norm = net.norms[depth]
        for level in range(count):
            out = F.conv2d(x, weights[depth][level], stride=net.convs[depth].stride, padding=1)
            own = out[: len(calibration)]
            mean, variance = own.mean((0, 2, 3)), own.var((0, 2, 3))
            factor = norm.weight * torch.rsqrt(variance + norm.eps)
            out = out.mul_(factor.view(1, -1, 1, 1)).add_((norm.bias - mean * factor).view(1, -1, 1, 1)).relu_()
            descend(depth + 1, out, (*prefix, level))

    descend(0, torch.cat([calibration, images]).contiguous(memory_format=torch.channels_last), ())
    sizes = tuple(tuple(packed_bytes(layer.weight, *level) for level in levels) for layer in layers)
    return accuracy, sizes


def interacting(seed: int, layers: int = 6, levels: int = 6) -> Truth:
    """A made-up truth: layers' own losses, and for every pair an interaction of the same size."""
    random = np.random.default_rng(seed)
    own = random.gamma(0.7, 0.12, (layers, 1)) * np.linspace(1, 0, levels)[None] ** 2
    damage = np.zeros((levels,) * layers)
    for layer in range(layers):
        damage += own[layer].reshape([-1 if axis == layer else 1 for axis in range(layers)])
    for a, b in itertools.combinations(range(layers), 2):
        table = random.normal(0, 0.12, (levels, levels))
        table[-1, :] = table[:, -1] = 0.0
        damage += table.reshape([levels if axis in (a, b) else 1 for axis in range(layers)])
    accuracy = np.round(1 - _broken(damage), 4)
    weights = random.integers(1, 40, layers) * 100
    return Truth(f"interacting-{seed}", tuple(tuple(float(w * b) for b in BITS) for w in weights), accuracy)


def _broken(damage: Any) -> Any:
    """The error of a network that holds out for long and then breaks."""
    return 0.9 - 0.86 / (1 + np.exp(6 * (damage - 0.5)))


def layers(seed: int, count: int = 60) -> Layers:
    """A made-up network of many layers: n bits do 4^-n of a layer's damage, give or take a third."""
    random = np.random.default_rng(seed)
    weights = np.ceil(10 * np.exp(random.normal(0, 1.2, count)))
    worst = np.exp(random.normal(0, 1.2, count))
    shape = np.abs(4.0 ** (2 - np.array(BITS)) * random.normal(1, 0.3, (count, len(BITS))))
    damage = np.minimum.accumulate(shape, axis=1) * 1.5 * (worst / worst.sum())[:, None]
    sizes = tuple(tuple(float(w * b) for b in BITS) for w in weights)
    return Layers(f"layers-{seed}", sizes, tuple(map(tuple, damage.tolist())))


def digits(width: int, seed: int) -> Truth:
    channels = (width, width, 2 * width, 2 * width, 4 * width)
    return _cached(f"digits-{width}-{seed}", channels, (1, 1, 2, 1, 2), seed, tuple((bits, 0.0) for bits in BITS))


def joint(seed: int) -> Truth:
    return _cached(f"joint-{seed}", (12, 24, 48), (1, 2, 2), seed, JOINT)


def cifar() -> Truth:
    with np.load(CIFAR, allow_pickle=False) as stored:
        return _sorted("cifar", stored["right"] / int(stored["images"]), stored["bytes"])


def _cached(
    name: str, channels: tuple[int, ...], strides: tuple[int, ...], seed: int, levels: tuple[tuple[int, float], ...]
) -> Truth:
    path = CACHE / f"{name}.npz"
    if not path.exists():
        started = time.perf_counter()
        torch.set_num_threads(1)
        accuracy, sizes = exhaust(trained(channels, strides, seed), levels)
        CACHE.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, accuracy=accuracy, bytes=np.array(sizes))
        partial.replace(path)
        print(f"{name}: {accuracy.size} recipes in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    with np.load(path, allow_pickle=False) as stored:
        return _sorted(name, stored["accuracy"], stored["bytes"])


def _sorted(name: str, accuracy: NDArray[np.float64], sizes: NDArray[np.float64]) -> Truth:
    """Levels by their bytes, as a search would list them."""
    order = np.argsort(sizes, axis=1, kind="stable")
    for axis, rows in enumerate(order):
        accuracy = np.take(accuracy, rows, axis=axis)
    return Truth(name, tuple(map(tuple, np.take_along_axis(sizes, order, axis=1).tolist())), accuracy)


def everything() -> list[Problem]:
    """All truths that can be had here, built when they are missing."""
    found = [digits(width, seed) for width, seed in DIGITS] + [joint(seed) for seed in (0, 1)]
    return [*found, cifar(), *(interacting(seed) for seed in (0, 1)), *(layers(seed) for seed in (0, 1))]


if __name__ == "__main__":
    for truth in everything():
        error, size = truth.front()
        print(
            f"{truth.name:16}  {math.prod(truth.shape):10.3g} recipes  best {1 - error.min():.4f}  "
            f"largest {1 - truth.error(tuple(n - 1 for n in truth.shape)):.4f}  front of {len(size)}  "
            f"hypervolume {truth.total():.4f}"
        )
