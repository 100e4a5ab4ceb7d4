"""The artifact that ships: a directory with the model as plain ONNX, the packed file, the recipe and the measurements.

`model.onnx` runs in ONNX Runtime alone. `weights.safetensors` is the packed file whose length is `size_bytes`; it holds
the whole model and gives `model.onnx` bit for bit. `artifact.json` lists the SHA-256 of every file, which detects any
damage. It is no signature: whoever can write the directory can also write a new list. Nothing is pickled.
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
_PROBED = 4, 64  # the number of pseudo-random inputs, and of outputs that are kept
# The share of the largest output by which two machines may differ. Floats are added in another order; where layers
# compute in int8, a number on the border between two steps may round the other way, and later layers amplify that.
_TOLERANCE_FLOAT, _TOLERANCE_INT8 = 1e-3, 5e-2


class OnnxModule(nn.Module):
    """A torch module that computes an exported network in ONNX Runtime on the CPU: one float tensor in, one out.

    Args:
        data: The packed file.
        threads: CPU threads of the runtime.

    Raises:
        ArtifactError: ONNX Runtime cannot load the network.
    """

    def __init__(self, data: bytes, threads: int) -> None:
        super().__init__()
        try:
            self._session = session(packing.unpack(data), threads)
        except ExportFailed as error:
            raise ArtifactError(str(error)) from error
        self._input = self._session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._session.run(None, {self._input: x.detach().cpu().contiguous().numpy()})
        return torch.from_numpy(outputs[0])


def check_free(directory: Path) -> None:
    """Check that an artifact may be written to a directory.

    Raises:
        ArtifactError: Something is there that an artifact must not replace.
    """
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
    """Write the directory of an artifact as a whole; an existing artifact there is replaced.

    Args:
        directory: Where to write.
        packed: The packed file.
        recipe: The recipe that made it.
        measurements: `Record.to_dict`; what `probe` gives for the network is added as `check`.
        card: The text of the README.
        environment: What the measurements depend on beside the file.

    Returns:
        The absolute path of the directory.

    Raises:
        ArtifactError: The directory holds something else than an artifact.
        OSError: It cannot be written.
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
    """Whether the path is a directory that is empty or holds just an artifact."""
    if not directory.is_dir():
        return False
    names = {path.name for path in directory.iterdir()}
    return not names or ("artifact.json" in names and names <= {*_FILES[VERSION], "artifact.json"})


def _listing(contents: Mapping[str, bytes], version: int) -> bytes:
    """The bytes of `artifact.json` for these files; equal files give equal bytes."""
    digests = {name: hashlib.sha256(contents[name]).hexdigest() for name in _FILES[version]}
    listing = {"format": "paretorch.artifact", "version": version, "sha256": digests}
    return (json.dumps(listing, indent=1) + "\n").encode()


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise ArtifactError(f"{path} is not a file")
    return path.read_bytes()


def verify(directory: str | Path) -> dict[str, bytes]:
    """Read the files of an artifact and check each against its SHA-256.

    Other files in the directory are ignored, because nothing reads them.

    Returns:
        The bytes of each file by its name.

    Raises:
        ArtifactError: The directory is not an artifact, or a file was changed.
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
    """Load the exported network as a torch module.

    The module computes in ONNX Runtime on the CPU: the same file, runtime and numbers that were measured.

    Args:
        directory: The directory of the artifact.
        threads: CPU threads of the runtime.

    Raises:
        ArtifactError: The directory is not an artifact, or a file was changed.
    """
    return OnnxModule(verify(directory)["weights.safetensors"], threads)


@dataclass(frozen=True)
class VerifiedArtifact:
    """An artifact whose files have passed every check.

    Args:
        packed: The packed file.
        recipe: The recipe that made it.
        record: The recorded measurements.
        environment: Where they were measured.
        outputs: What `probe` gives for the network on this machine.
    """

    packed: bytes
    recipe: Recipe
    record: Record
    environment: Mapping[str, str]
    outputs: Mapping[str, Any]


def inspect(directory: str | Path) -> VerifiedArtifact:
    """Check everything about an artifact that can be checked without its task.

    Beyond the digests: the directory holds no other files, the packed file gives `model.onnx` bit for bit, the model is
    valid ONNX and runs, and the recipe and the measurements can be read.

    Raises:
        ArtifactError: A check failed.
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
    """Run a network on pseudo-random inputs that are the same on every machine.

    The inputs are uniform in -1..1, from NumPy's frozen Mersenne Twister.

    Args:
        model: The bytes of the ONNX file.

    Returns:
        Plain data: some of the outputs, and the share of the largest by which another machine's may differ.

    Raises:
        ExportFailed: The network does not run.
    """
    runtime = session(model)
    given = runtime.get_inputs()[0]
    count, kept = _PROBED
    shape = [count, *(size if isinstance(size, int) else 1 for size in given.shape[1:])]
    inputs = np.random.RandomState(0).uniform(-1, 1, shape).astype(np.float32)
    try:
        outputs = runtime.run(None, {given.name: inputs})[0]
    except Exception as error:  # ONNX Runtime raises a class per status, without a common base but this
        raise ExportFailed(f"the exported network does not run in ONNX Runtime: {error}") from error
    flat = outputs.reshape(-1).astype(np.float64)
    places = np.unique(np.linspace(0, len(flat) - 1, min(kept, len(flat))).astype(int))
    int8 = any(node.op_type == "QuantizeLinear" for node in onnx.load_from_string(model).graph.node)
    return {
        "inputs": f"numpy.random.RandomState(0).uniform(-1, 1, {shape}).astype('float32')",
        "shape": list(outputs.shape),
        "outputs": [float(f"{value:.7g}") for value in flat[places]],
        "largest": float(f"{np.abs(flat).max(initial=0.0):.7g}"),
        "tolerance": _TOLERANCE_INT8 if int8 else _TOLERANCE_FLOAT,
    }


def card(recipe: Recipe, record: Record, environment: Mapping[str, str]) -> str:
    """The README of an artifact: what it is, its numbers beside the baseline's, and how to run it."""
    lines = []
    for row in record.rows:
        one, base = (
            ("-" if m is None else f"{show(row.metric, m.value)} {spread(row.metric, m)}".rstrip())
            for m in (row.estimate, row.baseline)
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
