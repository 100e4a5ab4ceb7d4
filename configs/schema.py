"""What a configuration file may say: every key with its meaning, unit and default.

The docstrings of the fields are the descriptions in the JSON schema (`paretorch schema`), so an editor shows them while
one types. Nothing here imports torch: `paretorch --help` and `paretorch schema` stay fast.

Two habits keep messages readable. A value that may be written in two ways (a text or a mapping) is told apart by a
function, so that only the form that was meant reports its mistakes; the tags `<...>` of these forms are left out of key
paths. And a check that spans two keys sits on the later of the two, because pydantic skips checks of a whole mapping
as soon as one of its keys is wrong.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PrivateAttr,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from ..errors import ConfigError, RecipeError
from ..objectives.objective import Budget, Limit, Objective
from ..spaces.rules import Rule
from ..spaces.space import Space
from ..spaces.techniques.recover import Recover
from ..spaces.techniques.sparsify import pattern_of
from ..spaces.techniques.student import STUDENT, Student

T = TypeVar("T")
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"".join(rf"(?:(\d+(?:\.\d*)?){unit})?" for unit in _SECONDS))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FUNCTION = re.compile(r"[^:]+:[A-Za-z_]\w*")
# The names of `runners.targets.target.TARGETS` (a test compares them), which would import ONNX Runtime.
TARGETS = ("onnxruntime", "openvino", "torch", "torch-cuda")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def _fail(text: str) -> PydanticCustomError:
    """A mistake whose message already names the value."""
    return PydanticCustomError("paretorch", "{text}", {"text": text})


def _parsed(parse: Callable[[str], object]) -> AfterValidator:
    """The text must be one that `parse` reads; it stays a text."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ConfigError as error:
            raise _fail("; ".join(error.problems)) from error
        return text

    return AfterValidator(check)


def _duration(value: object) -> object:
    if value is None:
        return None
    try:
        # YAML reads 1:30 as the number 90, and a bare 30 could be anything: only a text with units is clear.
        return parse_duration(str(value))
    except ConfigError as error:
        raise _fail(error.problems[0]) from error


