"""What groups of weights with a scale each are worth: the transformer encoder of `artifacts.py`, weights alone, no
training.

    python benchmarks/groups.py

Every linear layer at the same bits and group size; the divergence (KL of the softmax, nats) and the accuracy are those
of the exported file on the 1,000 images that the encoder was not trained on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from artifacts import TASKS

from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.local import LocalRunner
from paretorch.runners.sensitivity import divergence
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runner = LocalRunner(TASKS["encoder"](), Path(folder), library=LayerLibrary(limit=0))
        base_file = runner.build(Recipe())
        base, targets = runner.outputs(base_file), runner.targets()
        print(f"untouched: {len(base_file):,} bytes, {100 * float((base.argmax(1) == targets).float().mean()):.1f}%")
        print("| bits | scale for | bytes | divergence | accuracy |\n|---|---|---|---|---|")
        for bits in (4, 3, 2, 1):
            for size in (0, 128, 32):
                steps = [Quantize(layer.name, bits, group_size=size) for layer in runner.structure.layers]
                data = runner.build(Recipe(tuple(steps)))
                found = runner.outputs(data)
                right = 100 * float((found.argmax(1) == targets).float().mean())
                print(
                    f"| {bits} | {size or 'a row'} | {len(data):,} | {divergence(base, found):.3f} | {right:.1f}% |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
