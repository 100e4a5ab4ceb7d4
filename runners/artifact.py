"""What ships: a directory with the model as plain ONNX, the packed file, the recipe, and what was measured, how and
where.

`model.onnx` runs in ONNX Runtime alone. `weights.safetensors` is the packed file whose length is `size_bytes`; it holds
the whole model and gives `model.onnx` bit for bit. `artifact.json` lists the SHA-256 of every file, which finds every
damage; it is no signature, and whoever can write the directory can write all of it anew. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from torch import Tensor, nn

from ..errors import ArtifactError, ExportFailed, RecipeError
from ..objectives.display import show, spread
from ..spaces.recipe import Recipe
from .files import packing
from .files.atomic import write_atomic
from .record import Record
from .targets.runtime import DISABLED_OPTIMIZERS, session

VERSION = 2
_FILES_1 = ("model.onnx", "weights.safetensors", "recipe.yaml", "measurements.json", "README.md")
# By version: the files that an artifact consists of, beside artifact.json.
_FILES = {1: _FILES_1, 2: (*_FILES_1, "environment.json")}
_PROBED = 4, 64  # pseudo-random inputs, and outputs that are kept
# By what share of the largest output two machines may differ. Floats are added in another order; where layers compute
# in int8, a number at the border of two steps falls to the other side, and layers behind it make more of that.
_TOLERANCE_FLOAT, _TOLERANCE_INT8 = 1e-3, 5e-2


class OnnxModule(nn.Module):
    """A torch module that computes an exported network in ONNX Runtime: one float tensor in, one out, on the CPU."""

    def __init__(self, data: bytes, threads: int) -> None:
        super().__init__()
        try:
            self._session = session(packing.unpack(data), threads)
        except ExportFailed as error:
            raise ArtifactError(str(error)) from error
        self._input = self._session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        found = self._session.run(None, {self._input: x.detach().cpu().contiguous().numpy()})
        return torch.from_numpy(found[0])


def check_free(directory: Path) -> None:
    """Raises `ArtifactError` when something is there that an artifact must not replace."""
    if directory.exists() and not _replaceable(directory):
        raise ArtifactError(f"{directory} exists and is not an artifact; choose another directory or empty it")


def write(
    directory: Path,
    packed: bytes,
    recipe: Recipe,
    measurements: Mapping[str, Any],
    card: str,
    environment: Mapping[str, str],
) -> Path:
    """Write an artifact directory whole; an existing artifact there is replaced, any other directory is refused.

    What the network gives for fixed pseudo-random inputs is added to the measurements as `check`. Raises
    `ArtifactError` when `directory` holds something else, `OSError` when it cannot be written.
    """
    directory = directory.absolute()
    check_free(directory)
    model = packing.onnx_bytes(packed)
    contents = {
        "model.onnx": model,
        "weights.safetensors": packed,
        "recipe.yaml": yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode(),
        "measurements.json": (json.dumps({**measurements, "check": probe(model)}, indent=1) + "\n").encode(),
        "environment.json": (json.dumps(dict(environment), indent=1) + "\n").encode(),
        "README.md": card.encode(),
    }
    contents["artifact.json"] = _listing(contents, VERSION)
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
    return not found or ("artifact.json" in found and found <= {*_FILES[VERSION], "artifact.json"})


def _listing(contents: Mapping[str, bytes], version: int) -> bytes:
    """`artifact.json` of these files, in one form."""
    digests = {name: hashlib.sha256(contents[name]).hexdigest() for name in _FILES[version]}
    listing = {"format": "paretorch.artifact", "version": version, "sha256": digests}
    return (json.dumps(listing, indent=1) + "\n").encode()


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would keep the reader waiting
        raise ArtifactError(f"{path} is not a file")
    return path.read_bytes()


def verify(directory: str | Path) -> dict[str, bytes]:
    """The artifact's files, every one checked against its SHA-256; raises `ArtifactError`.

    Files beside them are none of its business: nothing reads them.
    """
    folder = Path(directory)
    try:
        written = _read(folder / "artifact.json")
        listing = json.loads(written)
        version = listing["version"]
        if listing["format"] != "paretorch.artifact" or type(version) is not int or version not in _FILES:
            raise ArtifactError(
                f"{folder}: format {listing['format']!r} version {version!r} is not read by this paretorch "
                f"(paretorch.artifact, versions 1 to {VERSION})"
            )
        expected: dict[str, str] = dict(listing["sha256"])
        if set(expected) != set(_FILES[version]):
            raise ArtifactError(f"{folder}: artifact.json must list {', '.join(_FILES[version])}")
        contents = {name: _read(folder / name) for name in _FILES[version]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{folder} is not a paretorch artifact: {error}") from error
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != expected[name]:
            raise ArtifactError(
                f"{folder / name} was changed after it was exported; its SHA-256 does not match artifact.json"
            )
    if _listing(contents, version) != written:
        raise ArtifactError(f"{folder / 'artifact.json'} was changed after it was exported")
    return contents


def load(directory: str | Path, threads: int = 1) -> OnnxModule:
    """The exported network as a torch module, from its packed weights; raises `ArtifactError` for a changed file.

    The module computes in ONNX Runtime on the CPU with `threads` threads: the same file, runtime and numbers that were
    measured.
    """
    return OnnxModule(verify(directory)["weights.safetensors"], threads)


@dataclass(frozen=True)
class VerifiedArtifact:
    """An artifact that was found to be whole, and what it gives for the fixed pseudo-random inputs here and now."""

    packed: bytes
    recipe: Recipe
    record: Record
    environment: Mapping[str, str]
    outputs: Mapping[str, Any]


def inspect(directory: str | Path) -> VerifiedArtifact:
    """All that can be checked without a task; raises `ArtifactError`.

    Beyond the digests: nothing lies there that does not belong to it, the packed file gives `model.onnx` bit for bit,
    that is valid ONNX and runs, and recipe and measurements can be read.
    """
    folder = Path(directory)
    contents = verify(folder)
    try:
        if foreign := sorted({path.name for path in folder.iterdir()} - {*contents, "artifact.json"}):
            raise ArtifactError(
                f"{folder} holds {', '.join(foreign)}, which artifact.json does not list; move that elsewhere"
            )
        packed, model = contents["weights.safetensors"], contents["model.onnx"]
        if packing.onnx_bytes(packed) != model:
            raise ArtifactError(f"{folder}: weights.safetensors and model.onnx are two different models")
        onnx.checker.check_model(model)
        recipe = Recipe.from_dict(yaml.safe_load(contents["recipe.yaml"]))
        record = Record.from_dict(json.loads(contents["measurements.json"]))
        environment = json.loads(contents.get("environment.json", b"{}"))
        outputs = probe(model)
    except (
        ExportFailed,
        RecipeError,
        onnx.checker.ValidationError,
        yaml.YAMLError,
        OSError,
        ValueError,
        RecursionError,
    ) as error:
        raise ArtifactError(f"{folder} is whole, but not what paretorch writes: {error}") from error
    return VerifiedArtifact(packed, recipe, record, dict(environment), outputs)


def probe(model: bytes) -> dict[str, Any]:
    """What a network gives for inputs that are the same everywhere, as plain data: some outputs and how far they may be
    off.

    Raises `ExportFailed` when it does not run. The inputs are uniform in -1..1, from NumPy's frozen Mersenne Twister.
    """
    runtime = session(model)
    given = runtime.get_inputs()[0]
    count, kept = _PROBED
    shape = [count, *(size if isinstance(size, int) else 1 for size in given.shape[1:])]
    inputs = np.random.RandomState(0).uniform(-1, 1, shape).astype(np.float32)
    try:
        found = runtime.run(None, {given.name: inputs})[0]
    except Exception as error:  # ONNX Runtime raises a class per status, without a common base but this
        raise ExportFailed(f"the exported network does not run in ONNX Runtime: {error}") from error
    flat = found.reshape(-1).astype(np.float64)
    places = np.unique(np.linspace(0, len(flat) - 1, min(kept, len(flat))).astype(int))
    int8 = any(node.op_type == "QuantizeLinear" for node in onnx.load_from_string(model).graph.node)
    return {
        "inputs": f"numpy.random.RandomState(0).uniform(-1, 1, {shape}).astype('float32')",
        "shape": list(found.shape),
        "outputs": [float(f"{value:.7g}") for value in flat[places]],
        "largest": float(f"{np.abs(flat).max(initial=0.0):.7g}"),
        "tolerance": _TOLERANCE_INT8 if int8 else _TOLERANCE_FLOAT,
    }


def card(recipe: Recipe, record: Record, environment: Mapping[str, str]) -> str:
    """The README of an artifact: what it is, its numbers beside the untouched network's, and how to run it."""
    lines = []
    for row in record.rows:
        one, base = (
            ("-" if m is None else f"{show(row.metric, m.value)} {spread(row.metric, m)}".rstrip())
            for m in (row.found, row.baseline)
        )
        lines.append(f"| {row.name} | {one} | {base} | {row.change()} |")
    table = "\n".join(lines)
    notes = "\n".join(f"- {row.name}: {row.protocol}." for row in record.rows)
    over = ""
    if record.over_budget:
        over = f"\nIt is over the budget it was searched for: {', '.join(record.over_budget)}.\n"
    place = ", ".join(f"{key} {environment[key]}" for key in ("onnxruntime", "torch", "python") if key in environment)
    processor = environment.get("processor", "an unknown processor") + (f" ({place})" if place else "")
    return f"""# {record.name}

A compressed network of the task `{record.task}`: {recipe.describe()}. Measured on {processor}.
{over}
| | this file | the untouched network | |
|---|---|---|---|
{table}

{notes}

`size_bytes` is the packed file `weights.safetensors`, which holds the whole model; `model.onnx` is the same model for
any ONNX runtime. `recipe.yaml` says what was done, and `paretorch apply recipe.yaml` does it to a newer checkpoint.
`paretorch verify .` checks these files and measures them again.

```python
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx", disabled_optimizers={DISABLED_OPTIMIZERS!r})
outputs = session.run(None, {{"input": images}})[0]          # images: float32 [batch, ...]
```

With the optimizer left on, ONNX Runtime may turn layers that were kept in float into int8 ones. On x86 processors
without VNNI also set the session option `session.x64quantprecision` to `1`: else sums of 8-bit products overflow there.
Or, with paretorch:

```python
import paretorch
module = paretorch.load(".")                                 # a torch module
```
"""