def _no_bool(value: object) -> object:
    """YAML 1.1 reads yes, no, on and off as booleans, and pydantic would take those for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "must be a number; YAML reads yes, no, on and off as true and false")
    return value


def _no_minutes(value: object) -> object:
    """YAML 1.1 reads 2:4 as minutes and seconds, 124."""
    if isinstance(value, int) and value > 60:
        text = f"{value // 60}:{value % 60}"
        raise PydanticCustomError(
            "minutes", "{text}", {"text": f"must be less than 1; a pattern needs quotes, '{text}'"}
        )
    return value


def _pattern(text: str) -> str:
    try:
        pattern_of(text)
    except RecipeError as error:
        raise _fail(str(error)) from error
    return text


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:
        raise PydanticCustomError("empty", "must have at least one entry; leave the key out instead")
    twice = [value for n, value in enumerate(values) if value in values[:n]]
    if twice:
        raise PydanticCustomError("twice", "{text}", {"text": f"holds {twice[0]!r} twice"})
    return values


def _checked_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise _fail(f"name {text!r}: use letters, digits and -_. only (at most 100, a letter or digit first)")
    return text


def _checked_function(text: str) -> str:
    if not _FUNCTION.fullmatch(text):
        raise _fail(f"task {text!r}: write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, such as my_task.py:task")
    return text


def _criterion_function(text: str) -> str:
    if not _FUNCTION.fullmatch(text):
        raise _fail(f"criterion {text!r}: write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, such as rules.py:score")
    return text


def _checked_student(text: str) -> str:
    if not STUDENT.fullmatch(text):
        raise _fail(f"student {text!r}: use letters, digits and -_. only, as in Task(students={{...}})")
    return text


def _checked_target(text: str) -> str:
    if text not in TARGETS and not text.endswith((".yaml", ".yml")):
        close = difflib.get_close_matches(text, TARGETS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise _fail(f"target {text!r}: choose from {', '.join(TARGETS)}, or name the .yaml file of a profile{hint}")
    return text


def _form(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<mapping>" if isinstance(value, (dict, BaseModel)) else None


def _rules_form(value: object) -> str | None:
    if not isinstance(value, (list, tuple)):
        return None
    return "<rules>" if any(isinstance(entry, (dict, BaseModel)) for entry in value) else "<choices>"


# The check for booleans comes last, so that it runs first and the bounds still reach the JSON schema.
_NUMBER = BeforeValidator(_no_bool)
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
Count = Annotated[int, Field(ge=1), _NUMBER]
Natural = Annotated[int, Field(ge=0), _NUMBER]
Number = Annotated[float, _NUMBER]
Positive = Annotated[float, Field(gt=0), _NUMBER]
Removed = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Kept = Annotated[float, Field(gt=0, le=1), _NUMBER]
# A name or a function, told apart by a function, so that only the form that was meant reports its mistake.
Criterion = Annotated[
    Annotated[Literal["magnitude", "taylor", "activation", "obs", "random"], Tag("<name>")]
    | Annotated[str, AfterValidator(_criterion_function), Tag("<function>")],
    Discriminator(lambda value: "<function>" if isinstance(value, str) and ":" in value else "<name>"),
]
Rounding = Literal["nearest", "gptq", "adaround"]
Ranges = Literal["mse", "minmax", "percentile", "entropy"]
Activations = Literal["static", "dynamic"]
Scheme = Literal["symmetric", "affine"]
GroupSize = Literal[0, 16, 32, 64, 128, 256]
# A share or a pattern, told apart by a function, so that only the form that was meant reports its mistake.
Zeros = Annotated[
    Annotated[float, Field(ge=0, lt=1), BeforeValidator(_no_minutes), _NUMBER, Tag("<number>")]
    | Annotated[str, AfterValidator(_pattern), Tag("<text>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<number>"),
]
WeightBits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
ActivationBits = Literal[4, 8, 16, 32]
ClusterBits = Literal[2, 3, 4, 5, 6, 7, 8, 32]
# Not Field(min_length=1): pydantic then calls a tuple of invalid entries too short as well.
Choices = Annotated[tuple[T, ...], AfterValidator(_distinct), Field(json_schema_extra={"minItems": 1})]
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


class LayerRule(Strict):
    """Choices for the layers that the patterns select; where several rules select a layer, the last one counts."""

    layers: Annotated[
        tuple[str, ...], AfterValidator(_distinct), BeforeValidator(_as_list), WithJsonSchema(_TEXTS)
    ] = ("*",)  # fmt: skip
    """Which layers: names, globs such as `layer1.*`, kinds (conv, depthwise, grouped, linear), `first`, `last`.
    Default: `*`, all. For `channels` the names are those of dependency groups (`paretorch check` lists them)."""
    share: bool = False
    """One choice for all selected layers (true) or one for each (false). Default: false."""


class WeightRule(LayerRule):
    """Bits that the weights of the selected layers may have."""

    choices: Choices[WeightBits]
    """1..8, 16 or 32 bits, in ascending or descending order. Required."""


class ActivationRule(LayerRule):
    """Bits that the inputs of the selected layers may have."""

    choices: Choices[ActivationBits]
    """4, 8, 16 or 32 bits. Required."""


class ClusterRule(LayerRule):
    """Bits of the indices that the weights of the selected layers may become."""

    choices: Choices[ClusterBits]
    """2..8 bits, or 32 for no codebook. Required."""


class RankRule(LayerRule):
    """Ranks that the selected layers may be reduced to."""

    choices: Choices[Kept]
    """Shares of the full rank, 0 < x <= 1, in ascending or descending order; 1 leaves the layer as it is. Required."""


class SparsityRule(LayerRule):
    """Shares of the selected layers' weights that may be set to zero."""

    choices: Choices[Zeros]
    """Shares, 0 <= x < 1, and patterns such as '2:4' (in quotes), in ascending or descending order. Required."""


