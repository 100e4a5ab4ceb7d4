"""The packed file: a whole ONNX model in as few bytes as its numbers need, restored bit for bit.

`size_bytes` on the front is the length of this file. It is a safetensors file of three byte tensors: `graph` (the ONNX
model without its large tensors, deflated), `index` (how each tensor is stored, deflated JSON) and `payload`. Integer
tensors take the width of their largest number (3-bit weights cost 3 bits), any tensor may be stored as a bitmap and
its nonzero values, whichever is less; floats are kept as they are. Nothing is lost: `unpack(pack(model))` is `model`.

The header is written here and not by the safetensors library, so that it has one form: a file is intact exactly when
its parts, written again, give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from ..errors import ArtifactError

FORMAT = "paretorch.packed"
VERSION = 1
_SMALLEST = 16  # numbers; a smaller tensor stays in the graph
_FLOATS: dict[int, type] = {TensorProto.FLOAT: np.uint32, TensorProto.FLOAT16: np.uint16, TensorProto.INT32: np.uint32}
_CODES = {TensorProto.INT8: 8, TensorProto.INT4: 4, TensorProto.INT2: 2}  # and the bits of a number in the ONNX file


def width(values: NDArray[np.int8]) -> int:
    """The bits of a two's complement number that hold every value.

    >>> width(np.array([-3, 3], np.int8)), width(np.array([-4, 3], np.int8)), width(np.array([0], np.int8))
    (3, 3, 1)
    """
    if not len(values):
        return 1
    low, high = int(values.min()), int(values.max())
    return max(max(-1 - low, 0).bit_length(), max(high, 0).bit_length()) + 1


def pack_bits(values: NDArray[Any], bits: int) -> bytes:
    """Unsigned numbers below `2 ** bits` in a row without gaps, the lowest bit first.

    >>> pack_bits(np.array([1, 2, 3], np.uint8), 3).hex()
    'd100'
    """
    planes = (values[:, None] >> np.arange(bits, dtype=values.dtype)) & 1
    return np.packbits(planes.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def unpack_bits(data: bytes, bits: int, count: int) -> NDArray[np.uint8]:
    """The reverse of `pack_bits` for widths up to 8."""
    planes = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    values: NDArray[np.uint8] = (planes << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return values


def _encode(values: NDArray[Any], bits: int) -> tuple[str, bytes]:
    """`zeros`, `dense` or `bitmap` (which numbers are nonzero, then those), whichever is shortest."""

    def body(part: NDArray[Any]) -> bytes:
        return part.tobytes() if bits > 8 else pack_bits(part, bits)

    nonzero = values != 0
    if not nonzero.any():
        return "zeros", b""
    bitmap_size = -(-len(values) // 8) + -(-int(nonzero.sum()) * bits // 8)
    if bitmap_size < -(-len(values) * bits // 8):
        return "bitmap", pack_bits(nonzero.astype(np.uint8), 1) + body(values[nonzero])
    return "dense", body(values)


def _decode(kind: str, data: bytes, bits: int, count: int, dtype: Any) -> NDArray[Any]:
    def body(part: bytes, n: int) -> NDArray[Any]:
        if len(part) != -(-n * bits // 8):
            raise ValueError(f"{len(part)} bytes for {n} numbers of {bits} bits")
        return np.frombuffer(part, dtype, n) if bits > 8 else unpack_bits(part, bits, n)

    if kind == "zeros":
        return np.zeros(count, dtype)
    if kind == "dense":
        return body(data, count)
    head = -(-count // 8)
    nonzero = unpack_bits(data[:head], 1, count).astype(bool)
    values = np.zeros(count, dtype)
    values[nonzero] = body(data[head:], int(nonzero.sum()))
    return values


def pack(model: onnx.ModelProto) -> bytes:
    """The packed file of a model. Equal models give equal bytes."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model)
    index: list[list[Any]] = []
    parts: list[bytes] = []
    for position, tensor in enumerate(skeleton.graph.initializer):
        count = int(np.prod(tensor.dims))
        if count < _SMALLEST or not tensor.HasField("raw_data"):
            continue
        if tensor.data_type in _CODES:
            signed = numpy_helper.to_array(tensor).astype(np.int8).reshape(-1)
            bits = width(signed)
            kind, data = _encode(signed.view(np.uint8) & np.uint8(2**bits - 1), bits)
        elif tensor.data_type in _FLOATS:
            raw: NDArray[Any] = (
                np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1).view(_FLOATS[tensor.data_type])
            )
            bits = raw.dtype.itemsize * 8
            kind, data = _encode(raw, bits)
        else:
            continue
        tensor.ClearField("raw_data")
        index.append([position, kind, bits, len(data)])
        parts.append(data)
    graph = zlib.compress(skeleton.SerializeToString(deterministic=True), 9)
    listing = zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)
    return _file({"graph": graph, "index": listing, "payload": b"".join(parts)})


def _file(parts: Mapping[str, bytes]) -> bytes:
    """The safetensors file of byte tensors, in one form: sorted keys, no gaps, the header padded to 8 bytes."""
    digest = hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION), "sha256": digest}}
    offset = 0
    for name in sorted(parts):
        end = offset + len(parts[name])
        header[name] = {"dtype": "U8", "shape": [len(parts[name])], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts[name] for name in sorted(parts))


def _parts(data: bytes) -> dict[str, bytes]:
    """The three parts of an intact file; raises `ArtifactError`."""
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
    if _file(parts) != data:
        raise ArtifactError("the packed model is corrupted: its contents do not match its SHA-256")
    return parts


def unpack(data: bytes) -> onnx.ModelProto:
    """The model of a packed file; raises `ArtifactError` for anything that `pack` did not write."""
    parts = _parts(data)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(zlib.decompress(parts["graph"]))
        _restore(model, json.loads(zlib.decompress(parts["index"])), parts["payload"])
    except (zlib.error, DecodeError, KeyError, IndexError, TypeError, ValueError) as error:
        # The digest fits: the file is whole, but something else wrote it.
        raise ArtifactError(f"not a packed model: {error!r}") from error
    return model


def _restore(model: onnx.ModelProto, index: Sequence[Any], payload: bytes) -> None:
    """Give the graph's tensors their numbers back, in place."""
    offset = 0
    for position, kind, bits, size in index:
        tensor = model.graph.initializer[position]
        count = int(np.prod(tensor.dims))
        part = payload[offset : offset + size]
        offset += size
        if tensor.data_type in _CODES:
            raw = _decode(kind, part, bits, count, np.uint8).astype(np.int16)
            signed = np.where(raw >= 2 ** (bits - 1), raw - 2**bits, raw).astype(np.int8)
            tensor.raw_data = codes_to_raw(signed, tensor.data_type)
        else:
            tensor.raw_data = _decode(kind, part, bits, count, _FLOATS[tensor.data_type]).tobytes()


def codes_to_raw(values: NDArray[np.int8], data_type: int) -> bytes:
    """The bytes of an INT8, INT4 or INT2 ONNX tensor (several numbers in a byte, the first in its lowest bits)."""
    bits = _CODES[data_type]
    return values.tobytes() if bits == 8 else pack_bits(values.view(np.uint8) & np.uint8(2**bits - 1), bits)
