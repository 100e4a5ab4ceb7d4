"""Dataclasses as plain data, in a form that stays the same when later versions give them more fields."""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass
from typing import Any


def later(default: Any) -> Any:
    """A field that older versions did not have: at its default it is not written, so that texts and keys stay."""
    return field(default=default, metadata={"later": True})


def plain(value: Any) -> Any:
    """A dataclass as plain data, as `asdict` gives it, without `later` fields that stand at their default."""
    if isinstance(value, tuple):
        return tuple(plain(entry) for entry in value)
    if not is_dataclass(value):
        return value
    shown = (f for f in fields(value) if not f.metadata.get("later") or getattr(value, f.name) != f.default)
    return {f.name: plain(getattr(value, f.name)) for f in shown}
