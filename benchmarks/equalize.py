"""What does cross-layer equalisation win back, without any training?

    python benchmarks/equalize.py [SEEDS]            # handwritten digits; default 3
    python benchmarks/equalize.py cifar10 [SEEDS]    # ResNet-20; images: see benchmarks/cifar10/task.py

Digits: four networks of convolutions, depthwise convolutions and linear layers, three of them without BatchNorm,
trained as in `moments.py`. *Uneven*: the same networks, computing the same, each channel multiplied by 10^U(-1, 1)
where it is made and divided where it is read, which is what training with other tools or from other beginnings may well
give. Exported files in ONNX Runtime on 719 noisy images that were not trained on, points against the untouched network
of the same seed, mean and standard error over seeds, in brackets the mean divergence of the softmax (KL, nats).
*affine*: one scale for a whole weight. CIFAR-10: on the 10,000 test images, a seed draws the calibration images.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from moments import NETWORKS, trained
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paretorch import Equalize, Quantize, Recipe, Recover, Task
from paretorch.configs.digits import splits
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.local import LocalRunner
from paretorch.runners.operators.equalize import find_pairs, scale_channels
from paretorch.runners.sensitivity import divergence
from paretorch.runners.settings import MeasurementSettings
from paretorch.spaces.structure import Structure
from paretorch.spaces.techniques.equalize import EQUALIZATIONS

CIFAR10 = Path(__file__).parent / "cifar10"
LEVELS = ((8, 8), (4, 32), (4, 8), (3, 8), (8, 8, "affine"), (4, 8, "affine"))


def normed(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


def mobile() -> nn.Module:
    return nn.Sequential(
        *normed(1, 16),
        *normed(16, 16, groups=16),
        *normed(16, 32, 1),
        *normed(32, 32, 3, 2, 32),
        *normed(32, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


NETWORKS["separable, BatchNorm"] = mobile


def recipes(structure: Structure, recovery: Recover) -> Iterator[tuple[str, str, Recipe]]:
    """The table's row and column, and the recipe: all layers alike."""
    for recovered in ((), (recovery,)):
        for by in ("", *EQUALIZATIONS):
            first = (Equalize(by),) if by else ()
            row = f"{f'by {by}' if by else 'not equalised'}{f', {recovery.method}' if recovered else ''}"
            for bits, activations, *scheme in LEVELS:
                steps = (Quantize(layer.name, bits, activations) for layer in structure.layers)
                steps = (replace(step, scheme=name) for step in steps for name in scheme or ["symmetric"])
                yield row, " ".join([f"W{bits}A{activations}", *scheme]), Recipe((*first, *steps, *recovered))


def uneven(network: nn.Module, example: Tensor, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    made = copy.deepcopy(network)
    for pair in find_pairs(made, example)[0]:
        count = len(made.get_submodule(pair.maker).weight)  # type: ignore[arg-type]
        scale_channels(made, pair, 10 ** (2 * torch.rand(count, generator=generator) - 1))
    return made


def table(found: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    """Points and divergences by row and column, each a list over seeds."""
    columns = list(dict.fromkeys(column for _, column in found))
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in dict.fromkeys(row for row, _ in found):
        cells = []
        for column in columns:
            points, away = (np.array(values) for values in zip(*found[row, column], strict=True))
            error = points.std(ddof=1) / len(points) ** 0.5 if len(points) > 1 else 0.0
            cells.append(f"{points.mean():.2f} ±{error:.2f} ({away.mean():.3f})")
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


def on_digits(seeds: int) -> None:
    generator = torch.Generator().manual_seed(5)
    noisy = {name: (x + 0.6 * torch.randn(x.shape, generator=generator), y) for name, (x, y) in splits().items()}
    x, y = (torch.cat(parts) for parts in zip(noisy["validation"], noisy["test"], strict=True))
    for name in NETWORKS:
        rows: dict[bool, dict[tuple[str, str], list[tuple[float, float]]]] = {False: {}, True: {}}
        for seed in range(seeds):
            even = trained(name, seed, *splits()["train"])
            for spoiled, network in ((False, even), (True, uneven(even, x[:2], seed))):
                task = Task(name, lambda: network, TensorDataset(*noisy["train"]), TensorDataset(x, y))  # noqa: B023
                with TemporaryDirectory() as folder:
                    runner = LocalRunner(task, Path(folder), library=LayerLibrary(limit=0))
                    base = runner.outputs(runner.build(Recipe()))
                    right = float((base.argmax(1) == y).float().mean())
                    method = "batchnorm" if runner.structure.folds else "statistics"
                    for row, column, recipe in recipes(runner.structure, Recover(method)):
                        outputs = runner.outputs(runner.build(recipe))
                        points = 100 * (float((outputs.argmax(1) == y).float().mean()) - right)
                        rows[spoiled].setdefault((row, column), []).append((points, divergence(base, outputs)))
        for spoiled, found in rows.items():
            print(f"\n{name}{', uneven' if spoiled else ''}:")
            table(found)


def on_cifar10(seeds: int) -> None:
    sys.path.insert(0, str(CIFAR10))
    from task import task as cifar10

    task = cifar10()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in range(seeds):
        with TemporaryDirectory() as folder:
            runner = LocalRunner(task, Path(folder), MeasurementSettings(seed=seed))
            base_file = runner.build(Recipe())
            if not seed:
                runner.tune_evaluation([base_file])
                plan = runner.plan
            runner.plan = plan
            base, outputs = runner.scores(base_file, "test"), runner.outputs(base_file)
            for row, column, recipe in recipes(runner.structure, Recover("batchnorm")):
                data = runner.build(recipe)
                points = 100 * float(runner.scores(data, "test").mean() - base.mean())
                found.setdefault((row, column), []).append((points, divergence(outputs, runner.outputs(data))))
                print(f"  seed {seed}  {row:<32}{column:<6}{points:>7.2f}  {len(data)} bytes", flush=True)
    table(found)


def main() -> None:
    words = sys.argv[1:]
    seeds = int(words[-1]) if words and words[-1].isdecimal() else 3
    (on_cifar10 if "cifar10" in words else on_digits)(seeds)


if __name__ == "__main__":
    main()
