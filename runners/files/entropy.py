"""The size of a packed file after entropy coding, as a download or an archive with zstd would store it.

Nothing here ships. Packed numbers seldom align to bytes, which are what zstd codes, so they are compressed in several
forms, and the shortest counts: the packed file, coded or as it is; each integer as a byte; a bitmap of the nonzero
numbers, and a byte for each of them. Floats are coded as they are; the deflated graph is not coded again.
"""

from __future__ import annotations

import numpy as np
import onnx
import pyarrow  # MLflow brings it, and it brings zstd

from .packing import large_tensors, payload_size


def zstd_bytes(model: onnx.ModelProto, packed: bytes, level: int) -> int:
    """The length of the shortest of these codings.

    Args:
        model: The model.
        packed: The packed file of the model.
        level: The compression level of zstd, 1 to 19.
    """
    zstd = pyarrow.Codec("zstd", compression_level=level)

    def coded(parts: list[bytes]) -> int:
        data = b"".join(parts)
        return len(zstd.compress(data)) if data else 0

    tensors = [(raw, zero) for _, raw, zero in large_tensors(model)]
    integers = [(raw, zero) for raw, zero in tensors if raw.dtype == np.int8]
    floats = coded([raw.tobytes() for raw, _ in tensors if raw.dtype != np.int8])
    rest = len(packed) - payload_size(packed) + floats
    whole = coded([raw.tobytes() for raw, _ in integers])
    split = coded([np.packbits(raw != zero).tobytes() for raw, zero in integers])
    split += coded([raw[raw != zero].tobytes() for raw, zero in integers])
    return min(len(packed), coded([packed]), rest + min(whole, split))
