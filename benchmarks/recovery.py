"""What is lost by compression, and how much of it is won back: ResNet-20 on CIFAR-10.

    python benchmarks/recovery.py                     # rounding and sparsity, without training, 3 seeds
    python benchmarks/recovery.py rounding --seeds 1 --only W3A8
    python benchmarks/recovery.py channels            # fewer channels, fine-tuned: minutes a seed

Every number is that of the exported file in ONNX Runtime on the 10,000 test images, less the untouched network's on the
same images. A seed draws the calibration images (512 training crops), and with them Hessians, gradients, activation
ranges and BatchNorm statistics, and in training the order and the crops of the images; intervals are 95% over images,
of the mean over seeds. Images: see `benchmarks/cifar10/task.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent / "cifar10"))
from task import task as cifar10

from paretorch.objectives.cost import macs
from paretorch.runners.apply import read_recipe
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.structure import Structure
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import CRITERIA, Sparsify

ROUNDINGS = (
    ("nearest", "minmax"),
    ("nearest", "mse"),
    ("nearest", "percentile"),
    ("nearest", "entropy"),
    ("gptq", "mse"),
    ("adaround", "mse"),
)
BATCHNORM = Recover("batchnorm")
RECIPES = Path(__file__).resolve().parents[1] / "configs" / "recipes"


def rounding(structure: Structure) -> Iterator[tuple[str, str, Recipe]]:
    """Table's row and column, and the recipe: uniform bits, all layers, 8-bit activations."""
    for bits in (4, 3, 2):
        for how, ranges in ROUNDINGS:
            steps = [Quantize(layer.name, bits, 8, how, ranges) for layer in structure.layers]
            for recovery in ((), (BATCHNORM,)):
                name = f"{how}, {ranges}{' + BatchNorm' if recovery else ''}"
                yield name, f"W{bits}A8", Recipe((*steps, *recovery))


def sparsity(structure: Structure) -> Iterator[tuple[str, str, Recipe]]:
    """Uniform zeros, all layers, float weights, BatchNorm re-estimated."""
    for zeros in (0.5, 0.7, 0.9):
        for criterion in CRITERIA:
            steps = [Sparsify(layer.name, zeros, criterion) for layer in structure.layers]
            yield criterion, f"{100 * zeros:g}%", Recipe((*steps, BATCHNORM))
    # The first layer has 3 input channels, too few for a pattern.
    for pattern in ("2:4", "4:8"):
        for criterion in CRITERIA:
            steps = [Sparsify(layer.name, 0.5, criterion, pattern) for layer in structure.layers[1:]]
            yield criterion, pattern, Recipe((*steps, BATCHNORM))


def channels(structure: Structure) -> Iterator[tuple[str, str, Recipe]]:
    """The recipe that is kept for `paretorch apply`, and what its channels cost before it trains."""
    recipe, _ = read_recipe(RECIPES / "cifar10_channels.yaml")
    narrow = tuple(recipe.of(Prune))
    fewer = f"{macs(structure, Recipe()) / macs(structure, recipe):.2f}x fewer MACs"
    yield "BatchNorm", fewer, Recipe((*narrow, BATCHNORM))
    (trained,) = recipe.of(Recover)
    yield f"{trained.epochs:g} epochs", fewer, recipe


PARTS = {"rounding": rounding, "sparsity": sparsity, "channels": channels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["rounding", "sparsity"], help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="part of the name of a row or a column")
    arguments = parser.parse_args()
    task = cifar10()
    lost: dict[tuple[str, str, str], list[NDArray[np.float64]]] = {}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runner = LocalRunner(task, Path(folder), MeasurementSettings(seed=seed))
            base_file = runner.build(Recipe())
            if not seed:
                runner.tune_evaluation([base_file])
                plan = runner.plan
            runner.plan = plan
            base = runner.scores(base_file, "test")
            if not seed:
                print(f"untouched: {100 * base.mean():.2f}%, {len(base_file)} bytes", flush=True)
            for part in arguments.parts:
                for row, column, recipe in PARTS[part](runner.structure):
                    if arguments.only not in f"{row} {column}":
                        continue
                    begin = time.perf_counter()
                    data = runner.build(recipe)
                    took = time.perf_counter() - begin
                    scores = runner.scores(data, "test")
                    lost.setdefault((part, row, column), []).append(base - scores)
                    print(
                        f"  seed {seed}  {row:<28}{column:<6}{100 * scores.mean():>7.2f}%  {len(data):>7} bytes "
                        f" built in {took:.1f} s",
                        flush=True,
                    )
    for part in arguments.parts:
        _table({(row, column): values for (of, row, column), values in lost.items() if of == part}, part == "rounding")


def _table(lost: dict[tuple[str, str], list[NDArray[np.float64]]], ladder: bool) -> None:
    """Points lost, their interval over images and range over seeds; of a ladder the share of the first row's loss won
    back.
    """
    rows, columns = (list(dict.fromkeys(key[i] for key in lost)) for i in (0, 1))
    print(f"\n| points lost (95%) [seeds] | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in rows:
        cells = []
        for column in columns:
            seeds = lost[row, column]
            mean = np.mean(seeds, 0)
            half = 1.96 * mean.std(ddof=1) / len(mean) ** 0.5
            each = [100 * values.mean() for values in seeds]
            spread = f" [{min(each):.2f}, {max(each):.2f}]" if len(each) > 1 else ""
            back = 1 - mean.mean() / np.mean(lost[rows[0], column])
            won = f", {100 * back:.0f}% won back" if ladder and row != rows[0] else ""
            cells.append(f"{100 * mean.mean():.2f} ±{100 * half:.2f}{spread}{won}")
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
