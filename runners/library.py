"""The layer library: every (weight, bits, sparsity) is compressed once, for all trials, studies and processes.

An entry is what a layer needs beside its weight: which of the numbers stay (a bit for each) and the scale of each output
channel. Its name is the SHA-256 of all that it depends on: the weight's bytes, type and shape, the level, `VERSION`, and
the version of torch, which may order a sum anew. So an entry is never outdated, only there or not, and nobody holds a
lock: who does not find it computes it, and of several who write it at once each writes the same.

A file is moved into its place whole and carries a checksum of its name and contents. One that a crash tore, that the
disk damaged or that somebody else put there does not fit, counts as missing and is written anew. The oldest by last use
go when the folder grows too large, also while others read it: whoever comes too late computes. A folder that cannot be
written is no error; the library then lives in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .operators.lowrank import basis
from .operators.quantize import weight_scales
from .operators.sparsify import magnitude_mask

VERSION = 1  # of what `shaped` computes; raised when a scale or a mask comes out otherwise
_BLOCK = 4096  # bytes: what a disk takes for a file at least
_STALE = 3600  # seconds after which a file that was never moved into its place belongs to nobody
_Entry = dict[str, Tensor]


def shaped(weight: Tensor, bits: int, ratio: float) -> tuple[Tensor | None, Tensor | None]:
    """A layer's `(mask, scale)` at a level: zeros first, because the scale must not see what is zeroed.

    mask: as the weight, 1 and 0, or None without sparsity. scale: `[output channels]`, or None above 8 bits.

        >>> mask, scale = shaped(torch.tensor([[3.0, -1.0, 0.5, 2.0]]), 2, 0.5)
        >>> mask.tolist(), scale.shape
        ([[1.0, 0.0, 0.0, 1.0]], torch.Size([1]))
    """
    mask = magnitude_mask(weight, ratio) if ratio else None
    scale = weight_scales(weight if mask is None else weight * mask, bits) if bits <= 8 else None
    return mask, scale


def default_folder() -> Path | None:
    """`$PARETORCH_CACHE`, `$XDG_CACHE_HOME/paretorch` or `~/.cache/paretorch`; None for a user without a home."""
    if own := os.environ.get("PARETORCH_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paretorch"
    except RuntimeError:
        return None


class LayerLibrary:
    """Compressed layers by content, in `folder` (`default_folder()` when None) and in memory.

    limit: bytes on disk, as blocks of 4 KiB; with 0 nothing is read or written there. Every process that writes may
    exceed it by a sixteenth. memory: bytes of entries that stay in memory. Safe to use from several threads.

        >>> library = LayerLibrary(limit=0)
        >>> weight = torch.randn(8, 4)
        >>> mask, scale = library.shaped(weight, 4, 0.5)
        >>> torch.equal(scale, shaped(weight, 4, 0.5)[1])
        True
    """

    def __init__(self, folder: Path | None = None, *, limit: int = 1 << 30, memory: int = 64 << 20) -> None:
        home = default_folder() if folder is None else folder
        self.folder = home / "layers" if home and limit else None
        self.limit, self.memory = limit, memory
        self._kept: OrderedDict[str, _Entry] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._unpruned = limit  # bytes written since the folder was measured, which it has never been

    def shaped(self, weight: Tensor, bits: int, ratio: float) -> tuple[Tensor | None, Tensor | None]:
        """What the function `shaped` gives, bit for bit; the tensors are the caller's own."""
        bits = bits if bits <= 8 else 32
        if bits == 32 and not ratio:
            return None, None
        plain = weight.detach().cpu().contiguous()
        key = _key(plain, bits, ratio)
        entry = self._recall(key)
        if entry is None:
            entry = self._read(key, plain, bits, ratio)
            if entry is None:
                entry = _entry(key, *shaped(plain, bits, ratio))
                self._write(key, entry)
            self._remember(key, entry)
        mask = scale = None
        if ratio:
            flags = np.unpackbits(entry["mask"].numpy(), count=plain.numel())
            mask = torch.from_numpy(flags).view(plain.shape).to(weight)
        if bits <= 8:
            scale = entry["scale"].to(weight.device, copy=True)  # a scale is trained in place
        return mask, scale

    def basis(self, weight: Tensor) -> Tensor:
        """What `operators.lowrank.basis` gives, kept in memory only: it is as large as the weight."""
        plain = weight.detach().cpu().contiguous()
        key = f"basis of {_key(plain, 32, 0.0)}"
        entry = self._recall(key)
        if entry is None:
            entry = {"basis": basis(plain)}
            self._remember(key, entry)
        return entry["basis"].to(weight.device)

    # ---------------------------------------------------------------------------------------------- in memory

    def _recall(self, key: str) -> _Entry | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _remember(self, key: str, entry: _Entry) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = entry
                self._kept_bytes += _bytes(entry)
            while self._kept_bytes > self.memory:
                self._kept_bytes -= _bytes(self._kept.popitem(last=False)[1])

    # ------------------------------------------------------------------------------------------------ on disk

    def _path(self, key: str) -> Path | None:
        return self.folder / key[:2] / f"{key}.safetensors" if self.folder else None

    def _read(self, key: str, weight: Tensor, bits: int, ratio: float) -> _Entry | None:
        """The entry of an intact file, which then counts as used just now."""
        path = self._path(key)
        if path is None:
            return None
        try:
            entry: _Entry = load(path.read_bytes())
        except (OSError, SafetensorError, KeyError, ValueError):  # not there, torn, or not ours: all the same
            return None
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in entry.items()}
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"check": (torch.uint8, (32,))}
        if ratio:
            wanted["mask"] = (torch.uint8, (-(-weight.numel() // 8),))
        if bits <= 8:
            wanted["scale"] = (weight.dtype, (len(weight),))
        if found != wanted or not torch.equal(entry["check"], _check(key, entry)):
            return None
        with contextlib.suppress(OSError):  # of another user, or pruned just now; it was read, and that is enough
            os.utime(path)
        return entry

    def _write(self, key: str, entry: _Entry) -> None:
        path = self._path(key)
        if path is None:
            return
        data = save(entry)
        # Threads and containers share process numbers, and a writer must never meet another's unfinished file.
        partial = path.with_name(f".{uuid4().hex}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)  # no fsync: what a crash tears, the checksum tells
            partial.replace(path)
        except OSError:  # read-only, full or gone: the entry stays in memory
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            return
        with self._lock:
            self._unpruned += _blocks(len(data))
            due = self._unpruned > self.limit // 16
            if due:
                self._unpruned = 0
        if due:
            self._prune()

    def _prune(self) -> None:
        """Bring the folder down to fifteen sixteenths of the limit: the last sixteenth is written before the next look."""
        assert self.folder is not None
        found: list[tuple[float, int, Path]] = []
        listed: list[Path] = []
        with contextlib.suppress(OSError):  # somebody takes the whole folder away
            listed.extend(self.folder.glob("*/*"))
        for path in listed:
            with contextlib.suppress(OSError):  # another process prunes too
                about = path.stat()
                if path.suffix == ".safetensors":
                    found.append((about.st_mtime, _blocks(about.st_size), path))
                elif path.suffix == ".partial" and time.time() - about.st_mtime > _STALE:
                    path.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit - self.limit // 16:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _raw(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _key(weight: Tensor, bits: int, ratio: float) -> str:
    about = (VERSION, torch.__version__, str(weight.dtype), tuple(weight.shape), bits, float(ratio))
    digest = hashlib.sha256(repr(about).encode() + b"\0")
    digest.update(weight.reshape(-1).view(torch.uint8).numpy().data if weight.numel() else b"")
    return digest.hexdigest()


def _entry(key: str, mask: Tensor | None, scale: Tensor | None) -> _Entry:
    entry = {}
    if mask is not None:
        entry["mask"] = torch.from_numpy(np.packbits(mask.flatten().to(torch.uint8).numpy()))
    if scale is not None:
        entry["scale"] = scale
    entry["check"] = _check(key, entry)
    return entry


def _check(key: str, entry: _Entry) -> Tensor:
    parts = [key.encode(), *(_raw(entry[name]) for name in ("mask", "scale") if name in entry)]
    return torch.frombuffer(bytearray(hashlib.sha256(b"".join(parts)).digest()), dtype=torch.uint8)


def _bytes(entry: _Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
