"""A layer's weight as it ships, and what a parametrization has to say of itself so that it can be frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ...spaces.steps import Step


@dataclass(frozen=True)
class FrozenWeight:
    """Integer codes (float tensor) and a scale per output channel, or just the width of the numbers.

    group_size: then there is a scale for each group of so many weights of a row.

    zero: the zero point of an affine grid; then the scale is one for the whole weight, codes are counted from the zero
    point, and a channel's step was `scale / factor`, where factor is what folding multiplied the output channels by,
    None for no folding.

    codebook: `[values]`; then the codes are indices into it. dynamic: the range of 8-bit activations is found at run
    time.
    """

    weight_bits: int
    activation_bits: int = 32
    codes: Tensor | None = None
    scale: Tensor | None = None
    codebook: Tensor | None = None
    dynamic: bool = False
    group_size: int = 0
    zero: int | None = None
    factor: Tensor | None = None


@runtime_checkable
class Freezable(Protocol):
    """A parametrization of a weight that knows what will ship."""

    def frozen(self, weight: Tensor, step: Step | None) -> tuple[Tensor, FrozenWeight | None]:
        """The weight as it ships, from the one that is trained, and how it is stored, None for floats.

        Args:
            weight: The weight that the parametrization is given.
            step: The step of the recipe that says how the layer's weight is stored, if there is one.
        """
