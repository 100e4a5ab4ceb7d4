"""What low rank and codebooks are worth without any training: accuracy and bytes, and speed in ONNX Runtime.

    python benchmarks/factors.py [--images 10000] [--epochs 0] [--seconds 6]

Accuracy: ResNet-20 on the test images of CIFAR-10 (see benchmarks/cifar10/task.py), BatchNorm statistics re-estimated;
all layers but the first and the last, which keep 8 bits; paired differences from the untouched network with 95%
intervals; with `--epochs` those of low rank are trained for so long. Speed: torchvision's resnet18 of random weights at
64 pixels, every layer, one image on one thread, timed in turns with the untouched network.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from latency import random_resnet18

from paretorch import Cluster, LowRank, Quantize, Recipe, Recover, Sparsify
from paretorch.objectives import cost
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.evaluate import evaluate
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.task import batches
from paretorch.spaces.shapes import kept_rank, sides
from paretorch.spaces.structure import Structure

sys.path.insert(0, str(Path(__file__).parent / "cifar10"))


def thin(structure: Structure, share: float, names: list[str]) -> list[LowRank]:
    """A step for each of the layers that a share of the full rank makes smaller."""
    found = []
    for layer in structure.layers:
        rank = kept_rank(*sides(layer, layer.weight_shape[:2]), share) if layer.factorable else None
        found += [LowRank(layer.name, rank)] if rank and layer.name in names else []
    return found


def accuracy(folder: Path, images: int, epochs: float) -> None:
    import task as cifar10

    runner = LocalRunner(
        cifar10.task(), folder, MeasurementSettings(calibration_images=1024), library=LayerLibrary(folder / "cache")
    )
    names = [layer.name for layer in runner.structure.layers]
    ends, inner = [Quantize(name, 8) for name in (names[0], names[-1])], names[1:-1]
    recipes = {"untouched": []}
    for bits in (2, 3, 4):
        recipes[f"{bits}-bit integers"] = [Quantize(name, bits) for name in inner] + ends
        recipes[f"{bits}-bit codebooks"] = [Cluster(name, bits) for name in inner] + ends
    zeros = [Sparsify(name, 0.5) for name in inner]
    recipes["50% zeros, 3-bit integers"] = [*zeros, *(Quantize(name, 3) for name in inner), *ends]
    recipes["50% zeros, 3-bit codebooks"] = [*zeros, *(Cluster(name, 3) for name in inner), *ends]
    for share in (0.75, 0.5, 0.25):
        recipes[f"rank {share}"] = thin(runner.structure, share, inner)
    baseline = None
    print(f"{'ResNet-20':<28}{'file':>10}{'accuracy':>10}   difference")
    for name, steps in recipes.items():
        trained = epochs and any(isinstance(step, LowRank) for step in steps)
        recovery = Recover("finetune", epochs, 0.02) if trained else Recover("batchnorm")
        data = runner.build(Recipe((*steps, recovery)) if steps else Recipe())
        network = runner.target.load(packing.onnx_bytes(data), runner.plan.threads)
        some = islice(batches(runner.task, "test"), -(-images // runner.task.batch_size))
        scores = evaluate(network, runner.task, some, runner.plan)
        baseline = scores if baseline is None else baseline
        apart = scores - baseline
        half = 1.96 * apart.std(ddof=1) / np.sqrt(len(apart))
        print(
            f"{name:<28}{len(data):>10,}{100 * scores.mean():>9.2f}%   {100 * apart.mean():+.2f} ±{100 * half:.2f}",
            flush=True,
        )


def speed(folder: Path, seconds: float) -> None:
    runner = random_resnet18(folder)
    structure = runner.structure
    names = [layer.name for layer in structure.layers]
    int8 = [Quantize(name, 8, 8) for name in names]
    recipes = {f"rank {share}": thin(structure, share, names) for share in (0.75, 0.5, 0.25)}
    recipes |= {f"{bits}-bit codebooks": [Cluster(name, bits) for name in names] for bits in (4, 8)}
    recipes["int8"] = int8
    recipes |= {f"int8, rank {share}": [*thin(structure, share, names), *int8] for share in (0.5, 0.25)}
    untouched = runner.build(Recipe())
    baseline = runner.target.load(packing.onnx_bytes(untouched), 1)
    whole, one = cost.macs(structure, Recipe()), torch.randn(1, 3, 64, 64).numpy()
    print(f"\n{'resnet18':<28}{'file':>10}{'MACs':>10}   times as fast, 95% interval")
    for name, steps in recipes.items():
        recipe = Recipe(tuple(steps))
        data = runner.build(recipe, recovery=False)
        _, ratio = runner.target.latency(packing.onnx_bytes(data), baseline, one, None, seconds, 1)
        print(
            f"{name:<28}{100 * len(data) / len(untouched):>9.1f}%{100 * cost.macs(structure, recipe) / whole:>9.1f}%   "
            f"{1 / ratio.value:.2f} [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        accuracy(Path(folder), arguments.images, arguments.epochs)
        speed(Path(folder), arguments.seconds)


if __name__ == "__main__":
    main()
