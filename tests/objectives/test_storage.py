"""The bytes of packed weights by arithmetic, against what packing takes."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load

from paretorch.objectives.storage import nonzero_weights, weight_bytes
from paretorch.runners.files.packing import pack
from paretorch.runners.operators.sparsify import mask_of


def packed(values, kind):
    """Bytes of the payload of a packed file that holds one such tensor."""
    if kind == TensorProto.INT8:
        raw = np.asarray(values, np.int8)
        part = helper.make_tensor("t", kind, raw.shape, raw.tobytes(), raw=True)
    else:
        part = numpy_helper.from_array(
            np.asarray(values, np.float16 if kind == TensorProto.FLOAT16 else np.float32), "t"
        )
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([], "g", [value], [value], [part]))
    return len(load(pack(model))["payload"])


KINDS = {16: TensorProto.FLOAT16, 32: TensorProto.FLOAT}


@settings(deadline=None, max_examples=120)
@given(
    st.integers(16, 3000),
    st.sampled_from((1, 2, 3, 4, 5, 6, 7, 8, 16, 32)),
    st.floats(0, 0.99) | st.sampled_from((0.5, 0.8, 0.9, 0.95)),
    st.integers(0, 99),
)
def test_weight_bytes_is_what_packing_takes(params, bits, sparsity, seed):
    nonzero = params if bits == 1 else max(2, params - round(params * sparsity))
    rng = np.random.default_rng(seed)
    top = max(1, 2 ** (bits - 1) - 1) if bits <= 8 else 3
    values = np.zeros(params)
    values[:nonzero] = rng.choice([-1, 1], nonzero) * rng.integers(1, top + 1, nonzero)
    values[:2] = -top, top
    rng.shuffle(values)
    assert weight_bytes(params, bits, nonzero) == packed(values, KINDS.get(bits, TensorProto.INT8))


@given(st.integers(1, 5000), st.integers(2, 8), st.integers(0, 5000), st.integers(0, 5000))
def test_weight_bytes_falls_with_bits_and_zeros(params, bits, one, two):
    few, many = sorted((min(one, params), min(two, params)))
    if bits > 2 or many < params:  # without any zero they are signs
        assert weight_bytes(params, bits, few) <= weight_bytes(params, bits, many) + 1  # bytes that are begun
    assert weight_bytes(params, bits, few) <= weight_bytes(params, bits + 1, few)


@given(st.integers(1, 20), st.integers(1, 40), st.sampled_from(["2:4", "4:8", "1:3"]), st.sampled_from([(), (3, 3)]))
def test_the_zeros_of_a_pattern_are_counted_as_they_are_made(outputs, inputs, pattern, kernel):
    mask = mask_of(torch.rand(outputs, inputs, *kernel), 0.5, pattern)
    assert nonzero_weights(mask.numel(), inputs, pattern) == int(mask.sum())
