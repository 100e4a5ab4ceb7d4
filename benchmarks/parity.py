"""Does the file compute what its graph says? Random recipes, exported, in ONNX Runtime and in the simulation.

    python benchmarks/parity.py [RECIPES]        # per network, default 50; about a minute

Five networks are trained on scikit-learn's handwritten digits: a residual CNN, one of depthwise convolutions, a
perceptron, two branches that are concatenated, and a transformer encoder. Of each, random recipes of every technique
that needs no training (2 to 16 bits, activations of 8 bits in some layers, zeros, channels, blocks left out; BatchNorm
statistics re-estimated) are exported and packed, and 1,000 images that the network was not trained on go through the
file in ONNX Runtime and through `runners.graphs.simulate`.

The table tells the worst of each network. `agree`: equal answers. `difference`: of the outputs, as a share of the
largest, on average. `accuracy`: file less simulation. `where sure`: equal answers among the images whose two largest
simulated outputs lie further apart than the largest difference of all; less than 100% there would be an error and not
rounding.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paretorch import Recipe, Task
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.graphs.simulate import SimulationAgreement, agreement
from paretorch.runners.local import LocalRunner
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.techniques.recover import Recover

IMAGES = 1000


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU6())


class Branches(nn.Module):
    """Two branches that are concatenated, a gate, and flattened maps into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.join = conv(1, 16), conv(16, 16), conv(16, 16, 1), conv(32, 16)
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        return self.fc(self.join(torch.cat([self.left(x), self.right(x)], 1)).flatten(1))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A transformer encoder whose tokens are the rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 48)
        self.place = nn.Parameter(0.1 * torch.randn(8, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x[:, 0]) + self.place).mean(1))  # type: ignore[no-any-return]


def residual() -> nn.Module:
    return nn.Sequential(
        conv(1, 16),
        Block(16),
        Block(16),
        conv(16, 32, stride=2),
        Block(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(1, 16),
        conv(16, 16, groups=16),
        conv(16, 32, 1),
        conv(32, 32, stride=2, groups=32),
        conv(32, 48, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual,
    "depthwise": depthwise,
    "perceptron": perceptron,
    "branches": Branches,
    "encoder": Encoder,
}
# Low bits and many zeros in many layers leave nothing of a network, and of noise every answer is a matter of rounding.
SPACE = Space(
    weight_bits=(Rule((3, 4, 5, 6, 8, 8, 16, 32)), Rule((2, 4, 8), ("last",))),
    activation_bits=(Rule((8, 32)),),
    sparsity=(Rule((0.0, 0.0, 0.5)),),
    channels=(Rule((0.0, 0.0, 0.25)),),
    depth=(0, 1),
    recovery=(Recover("batchnorm"),),
)


def task(name: str) -> Task:
    """The network, trained for some seconds on all images but `IMAGES`, which are the validation split."""
    digits = load_digits()
    x = (torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) - 4.9) / 6.0
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    torch.manual_seed(0)
    network = NETWORKS[name]().train()
    optimizer = torch.optim.AdamW(network.parameters(), 0.005)
    for _ in range(40):
        for part in torch.randperm(len(x) - IMAGES).split(64):
            if len(part) > 1:
                optimizer.zero_grad()
                F.cross_entropy(network(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    network.eval()
    train, held = slice(len(x) - IMAGES), slice(len(x) - IMAGES, None)
    return Task(name, lambda: network, TensorDataset(x[train], y[train]), TensorDataset(x[held], y[held]))


def compare(name: str, count: int, seed: int = 0) -> Iterator[tuple[Recipe, SimulationAgreement, float, float, float]]:
    """For random recipes of a network: the agreement, both accuracies (file, simulation), agreement where sure."""
    mine = task(name)
    with TemporaryDirectory() as folder:
        runner = LocalRunner(mine, Path(folder), library=LayerLibrary(limit=0))
        axes = SPACE.axes(runner.structure)
        draw = random.Random(seed)
        images = torch.cat([x for x, _ in runner.validation()])
        labels = torch.cat([y for _, y in runner.validation()])
        for _ in range(count):
            recipe = SPACE.recipe(runner.structure, {axis.name: draw.randrange(len(axis.choices)) for axis in axes})
            found, simulated, outputs = agreement(runner.build(recipe), [images])
            file, simulation = (float((out.argmax(1) == labels).float().mean()) for out in (outputs, simulated))
            best = simulated.topk(2, 1).values
            sure = best[:, 0] - best[:, 1] > 2 * (outputs - simulated).abs().max()
            same = (outputs.argmax(1) == simulated.argmax(1))[sure].float()
            yield recipe, found, file, simulation, float(same.mean()) if len(same) else 1.0


def main(count: int) -> None:
    started = time.perf_counter()
    print(f"{'network':<11} recipes  agree worst  mean   below 99.5%  difference worst  accuracy worst  where sure")
    worst: list[tuple[float, str, str]] = []
    for name in NETWORKS:
        rows = list(compare(name, count))
        agree = [found.agree for _, found, *_ in rows]
        off = max((file - simulation for _, _, file, simulation, _ in rows), key=abs)
        print(
            f"{name:<11} {len(rows):7d} {100 * min(agree):11.1f}% {100 * sum(agree) / len(agree):6.2f}% "
            f"{sum(a < 0.995 for a in agree):11d} {100 * max(f.mean_difference for _, f, *_ in rows):16.2f}% "
            f"{100 * off:+14.1f} {100 * min(row[-1] for row in rows):11.1f}%"
        )
        worst += [
            (found.agree, name, f"{recipe.describe()}: accuracy {100 * file:.1f}%, simulated {100 * simulation:.1f}%")
            for recipe, found, file, simulation, _ in rows
        ]
    for share, name, what in sorted(worst)[:5]:
        print(f"{100 * share:.1f}%  {name}: {what}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
