"""Residual blocks that are left out of a network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Skip(nn.Module):
    """What a block that is left out leaves behind: its first input, whatever else it was given (masks, for one)."""

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return x


def drop_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Leave out blocks, by module name, in place."""
    for name in names:
        model.set_submodule(name, Skip())
