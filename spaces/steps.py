"""What all steps of a recipe have in common; each technique defines its own in `spaces.techniques`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol, TypeVar

from ..errors import RecipeError

_Kind = TypeVar("_Kind")
_Step = TypeVar("_Step", bound="Step")


@dataclass(frozen=True)
class Step:
    """One step of a recipe, plain frozen data.

    removes: whether layers or channels are gone after it, so that statistics of the original network no longer hold.
    rounds: whether it changes single weights, so that the ranges of channels matter.
    """

    removes: ClassVar[bool] = False
    rounds: ClassVar[bool] = False

    @property
    def target(self) -> str | None:
        """What a recipe may hold one such step for: a group, a layer, "" for the network; None: it may hold several."""
        return ""


@dataclass(frozen=True)
class LayerStep(Step):
    """A step for the weight of one layer."""

    layer: str

    @property
    def target(self) -> str:
        """The layer."""
        return self.layer


class Steps(Protocol):
    """A recipe as the techniques see it, which its own module stands on."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in the order of the passes."""

    @property
    def factory(self) -> str:
        """The name of the student that it begins with, "" for the original network."""

    def of(self, kind: type[_Kind]) -> list[_Kind]:
        """The steps of one kind."""


# By the declared type of a field: what is accepted, what it is turned into, and how to say so.
_TYPES: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
    "str": (str, str, "a name"),
    "int": (Integral, int, "a whole number"),
    "float": (Real, float, "a finite number"),
    "bool": (bool, bool, "true or false"),
    "tuple[str, ...]": (tuple, lambda names: tuple(sorted(set(map(str, names)))), "a tuple of names"),
}


def canonical(step: _Step) -> _Step:
    """The step with plain numbers and sorted names: 1, 1.0 and NumPy's 1 are equal but would give three texts."""
    values: dict[str, Any] = {}
    for entry in fields(step):
        value = getattr(step, entry.name)
        accepted, convert, wanted = _TYPES[str(entry.type)]
        if (
            not isinstance(value, accepted)
            or (isinstance(value, bool) and accepted is not bool)
            or (accepted is Real and not math.isfinite(value))
        ):
            raise RecipeError(f"{type(step).__name__.lower()}: {entry.name} = {value!r}; it must be {wanted}")
        values[entry.name] = convert(value)
    return replace(step, **values)


# ---------------------------------------------------------------------------------------------------------- words


def counted(steps: Sequence[object], noun: str) -> str:
    """How many there are: `1 layer`, `2 layers`."""
    return f"{len(steps)} {noun}{'s' * (len(steps) > 1)}"


def span(values: Sequence[int]) -> str:
    """The smallest and the largest: `3-8`, or `4` when they are equal."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"


def unusual(values: Iterable[str], default: str) -> list[str]:
    """The values other than the default, sorted."""
    return sorted(set(values) - {default})


def in_brackets(words: Sequence[str]) -> str:
    """` (one, two)`, or nothing."""
    return f" ({', '.join(words)})" if words else ""
