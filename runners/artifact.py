"""What ships: a directory with the model as plain ONNX, the packed file, the recipe and the measurements.

`model.onnx` runs in ONNX Runtime alone. `weights.safetensors` is the packed file whose length is `size_bytes`; it holds
the whole model and gives `model.onnx` bit for bit. `artifact.json` lists the SHA-256 of every file. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ..errors import ArtifactError
from ..spaces.recipe import Recipe
from . import packing
from .files import write_atomic
from .onnx_export import DISABLED_OPTIMIZERS, session

VERSION = 1
_FILES = ("model.onnx", "weights.safetensors", "recipe.yaml", "measurements.json", "README.md")


class OnnxModule(nn.Module):
    """A torch module that computes an exported network in ONNX Runtime: one float tensor in, one out, on the CPU."""

    def __init__(self, data: bytes, threads: int) -> None:
        super().__init__()
        self._session = session(packing.unpack(data), threads)
        self._input = self._session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        found = self._session.run(None, {self._input: x.detach().cpu().contiguous().numpy()})
        return torch.from_numpy(found[0])


def write(directory: Path, packed: bytes, recipe: Recipe, measurements: Mapping[str, Any], card: str) -> Path:
    """Write an artifact directory whole; an existing artifact there is replaced, any other directory is refused.

    Raises `ArtifactError` when `directory` holds something else, `OSError` when it cannot be written.
    """
    directory = directory.absolute()
    if directory.exists() and not _replaceable(directory):
        raise ArtifactError(f"{directory} exists and is not an artifact; choose another directory or empty it")
    contents = {
        "model.onnx": packing.unpack(packed).SerializeToString(deterministic=True),
        "weights.safetensors": packed,
        "recipe.yaml": yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode(),
        "measurements.json": (json.dumps(measurements, indent=1) + "\n").encode(),
        "README.md": card.encode(),
    }
    contents["artifact.json"] = _listing(contents)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        for name, data in contents.items():
            write_atomic(partial / name, data)
        if directory.exists():
            old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
            directory.rename(old)
            try:
                partial.rename(directory)
            except BaseException:
                old.rename(directory)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def _replaceable(directory: Path) -> bool:
    """Whether nothing but an artifact (or nothing at all) is in the way."""
    if not directory.is_dir():
        return False
    found = {path.name for path in directory.iterdir()}
    return not found or ("artifact.json" in found and found <= {*_FILES, "artifact.json"})


def _listing(contents: Mapping[str, bytes]) -> bytes:
    """`artifact.json` of these files, in one form."""
    digests = {name: hashlib.sha256(contents[name]).hexdigest() for name in _FILES}
    listing = {"format": "paretorch.artifact", "version": VERSION, "sha256": digests}
    return (json.dumps(listing, indent=1) + "\n").encode()


def verify(directory: str | Path) -> dict[str, bytes]:
    """The artifact's files, every one checked against its SHA-256; raises `ArtifactError`."""
    folder = Path(directory)
    try:
        written = (folder / "artifact.json").read_bytes()
        listing = json.loads(written)
        if listing["format"] != "paretorch.artifact" or listing["version"] > VERSION:
            raise ArtifactError(
                f"{folder}: format {listing['format']!r} version {listing['version']} is not read by this paretorch"
            )
        expected: dict[str, str] = dict(listing["sha256"])
        if set(expected) != set(_FILES):
            raise ArtifactError(f"{folder}: artifact.json must list {', '.join(_FILES)}")
        contents = {name: (folder / name).read_bytes() for name in _FILES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder} is not a paretorch artifact: {error}") from error
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != expected[name]:
            raise ArtifactError(
                f"{folder / name} was changed after it was exported; its SHA-256 does not match artifact.json"
            )
    if _listing(contents) != written:
        raise ArtifactError(f"{folder / 'artifact.json'} was changed after it was exported")
    return contents


def load(directory: str | Path, threads: int = 1) -> OnnxModule:
    """The exported network as a torch module, from its packed weights; raises `ArtifactError` for a changed file.

    The module computes in ONNX Runtime on the CPU with `threads` threads: the same file, runtime and numbers that were
    measured.
    """
    return OnnxModule(verify(directory)["weights.safetensors"], threads)


def card(name: str, recipe: Recipe, rows: list[tuple[str, str, str]], trained_on: str) -> str:
    """The README of an artifact: what it is, its numbers against the baseline's, and how to run it."""
    table = "\n".join(f"| {metric} | {value} | {base} |" for metric, value, base in rows)
    return f"""# {name}

A compressed network: {recipe.describe()}. Measured on {trained_on}.

| | this file | baseline |
|---|---|---|
{table}

`size` is the packed file `weights.safetensors`, which holds the whole model; `model.onnx` is the same model for any
ONNX runtime.

```python
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx", disabled_optimizers={DISABLED_OPTIMIZERS!r})
outputs = session.run(None, {{"input": images}})[0]          # images: float32 [batch, ...]
```

With the optimizer left on, ONNX Runtime may turn layers that were kept in float into int8 ones. Or, with paretorch:

```python
import paretorch
module = paretorch.load(".")                                 # a torch module
```
"""