class MethodRule(LayerRule):
    """How something is done to the selected layers."""

    share: bool = True
    """One choice for all selected layers (true) or one for each (false). Default: true."""


class CriterionRule(MethodRule):
    """Which weights of the selected layers are set to zero."""

    choices: Choices[Criterion]
    """magnitude, taylor, activation, obs, random, or a function of yours as FILE.py:FUNCTION. Required."""


class RoundingRule(MethodRule):
    """How the weights of the selected layers are rounded."""

    choices: Choices[Rounding]
    """nearest, gptq, adaround. Required."""


class RangesRule(MethodRule):
    """How the ranges of the selected layers' weights are found."""

    choices: Choices[Ranges]
    """mse, minmax, percentile, entropy. Required."""


class ActivationsRule(MethodRule):
    """Where the selected layers' 8-bit activations have their ranges from."""

    choices: Choices[Activations]
    """static, dynamic (linear layers only). Required."""


class GroupRule(MethodRule):
    """How many weights of an output channel share a scale in the selected layers."""

    choices: Choices[GroupSize]
    """0 (all of them), 16, 32, 64, 128, 256; other than 0 for linear layers only. Required."""


class SchemeRule(MethodRule):
    """Whether the integers of the selected layers' weights have scales for each output channel, or one and a zero point."""

    choices: Choices[Scheme]
    """symmetric, affine. Required."""


class ShareRule(LayerRule):
    """Shares of the selected groups' channels that may be removed."""

    choices: Choices[Removed]
    """Shares, 0 <= x < 1, in ascending or descending order. Required."""


# A technique is either `[4, 8]`, one rule for all layers, or a list of rules.
_FORMS = Discriminator(
    _rules_form,
    custom_error_type="form",
    custom_error_message="must be a list of choices, or a list of rules {layers: ..., choices: [...], share: false}",
)
WeightRules = Annotated[
    Annotated[Choices[WeightBits], Tag("<choices>")] | Annotated[tuple[WeightRule, ...], Tag("<rules>")], _FORMS
]
ActivationRules = Annotated[
    Annotated[Choices[ActivationBits], Tag("<choices>")] | Annotated[tuple[ActivationRule, ...], Tag("<rules>")], _FORMS
]
ClusterRules = Annotated[
    Annotated[Choices[ClusterBits], Tag("<choices>")] | Annotated[tuple[ClusterRule, ...], Tag("<rules>")], _FORMS
]
RankRules = Annotated[
    Annotated[Choices[Kept], Tag("<choices>")] | Annotated[tuple[RankRule, ...], Tag("<rules>")], _FORMS
]
ShareRules = Annotated[
    Annotated[Choices[Removed], Tag("<choices>")] | Annotated[tuple[ShareRule, ...], Tag("<rules>")], _FORMS
]


SparsityRules = Annotated[
    Annotated[Choices[Zeros], Tag("<choices>")] | Annotated[tuple[SparsityRule, ...], Tag("<rules>")], _FORMS
]
CriterionRules = Annotated[
    Annotated[Choices[Criterion], Tag("<choices>")] | Annotated[tuple[CriterionRule, ...], Tag("<rules>")], _FORMS
]
RoundingRules = Annotated[
    Annotated[Choices[Rounding], Tag("<choices>")] | Annotated[tuple[RoundingRule, ...], Tag("<rules>")], _FORMS
]
RangesRules = Annotated[
    Annotated[Choices[Ranges], Tag("<choices>")] | Annotated[tuple[RangesRule, ...], Tag("<rules>")], _FORMS
]


ActivationsRules = Annotated[
    Annotated[Choices[Activations], Tag("<choices>")] | Annotated[tuple[ActivationsRule, ...], Tag("<rules>")], _FORMS
]


GroupRules = Annotated[
    Annotated[Choices[GroupSize], Tag("<choices>")] | Annotated[tuple[GroupRule, ...], Tag("<rules>")], _FORMS
]


