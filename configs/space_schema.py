"""The section `space` of a configuration, made of the keys that the techniques describe (`spaces.techniques.table`).

A technique says what a choice may be as plain data (`spaces.values`); here it becomes a type of pydantic with the same
checks, so that a new key needs no line in this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError

from ..errors import RecipeError
from ..spaces.rules import Rule
from ..spaces.space import Space
from ..spaces.techniques.table import KEYS
from ..spaces.techniques.technique import Key
from ..spaces.values import Either, Entry, Flag, Number, OneOf, Settings, Text, Value
from .fields import NO_BOOL, TEXTS, Choices, Strict, as_list, distinct, fail, form

# The order of the keys in the schema; keys that it does not name come before the last of them, `recovery`.
_ORDER = (
    "weight_bits",
    "activation_bits",
    "activations",
    "group_size",
    "scheme",
    "cluster_bits",
    "rank",
    "rounding",
    "ranges",
    "sparsity",
    "criterion",
    "channels",
    "width",
    "depth",
    "equalize",
    "students",
    "recovery",
)


class LayerRule(Strict):
    """Choices for the layers that the patterns select; where several rules select a layer, the last one counts."""

    layers: Annotated[tuple[str, ...], AfterValidator(distinct), BeforeValidator(as_list), WithJsonSchema(TEXTS)] = (
        "*",
    )
    """Which layers: names, globs such as `layer1.*`, kinds (conv, depthwise, grouped, linear), `first`, `last`.
    Default: `*`, all. For `channels` the names are those of dependency groups (`paretorch check` lists them)."""
    share: bool = False
    """One choice for all selected layers (true) or one for each (false). Default: false."""


class MethodRule(LayerRule):
    """How something is done to the selected layers."""

    share: bool = True
    """One choice for all selected layers (true) or one for each (false). Default: true."""


# A technique is either `[4, 8]`, one rule for all layers, or a list of rules.
def _rules_form(value: object) -> str | None:
    if not isinstance(value, (list, tuple)):
        return None
    return "<rules>" if any(isinstance(entry, (dict, BaseModel)) for entry in value) else "<choices>"


_FORMS = Discriminator(
    _rules_form,
    custom_error_type="form",
    custom_error_message="must be a list of choices, or a list of rules {layers: ..., choices: [...], share: false}",
)


def _no_minutes(value: object) -> object:
    """YAML 1.1 reads 2:4 as minutes and seconds, 124."""
    if isinstance(value, int) and value > 60:
        text = f"{value // 60}:{value % 60}"
        raise PydanticCustomError(
            "minutes", "{text}", {"text": f"must be less than 1; a pattern needs quotes, '{text}'"}
        )
    return value


def _null_is_none(value: object) -> object:
    """YAML reads null and ~ as nothing, by which `none` is meant."""
    return ["none" if entry is None else entry for entry in value] if isinstance(value, list) else value


def _empty_is_default(value: object) -> object:
    """A mapping whose keys are all commented out is an empty value in YAML."""
    return {} if value is None else value


def _checked(check: Callable[[str], object]) -> AfterValidator:
    def checked(text: str) -> str:
        try:
            check(text)
        except RecipeError as error:
            raise fail(str(error)) from error
        return text

    return AfterValidator(checked)


def _either(value: Either) -> Any:
    """Two forms, told apart by a function, so that only the form that was meant reports its mistake."""
    first, second = _type(value.first), _type(value.second)
    if isinstance(value.second, Settings):
        told = Discriminator(form, custom_error_type="form", custom_error_message=value.message)
        return Annotated[Annotated[first, Tag("<text>")] | Annotated[second, Tag("<mapping>")], told]
    if isinstance(value.first, Number):  # beside a text that YAML may take for a number
        first = Annotated[_number(value.first), BeforeValidator(_no_minutes), NO_BOOL]
    told = Discriminator(lambda choice: "<second>" if value.is_second(choice) else "<first>")
    return Annotated[Annotated[first, Tag("<first>")] | Annotated[second, Tag("<second>")], told]


def _number(value: Number) -> Any:
    bounds: dict[str, Any] = {"gt": value.above, "ge": value.least, "lt": value.below, "le": value.most}
    field = Field(**{name: bound for name, bound in bounds.items() if bound is not None})
    return Annotated[int if value.whole else float, field]


def _type(value: Value) -> Any:
    match value:
        case Number():
            return Annotated[_number(value), NO_BOOL]
        case OneOf(values):
            return Literal[values]
        case Flag():
            return bool
        case Text(check):
            return Annotated[str, _checked(check)]
        case Either():
            return _either(value)
        case Settings(name, about, entries):
            fields: dict[str, Any] = {entry.name: _entry(entry) for entry in entries}
            return create_model(name, __base__=Strict, __doc__=about, __module__=__name__, **fields)


def _entry(entry: Entry) -> tuple[Any, Any]:
    kind = _type(entry.value)
    if isinstance(entry.value, Settings):
        kind = Annotated[kind, BeforeValidator(_empty_is_default)]
    default = {} if entry.default is None else {"default": entry.default}
    return kind, Field(description=entry.about, **default)


def _field(key: Key) -> tuple[Any, Any]:
    """The type and the description of a key of the section."""
    choice: Any = _type(key.value)
    choices: Any = Choices[choice]
    if key.rule:
        base = MethodRule if key.share else LayerRule
        listed: dict[str, Any] = {"choices": (choices, Field(description=key.rule.choices))}
        rule: Any = create_model(key.rule.name, __base__=base, __doc__=key.rule.about, __module__=__name__, **listed)
        choices = Annotated[Annotated[choices, Tag("<choices>")] | Annotated[tuple[rule, ...], Tag("<rules>")], _FORMS]
    elif isinstance(key.value, Either) and isinstance(key.value.first, OneOf):
        choices = Annotated[choices, BeforeValidator(_null_is_none)]
    kind = choices | None if key.default is None else choices
    return kind, Field(default=key.default, description=key.about)


def _fields() -> dict[str, Any]:
    rank = {name: number for number, name in enumerate(_ORDER)}
    ordered = sorted(KEYS, key=lambda key: rank.get(key.name, len(_ORDER) - 1.5))
    return {key.name: _field(key) for key in ordered}


if TYPE_CHECKING:
    SpaceConfig = Strict  # what follows is for running alone: a type that is made has no name for a type checker
else:
    SpaceConfig = create_model(
        "SpaceConfig",
        __base__=Strict,
        __doc__="What may be done to the network. A technique that is not named is left out.",
        __module__=__name__,
        **_fields(),
    )


def to_space(config: SpaceConfig) -> Space:
    """The rules of a configuration as a `Space`.

    >>> to_space(SpaceConfig(weight_bits=(4, 8))).weight_bits
    (Rule(choices=(4, 8), layers=('*',), share=False),)
    """
    choices: dict[str, Any] = {key.name: _choices(key, getattr(config, key.name)) for key in KEYS}
    return Space(**choices)


def _choices(key: Key, entries: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """The choices or rules of one key as the space has them."""
    if not entries:
        return ()
    if not key.of:
        return tuple(key.read(entry.model_dump() if isinstance(entry, BaseModel) else entry) for entry in entries)
    if isinstance(entries[0], LayerRule):
        return tuple(Rule(entry.choices, entry.layers, entry.share) for entry in entries)
    return (Rule(entries, share=key.share),)
