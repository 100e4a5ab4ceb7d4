"""What MatMulNBits does to one linear layer, against float weights that are folded from the integers at loading.

    python benchmarks/matmulnbits.py [--seconds 0.5] [--bits 4] [--levels 1] [--blocks 0] [--shapes 1024x1024 4096x4096]

Weights are symmetric with a scale per output channel, as a study makes them; MatMulNBits gets that scale once per
block. `levels` is its attribute accuracy_level: 1 multiplies floats, 4 rounds the inputs to 8 bits first. `blocks` is
the block size; 0 takes the largest of 256, 128, 64 and 32 that divides the inputs. One thread; `x1`, `x8`, `x32`: how
much faster it is than the folded floats at that batch (paired, 95% interval). `error`: the largest difference from the
exact product, in standard deviations of it, beside that of the folded floats. RAM: what the loaded session added, each
in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
from itertools import product
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from paretorch.runners.files.packing import codes_to_raw, pack_bits
from paretorch.runners.targets.latency import latency
from paretorch.runners.targets.runtime import session

SHAPES = [
    "64x64",
    "256x256",
    "512x512",
    "1024x1024",
    "1024x4096",
    "4096x1024",
    "2048x1000",
    "1536x1536",
    "2048x2048",
    "4096x4096",
]
KINDS = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}


def model(nodes, tensors, inputs, outputs):
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", inputs])
    found = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", outputs])
    opsets = [helper.make_opsetid("", 25), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(helper.make_graph(nodes, "layer", [given], [found], tensors), opset_imports=opsets)
    made.ir_version = 10
    return made


def folded(codes, scale, bits):
    """As a study exports it: integers, a Cast and a Mul, which ONNX Runtime folds to floats at loading."""
    raw = codes_to_raw(np.ascontiguousarray(codes.T).reshape(-1), KINDS[bits])
    weight = helper.make_tensor("q", KINDS[bits], codes.T.shape, raw, raw=True)
    nodes = [
        helper.make_node("Cast", ["q"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["c", "s"], ["w"]),
        helper.make_node("MatMul", ["input", "w"], ["output"]),
    ]
    return model(nodes, [weight, numpy_helper.from_array(scale[None], "s")], *codes.T.shape)


def packed(codes, scale, bits, block, level):
    """MatMulNBits on the same codes."""
    outputs, inputs = codes.shape
    count = inputs // block
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8).reshape(-1)
    raw = np.frombuffer(pack_bits(unsigned, bits), np.uint8).reshape(outputs, count, -1)
    scales = np.repeat(scale[:, None], count, 1)
    node = helper.make_node(
        "MatMulNBits",
        ["input", "b", "s"],
        ["output"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )
    return model([node], [numpy_helper.from_array(raw, "b"), numpy_helper.from_array(scales, "s")], inputs, outputs)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def memory(data):
    """Bytes that a session takes, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (data,))


def _memory(data):
    session(model([helper.make_node("Identity", ["input"], ["output"])], [], 1, 1))
    before = resident()
    runtime = session(data)
    inputs = runtime.get_inputs()[0].shape[1]
    runtime.run(None, {"input": np.zeros((1, inputs), np.float32)})
    return resident() - before


def row(shape, bits, level, block, seconds):
    inputs, outputs = map(int, shape.split("x"))
    random = np.random.default_rng(0)
    top = 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(random.normal(size=(outputs, inputs)) * top / 3), -top, top).astype(np.int8)
    scale = random.uniform(0.01, 0.02, outputs).astype(np.float32)
    block = block or next(size for size in (256, 128, 64, 32) if inputs % size == 0)
    files = folded(codes, scale, bits), packed(codes, scale, bits, block, level)
    for file in files:
        onnx.checker.check_model(file, full_check=True)
    plain, other = map(session, files)
    cells = []
    for batch in (1, 8, 32):
        x = random.normal(size=(batch, inputs)).astype(np.float32)
        exact = x.astype(np.float64) @ (codes * scale[:, None].astype(np.float64)).T
        errors = [np.abs(runtime.run(None, {"input": x})[0] - exact).max() / exact.std() for runtime in (other, plain)]
        _, ratio = latency(other, plain, x, seconds=seconds)
        cells.append(f"{1 / ratio.value:5.2f} [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]")
    ram = [memory(file.SerializeToString()) / 1e6 for file in files]
    print(
        f"{shape:<10} {bits}    {level}     {block:<5} {'  '.join(f'{cell:<19}' for cell in cells)} "
        f"{errors[0]:.0e} ({errors[1]:.0e})  "
        f"{files[1].ByteSize() / files[0].ByteSize():.3f}  {ram[1]:6.1f} ({ram[0]:.1f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=(2, 4, 8))
    parser.add_argument("--levels", type=int, nargs="+", default=[1])
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    arguments = parser.parse_args()
    print(f"{'in x out':<10} bits level block {'x1':<20} {'x8':<20} {'x32':<20} error          file   RAM, MB")
    for shape, bits, level, block in product(arguments.shapes, arguments.bits, arguments.levels, arguments.blocks):
        row(shape, bits, level, block, arguments.seconds)


if __name__ == "__main__":
    main()
