"""What does the teacher add to plain fine-tuning at equal epochs, and what do the settings of recovery give?

    python benchmarks/distillation.py [--seeds 10] [--epochs 3]       # digits, some minutes
    python benchmarks/distillation.py --cifar --seeds 3 --epochs 1    # ResNet-20 on CIFAR-10, hours
    python benchmarks/distillation.py --cifar --seeds 3 --epochs 1 --candidate "2 bit" --ways "answers, T 2" features
    python benchmarks/distillation.py --speed                          # processor time of a step, half a minute

Two compressed networks are trained in every way of `WAYS`, with the same seeds. Accuracy is that of the exported file
in ONNX Runtime, on the images that the network was not trained on (validation and test). `gain`: points over plain
fine-tuning of the same seed, with the 95% interval (Student's t) of the mean over seeds. `seconds`: of the whole
candidate.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch.utils.data import TensorDataset

from paretorch import Recipe, Task
from paretorch.configs import digits
from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.compression.trace import trace
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.training.distill import teacher_logits
from paretorch.runners.training.finetune import finetune
from paretorch.spaces.steps import Step
from paretorch.spaces.structure import Structure, kept_channels
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover

PLAIN = "plain (labels alone)"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {"distill": 0.0},
    "answers, T 2": {},
    "answers, T 1": {"temperature": 1.0},
    "answers, T 4": {"temperature": 4.0},
    "warmup to T 4": {"temperature": 4.0, "temperature_schedule": "warmup"},
    "anneal from T 4": {"temperature": 4.0, "temperature_schedule": "anneal"},
    "features": {"distill": 0.0, "features": 1.0},
    "answers and features": {"features": 1.0},
    "answers, last layers": {"train": "last"},
    "answers, scales": {"train": "scales"},
}


def candidates(structure: Structure) -> dict[str, tuple[Step, ...]]:
    two = tuple(Quantize(layer.name, 2, 8) for layer in structure.layers)
    narrow = (Prune(g.name, kept_channels(g.channels, 0.5, g.round_to)) for g in structure.groups)
    three = (Quantize(layer.name, 3, 8) for layer in structure.layers)
    return {"2 bit": two, "half the width, 3 bit": (*narrow, *three)}


def speed() -> None:
    """Milliseconds of one thread per step of 128 random images, ResNet-20 in 4 bits; the least and the median of 6
    runs.
    """
    sys.path.insert(0, str(Path(__file__).parent / "cifar10"))
    from task import ResNet  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    network, steps = ResNet().eval(), 4
    x = torch.randn(128 * steps, 3, 32, 32)
    data = TensorDataset(x, torch.randint(0, 10, (len(x),)))
    task = Task("speed", lambda: network, data, data)
    structure, stored = trace(network, x[:2]), teacher_logits(task, network)
    recipe = Recipe(tuple(Quantize(layer.name, 4) for layer in structure.layers))
    ways = {way: (settings, None) for way, settings in WAYS.items()}
    ways |= {f"{way}, stored": (WAYS[way], stored) for way in ("answers, T 2", "answers, last layers")}
    took: dict[str, list[float]] = {}
    for _ in range(6):
        for way, (settings, given) in ways.items():
            student = compress(copy.deepcopy(network), recipe, structure, x[:2])
            begin = time.thread_time()
            finetune(student, network, Recover("finetune", 1, **settings), task, 0, teacher_logits=given)
            took.setdefault(way, []).append(1000 * (time.thread_time() - begin) / steps)
    for way, found in took.items():
        print(f"{way:<30} {min(found):6.0f} {np.median(found):6.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate")
    parser.add_argument("--cifar", action="store_true", help="ResNet-20 on CIFAR-10 instead of digits")
    parser.add_argument("--candidate", help="one of them alone, such as '2 bit'")
    parser.add_argument(
        "--ways",
        nargs="+",
        default=list(WAYS),
        choices=list(WAYS),
        metavar="WAY",
        help=f"of {', '.join(WAYS)}; plain is always one",
    )
    parser.add_argument("--speed", action="store_true", help="the processor time of a step instead")
    options = parser.parse_args()
    if options.speed:
        return speed()
    if options.cifar:
        sys.path.insert(0, str(Path(__file__).parent / "cifar10"))
        from task import task as cifar  # type: ignore[import-not-found]

        task: Task = cifar()
    else:
        task = digits.task()
    ways = {way: settings for way, settings in WAYS.items() if way == PLAIN or way in options.ways}
    # By candidate and way: accuracy and seconds of each seed.
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in range(options.seeds):
        with TemporaryDirectory() as folder:  # one for each: a training that is kept goes on, whatever the seed
            runner = LocalRunner(task, Path(folder), MeasurementSettings(seed=seed), library=LayerLibrary())
            untouched = _accuracy(runner, runner.build(Recipe()))
            chosen = {k: v for k, v in candidates(runner.structure).items() if options.candidate in (None, k)}
            if not chosen:
                parser.error(
                    f"--candidate {options.candidate!r}: choose from {', '.join(candidates(runner.structure))}"
                )
            for name, steps in chosen.items():
                for way, settings in ways.items():
                    recipe = Recipe((*steps, Recover("finetune", options.epochs, options.rate, **settings)))
                    begin = time.perf_counter()
                    data = runner.build(recipe)
                    seconds = time.perf_counter() - begin
                    found.setdefault((name, way), []).append((_accuracy(runner, data), seconds))
                    if options.cifar:
                        print(
                            f"  seed {seed}  {name}, {way}: {100 * found[name, way][-1][0]:.2f}%, {seconds:.0f} s",
                            flush=True,
                        )
    print(f"{task.name}: {options.epochs:g} epochs, {options.seeds} seeds; untouched {100 * untouched:.2f}%")
    for name in chosen:
        print(f"\n{name:<24} accuracy   gain (points)    seconds")
        plain = np.array(found[name, PLAIN])[:, 0]
        for way in ways:
            accuracy, seconds = np.array(found[name, way]).T
            gains = 100 * (accuracy - plain)
            half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
            gain = "" if way == PLAIN else f"{gains.mean():+6.2f} ±{half:.2f}"
            print(f"  {way:<22} {100 * accuracy.mean():7.2f}%   {gain:<14} {np.median(seconds):8.2f}")


def _accuracy(runner: LocalRunner, data: bytes) -> float:
    scores = [runner.scores(data, split) for split in ("validation", "test")]
    return float(np.concatenate(scores).mean())


if __name__ == "__main__":
    main()
