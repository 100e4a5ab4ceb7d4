"""The packed file gives the model back bit for bit, costs what its numbers need, and notices any change."""

import hashlib
import json
import pickle
import zlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load as load_safetensors

from paretorch.errors import ArtifactError
from paretorch.runners import packing
from paretorch.runners.packing import codes_to_raw, pack, pack_bits, unpack, unpack_bits, width

KINDS = {
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "int2": TensorProto.INT2,
    "float": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


def tensor(name, kind, count, bits, zeros, seed):
    rng = np.random.default_rng(seed)
    if kind in ("int8", "int4", "int2"):
        bits = min(bits, int(kind.removeprefix("int")))
        values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), count).astype(np.int8)
        values[rng.random(count) < zeros] = 0
        return helper.make_tensor(name, KINDS[kind], [count], codes_to_raw(values, KINDS[kind]), raw=True)
    # Random bits: NaN, infinities, denormal numbers and minus zero are among them.
    dtype = {"float": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}[kind]
    raw = rng.integers(0, 256, (count, np.dtype(dtype).itemsize), np.uint8)
    raw[rng.random(count) < zeros] = 0
    return helper.make_tensor(name, KINDS[kind], [count], raw.tobytes(), raw=True)


def model_of(tensors):
    node = helper.make_node("Identity", ["input"], ["output"])
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "output")]
    return helper.make_model(helper.make_graph([node], "g", value[:1], value[1:], tensors))


