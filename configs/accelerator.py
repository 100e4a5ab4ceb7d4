"""Load the `Target` that a configuration or a command names, or that the YAML profile of an accelerator describes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationError, field_validator

from ..errors import ConfigError
from .fields import Positive, Strict, checked_name, fail, no_bool
from .load import problems_of, read_yaml

if TYPE_CHECKING:
    from ..runners.targets.target import Target

_PAIR = re.compile(r"[1-9]\d?x[1-9]\d?")
_NEEDED = "32x32"


def _rate(value: object) -> object:
    """Convert a text such as 2e12, which YAML 1.1 does not read as a number."""
    no_bool(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Rate = Annotated[Positive, BeforeValidator(_rate)]


class Memories(Strict):
    """Two memories that are accessed in parallel."""

    weights: Rate
    """Bytes of weights per second. Required."""
    activations: Rate
    """Bytes of activations per second, read and written. Required."""


class AcceleratorProfile(Strict):
    """The rates of an accelerator, from which latency is computed; see configs/accelerators/edge_npu.yaml."""

    name: Annotated[str, AfterValidator(checked_name)]
    """Name of the accelerator and of its results: letters, digits, `-_.`. Required."""
    operations_per_second: dict[str, Rate]
    """By pair of widths, weights x activations in bits, such as 8x8: operations per second, a multiply-add being two.
    The accelerator does not support a missing pair. 32x32 must be present, for the baseline. Required."""
    bytes_per_second: Annotated[
        Annotated[Memories, Tag("<mapping>")] | Annotated[Rate, Tag("<number>")],
        Discriminator(lambda value: "<mapping>" if isinstance(value, dict | Memories) else "<number>"),
    ]
    """Bytes per second of the memory, or of two: `{weights: ..., activations: ...}`. Required."""
    seconds_per_layer: Annotated[float, Field(ge=0), BeforeValidator(_rate)] = 0.0
    """Seconds that it takes to start a layer. Default: 0."""

    @field_validator("operations_per_second")
    @classmethod
    def _pairs(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = [pair for pair in value if not _PAIR.fullmatch(pair)]
        if wrong:
            raise fail(
                f"{', '.join(map(repr, wrong))}: write pairs of widths in bits, weights x activations, such as 8x8"
            )
        if _NEEDED not in value:
            raise fail(
                f"the pair {_NEEDED} is missing: the untouched network, with which all is compared, computes on it"
            )
        return value


def load_target(text: str, folder: Path | None = None) -> Target:
    """Load the target that a text names.

    Args:
        text: A name such as `openvino`, or the path of a profile that ends in `.yaml`.
        folder: The folder that the path is relative to; by default the current one.

    Raises:
        ConfigError: The profile is not valid; the error has all its problems.
        TargetError: The name is unknown, or the runtime is missing.

        >>> load_target("configs/accelerators/edge_npu.yaml").name  # doctest: +SKIP
        'edge-npu'
    """
    from ..runners.targets.catalog import TARGETS, as_target
    from ..runners.targets.roofline import Profile, analytic

    if not text.endswith((".yaml", ".yml")):
        return as_target(text)
    path = Path(folder or Path(), Path(text).expanduser())
    needs = "it needs name, operations_per_second and bytes_per_second"
    data = read_yaml(path, needs, "start with `name:`", "configs/accelerators/edge_npu.yaml is an example")
    try:
        profile = AcceleratorProfile.model_validate(data)
        if profile.name in TARGETS:
            raise ConfigError(
                f"name = {profile.name!r}: a target of that name is there already; choose another", str(path)
            )
    except ValidationError as error:
        raise ConfigError(problems_of(error, AcceleratorProfile), str(path)) from error
    memory = profile.bytes_per_second
    shared = not isinstance(memory, Memories)
    weights, activations = (memory.weights, memory.activations) if isinstance(memory, Memories) else (memory, memory)
    rates = dict(profile.operations_per_second)
    return analytic(Profile(profile.name, rates, weights, activations, shared, profile.seconds_per_layer))
