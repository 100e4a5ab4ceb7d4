"""What does `statistics` win back where there is no BatchNorm, without any training?

    python benchmarks/moments.py [SEEDS]        # default 5; about two minutes

Three networks without BatchNorm are trained on scikit-learn's handwritten digits with noise (5 seeds), compressed,
exported, and evaluated in ONNX Runtime on 719 noisy images that they were not trained on. Points against the untouched
network of the same seed, mean and standard error over seeds, and in brackets the mean divergence of the softmax (KL,
nats).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paretorch import Recipe, Task
from paretorch.configs.digits import splits
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.targets.runtime import session
from paretorch.spaces.steps import Step
from paretorch.spaces.structure import Structure
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify


def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU()]


def separable(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs)
    return [depthwise, nn.Conv2d(inputs, outputs, 1), nn.ReLU()]


def head() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(
        *conv(1, 16), *conv(16, 16), *conv(16, 32, 2), *conv(32, 32), *conv(32, 64, 2), *head()
    ),
    "separable": lambda: nn.Sequential(*conv(1, 16), *separable(16, 32), *separable(32, 64, 2), *head()),
    "perceptron": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)
    ),
}


def candidates(structure: Structure) -> dict[str, tuple[Step, ...]]:
    layers = [layer.name for layer in structure.layers]
    found: dict[str, tuple[Step, ...]] = {f"{bits} bit": tuple(Quantize(n, bits) for n in layers) for bits in (4, 3, 2)}
    return found | {
        "4 bit, int8": tuple(Quantize(n, 4, 8) for n in layers),
        "50% zeros": tuple(Sparsify(n, 0.5) for n in layers),
    }


def trained(name: str, seed: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(40):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            outputs = network(x[rows] + 0.3 * torch.randn_like(x[rows]))
            F.cross_entropy(outputs, y[rows]).backward()  # type: ignore[no-untyped-call]  # torch's stub
            optimizer.step()
    return network.eval()


def main(seeds: int) -> None:
    generator = torch.Generator().manual_seed(5)
    noisy = {name: (x + 0.6 * torch.randn(x.shape, generator=generator), y) for name, (x, y) in splits().items()}
    x, y = (torch.cat(parts) for parts in zip(noisy["validation"], noisy["test"], strict=True))
    rows: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for name in NETWORKS:
        for seed in range(seeds):
            network = trained(name, seed, *splits()["train"])
            task = Task(name, lambda: network, TensorDataset(*noisy["train"]), TensorDataset(x, y))  # noqa: B023
            with TemporaryDirectory() as folder:
                runner = LocalRunner(task, Path(folder), library=LayerLibrary(limit=0))

                def outputs(*steps: Step) -> Tensor:
                    graph = packing.unpack(runner.build(Recipe(steps)))  # noqa: B023
                    return torch.from_numpy(session(graph).run(None, {"input": x.numpy()})[0])

                untouched = outputs()
                for case, steps in candidates(runner.structure).items():
                    for way, more in (("nothing", ()), ("statistics", (Recover("statistics"),))):
                        found = outputs(*steps, *more)
                        points = 100 * float(
                            (found.argmax(1) == y).float().mean() - (untouched.argmax(1) == y).float().mean()
                        )
                        kl = F.kl_div(
                            found.log_softmax(1), untouched.log_softmax(1), reduction="batchmean", log_target=True
                        )
                        rows.setdefault((name, case, way), []).append((points, float(kl)))
        for case in candidates(runner.structure):
            cells = []
            for way in ("nothing", "statistics"):
                points, kl = np.array(rows[name, case, way]).T
                error = points.std(ddof=1) / np.sqrt(len(points))
                cells.append(f"{way} {points.mean():+6.2f} ±{error:.2f} ({kl.mean():.4f})")
            print(f"{name:<13} {case:<12} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