@st.composite
def models(draw):
    counts = st.one_of(st.integers(0, 40), st.sampled_from([15, 16, 17, 255, 1001]))
    parts = draw(
        st.lists(
            st.tuples(st.sampled_from(list(KINDS)), counts, st.integers(1, 8), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
        )
    )
    seed = draw(st.integers(0, 99))
    return model_of([tensor(f"t{i}", *part, seed + i) for i, part in enumerate(parts)])


@settings(max_examples=150, deadline=None)
@given(models())
def test_unpacking_gives_the_model_bit_for_bit(model):
    packed = pack(model)
    assert unpack(packed).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    assert pack(other) == packed
    assert pack(unpack(packed)) == packed


@pytest.mark.parametrize("kind", ["float", "int32", "int8"])
def test_numbers_that_are_not_stored_as_raw_bytes_come_back_as_they_were(kind):
    model = model_of([helper.make_tensor("t", KINDS[kind], [40], [0, 3] * 20)])
    assert unpack(pack(model)) == model


@given(st.integers(1, 8), st.data())
def test_bits_are_packed_as_one_little_endian_number(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50))
    packed = pack_bits(np.array(values, np.uint8), bits)
    number = sum(value << (bits * i) for i, value in enumerate(values))
    assert packed == number.to_bytes(-(-len(values) * bits // 8), "little")
    assert unpack_bits(packed, bits, len(values)).tolist() == values


@given(st.lists(st.integers(-128, 127), min_size=1))
def test_width_is_the_least_that_holds_every_number(values):
    bits = width(np.array(values, np.int8))
    fits = [b for b in range(1, 9) if all(-(2 ** (b - 1)) <= v < 2 ** (b - 1) for v in values)]
    assert bits == fits[0]


def payload_of(model):
    return len(load_safetensors(pack(model))["payload"])


@pytest.mark.parametrize("count", [16, 1000, 1003])
def test_a_weight_costs_its_bits_and_no_more(count):
    rng = np.random.default_rng(0)
    sizes = []
    for bits in (2, 3, 4, 5, 6, 7, 8):
        top = 2 ** (bits - 1) - 1
        values = rng.choice([-top, top], count).astype(np.int8)
        kind = TensorProto.INT8 if bits > 4 else TensorProto.INT4 if bits > 2 else TensorProto.INT2
        model = model_of([helper.make_tensor("t", kind, [count], codes_to_raw(values, kind), raw=True)])
        assert payload_of(model) == -(-count * bits // 8)
        sizes.append(len(pack(model)))
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(("bits", "zeros"), [(8, 0.5), (4, 0.1), (4, 0.5), (2, 0.3), (2, 0.7), (32, 0.02), (32, 0.05)])
def test_a_bitmap_is_taken_exactly_when_it_is_shorter(bits, zeros):
    count = 2000
    nonzero = count - round(count * zeros)
    values = np.array([1] * nonzero + [0] * (count - nonzero))
    if bits == 32:
        part = numpy_helper.from_array(values.astype(np.float32), "t")
    else:
        values[0] = -(2 ** (bits - 1))
        raw = codes_to_raw(values.astype(np.int8), TensorProto.INT8)
        part = helper.make_tensor("t", TensorProto.INT8, [count], raw, raw=True)
    assert payload_of(model_of([part])) == min(count * bits // 8, count // 8 + -(-nonzero * bits // 8))


def test_zeros_cost_nothing():
    assert payload_of(model_of([numpy_helper.from_array(np.zeros(5000, np.float32), "t")])) == 0


SMALL = pack(model_of([tensor("a", "int8", 20, 3, 0.0, 0), tensor("b", "float", 17, 8, 0.9, 1)]))


def test_any_changed_byte_is_noticed():
    """Every byte, its lowest and its highest bit and one flip of all: header, padding and metadata are no exception."""
    assert len(SMALL) < 1000
    for position in range(len(SMALL)):
        for flip in (0x01, 0x80, 0xFF, SMALL[position] ^ 0x20, SMALL[position] ^ 0x0A):
            if flip:
                changed = bytearray(SMALL)
                changed[position] ^= flip
                with pytest.raises(ArtifactError):
                    unpack(bytes(changed))


def test_any_missing_or_added_end_is_noticed():
    for length in range(len(SMALL)):
        with pytest.raises(ArtifactError):
            unpack(SMALL[:length])
    with pytest.raises(ArtifactError):
        unpack(SMALL + b"\0")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_random_bytes_are_no_packed_model(noise, length):
    for data in (noise, length.to_bytes(8, "little") + noise, b"\x10" + bytes(7) + b'{"__metadata__":' + noise):
        with pytest.raises(ArtifactError):
            unpack(data)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickle_is_refused_and_not_executed():
    with pytest.raises(ArtifactError):
        unpack(pickle.dumps(Bomb()))


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, body):
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def forged(**parts):
    """A file whose digest fits contents that `pack` never wrote."""
    whole = {"graph": b"", "index": b"", "payload": b""} | parts
    return packing._file(whole)


GRAPH = zlib.compress(model_of([tensor("a", "int8", 20, 3, 0.0, 0)]).SerializeToString())


@pytest.mark.parametrize(
    "data",
    [
        forged(graph=b"no zlib"),
        forged(graph=zlib.compress(b"\xff\xff"), index=zlib.compress(b"[]")),
        forged(graph=GRAPH, index=zlib.compress(b"no json")),
        forged(graph=GRAPH, index=zlib.compress(b"[[7,\"dense\",3,8]]")),
        forged(graph=GRAPH, index=zlib.compress(b"[[0,\"dense\"]]")),
        forged(graph=GRAPH, index=zlib.compress(b"[[0,\"dense\",\"3\",8]]")),
        forged(graph=GRAPH, index=zlib.compress(b"[[0,\"dense\",3,8]]")),
        forged(graph=GRAPH, index=zlib.compress(b"[[0,\"bitmap\",3,2]]"), payload=b"\xff\xff"),
        forged(graph=GRAPH, index=zlib.compress(b"{\"a\":1}")),
    ],
)  # fmt: skip
def test_a_forgery_with_a_fitting_digest_is_an_artifact_error_too(data):
    with pytest.raises(ArtifactError):
        unpack(data)


def test_a_newer_version_and_a_foreign_format_are_named():
    header, body = header_of(SMALL)
    for key, value, word in (("version", "2", "version 2"), ("format", "other", "'other'")):
        changed = header | {"__metadata__": header["__metadata__"] | {key: value}}
        with pytest.raises(ArtifactError, match=word):
            unpack(with_header(changed, body))


def test_the_file_is_a_safetensors_file():
    """Anybody's safetensors reads it; the digest in its metadata is that of the three tensors."""
    found = load_safetensors(SMALL)
    assert set(found) == {"graph", "index", "payload"}
    header, _ = header_of(SMALL)
    digest = hashlib.sha256(b"".join(found[name].tobytes() for name in sorted(found))).hexdigest()
    assert header["__metadata__"]["sha256"] == digest
