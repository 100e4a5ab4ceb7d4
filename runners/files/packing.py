"""The packed file: a whole ONNX model in as few bytes as its numbers need, restored bit for bit.

`size_bytes` on the front is the length of this file. It is a safetensors file of three byte tensors: `graph` (the
ONNX model without its large tensors, deflated), `index` (how each tensor is stored, deflated JSON) and `payload`.
Integer tensors take the width of their largest number (3-bit weights take 3 bits each); floats are kept as they are.
Each tensor gets the encoding that takes the fewest bytes. That depends on three numbers alone: how many numbers the
tensor has, how many of them are not zero, and how wide they are. So `objectives.cost` can predict the size of a file.

- `zeros`: no bytes; every number is zero.
- `dense`: one number after the other.
- `ternary`: numbers of {-1, 0, 1}, five to a byte.
- `sign`: numbers of {-1, 1}, a bit each.
- `bitmap`: a bit for each number, then the nonzero numbers.
- `index`: the positions of the nonzero numbers in the code of Elias and Fano for increasing sequences (R. M. Fano,
  1971; P. Elias, J. ACM 21, 1974), then their values.

In `bitmap` and `index` the positive integers are lowered by one, because zero does not occur; so -1 and 1 take a single
bit. Where the graph gives integers a zero point, the zero point counts as zero: the numbers of a sparse affine weight.

The packing is lossless: `unpack(pack(model))` is `model`. Version 1 of the format had neither `ternary` nor `index`,
and did not lower the integers in a bitmap; its files still load. Version 3 is version 2 with `sign`, and version 4 is
version 3 with zero points; only files that use these carry their version.

The header is written here and not by the safetensors library, so that it is unique: a file is intact exactly when its
parts, written again, give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it ships no types
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from ...errors import ArtifactError
from ...objectives.storage import bitmap_bytes, dense_bytes, index_bytes, position_bits, ternary_bytes

FORMAT = "paretorch.packed"
VERSION = 4
_SMALLEST = 16  # numbers; a smaller tensor stays in the graph
_FLOATS: dict[int, type] = {TensorProto.FLOAT: np.uint32, TensorProto.FLOAT16: np.uint16, TensorProto.INT32: np.uint32}
_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.int16)
_CODES = {TensorProto.INT8: 8, TensorProto.INT4: 4, TensorProto.INT2: 2}  # and the bits of a number in the ONNX file


def width(values: NDArray[np.int8]) -> int:
    """The fewest bits of a two's complement number that can hold every value.

    >>> width(np.array([-3, 3], np.int8)), width(np.array([-4, 3], np.int8)), width(np.array([0], np.int8))
    (3, 3, 1)
    """
    if not len(values):
        return 1
    low, high = int(values.min()), int(values.max())
    return max(max(-1 - low, 0).bit_length(), max(high, 0).bit_length()) + 1


def pack_bits(values: NDArray[Any], bits: int) -> bytes:
    """Unsigned numbers below `2 ** bits` (8 bits at most), one after the other without gaps, the lowest bit first.

    >>> pack_bits(np.array([1, 2, 3], np.uint8), 3).hex()
    'd100'
    """
    planes = (
        np.unpackbits(values.astype(np.uint8)[:, None], axis=1, count=bits, bitorder="little") if bits != 1 else values
    )
    return np.packbits(planes.astype(np.uint8, copy=False).reshape(-1), bitorder="little").tobytes()


def unpack_bits(data: bytes, bits: int, count: int) -> NDArray[np.uint8]:
    """The reverse of `pack_bits` for widths up to 8."""
    planes = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    values = np.zeros(count, np.uint8)
    for bit in range(bits):  # several times as fast as one sum
        values |= planes[:, bit] << np.uint8(bit)
    return values


def _body(values: NDArray[Any], bits: int) -> bytes:
    return values.tobytes() if bits > 8 else pack_bits(values, bits)


def _values(data: bytes, bits: int, count: int, dtype: Any) -> NDArray[Any]:
    """The reverse of `_body`."""
    if len(data) != -(-count * bits // 8):
        raise ValueError(f"{len(data)} bytes for {count} numbers of {bits} bits")
    return np.frombuffer(data, dtype, count) if bits > 8 else unpack_bits(data, bits, count)


def _signed(raw: NDArray[Any], bits: int) -> NDArray[np.int8]:
    """Two's complement numbers of `bits` bits as int8."""
    wide = raw.astype(np.int16)
    return np.where(wide >= 2 ** (bits - 1), wide - 2**bits, wide).astype(np.int8)


