"""Evaluates all 15,625 recipes of the `cifar` truth of `benchmarks/truths.py` and writes `truth.npz` beside this file.

    python benchmarks/cifar10/build_truth.py               # about 20 minutes on one core; needs the images
    python benchmarks/cifar10/build_truth.py --check 20    # random recipes of truth.npz, each evaluated on its own

ResNet-20 on CIFAR-10 with its weights in six groups, each with 2, 3, 4, 6 or 8 bits per weight (one scale per output
channel; activations stay float). Three quarters of the weights are in the last stage, so groups are cut finer there:
of 271,000 weights the groups hold 14,000, 51,000, 57,000, 74,000, 37,000 and 38,000.

Right answers are counted on 1,000 validation images (every fifth, 100 per class). BatchNorm's statistics are estimated
anew for every recipe, on 256 training images without crops (every 175th), with their bias taken out as paretorch does.
Every prefix of groups is run once and shared by all recipes that begin with it.

1,000 images settle an accuracy to about a point: that the best recipe has 89.9% and the one of 8 bits 88.7% is luck,
too. It is an exact table for samplers to be compared on, and no statement about the network.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
from task import HERE, Images, arrays, teacher
from truths import compressed, packed_bytes

from paretorch.runners.operators.fold import batchnorms, calibration_bias, reestimate_batchnorms

BITS = (2, 3, 4, 6, 8)
# The layers whose names begin so; in the order in which they run, so that a prefix of groups is a prefix of the
# network.
GROUPS = (
    ("conv1", "layer1"),
    ("layer2",),
    ("layer3.0",),
    ("layer3.1",),
    ("layer3.2.conv1",),
    ("layer3.2.conv2", "fc"),
)
Picks = tuple[int, ...]


def layers(model: nn.Module, group: int) -> list[nn.Conv2d | nn.Linear]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name.startswith(GROUPS[group])
    ]


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Calibration images, validation images and their labels."""
    stored = arrays()

    def stacked(split: str, chosen: slice) -> Tensor:
        part = Images(stored[f"{split}_x"][chosen], stored[f"{split}_y"][chosen])
        return torch.stack([image for image, _ in part]).contiguous(memory_format=torch.channels_last)

    calibration = stacked("train", slice(0, 256 * 175, 175))
    return calibration, stacked("validation", slice(None, None, 5)), torch.from_numpy(stored["validation_y"][::5])


class SharedNorm(nn.Module):
    """BatchNorm for calibration and other images in one batch: the first `count` give the statistics for the others."""

    def __init__(self, norm: nn.BatchNorm2d, bias: tuple[Tensor, Tensor], count: int) -> None:
        super().__init__()
        self.norm, self.bias, self.count = norm, bias, count

    def forward(self, x: Tensor) -> Tensor:
        norm, (offset, factor) = self.norm, self.bias
        mean, variance = torch.zeros_like(offset), torch.ones_like(factor)  # with momentum 1 replaced by the batch's
        own = F.batch_norm(x[: self.count], mean, variance, norm.weight, norm.bias, True, 1.0, norm.eps)
        others = F.batch_norm(
            x[self.count :], mean + offset, variance * factor, norm.weight, norm.bias, False, 0.0, norm.eps
        )
        return torch.cat([own, others])


@torch.no_grad()
def build() -> None:
    calibration, images, labels = data()
    model = teacher().to(memory_format=torch.channels_last)
    bias = calibration_bias(model, [calibration])
    groups = [layers(model, group) for group in range(len(GROUPS))]
    weights = [[[compressed(layer.weight, bits, 0.0) for layer in group] for bits in BITS] for group in groups]
    sizes = [[sum(packed_bytes(layer.weight, bits, 0.0) for layer in group) for bits in BITS] for group in groups]
    for name, norm in batchnorms(model).items():
        model.set_submodule(name, SharedNorm(norm, bias[name], len(calibration)))
    last = model.layer3[2]
    # What runs of each group. The last block is cut in two, so that its input goes along for the shortcut.
    run = (
        lambda x: (model.layer1(F.relu(model.bn1(model.conv1(x[0])))),),
        lambda x: (model.layer2(x[0]),),
        lambda x: (model.layer3[0](x[0]),),
        lambda x: (model.layer3[1](x[0]),),
        lambda x: (F.relu(last.bn1(last.conv1(x[0]))), x[0]),
        lambda x: (model.fc(F.relu(last.bn2(last.conv2(x[0])) + x[1]).mean((2, 3))),),
    )
    right = np.zeros((len(BITS),) * len(GROUPS), dtype=np.uint16)
    started, done = time.perf_counter(), 0

    def descend(depth: int, x: tuple[Tensor, ...], prefix: Picks) -> None:
        nonlocal done
        if depth == len(GROUPS):
            right[prefix] = int((x[0][len(calibration) :].argmax(1) == labels).sum())
            done += 1
            if done in (25, 125) or done % 625 == 0:
                seconds = time.perf_counter() - started
                print(
                    f"{done}/{right.size} recipes in {seconds:.0f} s, about "
                    f"{seconds / done * (right.size - done):.0f} s left",
                    flush=True,
                )
            return
        for level, chosen in enumerate(weights[depth]):
            for layer, weight in zip(groups[depth], chosen, strict=True):
                layer.weight.copy_(weight)
            descend(depth + 1, run[depth](x), (*prefix, level))

    descend(0, (torch.cat([calibration, images]),), ())
    partial = HERE / "truth.partial.npz"
    np.savez_compressed(partial, right=right, images=np.array(len(labels)), bytes=np.array(sizes))
    partial.replace(HERE / "truth.npz")


@torch.no_grad()
def check(amount: int, most: int = 5) -> None:
    """Random recipes evaluated as any network is; exits with 1 where they differ by more than `most` images."""
    calibration, images, labels = data()
    dense = teacher()
    bias = calibration_bias(dense, [calibration])
    with np.load(HERE / "truth.npz", allow_pickle=False) as stored:
        right = stored["right"]
    every = list(itertools.product(range(len(BITS)), repeat=len(GROUPS)))
    worst = 0
    for index in np.random.default_rng(0).choice(len(every), amount, replace=False):
        picks = every[index]
        model = copy.deepcopy(dense)
        for group, level in enumerate(picks):
            for layer in layers(model, group):
                layer.weight.copy_(compressed(layer.weight, BITS[level], 0.0))
        reestimate_batchnorms(model, [calibration], bias)
        found = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True)
        )
        print(f"bits {' '.join(str(BITS[level]) for level in picks)}: {right[picks]} right, on its own {found}")
        worst = max(worst, abs(found - int(right[picks])))
    print(f"at most {worst} images apart")
    if worst > most:
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=int, metavar="N", help="evaluate N recipes on their own instead of building")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.check:
        check(arguments.check)
    else:
        build()
