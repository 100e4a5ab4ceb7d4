"""What students add to a search: the front with and without them, at equal trials.

    python benchmarks/students.py [--seeds 3] [--trials 60]       # some minutes

The digits of the quickstart. One search chooses bits and channels of the network; the other also chooses between the
network and two students that it teaches for 20 epochs before the trials: a CNN of three layers and a perceptron.
Accuracy is that of the packed files in ONNX Runtime on the validation images, and so a little too good on both sides;
`at 3%`: the best of the files of at most 3% of the network's bytes. `hypervolume`: error against bytes, both as shares,
from an error of 10% and a quarter of the bytes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import nn

from paretorch import Recover, Rule, Space, Student, Study
from paretorch.configs import digits
from paretorch.objectives.pareto import hypervolume

SHARES = (0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
SPACE = Space(
    weight_bits=(Rule((2, 3, 4, 6, 8)),),
    activation_bits=(Rule((8,)),),
    channels=(Rule((0.0, 0.25, 0.5)),),
    recovery=(Recover("batchnorm"), Recover("finetune", 2.0)),
)
STUDENTS = (None, Student(factory="small", epochs=20), Student(factory="perceptron", epochs=20))


def small() -> nn.Module:
    def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *layer(1, 8, 1), *layer(8, 16, 2), *layer(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def points(space: Space, seed: int, trials: int) -> list[tuple[float, float]]:
    """Error and share of the bytes of all candidates of a search."""
    task = replace(digits.task(), students={"small": small, "perceptron": perceptron}, test=None)
    with TemporaryDirectory() as folder:
        study = Study(
            task, space, budget=["size_bytes <= 25%"], directory=Path(folder) / "study", seed=seed, mlflow=False
        )
        front = study.run(trials=trials)
        whole = front.baseline.value("size_bytes")
        measured = [c.measurement for c in front.candidates if c.measurement and "accuracy" in c.measurement.metrics]
        return [(1 - m.value("accuracy"), m.value("size_bytes") / whole) for m in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=60)
    options = parser.parse_args()
    print(f"{'':<24}hypervolume   " + "".join(f"{f'at {100 * share:g}%':>9}" for share in SHARES))
    for name, space in (("the network alone", SPACE), ("with students", replace(SPACE, students=STUDENTS))):
        volumes, best = [], []
        for seed in range(options.seeds):
            found = points(space, seed, options.trials)
            volumes.append(hypervolume(found, (0.1, 0.25)) / 0.025)
            best.append(
                [max((100 * (1 - e) for e, size in found if size <= share), default=np.nan) for share in SHARES]
            )
        shown = "".join(f"{'-' if np.isnan(b) else f'{b:.2f}%':>9}" for b in np.mean(best, axis=0))
        print(
            f"{name:<24}{np.mean(volumes):.4f} ±{np.std(volumes, ddof=1) / np.sqrt(len(volumes)):.4f}{shown}",
            flush=True,
        )


if __name__ == "__main__":
    main()
