"""What one scale and one zero point for a whole weight cost, beside a scale per output channel: ResNet-20 on CIFAR-10.

    python benchmarks/affine.py

All layers at the same bits, 8-bit activations, BatchNorm re-estimated, no training. Points are those of the exported file in
ONNX Runtime on the 10,000 test images, less the untouched network's on the same images, with their 95% interval; times are
shares of the FP32 file's, in turns with it, one image on one thread. Images: see `benchmarks/cifar10/task.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "cifar10"))
from task import task as cifar10

from paretorch.runners import packing
from paretorch.runners.local import LocalRunner
from paretorch.spaces.recipe import SCHEMES, Quantize, Recipe, Recover


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each timing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runner = LocalRunner(cifar10(), Path(folder))
        base_file = runner.build(Recipe())
        runner.choose_way([base_file])
        base = runner.scores(base_file, "test")
        target, image = runner.target, runner.example[:1].numpy()
        fp32 = target.load(packing.unpack(base_file).SerializeToString(), 1)
        print(
            f"untouched: {100 * base.mean():.2f}%, {len(base_file):,} bytes; load {os.getloadavg()[0]:.1f}", flush=True
        )
        print("| bits, rounding | scheme | bytes | points | time of FP32's |\n|---|---|---|---|---|", flush=True)
        for bits in arguments.bits:
            for rounding in ("nearest", "gptq") if bits < 8 else ("nearest",):
                for scheme in SCHEMES:
                    steps = [
                        Quantize(layer.name, bits, 8, rounding, scheme=scheme) for layer in runner.structure.layers
                    ]
                    data = runner.build(Recipe((*steps, Recover("batchnorm"))))
                    gained = 100 * (runner.scores(data, "test") - base)
                    half = 1.96 * gained.std(ddof=1) / len(gained) ** 0.5
                    file = packing.unpack(data).SerializeToString()
                    _, share = target.latency(file, fp32, image, seconds=arguments.seconds)
                    print(f"| {bits}, {rounding} | {scheme} | {len(data):,} | {gained.mean():.2f} ±{half:.2f} | "
                          f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}] |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
