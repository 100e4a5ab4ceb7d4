"""Random inputs for an ONNX file, in the shapes and types that it declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError

Shapes = Mapping[str, Sequence[int]]
_FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
# Integers are 0 or 1, which are rows of every embedding, and valid as a mask or as the position of a token.
_INTEGERS = {
    f"tensor({n})": np.dtype(n) for n in ("int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "bool")
}


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Parse the shapes of inputs.

    Args:
        texts: Such as `input=1,3,224,224`.

    Returns:
        The shapes by input.

    Raises:
        ConfigError: Some texts are not of this form; the error lists all of them.

    >>> parse_shapes(["input=1,3,224,224"])
    {'input': (1, 3, 224, 224)}
    """
    shapes, problems = {}, []
    for text in texts:
        name, _, numbers = text.rpartition("=")
        parts = numbers.replace("x", ",").split(",")
        if name and all(part.strip().isdecimal() and int(part) for part in parts):
            shapes[name.strip()] = tuple(int(part) for part in parts)
        else:
            problems.append(f"{text!r}: write NAME=SIZES with whole numbers from 1 on, such as input=1,3,224,224")
    if problems:
        raise ConfigError(problems, "--shape")
    return shapes


def feed(inputs: Sequence[Any], batch: int | None, shapes: Shapes, seed: int) -> dict[str, NDArray[Any]]:
    """Draw an array for each input of a session.

    Floats are normal, bytes uniform, other integers 0 or 1.

    Args:
        inputs: The session's inputs, or anything with `name`, `shape` and `type`.
        batch: The size of an open first dimension; 1 when None.
        shapes: By input, whole shapes; needed where another dimension is open. It may name other inputs, too.
        seed: The seed of the draw.

    Returns:
        The arrays by input.

    Raises:
        ConfigError: The batch or a shape does not fit an input, or its type is not supported; the error lists all
            problems.
    """
    rng = np.random.default_rng(seed)
    arrays, problems = {}, []
    for entry in inputs:
        try:
            shape = _shape(entry, batch, shapes.get(entry.name))
            arrays[entry.name] = _draw(entry, shape, rng)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return arrays


def _shape(entry: Any, batch: int | None, asked: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one input, checked against what the file says."""
    sizes = [size if isinstance(size, int) else None for size in entry.shape]
    says = f"input {entry.name!r} is [{', '.join(str(size) for size in entry.shape)}]"
    if asked is not None:
        if len(asked) != len(sizes) or any(s not in (None, a) for s, a in zip(sizes, asked, strict=True)):
            raise ConfigError(f"{says} in the file, which the shape {_text(asked)} does not fit")
        if batch is not None and sizes and asked[0] != batch:
            raise ConfigError(f"input {entry.name!r}: the shape {_text(asked)} is not of batch {batch}; leave one out")
        return tuple(asked)
    if any(size is None for size in sizes[1:]):
        example = ",".join(str(size or ("N" if axis else batch or 1)) for axis, size in enumerate(sizes))
        raise ConfigError(f"{says}, open beyond the batch: say what N is with --shape {entry.name}={example}")
    if sizes and sizes[0] is not None and batch not in (None, sizes[0]):
        raise ConfigError(
            f"{says} in the file: its batch is fixed, and --batch {batch} does not fit; leave --batch out"
        )
    return tuple(size or batch or 1 for size in sizes)


def _draw(entry: Any, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    if entry.type in _FLOATS:
        return rng.standard_normal(shape).astype(_FLOATS[entry.type])
    if entry.type == "tensor(uint8)":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if entry.type in _INTEGERS:
        return rng.integers(0, 2, shape).astype(_INTEGERS[entry.type])
    raise ConfigError(
        f"input {entry.name!r} is of type {entry.type}, for which no input can be made up; "
        f"types that can: {', '.join([*_FLOATS, 'tensor(uint8)', *_INTEGERS])}"
    )


def _text(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))
