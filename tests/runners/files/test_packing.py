"""The packed file gives the model back bit for bit, costs what its numbers need, and notices any change."""

import hashlib
import json
import math
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
from paretorch.objectives.storage import index_bytes, position_bits, weight_bytes
from paretorch.runners.files import packing
from paretorch.runners.files.packing import codes_to_nibbles, codes_to_raw, pack, pack_bits, unpack, unpack_bits, width

KINDS = {
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "int2": TensorProto.INT2,
    "float": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "nibbles": TensorProto.UINT8,
}


def tensor(name, kind, count, bits, zeros, seed):
    rng = np.random.default_rng(seed)
    if kind in ("int8", "int4", "int2"):
        bits = min(bits, int(kind.removeprefix("int")))
        values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), count).astype(np.int8)
        values[rng.random(count) < zeros] = 0
        return helper.make_tensor(name, KINDS[kind], [count], codes_to_raw(values, KINDS[kind]), raw=True)
    if kind == "nibbles":
        values = rng.integers(-(2 ** (min(bits, 4) - 1)), 2 ** (min(bits, 4) - 1), 2 * count).astype(np.int8)
        values[rng.random(2 * count) < zeros] = 0
        return helper.make_tensor(name, KINDS[kind], [count], codes_to_nibbles(values), raw=True)
    # Random bits: NaN, infinities, denormal numbers and minus zero are among them.
    dtype = {"float": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}[kind]
    raw = rng.integers(0, 256, (count, np.dtype(dtype).itemsize), np.uint8)
    raw[rng.random(count) < zeros] = 0
    return helper.make_tensor(name, KINDS[kind], [count], raw.tobytes(), raw=True)


def model_of(tensors):
    nodes = [helper.make_node("Identity", ["input"], ["output"])]
    nodes += [
        helper.make_node("MatMulNBits", ["input", t.name], [f"{t.name}_out"], domain="com.microsoft")
        for t in tensors
        if t.data_type == TensorProto.UINT8
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "output")]
    return helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:], tensors))


@st.composite
def models(draw):
    counts = st.one_of(st.integers(0, 40), st.sampled_from([15, 16, 17, 255, 1001]))
    parts = draw(
        st.lists(
            st.tuples(
                st.sampled_from(list(KINDS)), counts, st.integers(1, 8), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])
            )
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


@settings(deadline=None, max_examples=20)
@given(models())
def test_the_onnx_file_is_that_of_the_model(model):
    """Written deterministically or not: ONNX has no field whose order is free."""
    data = packing.onnx_bytes(pack(model))
    assert data == model.SerializeToString() == model.SerializeToString(deterministic=True)
    with pytest.raises(ArtifactError, match="not a packed model"):
        packing.onnx_bytes(data)


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
    for bits in (3, 4, 5, 6, 7, 8):
        top = 2 ** (bits - 1) - 1
        values = rng.choice([-top, top], count).astype(np.int8)
        kind = TensorProto.INT8 if bits > 4 else TensorProto.INT4
        model = model_of([helper.make_tensor("t", kind, [count], codes_to_raw(values, kind), raw=True)])
        assert payload_of(model) == -(-count * bits // 8)
        sizes.append(len(pack(model)))
    assert sizes == sorted(set(sizes))


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=60))
def test_ternary_numbers_are_digits_to_base_3(values):
    data = packing.pack_ternary(np.array(values, np.int8))
    number = [sum((value + 1) * 3**i for i, value in enumerate(values[k : k + 5])) for k in range(0, len(values), 5)]
    missing = sum(3**i for i in range(len(values) % 5, 5)) if len(values) % 5 else 0  # zeros fill the last byte up
    assert list(data) == [*number[:-1], *(n + missing for n in number[-1:])]
    assert packing.unpack_ternary(data, len(values)).tolist() == values


@given(
    st.sets(st.integers(0, 3000), min_size=1) | st.just(set(range(0, 3000, 3)) | set(range(2990))),
    st.integers(3001, 5000),
)
def test_positions_come_back_from_at_most_two_bits_beyond_their_low_ones(places, count):
    """Elias's bound: a position takes its low bits and two more, within the bytes that are begun."""
    positions = np.array(sorted(places))
    data = packing.pack_positions(positions, count)
    low = int(position_bits(count, len(places)))
    assert low == min(8, math.floor(math.log2(count / len(places))))
    assert packing.unpack_positions(data, count, len(places)).tolist() == positions.tolist()
    if low < 8:  # (a mean gap above 512 would ask for more)
        assert 8 * len(data) <= len(places) * (low + 3) + 16
    assert len(data) == index_bytes(count, 0, len(places))