SchemeRules = Annotated[
    Annotated[Choices[Scheme], Tag("<choices>")] | Annotated[tuple[SchemeRule, ...], Tag("<rules>")], _FORMS
]


class Finetune(Strict):
    """How a candidate is trained after compression, taught by the original network."""

    epochs: Positive = 1.0
    """Passes over the training data; may be a fraction. Default: 1."""
    learning_rate: Positive = 0.01
    """Highest learning rate. Default: 0.01."""
    distill: Annotated[float, Field(ge=0, le=1), _NUMBER] = 0.9
    """Weight of the original network's soft answers against the labels, 0 to 1. Default: 0.9."""
    temperature: Positive = 2.0
    """How soft these answers are made; 1 leaves them as they are. Default: 2."""
    train: Literal["all", "last", "scales"] = "all"
    """What is trained: `all`; `last`, the last third of the modules that have parameters, which is faster; `scales`, the
    scales of quantization, biases and normalisation alone, which changes the least. Default: all."""
    temperature_schedule: Literal["constant", "warmup", "anneal"] = "constant"
    """The temperature during training: `constant`; `warmup`, from 1 up to it; `anneal`, from it down to 1. Default:
    constant."""
    features: Annotated[float, Field(ge=0), _NUMBER] = 0.0
    """Weight of the distance between the features of both networks, at the last layer of each shape that both have.
    Default: 0, none."""
    patience: Natural = 0
    """Training ends after so many epochs in a row without a better loss on held-out training samples (a tenth, 1024
    at most), and the best weights stay. Default: 0, to the end and on all samples."""
    gradual: bool = False
    """Zeros (`sparsity`) grow during the first half of training, from none to all, the smallest weights of each moment (Zhu &
    Gupta 2017); `criterion` and `rounding` then have no effect where zeros are. Default: false."""


class Recovery(Strict):
    """Recovery by training, with its settings."""

    finetune: Finetune
    """Train the compressed network for some epochs."""

    @field_validator("finetune", mode="before")
    @classmethod
    def _empty(cls, value: object) -> object:
        return {} if value is None else value


RecoveryChoice = Annotated[
    Annotated[Literal["none", "batchnorm", "statistics", "finetune"], Tag("<text>")]
    | Annotated[Recovery, Tag("<mapping>")],
    Discriminator(
        _form,
        custom_error_type="form",
        custom_error_message="must be none, batchnorm, statistics or {finetune: {epochs: 1}}",
    ),
]


class StudentConfig(Strict):
    """A student that is trained before the trials."""

    name: Annotated[str, AfterValidator(_checked_student)]
    """Its name in `Task(students={...})`. Required."""
    epochs: Annotated[float, Field(ge=0), _NUMBER] = 0.0
    """Passes over the training data, once, before all trials, taught by the original network. Default: 0, it comes trained."""
    learning_rate: Positive = 0.05
    """Highest learning rate of this training. Default: 0.05."""


StudentChoice = Annotated[
    Annotated[str, AfterValidator(_checked_student), Tag("<text>")] | Annotated[StudentConfig, Tag("<mapping>")],
    Discriminator(
        _form,
        custom_error_type="form",
        custom_error_message="must be teacher, the name of a student, or {name: small, epochs: 8}",
    ),
]


