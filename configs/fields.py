"""The types that the sections of a configuration are made of, and the checks that they share.

Two habits keep messages readable. A value that may be written in two ways (a text or a mapping) is told apart by a
function, so that only the form that was meant reports its mistakes; the tags `<...>` of these forms are left out of key
paths. And a check that spans two keys sits on the later of the two, because pydantic skips checks of a whole mapping
as soon as one of its keys is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from ..errors import ConfigError

T = TypeVar("T")
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"".join(rf"(?:(\d+(?:\.\d*)?){unit})?" for unit in _SECONDS))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def parse_duration(text: str) -> float:
    """The seconds that a duration such as `30m`, `2h`, `90s` or `1h30m` stands for.

    Units, largest first: d (days), h, m (minutes), s. Raises `ConfigError` for anything else, for a number without a
    unit, and for a duration of zero.

        >>> parse_duration("1h30m")
        5400.0
    """
    match = _DURATION.fullmatch(text.strip().lower().replace(" ", ""))
    if not match or not any(match.groups()):
        unit = "; the unit is missing" if re.fullmatch(r"\s*\d+(\.\d*)?\s*", text) else ""
        raise ConfigError(
            f"duration {text!r}{unit}; write numbers with the units d, h, m, s, largest first, such as 90s, 30m, 1h30m"
        )
    seconds = sum(float(n) * unit for n, unit in zip(match.groups(), _SECONDS.values(), strict=True) if n)
    if not 0 < seconds < math.inf:
        raise ConfigError(f"duration {text!r} must be longer than zero and finite")
    return float(seconds)


def fail(text: str) -> PydanticCustomError:
    """A mistake whose message already names the value."""
    return PydanticCustomError("paretorch", "{text}", {"text": text})


def parsed(parse: Callable[[str], object]) -> AfterValidator:
    """The text must be one that `parse` reads; it stays a text."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ConfigError as error:
            raise fail("; ".join(error.problems)) from error
        return text

    return AfterValidator(check)


def _duration(value: object) -> object:
    if value is None:
        return None
    try:
        # YAML reads 1:30 as the number 90, and a bare 30 could be anything: only a text with units is clear.
        return parse_duration(str(value))
    except ConfigError as error:
        raise fail(error.problems[0]) from error


def no_bool(value: object) -> object:
    """YAML 1.1 reads yes, no, on and off as booleans, and pydantic would take those for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "must be a number; YAML reads yes, no, on and off as true and false")
    return value


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:
        raise PydanticCustomError("empty", "must have at least one entry; leave the key out instead")
    twice = [value for n, value in enumerate(values) if value in values[:n]]
    if twice:
        raise PydanticCustomError("twice", "{text}", {"text": f"holds {twice[0]!r} twice"})
    return values


def checked_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise fail(f"name {text!r}: use letters, digits and -_. only (at most 100, a letter or digit first)")
    return text


def form(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<mapping>" if isinstance(value, (dict, BaseModel)) else None


# The check for booleans comes last, so that it runs first and the bounds still reach the JSON schema.
NO_BOOL = BeforeValidator(no_bool)
TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
Count = Annotated[int, Field(ge=1), NO_BOOL]
Natural = Annotated[int, Field(ge=0), NO_BOOL]
Number = Annotated[float, NO_BOOL]
Positive = Annotated[float, Field(gt=0), NO_BOOL]
Removed = Annotated[float, Field(ge=0, lt=1), NO_BOOL]
Kept = Annotated[float, Field(gt=0, le=1), NO_BOOL]
# Not Field(min_length=1): pydantic then calls a tuple of invalid entries too short as well.
Choices = Annotated[tuple[T, ...], AfterValidator(distinct), Field(json_schema_extra={"minItems": 1})]
Seconds = Annotated[
    float | None,
    BeforeValidator(_duration),
    PlainSerializer(lambda seconds: None if seconds is None else f"{seconds!r}s", when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]}),
]


class Strict(BaseModel):
    """A mapping that refuses unknown keys and cannot be changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )
