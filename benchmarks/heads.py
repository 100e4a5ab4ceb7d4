"""What attention heads are worth: an encoder with 3, 2 and 1 of its 4 heads, as it is and after a short training.

    python benchmarks/heads.py [--epochs 3]       # about two minutes

The transformer encoder of `artifacts.py` (4 layers of 256, 64 tokens, 797 training images). In every layer the same
number of heads stays, the most important by the norm of their weights; `finetune` teaches what is left with the
original's answers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from artifacts import TASKS, accuracy, on_onnxruntime  # type: ignore[import-not-found]

from paretorch import Recipe
from paretorch.objectives import cost
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.recover import Recover


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=float, default=3.0)
    training = Recover("finetune", epochs=parser.parse_args().epochs, learning_rate=0.01, distill=0.9, temperature=2.0)
    with tempfile.TemporaryDirectory() as folder:
        runner = LocalRunner(TASKS["encoder"](), Path(folder), library=LayerLibrary(limit=0))
        images = list(runner.validation())
        groups = [group for group in runner.structure.groups if group.unit > 1]
        whole = cost.macs(runner.structure, Recipe())
        print("| heads | bytes | MACs | accuracy | trained |\n|---|---|---|---|---|")
        for kept in (4, 3, 2, 1):
            heads = tuple(Prune(g.name, kept * g.unit) for g in groups if kept * g.unit < g.channels)
            found = []
            for recipe in (Recipe(heads), Recipe((*heads, training))):
                packed = runner.build(recipe)
                network = on_onnxruntime(packing.onnx_bytes(packed))
                found.append(f"{100 * accuracy(network, images):.2f}%")
            share = cost.macs(runner.structure, Recipe(heads)) / whole
            print(f"| {kept} of 4 | {len(packed):,} | {100 * share:.1f}% | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