class SpaceConfig(Strict):
    """What may be done to the network. A technique that is not named is left out."""

    weight_bits: WeightRules | None = None
    """Bits of a layer's weights: 1 (signs; they want training), 2..8 (integers), 16 (float16), 32 (untouched). Choices, or
    rules per layer. Where weights are signs, `sparsity` and `ranges` do not count."""
    activation_bits: ActivationRules | None = None
    """Bits of what a layer computes on: 8 (int8 arithmetic) or 32 (float); 4 and 16 for an accelerator whose profile has such
    units (a CPU rounds to them and computes in floats). Below 32 they take effect where the weights have at most 8. Choices or rules."""
    activations: ActivationsRules | None = None
    """Where 8-bit activations have their ranges from: static, the calibration images; dynamic, the inputs of each call
    (linear layers only, so write a rule: `{layers: linear, choices: [static, dynamic]}`). Default: static."""
    group_size: GroupRules | None = None
    """How many weights of an output channel share a scale: 0 (all of them), 16, 32, 64, 128, 256. Has an effect where
    activations are float, and is for linear layers only: `{layers: linear, choices: [0, 64]}`. Default: 0."""
    scheme: SchemeRules | None = None
    """symmetric, a scale for each output channel; affine, one scale and one zero point for the whole weight, BatchNorm folded into
    it (2 to 8 bits, ranges other than entropy), for devices that know no other. Choices (one for all layers) or rules. Without
    effect on signs and groups. Default: symmetric."""
    cluster_bits: ClusterRules | None = None
    """Bits of indices into a layer's own codebook of floats: 2..8, or 32 for none. Where a layer has a codebook,
    `weight_bits` and `activation_bits` do not count: it runs as float. Choices or rules."""
    rank: RankRules | None = None
    """Shares of a layer's full rank at which it becomes two thinner layers, 0 < x <= 1; 1 leaves it as it is. A share that
    would save neither bytes nor MACs is left out (about 0.5 and more for square linear layers). Choices or rules."""
    rounding: RoundingRules | None = None
    """How weights of at most 8 bits are rounded: nearest; gptq or adaround, which round for the layer's outputs on the
    calibration images (seconds to minutes, once). Choices (one for all layers) or rules. Default: nearest."""
    ranges: RangesRules | None = None
    """How the range of each output channel's weights is found: mse, minmax, percentile, entropy. Choices (one for all
    layers) or rules. Default: mse."""
    sparsity: SparsityRules | None = None
    """Shares of a layer's weights that are set to zero, 0 <= x < 1, or patterns such as '2:4' (in quotes): 2 of every 4
    neighbouring input channels stay. Choices or rules."""
    criterion: CriterionRules | None = None
    """Which weights are set to zero: magnitude, taylor (by gradients), activation (by the inputs' norms), obs (by what they
    cost after the others are adjusted, which they then are), random, or FILE.py:FUNCTION, a function of yours: from a weight
    and the norms of its inputs, as large as the weight or None, it gives a score for each weight; the lowest become zero.
    Choices (one for all layers) or rules. Default: magnitude."""
    channels: ShareRules | None = None
    """Shares of a dependency group's channels that are really removed, 0 <= x < 1. Choices or rules."""
    width: Choices[Kept] = (1.0,)
    """Shares of all channels that stay, 0 < x <= 1. Default: [1.0], all."""
    depth: Choices[Natural] = (0,)
    """How many residual blocks may be left out, the least important first. Default: [0], none."""
    equalize: Choices[Literal["none", "weights", "activations"]] = ("none",)
    """Whether channels of very different range are made alike where only ReLU, pooling and the like lie between two layers, before
    weights are rounded; what the network computes stays (Nagel et al. 2019): none; weights, by the weights on both sides;
    activations, by the values on the calibration images and the weights that read them. Not with `features` in `recovery`.
    Default: [none]."""
    students: Choices[StudentChoice] | None = None
    """Networks to begin with: `teacher`, the network itself; names of networks that the task makes (`Task(students={...})`), or
    {name: small, epochs: 8} for one that is first trained. All other keys apply to each of them; a pattern has to select
    something in one of them. Default: the network itself alone."""
    recovery: Choices[RecoveryChoice] = ("none",)
    """How accuracy is won back: `none`, `batchnorm` (re-estimate its statistics, seconds), `statistics` (also those of
    layers that no BatchNorm follows, in their biases and scales) or `{finetune: {epochs: 1}}` (train). Default: [none]."""

    @field_validator("recovery", mode="before")
    @classmethod
    def _null_is_none(cls, value: object) -> object:
        return ["none" if entry is None else entry for entry in value] if isinstance(value, list) else value


