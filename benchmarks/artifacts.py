"""The files that ship: how small, how fast, and whether they are still the same network.

    python benchmarks/artifacts.py [--networks resnet20 resnet18 ...] [--time 20] [--images 1000]

Four networks, each as FP32, int8, mixed (4 and 8 bits in turns), 4-bit, and with half of the channels of every group
(attention heads among them, which come alone, too), float and int8, the encoder also with ranges of activations found
at run time, all exported and packed as a study does it, without training afterwards (BatchNorm statistics are
re-estimated): ResNet-20 on CIFAR-10 (the images are needed, see cifar10/task.py), torchvision's resnet18 and
mobilenet_v2 at 224 pixels and a transformer encoder (4 layers of 256, 64 tokens), which are trained on scikit-learn's
handwritten digits, enlarged, and kept in `.cache`.

`file` is the packed file, `predicted` what arithmetic said it would weigh, `onnx` is model.onnx. `b1` and `b32`: how
many times as fast as the network's own FP32 file, with the 95% interval, by the protocol of `paretorch measure` with
one thread. `agrees`: answers equal to those of the simulated graph. Beside them what others make of the same float
network and the same calibration images: ONNX Runtime's `quantize_static` with the settings that are the fastest here
(uint8 activations, int8 weights per channel), and NNCF's default int8 in OpenVINO, where both are installed (float
OpenVINO and the int8 file that we make for that target beside it), timed in turns with our FP32 file by the wall clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paretorch import Quantize, Recipe, Task
from paretorch.errors import ParetorchError
from paretorch.objectives import cost
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.compression.overhead import measure_overhead
from paretorch.runners.files import packing
from paretorch.runners.graphs.simulate import agreement
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.runtime import session
from paretorch.runners.timing.compare import compare
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.steps import Step
from paretorch.spaces.structure import Structure, kept_channels
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.recover import Recover

HERE = Path(__file__).resolve().parent
Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Encoder(nn.Module):
    """A transformer encoder over patches of 8x8 pixels: `[n, 1, 64, 64] -> [n, 10]`."""

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.place = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, 0].reshape(-1, 8, 8, 8, 8).transpose(2, 3).reshape(-1, 64, 64)
        return self.head(self.body(self.embed(patches) + self.place).mean(1))  # type: ignore[no-any-return]


def digits(size: int, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """797 images to train on with their labels, and 1,000 others, enlarged to `size` pixels."""
    data = load_digits()
    x = (torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) - 4.9) / 6.0
    x = F.interpolate(x, size=(size, size), mode="bilinear").expand(-1, channels, -1, -1).contiguous()
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[1000:]], y[order[1000:]], x[order[:1000]], y[order[:1000]]


def train(network: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * (len(x) // 32))
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for epoch in range(epochs):
        for part in torch.randperm(len(x)).split(32)[: len(x) // 32]:
            optimizer.zero_grad()
            outputs = network(x[part].contiguous(memory_format=torch.channels_last))
            F.cross_entropy(outputs, y[part]).backward()  # type: ignore[no-untyped-call]  # torch's stub
            optimizer.step()
            schedule.step()
        print(f"  trained {epoch + 1} of {epochs} epochs", file=sys.stderr, flush=True)
    network.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def on_digits(name: str, factory: Callable[[], nn.Module], size: int, channels: int, small: int, epochs: int) -> Task:
    """A network trained at `small` pixels for most of its epochs and at `size` for the last one; kept in `.cache`."""
    torch.manual_seed(0)
    network = factory()
    x, y, held_x, held_y = digits(size, channels)
    kept = HERE / ".cache" / f"{name}.safetensors"
    if kept.exists():
        network.load_state_dict(load_file(kept))
    else:
        if small < size:
            train(network, *digits(small, channels)[:2], epochs, 2e-3)
            train(network, x, y, 1, 5e-4)
        else:
            train(network, x, y, epochs, 5e-4)
        kept.parent.mkdir(exist_ok=True)
        save_file(network.state_dict(), kept)
    held = TensorDataset(held_x, held_y)
    return Task(name, lambda: network.eval(), TensorDataset(x, y), held, held, batch_size=32)


def resnet20() -> Task:
    sys.path.insert(0, str(HERE / "cifar10"))
    from task import task  # type: ignore[import-not-found]

    return task()  # type: ignore[no-any-return]


TASKS: dict[str, Callable[[], Task]] = {
    "resnet20": resnet20,
    "resnet18": lambda: on_digits("resnet18", lambda: torchvision.models.resnet18(num_classes=10), 224, 3, 64, 6),
    "mobilenet_v2": lambda: on_digits(
        "mobilenet_v2", lambda: torchvision.models.mobilenet_v2(num_classes=10), 224, 3, 96, 8
    ),
    "encoder": lambda: on_digits("encoder", Encoder, 64, 1, 64, 12),
}


def recipes(structure: Structure) -> Iterator[tuple[str, Recipe]]:
    layers = [layer.name for layer in structure.layers]
    again = Recover("batchnorm")

    def made(*steps: Step) -> Recipe:
        return Recipe((*steps, again) if structure.folds else steps)

    halved = [
        Prune(g.name, keep)
        for g in structure.groups
        if (keep := kept_channels(g.channels, 0.5, g.round_to)) < g.channels
    ]
    int8 = [Quantize(name, 8, 8) for name in layers]
    ends = {layers[0], layers[-1]}
    yield "FP32", Recipe()
    yield "int8", made(*int8)
    yield "mixed 4/8", made(*(Quantize(n, 8 if n in ends or i % 2 else 4, 8) for i, n in enumerate(layers)))
    yield "4-bit", made(*(Quantize(name, 4, 8) for name in layers))
    heads = [step for step in halved if structure.group(step.group).unit > 1]
    if heads:
        yield "50% heads", made(*heads)
        yield "50% heads, int8", made(*heads, *int8)
    if all(layer.kind == "linear" for layer in structure.layers):
        yield "int8, dynamic", made(*(Quantize(name, 8, 8, activations="dynamic") for name in layers))
        yield "4-bit, dynamic", made(*(Quantize(name, 4, 8, activations="dynamic") for name in layers))
    if halved:
        yield "50% channels", made(*halved)
        yield "50% channels, int8", made(*halved, *int8)


def accuracy(network: Network, images: list[tuple[Tensor, Tensor]]) -> float:
    hits = [np.asarray(network(x.numpy())).argmax(1) == y.numpy() for x, y in images]
    return float(np.concatenate(hits).mean())


def on_onnxruntime(model: bytes) -> Network:
    runtime = session(model)
    name = runtime.get_inputs()[0].name
    return lambda x: runtime.run(None, {name: x})[0]  # type: ignore[no-any-return]


def faster(candidate: Path, baseline: Path, batch: int, seconds: float) -> str:
    found = compare([candidate, baseline], batch=batch, precision=0.02, seconds=seconds)
    assert found.ratio is not None
    return f"{1 / found.ratio.value:.2f} [{1 / found.ratio.high:.2f}, {1 / found.ratio.low:.2f}]"


def by_the_clock(candidate: Network, baseline: Network, x: NDArray[np.float32], seconds: float) -> str:
    """As `faster`, for a runtime that computes in threads of its own: the wall clock, in this process."""
    ratios = []
    for network in (candidate, baseline) * 3:
        network(x)
    end = time.perf_counter() + seconds
    while len(ratios) < 6 or time.perf_counter() < end:
        took = []
        for network in (candidate, baseline):
            network(x)
            begin = time.perf_counter()
            network(x)
            took.append(time.perf_counter() - begin)
        ratios.append(took[1] / took[0])
    ordered, half = sorted(ratios), 0.98 * len(ratios) ** 0.5
    low, high = (ordered[max(0, min(len(ratios) - 1, round(len(ratios) / 2 + s * half)))] for s in (-1, 1))
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def static(model: bytes, calibration: list[Tensor], folder: Path) -> bytes:
    """ONNX Runtime's own quantization of the float file."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(({"input": x.numpy()} for x in self.left), None)

    source, prepared, target = (folder / name for name in ("float.onnx", "prepared.onnx", "static.onnx"))
    source.write_bytes(model)
    quant_pre_process(source, prepared, skip_symbolic_shape=True)  # which fails on the encoder
    quantize_static(
        prepared, target, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
    )
    return target.read_bytes()


