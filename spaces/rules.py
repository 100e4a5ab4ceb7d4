"""Rules select layers by patterns and give them choices; against a `Structure` they become axes.

A rule selects by glob on the name, by kind, or as `first` and `last`; the last rule that selects a layer wins; with
`share` there is one choice for all layers of the rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .structure import Structure

KINDS = ("conv", "depthwise", "grouped", "linear")


@dataclass(frozen=True)
class Rule:
    """Choices for the layers (or groups) that the patterns select, one for all of them when `share`."""

    choices: tuple[Any, ...]
    layers: tuple[str, ...] = ("*",)
    share: bool = False

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "layers", layers)


@dataclass(frozen=True)
class Axis:
    """One decision: `choices[i]` for all `targets`.

    student: the network that it decides about, or has an effect with: "" for the original one, None for all.
    """

    name: str
    kind: str
    targets: tuple[str, ...]
    choices: tuple[Any, ...]
    student: str | None = ""


def rule_axes(
    kind: str, rules: Sequence[Rule], names: Sequence[str], structure: Structure, idle: dict[str, str]
) -> list[Axis]:
    """The axes of one key. idle: is given what to say of patterns that select nothing."""
    if not names:
        return []
    owner: dict[str, int] = {}
    for number, rule in enumerate(rules):
        for pattern in rule.layers:
            selected = [name for name in names if matches(pattern, name, structure)]
            if not selected:
                close = difflib.get_close_matches(pattern, names, 3, 0.4) or list(names[:5])
                where = f"{kind}.{number}.layers: pattern {pattern!r}"
                idle[where] = (
                    f"{where} selects no {'group' if kind == 'channels' else 'layer'}; "
                    f"write a name, a glob such as 'layer1.*', first, last, or a kind ({', '.join(KINDS)}); "
                    f"names here: {', '.join(close)}{', ...' if len(names) > len(close) else ''}"
                )
            owner.update(dict.fromkeys(selected, number))
    axes: list[Axis] = []
    for number, rule in enumerate(rules):
        targets = tuple(name for name in names if owner.get(name) == number)
        if rule.share and targets:
            label = "all" if rule.layers == ("*",) else "+".join(rule.layers)
            if label in names:  # a layer may be called `all` or `conv`, and its own axis too
                label += " (shared)"
            axes.append(Axis(f"{kind}/{label}", kind, targets, rule.choices))
        else:
            axes += [Axis(f"{kind}/{target}", kind, (target,), rule.choices) for target in targets]
    return axes


def matches(pattern: str, name: str, structure: Structure) -> bool:
    """Whether a pattern selects a layer or the group named after it."""
    if pattern == "first":
        return name == structure.layers[0].name
    if pattern == "last":
        return name == structure.layers[-1].name
    if pattern in KINDS:
        return structure.layer(name).kind == pattern
    return fnmatchcase(name, pattern)
