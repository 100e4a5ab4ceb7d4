"""The entropy-coded size: really a coding of the same numbers, near their entropy, in the form that is the shortest."""

import numpy as np
import pyarrow
import pytest
from onnx import TensorProto, helper, numpy_helper

from paretorch.runners.files.entropy import zstd_bytes
from paretorch.runners.files.packing import codes_to_raw, pack, payload_size


def entropy(values):
    """Bytes of independent numbers of these frequencies (Shannon)."""
    share = np.unique(values, return_counts=True)[1] / len(values)
    return -(share * np.log2(share)).sum() * len(values) / 8


def model_with(part):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], "g", ends[:1], ends[1:], [part])
    return helper.make_model(graph)


def model_of(values, bits):
    kind = TensorProto.INT8 if bits > 4 else TensorProto.INT4 if bits > 2 else TensorProto.INT2
    return model_with(helper.make_tensor("t", kind, [len(values)], codes_to_raw(values, kind), raw=True))


def codes(bits, zeros, count=100_000):
    rng = np.random.default_rng(0)
    top = 2 ** (bits - 1) - 1
    values = np.clip(np.rint(rng.normal(size=count) * top / 2.5), -top, top).astype(np.int8)
    values[rng.random(count) < zeros] = 0
    return values


@pytest.mark.parametrize("level", [1, 19])
@pytest.mark.parametrize(("bits", "zeros"), [(8, 0.0), (5, 0.0), (4, 0.0), (3, 0.5), (4, 0.9), (2, 0.0)])
def test_it_is_near_the_entropy_and_never_above_the_file(bits, zeros, level):
    values = codes(bits, zeros)
    model = model_of(values, bits)
    packed = pack(model)
    found = zstd_bytes(model, packed, level)
    assert found <= len(packed)
    # At most a quarter above it, where zeros are many and zstd spends a bit on each; and the graph is there too.
    assert entropy(values) <= found <= 1.25 * entropy(values) + 1000


def test_three_forms_and_the_shortest_counts():
    zstd = pyarrow.Codec("zstd", compression_level=19)

    def coded(*parts):
        return sum(len(zstd.compress(part)) for part in parts)

    best = set()
    for bits, zeros in ((6, 0.0), (4, 0.9), (4, 0.0)):
        values = codes(bits, zeros)
        model = model_of(values, bits)
        packed = pack(model)
        rest = len(packed) - payload_size(packed)
        forms = {
            "file": coded(packed),
            "bytes": rest + coded(values.tobytes()),
            "bitmap": rest + coded(np.packbits(values != 0).tobytes(), values[values != 0].tobytes()),
        }
        assert zstd_bytes(model, packed, 19) == min(len(packed), *forms.values())
        best.add(min(forms, key=forms.get))
    assert len(best) > 1


def test_floats_are_coded_as_they_are():
    values = np.repeat(np.arange(5000, dtype=np.float32), 2)
    model = model_with(numpy_helper.from_array(values, "t"))
    packed = pack(model)
    assert zstd_bytes(model, packed, 1) < len(packed) / 2