def openvino_networks(model: bytes, calibration: list[Tensor]) -> Iterator[tuple[str, Network, int]]:
    """OpenVINO's float network and NNCF's int8 one, with the bytes of their weights' files."""
    import nncf  # type: ignore[import-not-found]
    import openvino  # type: ignore[import-not-found]

    core = openvino.Core()
    whole = core.read_model(model)
    data = nncf.Dataset([x.numpy() for x in calibration])
    # The precision hint would otherwise let float layers run in bfloat16 where the processor has it.
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    for name, made in (
        ("OpenVINO FP32", whole),
        ("NNCF int8 in OpenVINO", nncf.quantize(whole, data, subset_size=10_000)),
    ):
        request = core.compile_model(made, "CPU", options).create_infer_request()
        with tempfile.TemporaryDirectory() as folder:
            openvino.save_model(made, Path(folder) / "m.xml", compress_to_fp16=False)
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
        # Called as our target calls it: shared, a call costs a quarter.
        yield name, lambda x, r=request: np.array(r.infer(x, share_inputs=True, share_outputs=True)[0]), size


def report(name: str, arguments: argparse.Namespace, folder: Path) -> None:
    task = TASKS[name]()
    runner = LocalRunner(task, folder, library=LayerLibrary(limit=0))
    images = list(runner.validation())
    everything = torch.cat([x for x, _ in images])
    chosen = everything[torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))[: arguments.images]]
    original = runner.build(Recipe())
    float_model = packing.onnx_bytes(original)
    baseline = folder / "fp32.onnx"
    baseline.write_bytes(float_model)
    axes = Space(activations=(Rule(("static", "dynamic"), ("linear",)),)).axes(runner.structure)
    overhead = measure_overhead(runner.builder, len(original), axes)
    print(f"\n{name}: FP32 {len(original):,} bytes, {len(images) and sum(len(y) for _, y in images)} images\n")
    print(
        "| file | bytes | of FP32 | predicted | model.onnx | b1 | b32 | accuracy | agrees "
        "|\n|---|---|---|---|---|---|---|---|---|"
    )

    def row(
        title: str, size: int, onnx_size: int, predicted: str, speeds: list[str], share: float, agrees: str
    ) -> None:
        print(
            f"| {title} | {size:,} | {100 * size / len(original):.1f}% | {predicted} | {onnx_size:,} | "
            f"{' | '.join(speeds)} | "
            f"{100 * share:.2f}% | {agrees} |",
            flush=True,
        )

    for title, recipe in recipes(runner.structure):
        try:
            packed = runner.build(recipe)
        except ParetorchError as error:
            print(f"| {title} | refused: {error} |")
            continue
        model = packing.unpack(packed)
        onnx.checker.check_model(model)
        file = folder / "candidate.onnx"
        file.write_bytes(model.SerializeToString())
        guess = cost.size_bytes(runner.structure, recipe, overhead) / len(packed) - 1
        speeds = [faster(file, baseline, batch, arguments.time) for batch in (1, 32)] if recipe.steps else ["1", "1"]
        same, _, _ = agreement(packed, [chosen], arguments.images)
        row(
            title,
            len(packed),
            file.stat().st_size,
            f"{100 * guess:+.2f}%",
            speeds,
            accuracy(on_onnxruntime(file.read_bytes()), images),
            f"{100 * same.agree:.2f}%",
        )
    calibration = list(runner.builder.calibration[:256].split(32))  # type: ignore[no-untyped-call]
    others = folder / "static.onnx"
    data = static(float_model, calibration, folder)
    others.write_bytes(data)
    row(
        "quantize_static",
        len(data),
        len(data),
        "",
        [faster(others, baseline, batch, arguments.time) for batch in (1, 32)],
        accuracy(on_onnxruntime(data), images),
        "",
    )
    if importlib.util.find_spec("nncf") and importlib.util.find_spec("openvino"):
        own = on_onnxruntime(float_model)
        batches = [chosen[:1].numpy(), chosen[:32].numpy()]
        there = LocalRunner(task, folder, MeasurementSettings(target="openvino"), library=runner.builder.library)
        model = packing.unpack(there.build(dict(recipes(runner.structure))["int8"]))
        int8 = model.SerializeToString()
        ours = ("int8, in OpenVINO", there.target.load(int8, 1), len(int8))
        theirs = [*openvino_networks(float_model, calibration)]
        for title, network, size in (ours, *theirs):
            speeds = [by_the_clock(network, own, batch, arguments.time / 2) for batch in batches]
            row(title, size, size, "", speeds, accuracy(network, images), "")
        # Beside a network of another runtime both drift; in turns with each other the two tell who is faster.
        beside = [by_the_clock(ours[1], theirs[-1][1], batch, arguments.time / 2) for batch in batches]
        print(f"int8 in OpenVINO is {' and '.join(beside)} times as fast as NNCF's, batch 1 and 32, in turns with it")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--time", type=float, default=20.0, help="seconds for one comparison")
    parser.add_argument("--images", type=int, default=1000, help="inputs of the simulation")
    arguments = parser.parse_args()
    for name in arguments.networks:
        try:
            with tempfile.TemporaryDirectory() as folder:
                report(name, arguments, Path(folder))
        except FileNotFoundError as missing:
            print(f"\n{name}: skipped, {missing}")


if __name__ == "__main__":
    main()