def pack_ternary(values: NDArray[np.int8]) -> bytes:
    """Numbers of {-1, 0, 1}, five to a byte: the digits of a number to base 3, the first the lowest.

    >>> pack_ternary(np.array([1, 0, -1, -1, 1, 0], np.int8)).hex()
    'a779'
    """
    digits = np.ones(-(-len(values) // 5) * 5, np.int8)
    digits[: len(values)] += values
    return bytes((digits.reshape(-1, 5) @ _POWERS_OF_3).astype(np.uint8))


def unpack_ternary(data: bytes, count: int) -> NDArray[np.int8]:
    """The reverse of `pack_ternary`."""
    if len(data) != -(-count // 5):
        raise ValueError(f"{len(data)} bytes for {count} numbers, five to a byte")
    digits = np.frombuffer(data, np.uint8)[:, None] // _POWERS_OF_3 % 3
    return (digits.reshape(-1)[:count] - 1).astype(np.int8)


def signs(values: NDArray[Any]) -> bool:
    """Whether every number is -1 or 1.

    >>> signs(np.array([-1, 1], np.int8)), signs(np.array([0, 1], np.int8))
    (True, False)
    """
    return bool((np.abs(values) == 1).all())


def pack_positions(positions: NDArray[np.int64], count: int) -> bytes:
    """An increasing sequence of numbers below `count`, in the code of Elias and Fano.

    The low bits of each number stand one after the other; the high ones are counted in unary, which takes at most two
    bits a number when as many low ones are taken as `position_bits` says.
    """
    low = position_bits(count, len(positions))
    upper = np.zeros(len(positions) + (count - 1 >> low), np.uint8)
    upper[(positions >> low) + np.arange(len(positions))] = 1
    return pack_bits(positions & 2**low - 1, low) + pack_bits(upper, 1)


def unpack_positions(data: bytes, count: int, nonzero: int) -> NDArray[np.int64]:
    """The reverse of `pack_positions`."""
    low = position_bits(count, nonzero)
    middle = -(-nonzero * low // 8)
    upper = _values(data[middle:], 1, nonzero + (count - 1 >> low), np.uint8)
    high = np.flatnonzero(upper) - np.arange(nonzero)
    positions: NDArray[np.int64] = (high << low) | _values(data[:middle], low, nonzero, np.uint8)
    return positions


# By encoding, the bytes of `count` numbers of `bits` bits of which `nonzero` are not zero.
_SIZES: dict[str, Callable[[int, int, int], Any]] = {
    "zeros": lambda count, bits, nonzero: 0,
    "dense": lambda count, bits, nonzero: dense_bytes(count, bits),
    "ternary": lambda count, bits, nonzero: ternary_bytes(count),
    "sign": lambda count, bits, nonzero: dense_bytes(count, 1),
    "bitmap": bitmap_bytes,
    "index": index_bytes,
}


def _encode(raw: NDArray[Any], zero: int = 0) -> tuple[list[Any], bytes]:
    """A tensor's numbers in the fewest bytes.

    Args:
        raw: int8, or the bits of floats as unsigned integers.
        zero: The number that counts as zero.

    Returns:
        The encoding, the bits of a number and, where it matters, how many are not zero; and the bytes.
    """
    integer = raw.dtype == np.int8
    places = np.flatnonzero(raw != zero)
    nonzero = raw[places]
    if not len(nonzero):
        return ["zeros", 1], b""
    wide = narrow = raw.dtype.itemsize * 8
    if integer:
        wide, narrow = width(raw), width(nonzero - (nonzero > zero))
        nonzero = (nonzero - (nonzero > zero)).view(np.uint8) & np.uint8(2**narrow - 1)
    bits = {"dense": wide, "bitmap": narrow, "index": narrow}
    if integer and raw.min() >= -1 and raw.max() <= 1:
        bits["ternary"] = 2
    if integer and signs(raw):
        bits["sign"] = 1
    sizes = {kind: _SIZES[kind](len(raw), bits[kind], len(nonzero)) for kind in bits}
    kind = min(sizes, key=sizes.__getitem__)
    match kind:
        case "dense":
            data = _body(raw.view(np.uint8) & np.uint8(2**wide - 1) if integer else raw, wide)
        case "ternary":
            data = pack_ternary(raw)
        case "sign":
            data = pack_bits((raw > 0).astype(np.uint8), 1)
        case "bitmap":
            data = pack_bits((raw != zero).astype(np.uint8), 1) + _body(nonzero, narrow)
        case _:
            data = pack_positions(places, len(raw)) + _body(nonzero, narrow)
    return [kind, bits[kind], *([len(nonzero)] if kind in ("bitmap", "index") else [])], data


def _decode(
    kind: str, bits: int, data: bytes, count: int, dtype: Any, nonzero: int, moved: bool, zero: int = 0
) -> NDArray[Any]:
    """The reverse of `_encode`.

    Args:
        kind: The encoding.
        bits: The bits of a number.
        data: The bytes.
        count: How many numbers there are.
        dtype: The type of the numbers; int8 for integers.
        nonzero: How many numbers are not zero, where the encoding needs it.
        moved: Whether nonzero integers above zero are stored lowered by one.
        zero: The number that counts as zero.
    """
    integer = dtype == np.int8
    stored = np.uint8 if integer else dtype
    if kind == "zeros":
        return np.full(count, zero, dtype)
    if kind == "ternary":
        return unpack_ternary(data, count)
    if kind == "sign":
        return _values(data, 1, count, stored).view(np.int8) * np.int8(2) - np.int8(1)
    if kind == "dense":
        raw = _values(data, bits, count, stored)
        return _signed(raw, bits) if integer else raw
    if kind == "index":
        head = index_bytes(count, 0, nonzero)
        places = unpack_positions(data[:head], count, nonzero)
    else:
        head = dense_bytes(count, 1)
        places = np.flatnonzero(unpack_bits(data[:head], 1, count))
    nonzeros = _values(data[head:], bits, len(places), stored)
    if integer:
        nonzeros = _signed(nonzeros, bits)
        nonzeros = nonzeros + (nonzeros >= zero) if moved else nonzeros
    values = np.full(count, zero, dtype)
    values[places] = nonzeros
    return values


def pack(model: onnx.ModelProto) -> bytes:
    """The packed file of a model. Equal models give equal bytes."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model)
    index: list[list[Any]] = []
    parts: list[bytes] = []
    for position, raw, zero in large_tensors(model):
        encoding, data = _encode(raw, zero)
        skeleton.graph.initializer[position].ClearField("raw_data")
        index.append([position, *encoding])
        parts.append(data)
    graph = zlib.compress(skeleton.SerializeToString(deterministic=True), 9)
    listing = zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)
    return _file({"graph": graph, "index": listing, "payload": b"".join(parts)}, _version(index, _zero_points(model)))


def _version(index: Sequence[Any], zeros: Mapping[str, int]) -> int:
    """The lowest version that has all the encodings and zero points of the tensors."""
    return 4 if zeros else 3 if any(kind == "sign" for _, kind, *_ in index) else 2


def large_tensors(model: onnx.ModelProto) -> Iterator[tuple[int, NDArray[Any], int]]:
    """The tensors that are stored outside the graph.

    Yields:
        The position among the initializers, the numbers, and which of them counts as zero. Integers are int8, floats
        their bits as unsigned integers.
    """
    nibbles, zeros = _nibbles(model), _zero_points(model)
    for position, tensor in enumerate(model.graph.initializer):
        if int(np.prod(tensor.dims)) < _SMALLEST or not tensor.HasField("raw_data"):
            continue
        if tensor.data_type in _CODES:
            yield position, numpy_helper.to_array(tensor).astype(np.int8).reshape(-1), zeros.get(tensor.name, 0)
        elif tensor.name in nibbles:
            yield position, nibbles_to_codes(tensor.raw_data), 0
        elif tensor.data_type in _FLOATS:
            floats: NDArray[Any] = np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1)
            yield position, floats.view(_FLOATS[tensor.data_type]), 0


def tensor_bytes(data: bytes) -> dict[bytes, int]:
    """The bytes of each tensor that a packed file stores outside its graph.

    Args:
        data: The packed file.

    Returns:
        The bytes by the SHA-256 of the tensor's type, shape and numbers.
    """
    model = unpack(data)
    sizes = {}
    for position, raw, zero in large_tensors(model):
        tensor = model.graph.initializer[position]
        about = f"{tensor.data_type} {list(tensor.dims)} ".encode()
        sizes[hashlib.sha256(about + tensor.raw_data).digest()] = len(_encode(raw, zero)[1])
    return sizes


def _nibbles(model: onnx.ModelProto) -> set[str]:
    """The names of the weights of MatMulNBits: ONNX stores them as bytes, each of which holds two 4-bit numbers."""
    return {node.input[1] for node in model.graph.node if node.op_type == "MatMulNBits"}


# Operators that subtract a zero point, and the places of the numbers and of the zero point among their inputs.
_SUBTRACT = {"DequantizeLinear": (0, 2), "Sub": (0, 1), "MatMulInteger": (1, 3)}


def _zero_points(model: onnx.ModelProto) -> dict[str, int]:
    """By integer tensor, the zero point that the graph gives to all of its numbers, where that is not 0."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    single = {name: numpy_helper.to_array(t).item() for name, t in tensors.items() if t.dims in ([], [1])}
    cast = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    zeros = {}
    for node in model.graph.node:
        what, by = _SUBTRACT.get(node.op_type, (0, len(node.input)))
        zero = single.get(node.input[by], 0) if by < len(node.input) else 0
        name = cast.get(node.input[what], node.input[what]) if zero else ""
        if name in tensors and tensors[name].data_type in _CODES and zero in range(-128, 128):
            zeros[name] = int(zero)
    return zeros


def _file(parts: Mapping[str, bytes], version: int = VERSION) -> bytes:
    """The unique safetensors file of byte tensors: sorted keys, no gaps, the header padded to 8 bytes."""
    digest = hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(version), "sha256": digest}}
    offset = 0
    for name in sorted(parts):
        end = offset + len(parts[name])
        header[name] = {"dtype": "U8", "shape": [len(parts[name])], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts[name] for name in sorted(parts))


def _parts(data: bytes) -> tuple[dict[str, bytes], int]:
    """The three parts of an intact file, and its version.

    Raises:
        ArtifactError: The file is damaged, of a later version, or not a packed model.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        metadata = header["__metadata__"]
        kind, version = metadata["format"], int(metadata["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"not a packed model: {error}") from error
    if kind != FORMAT or version > VERSION:
        raise ArtifactError(
            f"a file of format {kind!r} version {version}; this paretorch reads {FORMAT!r} up to version {VERSION}"
        )
    try:
        spans = {name: header[name]["data_offsets"] for name in ("graph", "index", "payload")}
        parts = {name: data[start + first : start + last] for name, (first, last) in spans.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"not a packed model: {error!r}") from error
    if _file(parts, version) != data:
        raise ArtifactError("the packed model is corrupted: its contents do not match its SHA-256")
    return parts, version


def payload_size(data: bytes) -> int:
    """The bytes of the tensors that are stored outside the graph.

    Raises:
        ArtifactError: `pack` did not write the file.
    """
    return len(_parts(data)[0]["payload"])


def unpack(data: bytes) -> onnx.ModelProto:
    """The model of a packed file.

    Raises:
        ArtifactError: `pack` did not write it.
    """
    parts, version = _parts(data)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(zlib.decompress(parts["graph"]))
        _restore(model, json.loads(zlib.decompress(parts["index"])), parts["payload"], version)
    except (zlib.error, DecodeError, KeyError, IndexError, TypeError, ValueError) as error:
        # The digest is right, so the file is intact, but `pack` did not write it.
        raise ArtifactError(f"not a packed model: {error!r}") from error
    return model


def onnx_bytes(packed: bytes) -> bytes:
    """The ONNX file of a packed one, which runtimes load. Equal packed files give equal bytes.

    Raises:
        ArtifactError: `pack` did not write it.
    """
    data: bytes = unpack(packed).SerializeToString(deterministic=True)
    return data


def _restore(model: onnx.ModelProto, index: Sequence[Any], payload: bytes, version: int) -> None:
    """Restore the numbers of the graph's tensors, in place."""
    nibbles, zeros = _nibbles(model), _zero_points(model)
    if version > 1 and version != _version(index, zeros):  # the digest does not cover it
        raise ValueError(f"version {version} of a file of version {_version(index, zeros)}")
    offset = 0
    for position, kind, bits, *rest in index:
        tensor = model.graph.initializer[position]
        half_bytes = tensor.name in nibbles
        count = int(np.prod(tensor.dims)) * (2 if half_bytes else 1)
        nonzero = int(rest[0]) if rest else 0
        size = nonzero if version == 1 else int(_SIZES[kind](count, bits, nonzero))  # version 1 notes the size itself
        part = payload[offset : offset + size]
        offset += size
        integer = half_bytes or tensor.data_type in _CODES
        dtype = np.int8 if integer else _FLOATS[tensor.data_type]
        values = _decode(kind, bits, part, count, dtype, nonzero, version > 1, zeros.get(tensor.name, 0))
        if half_bytes:
            tensor.raw_data = codes_to_nibbles(values)
        else:
            tensor.raw_data = codes_to_raw(values, tensor.data_type) if integer else values.tobytes()


def codes_to_raw(values: NDArray[np.int8], data_type: int) -> bytes:
    """The bytes of an INT8, INT4 or INT2 ONNX tensor (several numbers in a byte, the first in its lowest bits)."""
    bits = _CODES[data_type]
    return values.tobytes() if bits == 8 else pack_bits(values.view(np.uint8) & np.uint8(2**bits - 1), bits)


def codes_to_nibbles(values: NDArray[np.int8]) -> bytes:
    """The bytes of a MatMulNBits weight: numbers of -8 to 7 less -8, two in a byte, the first in the low half."""
    return pack_bits((values + np.int8(8)).view(np.uint8), 4)


def nibbles_to_codes(data: bytes) -> NDArray[np.int8]:
    """The reverse of `codes_to_nibbles`."""
    return unpack_bits(data, 4, 2 * len(data)).view(np.int8) - np.int8(8)
