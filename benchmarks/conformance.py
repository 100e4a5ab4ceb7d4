"""Every operator on architectures that nobody had in mind: works, or is refused by name with the reason.

    python benchmarks/conformance.py [NETWORK ...] [--pairs]       # some minutes a network with --pairs

Torchvision's classification networks, with random weights and small images (of the largest a smaller one of the same
blocks). For every operator, and with `--pairs` for every two of them together, a recipe that uses it on as many layers,
groups or blocks as the trace of the network offers is carried out: compressed, exported, packed, unpacked, checked by
ONNX's checker, and run in ONNX Runtime with batches of 1 and 3.

`ok` means: outputs of the right shape, all finite, the same for an input alone as among three (within 1% of the
largest), and those of the simulated graph (`runners.graphs.simulate`; within 5%). `none`: the trace offers nothing for
it (the reasons are listed below the table). Anything else is an error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models.convnext import CNBlockConfig

from paretorch import Quantize, Recipe, Task
from paretorch.errors import ParetorchError, RecipeError
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.files import packing
from paretorch.runners.graphs.simulate import Simulation
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.runtime import session
from paretorch.spaces.shapes import kept_rank, sides
from paretorch.spaces.steps import Step
from paretorch.spaces.structure import Layer, Structure, inside, kept_channels
from paretorch.spaces.techniques.cluster import Cluster
from paretorch.spaces.techniques.equalize import Equalize
from paretorch.spaces.techniques.lowrank import LowRank
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student

# By name the pixels of its images: few, but for two that pool to a fixed number of places.
NETWORKS = {
    "squeezenet1_1": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "densenet121": 32,
    "googlenet": 48,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "mnasnet0_5": 32,
    "shufflenet_v2_x0_5": 32,
    "efficientnet_b0": 32,
    "regnet_y_400mf": 32,
    "convnext_tiny": 32,
    "vit_b_16": 32,
    "swin_t": 32,
    "alexnet": 224,
    "vgg11": 224,
    "vgg11_bn": 224,
}
Operator = Callable[[Structure], Sequence[Step]]


def _each(make: Callable[[str], Step]) -> Operator:
    return lambda structure: [make(layer.name) for layer in structure.layers]


def _narrowed(structure: Structure) -> list[Step]:
    return [
        Prune(g.name, keep)
        for g in structure.groups
        if (keep := kept_channels(g.channels, 0.75, g.round_to)) < g.channels
    ]


def _calibrated(structure: Structure) -> list[Layer]:
    """The layers whose inputs are few enough for a Hessian, and for this to end."""
    return [layer for layer in structure.layers if math.prod(layer.weight_shape[1:]) <= 1024]


def _half_rank(layer: Layer) -> int | None:
    return kept_rank(*sides(layer, layer.weight_shape[:2]), 0.5) if layer.factorable else None  # type: ignore[arg-type]


OPERATORS: dict[str, Operator] = {
    "W8A8": _each(lambda name: Quantize(name, 8, 8)),
    "W4": _each(lambda name: Quantize(name, 4)),
    "signs": _each(lambda name: Quantize(name, 1, 8)),
    "affine W4A8": _each(lambda name: Quantize(name, 4, 8, scheme="affine")),
    "fp16": _each(lambda name: Quantize(name, 16)),
    "gptq W4": lambda structure: [Quantize(layer.name, 4, 8, rounding="gptq") for layer in _calibrated(structure)],
    "50% zeros": _each(lambda name: Sparsify(name, 0.5)),
    "2:4": lambda structure: [Sparsify(x.name, 0.5, pattern="2:4") for x in structure.layers if x.weight_shape[1] >= 4],
    "codebook": _each(lambda name: Cluster(name, 4)),
    "rank 1/2": lambda structure: [LowRank(x.name, rank) for x in structure.layers if (rank := _half_rank(x))],
    "equalised": lambda structure: [Equalize("activations")] if structure.pairs else [],
    "75% channels": _narrowed,
    "a block less": lambda structure: [Student(structure.blocks[:1])] if structure.blocks else [],
}


def _vit(size: int) -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=size, patch_size=8, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=10
    )


def _convnext() -> nn.Module:
    widths = (32, 64, 128)
    stages = [CNBlockConfig(width, after, 2) for width, after in zip(widths, (*widths[1:], None), strict=True)]
    return torchvision.models.ConvNeXt(stages, num_classes=10)


def _swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10)


def _narrow_classifier(name: str) -> nn.Module:
    """Nine tenths of the weights are in one layer of 4,096 outputs, which takes minutes and shows nothing."""
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    linear = [i for i, module in enumerate(model.classifier) if isinstance(module, nn.Linear)]
    for i, outputs in zip(linear, (128, 128, 10), strict=True):
        model.classifier[i] = nn.Linear(model.classifier[i].in_features if i == linear[0] else 128, outputs)
    return model


def network(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """Random weights, BatchNorm statistics of its own, and 24 random images (8 large ones)."""
    torch.manual_seed(0)
    more = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    match name:
        case "vit_b_16":
            model = _vit(size)
        case "convnext_tiny":
            model = _convnext()
        case "swin_t":
            model = _swin()
        case "alexnet" | "vgg11" | "vgg11_bn":
            model = _narrow_classifier(name)
        case _:
            model = torchvision.models.get_model(name, weights=None, num_classes=10, **more)
    x = torch.randn(24 if size < 200 else 8, 3, size, size)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval(), x


def combined(steps: Sequence[Step]) -> Recipe:
    """The recipe of steps that may be meant for the same layers: none for layers in a block that goes."""
    gone = tuple(name for step in steps if isinstance(step, Student) for name in step.drop)
    kept = [
        s for s in steps if isinstance(s, Student) or not inside(getattr(s, "layer", getattr(s, "group", "")), gone)
    ]
    return Recipe((*kept, Recover("batchnorm")))


def verdict(runner: LocalRunner, recipe: Recipe, x: Tensor) -> str:
    packed = runner.build(recipe)
    model = packing.unpack(packed)
    onnx.checker.check_model(model)
    runtime = session(model)
    outputs = torch.from_numpy(runtime.run(None, {"input": x[:3].numpy()})[0])
    if outputs.shape != (3, 10):
        return f"shape {tuple(outputs.shape)}"
    if not bool(outputs.isfinite().all()):
        return "not finite"
    largest = float(outputs.abs().max())
    alone = torch.cat([torch.from_numpy(runtime.run(None, {"input": row[None].numpy()})[0]) for row in x[:3]])
    if float((alone - outputs).abs().max()) > 1e-2 * largest:
        return f"depends on the batch: {float((alone - outputs).abs().max()) / largest:.2g}"
    simulated = Simulation(model)(x[:3])
    if float((simulated - outputs).abs().max()) > 5e-2 * largest:
        return f"simulated otherwise: {float((simulated - outputs).abs().max()) / largest:.2g}"
    return "ok"


def conform(name: str, pairs: bool) -> int:
    """Judge every operator on a network, print its line and what is wrong; gives how much is wrong."""
    begin = time.perf_counter()
    model, x = network(name, NETWORKS[name])
    data = TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        task = Task(name, lambda: copy.deepcopy(model), data, data)
        runner = LocalRunner(
            task, Path(folder), MeasurementSettings(calibration_images=len(x)), library=LayerLibrary(Path(folder))
        )
        structure = runner.structure
        steps = {key: list(make(structure)) for key, make in OPERATORS.items()}

        def judged(*keys: str) -> str:
            try:
                found = verdict(runner, combined([step for key in keys for step in steps[key]]), x)
            except RecipeError as error:  # two that cannot be done to one layer
                return f"refused: {error}"
            except ParetorchError as error:
                found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if found != "ok":
                problems.append(f"{' + '.join(keys)}: {found}")
            return found

        cells = [
            ("none" if not steps[key] else "ok" if judged(key) == "ok" else "WRONG").ljust(len(key))
            for key in OPERATORS
        ]
        line = (
            f"{name:<20}{len(structure.layers):>7}{len(structure.groups):>7}{len(structure.blocks):>7}  "
            f"{'  '.join(cells)}"
        )
        if pairs:
            told = [judged(a, b) for a, b in itertools.combinations([key for key in OPERATORS if steps[key]], 2)]
            line += f"  {told.count('ok')} ok, {sum(text.startswith('refused') for text in told)} refused"
        print(f"{line}  {time.perf_counter() - begin:.0f}", flush=True)
    reasons: dict[str, list[str]] = {}
    for where, reason in structure.refused:
        reasons.setdefault(reason, []).append(where)
    for reason, places in reasons.items():
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        print(f"    left as it is: {', '.join(places[:3])}{more}: {reason}")
    for problem in problems:
        print(f"    WRONG {problem}")
    return len(problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--pairs", action="store_true", help="every two operators together, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"{'network':<20}{'layers':>7}{'groups':>7}{'blocks':>7}  "
        + "  ".join(OPERATORS)
        + ("  pairs" if arguments.pairs else "")
        + "  seconds"
    )
    return 1 if sum(conform(name, arguments.pairs) for name in arguments.networks or NETWORKS) else 0


if __name__ == "__main__":
    sys.exit(main())
