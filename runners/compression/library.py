"""The layer library: every (weight, level) is compressed once, for all trials, studies and processes.

An entry is what a layer needs beside its weight: which of the numbers stay (a bit for each), the scale of each output
channel, and the adjusted weight where the method asks for one. Its name is the SHA-256 of all that it depends on: the
weight's bytes, type and shape, the level, the name of the evidence that the method asks for, `VERSION`, and the version
of torch, which may order a sum anew. So an entry is never outdated, only there or not, and nobody holds a lock: who
does not find it computes it, and of several who write it at once each writes the same. Hessians and gradients
(`calibration`) are entries too.

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
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...errors import RecipeError, TaskError
from ...spaces.techniques.sparsify import CRITERIA
from ...spaces.techniques.technique import LARGEST_HESSIAN
from ..operators.adaround import adaround
from ..operators.gptq import gptq
from ..operators.lowrank import basis
from ..operators.obs import obs, order, sweepable
from ..operators.quantize import affine_grid, spread, weight_scales
from ..operators.sparsify import activation_scores, input_norms, mask_of, random_scores
from ..task import Criterion

VERSION = 2  # of what `shaped` computes; raised when a scale or a mask comes out otherwise
_BLOCK = 4096  # bytes: what a disk takes for a file at least
_STALE = 3600  # seconds after which a file that was never moved into its place belongs to nobody
_Entry = dict[str, Tensor]
_Wanted = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Method:
    """How zeros, scales and codes are chosen: the fields of `Sparsify` and `Quantize` beside the numbers."""

    criterion: str = "magnitude"
    pattern: str = ""
    rounding: str = "nearest"
    ranges: str = "mse"
    group_size: int = 0
    scheme: str = "symmetric"

    def at(self, bits: int, ratio: float) -> Method:
        """The same without what has no effect at this level, so that equal layers are one entry."""
        zeros = self if ratio else replace(self, criterion="magnitude", pattern="")
        return (
            zeros if bits <= 8 else replace(zeros, rounding="nearest", ranges="mse", group_size=0, scheme="symmetric")
        )

    @property
    def needs(self) -> frozenset[str]:
        """What must be known of the layer beside its weight: `hessian`, `fisher`, `seed`, `function` (the user's)."""
        asked = {"taylor": "fisher", "random": "seed", "activation": "hessian", "obs": "hessian", "magnitude": ""}
        rounding = "" if self.rounding == "nearest" else "hessian"
        return frozenset({asked.get(self.criterion, "function"), rounding} - {""})

    @property
    def adjusts(self) -> bool:
        """Whether weights that stay get other values."""
        return self.criterion == "obs" or self.rounding != "nearest"


PLAIN = Method()


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration knows of one layer: `key` names it, the numbers come when they are asked for.

    criteria: functions of the user's by name.
    """

    key: str
    seed: int
    hessian: Callable[[], Tensor]
    fisher: Callable[[], Tensor]
    criteria: Mapping[str, Criterion] = field(default_factory=dict)


class CompressedLayer(NamedTuple):
    """A layer at a level. mask: as the weight, 1 and 0, or None without sparsity. scale: as `weight_scales` or
    `affine_grid` gives it, or None above 8 bits. weight: in place of the layer's own, or None. zero: the zero point of
    an affine grid, or None."""

    mask: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    zero: int | None = None


def compress_layer(
    weight: Tensor,
    bits: int,
    ratio: float,
    method: Method = PLAIN,
    layer_statistics: LayerStatistics | None = None,
    sweep: Callable[[Tensor, Tensor, str], Tensor] = order,
    factor: Tensor | None = None,
) -> CompressedLayer:
    """A layer at a level: zeros first, because the scale must not see what is zeroed, then the rounding.

    evidence: what `method.needs` asks for; raises `ValueError` without it. sweep: gives what `operators.obs.order`
    gives. factor: what folding multiplies the output channels by, over which an affine grid is laid; no other needs it.

        >>> mask, scale, *_ = compress_layer(torch.tensor([[3.0, -1.0, 0.5, 2.0]]), 2, 0.5)
        >>> mask.tolist(), scale.shape
        ([[1.0, 0.0, 0.0, 1.0]], torch.Size([1]))
    """
    method = method.at(bits, ratio)
    if method.needs and layer_statistics is None:
        raise ValueError(
            f"{method} needs the {', '.join(sorted(method.needs))} of the layer: give compress() a calibration"
        )
    mask, scale, adjusted, zero = None, None, None, None
    if ratio and method.criterion == "obs":
        assert layer_statistics is not None  # checked above: the method needs it
        hessian = layer_statistics.hessian()
        places = sweep(weight, hessian, method.pattern) if sweepable(weight) else None
        mask, adjusted = obs(weight, hessian, ratio, method.pattern, places)
    elif ratio:
        mask = mask_of(_scores(weight, method, layer_statistics), ratio, method.pattern)
    current = weight if adjusted is None else adjusted
    if bits <= 8:
        kept = current if mask is None else current * mask
        if method.scheme == "affine":
            factor = torch.ones(len(weight)) if factor is None else factor
            scale, zero = affine_grid(kept * spread(factor, kept), bits, method.ranges)
            wide = spread(scale / factor, kept)
        else:
            scale = weight_scales(kept, bits, method.ranges, method.group_size)
            wide = spread(scale, current, method.group_size)
        if method.rounding != "nearest":
            assert layer_statistics is not None
            adjusted = ROUNDINGS[method.rounding](current, wide, bits, layer_statistics.hessian(), mask, zero=zero)
    return CompressedLayer(mask, scale, adjusted, zero)


def _scores(weight: Tensor, method: Method, layer_statistics: LayerStatistics | None) -> Tensor:
    """How important each weight is by a criterion that leaves the others as they are."""
    if method.criterion == "magnitude":
        return weight.detach().abs()
    assert layer_statistics is not None
    if method.criterion == "taylor":  # Molchanov et al. 2019, equation 8: what the square of a weight's step costs
        return weight.detach().square() * layer_statistics.fisher()
    if method.criterion == "activation":
        return activation_scores(weight, layer_statistics.hessian())
    if method.criterion not in CRITERIA:
        return _own_scores(weight, method.criterion, layer_statistics)
    return random_scores(weight, int(digest(weight.detach().contiguous())[:8], 16) ^ layer_statistics.seed)


def _own_scores(weight: Tensor, name: str, layer_statistics: LayerStatistics) -> Tensor:
    """What a function of the user's says of each weight."""
    if name not in layer_statistics.criteria:
        raise RecipeError(
            f"criterion {name!r}: the task has no such function; give it as Task(criteria={{{name!r}: "
            f"function}}), or a configuration "
            f"whose space names it; functions of the task: {', '.join(layer_statistics.criteria) or 'none'}"
        )
    weight = weight.detach()
    norms = input_norms(weight, layer_statistics.hessian()) if weight[0].numel() <= LARGEST_HESSIAN else None
    try:
        with torch.no_grad():
            scores = layer_statistics.criteria[name](weight.clone(), norms)
    except Exception as error:  # whatever the user's function raises
        raise TaskError(
            f"criterion {name!r} failed for a weight of shape {tuple(weight.shape)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != weight.shape or not bool(scores.isfinite().all()):
        shown = f"the shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise TaskError(
            f"criterion {name!r} returned {shown} for a weight of shape {tuple(weight.shape)}; it must return a "
            "finite score for each "
            "weight, a tensor of the same shape; the lowest scores become zero"
        )
    return scores


ROUNDINGS: dict[str, Callable[..., Tensor]] = {"gptq": gptq, "adaround": adaround}


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
        >>> mask, scale, *_ = library.compress_layer(weight, 4, 0.5)
        >>> torch.equal(scale, compress_layer(weight, 4, 0.5)[1])
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

    def compress_layer(
        self,
        weight: Tensor,
        bits: int,
        ratio: float,
        method: Method = PLAIN,
        layer_statistics: LayerStatistics | None = None,
        factor: Tensor | None = None,
    ) -> CompressedLayer:
        """What the function `compress_layer` gives, bit for bit; the tensors are the caller's own.

        Not kept where a function of the user's chose the zeros: a function has no content that could name an entry.
        """
        bits = bits if bits <= 8 else 32
        if bits == 32 and not ratio:
            return CompressedLayer(None, None, None)
        plain, method = weight.detach().cpu().contiguous(), method.at(bits, ratio)
        affine = method.scheme == "affine"
        factor = factor.cpu() if affine and factor is not None else None
        if "function" in method.needs:
            made = compress_layer(plain, bits, ratio, method, layer_statistics, order, factor)
            mask, scale, adjusted = (None if tensor is None else tensor.to(weight) for tensor in made[:3])
            return CompressedLayer(mask, scale, adjusted, made.zero)
        key = _key(plain, bits, ratio, method, layer_statistics, factor)
        entry = self._recall(key)
        if entry is None:
            wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
            if ratio:
                wanted["mask"] = (torch.uint8, (-(-plain.numel() // 8),))
            if bits <= 8:
                groups = (-(-plain[0].numel() // method.group_size),) if method.group_size else ()
                wanted["scale"] = (plain.dtype, (1,) if affine else (len(plain), *groups))
            if affine:
                wanted["zero"] = (torch.uint8, (1,))
            if method.adjusts:
                wanted["weight"] = (plain.dtype, tuple(plain.shape))
            entry = self.find(key, wanted)
            if entry is None:
                entry = _entry(
                    compress_layer(
                        plain, bits, ratio, method, layer_statistics, partial(self._order, layer_statistics), factor
                    )
                )
                self.put(key, entry)
            self._remember(key, entry)
        mask = scale = adjusted = None
        if ratio:
            flags = np.unpackbits(entry["mask"].numpy(), count=plain.numel())
            mask = torch.from_numpy(flags).view(plain.shape).to(weight)
        if bits <= 8:
            scale = entry["scale"].to(weight.device, copy=True)  # a scale is trained in place
        if method.adjusts:
            adjusted = entry["weight"].to(weight.device, copy=True)
        return CompressedLayer(mask, scale, adjusted, int(entry["zero"]) if affine else None)

    def _order(self, layer_statistics: LayerStatistics | None, weight: Tensor, hessian: Tensor, pattern: str) -> Tensor:
        """What `operators.obs.order` gives: one sweep for all levels of a layer."""
        key = f"{_key(weight, 32, 0.0, Method('obs', pattern), layer_statistics)}-order"
        entry = self._recall(key) or self.find(key, {"order": (torch.float32, tuple(weight.shape))})
        if entry is None:
            entry = {"order": order(weight, hessian, pattern)}
            self.put(key, entry)
        self._remember(key, entry)
        return entry["order"]

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

    def find(self, key: str, wanted: _Wanted) -> _Entry | None:
        """The entry of an intact file that holds what is wanted; it then counts as used just now."""
        path = self._path(key)
        if path is None:
            return None
        try:
            entry: _Entry = load(path.read_bytes())
        except (OSError, SafetensorError, KeyError, ValueError):  # not there, torn, or not ours: all the same
            return None
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in entry.items()}
        if layout != {"check": (torch.uint8, (32,)), **wanted} or not torch.equal(entry["check"], _check(key, entry)):
            return None
        with contextlib.suppress(OSError):  # of another user, or pruned just now; it was read, and that is enough
            os.utime(path)
        return entry

    def put(self, key: str, entry: _Entry) -> bool:
        """Keep an entry on disk; False when that is not possible."""
        path = self._path(key)
        if path is None:
            return False
        data = save({**entry, "check": _check(key, entry)})
        # Threads and containers share process numbers, and a writer must never meet another's unfinished file.
        partial = path.with_name(f".{uuid4().hex}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)  # no fsync: what a crash tears, the checksum tells
            partial.replace(path)
        except OSError:  # read-only, full or gone: the entry stays in memory
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            return False
        with self._lock:
            self._unpruned += _blocks(len(data))
            due = self._unpruned > self.limit // 16
            if due:
                self._unpruned = 0
        if due:
            self._prune()
        return True

    def _prune(self) -> None:
        """Bring the folder down to fifteen sixteenths of the limit: the last sixteenth is written before the next
        look.
        """
        assert self.folder is not None
        entries: list[tuple[float, int, Path]] = []
        listed: list[Path] = []
        with contextlib.suppress(OSError):  # somebody takes the whole folder away
            listed.extend(self.folder.glob("*/*"))
        for path in listed:
            with contextlib.suppress(OSError):  # another process prunes too
                about = path.stat()
                if path.suffix == ".safetensors":
                    entries.append((about.st_mtime, _blocks(about.st_size), path))
                elif path.suffix == ".partial" and time.time() - about.st_mtime > _STALE:
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit - self.limit // 16:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _raw(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def digest(*tensors: Tensor) -> str:
    """The SHA-256 of tensors: their types, shapes and numbers."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode() + b"\0")
        sha.update(_raw(tensor.detach().contiguous()))
    return sha.hexdigest()


def _key(
    weight: Tensor,
    bits: int,
    ratio: float,
    method: Method = PLAIN,
    layer_statistics: LayerStatistics | None = None,
    factor: Tensor | None = None,
) -> str:
    about: tuple[object, ...] = (VERSION, torch.__version__, str(weight.dtype), tuple(weight.shape), bits, float(ratio))
    if method != PLAIN:
        *fields, group_size, scheme = astuple(method)
        about = (*about, *fields, *([group_size] if group_size else []))
        if scheme != "symmetric":
            about = (*about, scheme, "" if factor is None else digest(factor))
    if layer_statistics is not None and method.needs:
        about = (*about, layer_statistics.seed if method.needs == {"seed"} else layer_statistics.key)
    sha = hashlib.sha256(repr(about).encode() + b"\0")
    sha.update(weight.reshape(-1).view(torch.uint8).numpy().data if weight.numel() else b"")
    return sha.hexdigest()


def _entry(made: CompressedLayer) -> _Entry:
    entry = {}
    if made.mask is not None:
        entry["mask"] = torch.from_numpy(np.packbits(made.mask.flatten().to(torch.uint8).numpy()))
    if made.scale is not None:
        entry["scale"] = made.scale
    if made.zero is not None:
        entry["zero"] = torch.tensor([made.zero], dtype=torch.uint8)
    if made.weight is not None:
        entry["weight"] = made.weight.contiguous()
    return entry


def _check(key: str, entry: _Entry) -> Tensor:
    parts = [key.encode(), *(_raw(entry[name]) for name in sorted(entry) if name != "check")]
    return torch.frombuffer(bytearray(hashlib.sha256(b"".join(parts)).digest()), dtype=torch.uint8)


def _bytes(entry: _Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
