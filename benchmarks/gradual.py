"""Do zeros that grow during training (`gradual`) cost less than zeros that are there from its beginning?

    python benchmarks/gradual.py [--seeds 10] [--epochs 6]     # the quickstart's digits, some minutes

All layers but the last have the share of zeros, of least magnitude; both ways train for the same epochs from the same
seeds. Accuracy is that of the exported file in ONNX Runtime, on the images that the network was not trained on
(validation and test). `gain`: points over zeros from the beginning with the same seed, with the 95% interval (Student's
t) of the mean over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy import stats

from paretorch import Recipe
from paretorch.configs import digits
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify

SHARES = (0.8, 0.9, 0.95, 0.98)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate")
    options = parser.parse_args()
    task = digits.task()
    found: dict[tuple[float, bool], list[float]] = {}
    for seed in range(options.seeds):
        with TemporaryDirectory() as folder:  # one for each: a training that is kept goes on, whatever the seed
            runner = LocalRunner(task, Path(folder), MeasurementSettings(seed=seed))
            untouched = _accuracy(runner, runner.build(Recipe()))
            for share in SHARES:
                zeros = [Sparsify(layer.name, share) for layer in runner.structure.layers[:-1]]
                for gradual in (False, True):
                    training = Recover("finetune", options.epochs, options.rate, gradual=gradual)
                    data = runner.build(Recipe((*zeros, training)))
                    found.setdefault((share, gradual), []).append(_accuracy(runner, data))
    print(f"{task.name}: {options.epochs:g} epochs, {options.seeds} seeds; untouched {100 * untouched:.2f}%")
    print("zeros   at once   growing   gain (points)")
    for share in SHARES:
        before, after = (100 * np.array(found[share, gradual]) for gradual in (False, True))
        half = stats.t.ppf(0.975, len(before) - 1) * (after - before).std(ddof=1) / np.sqrt(len(before))
        print(f"{share:5.0%}  {before.mean():7.2f}%  {after.mean():7.2f}%  {(after - before).mean():+6.2f} ±{half:.2f}")


def _accuracy(runner: LocalRunner, data: bytes) -> float:
    return float(np.concatenate([runner.scores(data, split) for split in ("validation", "test")]).mean())


if __name__ == "__main__":
    main()
