"""What a packed file takes after entropy coding: what a download or an archive with zstd would make of it.

Nothing here ships. Packed bits seldom align to bytes, which is what zstd codes, so the numbers are offered to it in
several forms, and the shortest counts: the packed file, coded or left as it is; integers as a byte each; a bitmap of
what is not zero, and a byte for each number that is not. Floats go in as they are; the deflated graph stays as it is.
"""

from __future__ import annotations

import numpy as np
import onnx
import pyarrow  # MLflow brings it, and it brings zstd

from .packing import large_tensors, payload_size


def zstd_bytes(model: onnx.ModelProto, packed: bytes, level: int) -> int:
    """The length of the shortest of these codings. packed: the packed file of the model. level: of zstd, 1 to 19."""
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
