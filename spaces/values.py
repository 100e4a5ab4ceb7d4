"""What a value of a configuration or a choice of a space may be, as plain data.

`Space` checks choices with `possible`, and `configs.space_schema` makes the types of the configuration of the same
data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError


@dataclass(frozen=True)
class Number:
    """A number between bounds: > `above`, >= `least`, < `below`, <= `most`; a whole one where `whole`."""

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class OneOf:
    """One of some texts or whole numbers."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Flag:
    """True or false."""


@dataclass(frozen=True)
class Text:
    """A text for which `check` raises no `RecipeError`."""

    check: Callable[[str], object]


@dataclass(frozen=True)
class Either:
    """One of two forms; `is_second` tells which is meant, so that only that one reports its mistakes.

    message: what to say of a value that is neither a text nor a mapping, where the second form is `Settings`.
    """

    first: Value
    second: Value
    is_second: Callable[[object], bool]
    message: str = ""


@dataclass(frozen=True)
class Entry:
    """One key of a mapping: what it may be, what it is about, and its default (None: it is required)."""

    name: str
    value: Value
    about: str
    default: Any = None


@dataclass(frozen=True)
class Settings:
    """A mapping, by the name of its type."""

    name: str
    about: str
    entries: tuple[Entry, ...]


Value = Number | OneOf | Flag | Text | Either | Settings

POSITIVE = Number(above=0)
NOT_NEGATIVE = Number(least=0)


def possible(value: Value, choice: object) -> bool:
    """Whether a choice is one that the value may have.

    >>> possible(Number(least=0, below=1), 0.5), possible(OneOf((4, 8)), 4.0), possible(OneOf((1, 2)), True)
    (True, False, False)
    """
    match value:
        case OneOf(values):
            return isinstance(choice, int | str) and not isinstance(choice, bool) and choice in values
        case Number(above, least, below, most, whole):
            if not isinstance(choice, int if whole else int | float) or isinstance(choice, bool):
                return False
            assert isinstance(choice, int | float)
            return (
                (above is None or choice > above)
                and (least is None or choice >= least)
                and (below is None or choice < below)
                and (most is None or choice <= most)
            )
        case Either(first, second, is_second):
            return possible(second if is_second(choice) else first, choice)
        case Flag():
            return isinstance(choice, bool)
        case Text(check):
            try:
                check(str(choice))
            except RecipeError:
                return False
            return isinstance(choice, str)
        case Settings():
            return False  # a mapping is read into the dataclass of a step first