def entries(model):
    """How each tensor is stored, by its name."""
    index = json.loads(zlib.decompress(load_safetensors(pack(model))["index"].tobytes()))
    return {model.graph.initializer[entry[0]].name: entry[1:] for entry in index}


@pytest.mark.parametrize(
    ("bits", "zeros", "kind"),
    [
        (1, 0.0, "sign"),
        (2, 0.0, "sign"),
        (8, 0.1, "dense"),
        (8, 0.5, "bitmap"),
        (8, 0.8, "index"),
        (4, 0.1, "dense"),
        (4, 0.5, "bitmap"),
        (4, 0.9, "index"),
        (2, 0.3, "ternary"),
        (2, 0.5, "bitmap"),
        (2, 0.8, "index"),
        (32, 0.02, "dense"),
        (32, 0.05, "bitmap"),
        (32, 0.95, "index"),
    ],
)
def test_the_shortest_way_is_taken(bits, zeros, kind):
    count = 2000
    nonzero = count - round(count * zeros)
    rng = np.random.default_rng(0)
    values = np.zeros(count, np.int8)
    values[:nonzero] = rng.choice([-1, 1], nonzero)
    if bits == 32:
        part = numpy_helper.from_array(rng.permutation(values).astype(np.float32), "t")
    else:
        values[:2] = [min(-1, 1 - 2 ** (bits - 1)), max(1, 2 ** (bits - 1) - 1)]
        raw = codes_to_raw(rng.permutation(values), TensorProto.INT8)
        part = helper.make_tensor("t", TensorProto.INT8, [count], raw, raw=True)
    model = model_of([part])
    low, value = math.floor(math.log2(count / nonzero)), 1 if bits == 2 else bits
    sizes = {
        "dense": count * max(2, bits) / 8,
        "ternary": count / 5 if bits == 2 else math.inf,
        "sign": count / 8 if bits <= 2 and not zeros else math.inf,
        "bitmap": count / 8 + nonzero * value / 8,
        "index": nonzero * (low + 1 + value) / 8 + count / 2**low / 8,
    }
    assert kind == min(sizes, key=sizes.get)
    assert entries(model)["t"][0] == kind
    assert payload_of(model) == pytest.approx(sizes[kind], abs=2)
    assert payload_of(model) == weight_bytes(count, bits, nonzero)


def test_only_a_file_of_signs_asks_for_version_3():
    """A paretorch that knows no signs reads all other files, and their bytes are what they were."""
    for numbers, version in (([1, -1] * 20, "3"), ([1, 0] * 20, "2")):
        raw = np.array(numbers, np.int8).tobytes()
        packed = pack(model_of([helper.make_tensor("t", TensorProto.INT8, [40], raw, raw=True)]))
        start = 8 + int.from_bytes(packed[:8], "little")
        assert json.loads(packed[8:start])["__metadata__"]["version"] == version
        assert [*numpy_helper.to_array(unpack(packed).graph.initializer[0])] == numbers


@settings(deadline=None, max_examples=60)
@given(
    st.integers(16, 2000),
    st.integers(2, 8),
    st.floats(0, 1) | st.sampled_from((0.5, 0.9, 1.0)),
    st.sampled_from(("DequantizeLinear", "Sub", "MatMulInteger")),
    st.booleans(),
    st.integers(0, 999),
)
def test_zeros_of_an_affine_weight_are_found_by_its_zero_point(count, bits, zeros, how, cast, seed):
    """All 2^bits codes around any zero point, in the bytes that are foretold; only such files are of version 4."""
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    zero = int(rng.integers(low, high + 1))
    values = rng.integers(low, high + 1, count).astype(np.int8)
    values[rng.random(count) < zeros] = zero
    values[:4] = low, high, high - 1, low + 1  # so that all bits are needed
    kind = TensorProto.INT2 if bits == 2 else TensorProto.INT4 if bits <= 4 else TensorProto.INT8
    weight = helper.make_tensor("w", kind, [count], codes_to_raw(values, kind), raw=True)
    point = numpy_helper.from_array(np.array(zero, np.float32 if how == "Sub" else np.int8), "z")
    name = "c" if cast or how == "Sub" else "w"
    inputs = {"DequantizeLinear": [name, "s", "z"], "Sub": [name, "z"], "MatMulInteger": ["x", name, "xz", "z"]}[how]
    model = model_of([weight, point])
    model.graph.node.append(helper.make_node(how, inputs, ["y"]))
    if name == "c":
        model.graph.node.append(helper.make_node("Cast", ["w"], ["c"], to=TensorProto.INT8))
    data = pack(model)
    assert unpack(data) == model
    assert header_of(data)[0]["__metadata__"]["version"] == ("4" if zero else "2")
    taken = weight_bytes(count, bits, int((values != zero).sum()), affine=True)
    few = bits == 2 and zero == 0  # then -2 can be all that tells from ternary, and codes around 0 need a bit less
    assert payload_of(model) <= taken if few else payload_of(model) == taken


def test_a_file_of_version_1_still_loads():
    """There integers in a bitmap are two's complement as they are, and an index entry has four numbers."""
    values = np.array([0, 3, -4, 1, 0, 0, -1, 2] * 3, np.int8)
    model = model_of([helper.make_tensor("t", TensorProto.INT8, [24], values.tobytes(), raw=True)])
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model)
    skeleton.graph.initializer[0].ClearField("raw_data")
    nonzero = values[values != 0]
    payload = pack_bits((values != 0).astype(np.uint8), 1) + pack_bits(nonzero.view(np.uint8) & np.uint8(7), 3)
    index = zlib.compress(json.dumps([[0, "bitmap", 3, len(payload)]]).encode())
    graph = zlib.compress(skeleton.SerializeToString(deterministic=True))
    old = packing._file({"graph": graph, "index": index, "payload": payload}, 1)
    assert unpack(old) == model
    assert header_of(old)[0]["__metadata__"]["version"] == "1"
    assert unpack(pack(model)) == model


def test_zeros_cost_nothing():
    assert payload_of(model_of([numpy_helper.from_array(np.zeros(5000, np.float32), "t")])) == 0


PARTS = [tensor("a", "int8", 20, 3, 0.0, 0), tensor("b", "float", 17, 8, 0.9, 1)]
SIGNS = helper.make_tensor("c", TensorProto.INT8, [16], np.array([1, -1] * 8, np.int8).tobytes(), raw=True)
SMALL = pack(model_of(PARTS))


@pytest.mark.parametrize("whole", [SMALL, pack(model_of([*PARTS, SIGNS]))], ids=["version 2", "version 3"])
def test_any_changed_byte_is_noticed(whole):
    """Every byte, its lowest and its highest bit and one flip of all: header, padding and metadata are no exception."""
    assert len(whole) < 1000
    for position in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF, whole[position] ^ 0x20, whole[position] ^ 0x0A):
            if flip:
                changed = bytearray(whole)
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
        forged(graph=GRAPH, index=zlib.compress(b'[[7,"dense",3]]')),
        forged(graph=GRAPH, index=zlib.compress(b'[[0,"dense"]]')),
        forged(graph=GRAPH, index=zlib.compress(b'[[0,"dense","3"]]')),
        forged(graph=GRAPH, index=zlib.compress(b'[[0,"dense",3]]')),
        forged(graph=GRAPH, index=zlib.compress(b'[[0,"bitmap",3,2]]'), payload=b"\xff\xff"),
        forged(graph=GRAPH, index=zlib.compress(b'{"a":1}')),
        forged(graph=GRAPH, index=zlib.compress(b'[[0,"rle",3]]'), payload=bytes(8)),
        forged(graph=GRAPH, index=zlib.compress(b'[[0,"ternary",2]]'), payload=bytes(3)),
        forged(graph=GRAPH, index=zlib.compress(b'[[0,"index",3,2]]'), payload=b"\xff\xff\xff"),
        forged(graph=GRAPH, index=zlib.compress(b'[[0,"index",3,-2]]'), payload=b"\xff\xff\xff"),
    ],
)
def test_a_forgery_with_a_fitting_digest_is_an_artifact_error_too(data):
    with pytest.raises(ArtifactError):
        unpack(data)


def test_a_newer_version_and_a_foreign_format_are_named():
    header, body = header_of(SMALL)
    for key, value, word in (("version", "5", "version 5"), ("format", "other", "'other'")):
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