class Data(Strict):
    """Images: an image folder on disk (`folder`), or one of torchvision's datasets (`dataset`)."""

    folder: str | None = None
    """Image folder, relative to the configuration file: `{train,val,test}/<class>/*.jpg`, or `<class>/*.jpg` directly
    and then divided with `split`. `val` may be missing (divided off `train`) and so may `test`."""
    dataset: Annotated[
        Literal[
            "CIFAR10", "CIFAR100", "FashionMNIST", "Food101", "GTSRB", "Imagenette", "KMNIST", "MNIST",
            "OxfordIIITPet", "STL10", "SVHN",
        ]
        | None,
        Field(validate_default=True),
    ] = None  # fmt: skip
    """One of torchvision's datasets, instead of `folder`. Its test set is the test data; validation is divided off its
    training set with `split`."""
    root: str = "data"
    """For `dataset`: the folder that holds its files, relative to the configuration file. Default: data."""
    download: bool = False
    """For `dataset`: fetch the files from the internet when they are missing. Default: false."""
    size: Count = 224
    """Side of the square input, in pixels. Default: 224."""
    crop: Kept = 0.875
    """Validation and test: the shorter side is resized to size/crop, then the centre is cut out. Default: 0.875."""
    channels: Literal[1, 3] = 3
    """Colour channels: 3 (RGB) or 1 (grey). Default: 3."""
    mean: Annotated[tuple[Number, ...] | None, Field(validate_default=True)] = None
    """Mean of each channel on the scale 0..1. Default: ImageNet's for 3 channels, 0.5 for one."""
    std: Annotated[tuple[Positive, ...] | None, Field(validate_default=True)] = None
    """Standard deviation of each channel on the scale 0..1. Default: ImageNet's for 3 channels, 0.5 for one."""
    augment: bool = True
    """Random resized crop and horizontal flip in training (never in validation or test). Default: true."""
    split: tuple[Removed, Removed, Removed] = (0.7, 0.15, 0.15)
    """Shares of train, validation and test where images are divided, class by class. Default: [0.7, 0.15, 0.15]."""
    split_seed: Natural = 0
    """Seed of this division; it is not the seed of the search, so that all studies select on the same images.
    Default: 0."""

    @field_validator("dataset")
    @classmethod
    def _one_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        if "folder" in info.data and (value is None) == (info.data["folder"] is None):
            found = "neither is given" if value is None else "both are given"
            raise _fail(f"exactly one of `folder: images/` and `dataset: CIFAR10` says where the images are; {found}")
        return value

    @field_validator("mean", "std")
    @classmethod
    def _per_channel(cls, value: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...]:
        channels = info.data.get("channels", 3)
        if value is None:
            ours = IMAGENET_MEAN if info.field_name == "mean" else IMAGENET_STD
            return ours if channels == 3 else (0.5,)
        if len(value) != channels:
            raise PydanticCustomError("length", "must have {n} numbers, one per channel", {"n": channels})
        return value

    @field_validator("split")
    @classmethod
    def _sums_to_one(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if abs(sum(value) - 1) > 1e-6 or not (value[0] > 0 and value[1] > 0):
            raise PydanticCustomError("split", "must add up to 1, with some images for train and for validation")
        return value


class BuiltinTask(Strict):
    """A torchvision classification network on images, without any Python by the user."""

    model: str
    """Name of a torchvision classification model, such as mobilenet_v2 or resnet18. Required."""
    weights: str | None = None
    """Trained weights: a .safetensors, .pth or .pt file (relative to the configuration file; loaded without unpickling
    code) or the name of torchvision weights such as IMAGENET1K_V1. Default: none, random weights, for a dry run."""
    classes: Count | None = None
    """Number of classes of the network. Default: the number of classes in the data."""
    data: Data
    """Where the images are and how they are prepared. Required."""
    batch_size: Count = 32
    """Images per batch in training and evaluation. Default: 32."""


class Search(Strict):
    """How the space is searched."""

    sampler: Literal["ehvi", "tpe", "nsga2", "nsga3", "gp", "random", "qmc"] = "ehvi"
    """Sampler: ehvi (our own), or Optuna's tpe, nsga2, nsga3, gp, random, qmc. Default: ehvi."""
    trials: Count | None = None
    """Number of candidates in total, also after a resume. Default: 40, or as many as fit into `time` where that is given."""
    time: Seconds = None
    """How long the search may take in all, such as 90s, 30m or 1h30m, with the finalists' evaluation. Default: no end."""
    rungs: bool | None = None
    """Whether candidates begin untrained and only the best are trained, from one choice of `recovery` to the next.
    Only the sampler ehvi knows how. Default: true where training takes far longer than the rest of a trial."""
    ensembles: bool = False
    """Whether, after the trials, ensembles of two or three candidates are tried: one file that averages their outputs.
    Those that are foretold to be on the front are measured, at most 8, beside the `trials`. Default: false."""
    seed: Annotated[int, Field(ge=0, lt=2**32), _NUMBER] = 0
    """Seed of every random choice. Default: 0."""


class Measure(Strict):
    """How candidates are measured."""

    threads: Count = 1
    """CPU threads of the runtime while latency is measured. Default: 1."""
    batch: Count = 1
    """Inputs per call while latency is measured. Default: 1."""
    seconds: Positive = 0.5
    """Time spent on one latency measurement, in seconds; a fifth where latency is neither an objective nor limited, and
    up to four times as much for the finalists. Default: 0.5."""
    calibration_images: Annotated[int, Field(ge=16), _NUMBER] = 512
    """Training inputs that set activation ranges and BatchNorm statistics. Default: 512."""
    target: Annotated[str, AfterValidator(_checked_target)] = "onnxruntime"
    """What runs the files while latency and the metric are measured: onnxruntime, openvino, torch, torch-cuda; or the
    .yaml file of an accelerator's profile, relative to this file, from which the latency is computed.
    Default: onnxruntime."""


class MLflow(Strict):
    """Where runs are logged."""

    uri: str | None = None
    """MLflow tracking URI. Default: a SQLite store in the study's own directory."""
    experiment: str | None = None
    """Name of the MLflow experiment. Default: derived from the name of the study."""


class Config(Strict):
    """One study: the task, what may be done to its network, what is good, and how long to look.

    `source` is the file it came from; `path` resolves what it says about files. See `load` for reading one.
    """

    name: Annotated[
        str, AfterValidator(_checked_name), Field(json_schema_extra=lambda schema: schema.pop("default"))
    ] = "study"
    """Name of the study: letters, digits, `-_.`. Default: the name of the configuration file without `.yaml`."""
    task: Annotated[
        Annotated[str, AfterValidator(_checked_function), Tag("<text>")] | Annotated[BuiltinTask, Tag("<mapping>")],
        Discriminator(
            _form,
            custom_error_type="form",
            custom_error_message="must be FILE.py:FUNCTION, or a mapping that starts with model: mobilenet_v2",
        ),
    ]
    """What is compressed: `file.py:function` or `package.module:function` that returns a `paretorch.Task`, or a mapping
    with model, weights and data (no Python needed). Required."""
    objectives: Annotated[
        tuple[Annotated[str, _parsed(Objective.parse)], ...] | None,
        BeforeValidator(_as_list),
        WithJsonSchema({"anyOf": [*_TEXTS["anyOf"], {"type": "null"}]}),
    ] = None
    """What to pursue: metrics (accuracy or the task's own, size_bytes, latency_ms, macs), each optionally with `min` or
    `max` before it. Default: the task's metric and size_bytes."""
    budget: Annotated[
        tuple[Annotated[str, _parsed(Limit.parse)], ...], BeforeValidator(_as_list), WithJsonSchema(_TEXTS)
    ] = ()
    """Limits that a candidate must keep, such as `size_bytes <= 25%` (of the original), `latency_ms <= 4`,
    `accuracy >= -1%` (points below the original), `size_bytes <= 80kB`. Default: none."""
    space: SpaceConfig | None = None
    """What may be done to the network. Default: all but `cluster_bits` and `rank`, derived from the network."""
    search: Search = Search()
    """How the space is searched."""
    measure: Measure = Measure()
    """How candidates are measured."""
    mlflow: MLflow = MLflow()
    """Where runs are logged."""
    output: str | None = None
    """Directory of the study, relative to the configuration file. Default: studies/<name> in the current directory."""

    _source: Path | None = PrivateAttr(None)

    @field_validator("search", "measure", "mlflow", "budget", mode="before")
    @classmethod
    def _empty_section(cls, value: object, info: ValidationInfo) -> object:
        """A section whose keys are all commented out is an empty value in YAML."""
        if value is None:
            return [] if info.field_name == "budget" else {}
        return value

    @field_validator("objectives")
    @classmethod
    def _distinct_metrics(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None:
            _distinct(tuple(Objective.parse(text).metric for text in value))
        return value

    @field_validator("budget")
    @classmethod
    def _fits_together(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            Budget.parse(value)
        except ConfigError as error:
            raise _fail("; ".join(error.problems)) from error
        return value

    @property
    def source(self) -> Path | None:
        """The file that the configuration was read from."""
        return self._source

    @property
    def folder(self) -> Path:
        """What relative paths are relative to: the folder of the file, or the current directory without one."""
        return self._source.parent if self._source else Path.cwd()

    def path(self, text: str) -> Path:
        """A path of the configuration, absolute.

        >>> Config(task="task.py:task").path("/data/images")
        PosixPath('/data/images')
        """
        return (self.folder / Path(text).expanduser()).resolve()

    @property
    def directory(self) -> Path:
        """The directory of the study: `output`, or `studies/<name>` in the current directory."""
        return self.path(self.output) if self.output else Path.cwd() / "studies" / self.name

    def to_space(self) -> Space | None:
        """The space as the search knows it, or None when it is derived from the network."""
        return None if self.space is None else to_space(self.space)


def to_space(space: SpaceConfig) -> Space:
    """The rules of a configuration as a `Space`.

    >>> to_space(SpaceConfig(weight_bits=(4, 8))).weight_bits
    (Rule(choices=(4, 8), layers=('*',), share=False),)
    """
    return Space(
        weight_bits=_rules(space.weight_bits),
        activation_bits=_rules(space.activation_bits),
        cluster_bits=_rules(space.cluster_bits),
        rank=_rules(space.rank),
        sparsity=_rules(space.sparsity),
        criterion=_rules(space.criterion, share=True),
        rounding=_rules(space.rounding, share=True),
        ranges=_rules(space.ranges, share=True),
        activations=_rules(space.activations, share=True),
        group_size=_rules(space.group_size, share=True),
        scheme=_rules(space.scheme, share=True),
        channels=_rules(space.channels),
        width=space.width,
        depth=space.depth,
        equalize=space.equalize,
        students=tuple(_student(choice) for choice in space.students or ()),
        recovery=tuple(_recover(choice) for choice in space.recovery),
    )


def _rules(entries: tuple[Any, ...] | None, share: bool = False) -> tuple[Rule, ...]:
    if not entries:
        return ()
    if isinstance(entries[0], LayerRule):
        return tuple(Rule(entry.choices, entry.layers, entry.share) for entry in entries)
    return (Rule(entries, share=share),)


def _student(choice: str | StudentConfig) -> Student | None:
    if isinstance(choice, StudentConfig):
        return Student((), choice.name, choice.epochs, choice.learning_rate)
    return None if choice == "teacher" else Student(factory=choice)


def _recover(choice: str | Recovery) -> Recover | None:
    if isinstance(choice, Recovery):
        return Recover("finetune", **choice.finetune.model_dump())
    if choice == "finetune":
        return Recover("finetune", **Finetune().model_dump())
    return None if choice == "none" else Recover(choice)
