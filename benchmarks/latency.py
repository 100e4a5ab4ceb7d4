"""How well the ratio of two files' times repeats from process to process, by the protocol of `paretorch measure`.

    python benchmarks/latency.py [--runs 10] [--time 20] [--precision 0.02] [--threads 1]

The files: torchvision's resnet18 of random weights at 64 pixels, as float and with 8-bit weights and activations, both
exported as a study exports them. The pair is measured `--runs` times, each time in a fresh process and with another
order; then the int8 file against itself. The grand median is that of the runs' ratios. If runs differed by what their
intervals say and by nothing else, about 95% of the intervals would hold it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.utils.data import TensorDataset

from paretorch import Quantize, Recipe, Task
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.timing.compare import compare


def random_resnet18(folder: Path) -> LocalRunner:
    """torchvision's resnet18 with random weights, on random images of 64 pixels."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    images = {
        name: TensorDataset(torch.randn(32, 3, 64, 64), torch.zeros(32, dtype=torch.long))
        for name in ("train", "validation", "test")
    }
    return LocalRunner(
        Task("resnet18", lambda: network, **images),
        folder,
        MeasurementSettings(calibration_images=32),
        library=LayerLibrary(folder / "cache"),
    )


def export(folder: Path) -> tuple[Path, Path]:
    """The float and the int8 file."""
    runner = random_resnet18(folder)
    int8 = Recipe(tuple(Quantize(layer.name, 8, 8) for layer in runner.structure.layers))
    files = folder / "float.onnx", folder / "int8.onnx"
    for file, recipe in zip(files, (Recipe(), int8), strict=True):
        file.write_bytes(packing.onnx_bytes(runner.build(recipe, recovery=False)))
    return files


def repeat(title: str, candidate: Path, baseline: Path, arguments: argparse.Namespace) -> None:
    """Measure a pair again and again, and print each ratio and how they spread."""
    print(f"\n{title}\nrun  ratio   95% interval       verdict                    pairs  precise  seconds  load")
    found = []
    for run in range(arguments.runs):
        one = compare(
            [candidate, baseline],
            threads=arguments.threads,
            precision=arguments.precision,
            seconds=arguments.time,
            seed=run,
        )
        assert one.ratio is not None
        found.append(one)
        interval = f"[{one.ratio.low:.4f}, {one.ratio.high:.4f}]"
        print(
            f"{run:<5}{one.ratio.value:<8.4f}{interval:<19}{one.verdict:<27}{one.pairs:<7}"
            f"{'yes' if one.reached else 'no':<9}{one.seconds:<9.1f}{os.getloadavg()[0]:.1f}",
            flush=True,
        )
    ratios = np.array([one.ratio.value for one in found if one.ratio])
    own = np.array([one.ms[0].value for one in found])
    middle = float(np.median(ratios))
    held = sum(one.ratio.low <= middle <= one.ratio.high for one in found if one.ratio)
    half = np.median([(one.ratio.high - one.ratio.low) / 2 / one.ratio.value for one in found if one.ratio])
    different = sum(one.verdict != "no significant difference" for one in found)
    print(
        f"grand median {middle:.4f}; standard deviation of the ratio {100 * ratios.std(ddof=1) / middle:.1f}%, of the "
        f"milliseconds alone {100 * own.std(ddof=1) / own.mean():.1f}%;\nhalf an interval {100 * half:.1f}% (median); "
        f"{held} of {len(found)} intervals hold the grand median; called different: {different} of {len(found)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--time", type=float, default=20.0)
    parser.add_argument("--precision", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain, int8 = export(Path(folder))
        repeat("int8 against float", int8, plain, arguments)
        repeat("int8 against itself", int8, int8, arguments)


if __name__ == "__main__":
    main()
