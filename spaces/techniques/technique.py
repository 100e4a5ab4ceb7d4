"""What a technique is: one value of `Technique` in a file of its own, which `table` joins with the others.

All of it is plain data and plain functions, of no tensor. What the functions leave out does not happen, so that a
simple technique says little: a step, its check, its words, a key of the space, how a choice becomes the step and how
the weight is then stored. What is done to the network stands in `runners.operators`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..rules import Axis, rule_axes
from ..steps import LayerStep, Step, Steps
from ..structure import Layer, Structure
from ..values import Either, OneOf, Value

_Kind = TypeVar("_Kind", bound=LayerStep)
# Inputs of one group: its Hessian then takes 512 MiB in double precision, its inverse and a factor as much again.
LARGEST_HESSIAN = 8192


@dataclass(frozen=True)
class WeightForm:
    """How a layer's weight is stored and what it is fed, all that the arithmetic of bytes asks for.

    bits: of each number, or of an index when there is a `codebook` of floats. zeros: a share or a pattern N:M. rank: of
    two factors, 0 for a whole weight. inputs: `plain`, as in the original network; `float`, a compressed weight with
    float inputs; `static` and `dynamic`, rounded inputs and where their range comes from. group_size: how many weights
    of a row share a scale, 0 for all. affine: one scale and one zero point for the whole weight.
    """

    bits: int = 32
    codebook: bool = False
    zeros: float | str = 0.0
    rank: int = 0
    inputs: str = "plain"
    group_size: int = 0
    affine: bool = False


@dataclass(frozen=True)
class Choices:
    """What was picked for one network: by kind of the axis, and for axes of layers and groups by their name too."""

    structure: Structure
    network: Mapping[str, Any]
    targets: Mapping[tuple[str, str], Any]


@dataclass(frozen=True)
class Encoding:
    """A recipe whose picks are looked for, by the axes of its network.

    taken: whether the weight of a layer is stored by a technique that comes before that of a kind, whose choice then
    has no effect. grown: the layers whose zeros grow during training.
    """

    space: Any
    structure: Structure
    recipe: Steps
    axes: tuple[Axis, ...]
    taken: Callable[[str, type[Step]], bool]
    grown: set[str]

    def by_layer(self, kind: type[_Kind]) -> dict[str, _Kind]:
        """The steps of one kind by layer."""
        return {step.layer: step for step in self.recipe.of(kind)}


def _nothing(*_: Any) -> list[Any]:
    return []


def _no_refusal(layer: Layer, choice: Any) -> str:
    return ""


def _as_it_is(choice: Any) -> Any:
    return choice


@dataclass(frozen=True)
class RuleWords:
    """The words of a key's rules in the configuration schema: the name of the type, what it is, what its choices
    are.
    """

    name: str
    about: str
    choices: str


@dataclass(frozen=True)
class Key:
    """One key of the space: what may be chosen, for what, and how a choice is found in a recipe again.

    of: `layer` or `group` for choices by rules, "" for choices of the whole network. share: whether a rule makes one
    choice for all that it selects when it does not say so. about, allowed: for people, in the schema and in errors.
    default: of the configuration, for the whole network. own: also that choices are steps themselves, which `read`
    makes of the configuration's. refuse: why a choice is not possible for a layer, or "". axes: the axes of the
    choices, given the key, the choices or rules, the structure, and where to say that something has no effect.
    axis_kind: of them, the name when "". wanted: the choices of an axis that explain a recipe, given the targets that
    it has; none for any.
    """

    name: str
    value: Value
    about: str
    wanted: Callable[[Axis, Sequence[str], Encoding], set[Any]]
    of: str = ""
    rule: RuleWords | None = None
    share: bool = False
    allowed: str = ""
    default: tuple[Any, ...] | None = None
    own: bool = False
    read: Callable[[Any], Any] = _as_it_is
    refuse: Callable[[Layer, Any], str] = _no_refusal
    axes: Callable[[Key, Any, Structure, dict[str, str]], Iterable[Axis]] | None = None
    axis_kind: str = ""

    @property
    def kind(self) -> str:
        """The kind of its axes."""
        return self.axis_kind or self.name

    @property
    def names(self) -> bool:
        """Whether a choice is the name of a method for a layer."""
        value = self.value.first if isinstance(self.value, Either) else self.value
        return self.of == "layer" and isinstance(value, OneOf) and isinstance(value.values[0], str)

    def choose_from(self) -> str:
        """The possible choices, for people."""
        return self.allowed or ", ".join(map(str, self.value.values if isinstance(self.value, OneOf) else ()))

    def make_axes(self, entries: Any, structure: Structure, idle: dict[str, str]) -> list[Axis]:
        """The axes of this key for one network."""
        if self.axes:
            return list(self.axes(self, entries, structure, idle))
        targets = structure.layers if self.of == "layer" else structure.groups
        return rule_axes(self.name, entries, [target.name for target in targets], structure, idle)


@dataclass(frozen=True)
class Technique:
    """One thing that may be done to a network.

    step: what a recipe holds. check: raises `RecipeError` for impossible numbers of one step. problems: raises it for
    steps that do not go together. describe: words for all steps of the kind. stores: how the weight is stored, for
    people, where the step decides that; a layer has one such step at most, and in a space the technique that comes
    first in the table wins. fits: what is wrong with a step for a network (that a layer exists is looked at before).

    keys: of the space. conflicts: choices of several axes that some layers cannot have together, by problem.
    space_problems: what is wrong with a space, whatever the network. From choices to steps: network_steps, before those
    of layers; layer_step, for a layer of a shape, given the step that stores the weight; final_steps, given all others.

    form: the fields of `WeightForm` that a step for a layer decides.
    """

    step: type[Step]
    check: Callable[[Any], object] = _nothing
    problems: Callable[[Steps], object] = _nothing
    describe: Callable[[Any], list[str]] = _nothing
    stores: str = ""
    fits: Callable[[Any, Steps, Structure], list[str]] = _nothing
    keys: tuple[Key, ...] = ()
    conflicts: Callable[[Sequence[Axis], Structure], Mapping[str, list[str]]] = lambda axes, structure: {}
    space_problems: Callable[[Any], list[str]] = _nothing
    network_steps: Callable[[Any, Choices], list[Step]] = _nothing
    layer_step: Callable[[Layer, Mapping[str, Any], tuple[int, int], Step | None], Step | None] | None = None
    final_steps: Callable[[Any, Choices, Sequence[Step]], list[Step]] = _nothing
    form: Callable[[Any], Mapping[str, Any]] = lambda step: {}

    @property
    def name(self) -> str:
        """The name of its step in JSON."""
        return self.step.__name__.lower()


def needs_hessian(kind: str, methods: Sequence[str], instead: str) -> Callable[[Layer, Any], str]:
    """The refusal of `methods` that need a Hessian, for layers of too many inputs.

    >>> needs_hessian("rounding", ["gptq"], "nearest")(Layer("fc", "linear", (10, 25088), 250880), "gptq")
    'rounding gptq needs a Hessian of 25088 x 25088 inputs, more than 8192; choose nearest'
    """

    def refuse(layer: Layer, choice: Any) -> str:
        inputs = math.prod(layer.weight_shape[1:])
        if choice not in methods or inputs <= LARGEST_HESSIAN:
            return ""
        return (
            f"{kind} {choice} needs a Hessian of {inputs} x {inputs} inputs, more than {LARGEST_HESSIAN}; "
            f"choose {instead}"
        )

    return refuse


def refusals(step: LayerStep, structure: Structure, asked: Mapping[str, Callable[[Layer, Any], str]]) -> list[str]:
    """What of a step's fields a layer of such a shape cannot have. asked: by field why a value is not possible."""
    layer = structure.layer(step.layer)
    reasons = (refuse(layer, getattr(step, name)) for name, refuse in asked.items())
    return [f"layer {layer.name!r}: {reason}" for reason in reasons if reason]
