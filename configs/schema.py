"""What a configuration file may say: every key with its meaning, unit and default.

The docstrings of the fields are the descriptions in the JSON schema (`paretorch schema`), so an editor shows them while
one types. Nothing here imports torch: `paretorch --help` and `paretorch schema` stay fast. The section `space` is made
from the techniques, in `space_schema`.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from ..errors import ConfigError
from ..objectives.objective import Budget, Limit, Objective
from ..runners.settings import MeasurementSettings
from ..runners.targets.catalog import DEFAULT, TARGETS
from ..spaces.space import Space
from .fields import (
    NO_BOOL,
    TEXTS,
    Count,
    Kept,
    Natural,
    Number,
    Positive,
    Removed,
    Seconds,
    Strict,
    as_list,
    checked_name,
    distinct,
    fail,
    form,
    parsed,
)
from .space_schema import SpaceConfig, to_space

_FUNCTION = re.compile(r"[^:]+:[A-Za-z_]\w*")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _checked_function(text: str) -> str:
    if not _FUNCTION.fullmatch(text):
        raise fail(f"task {text!r}: write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, such as my_task.py:task")
    return text


def _checked_target(text: str) -> str:
    if text not in TARGETS and not text.endswith((".yaml", ".yml")):
        close = difflib.get_close_matches(text, TARGETS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise fail(f"target {text!r}: choose from {', '.join(TARGETS)}, or name the .yaml file of a profile{hint}")
    return text


class Data(Strict):
    """Images: an image folder on disk (`folder`), or one of torchvision's datasets (`dataset`)."""

    folder: str | None = None
    """Image folder, relative to the configuration file: `{train,val,test}/<class>/*.jpg`, or `<class>/*.jpg` directly
    and then divided with `split`. `val` may be missing (divided off `train`) and so may `test`."""
    dataset: Annotated[
        Literal[
            "CIFAR10",
            "CIFAR100",
            "FashionMNIST",
            "Food101",
            "GTSRB",
            "Imagenette",
            "KMNIST",
            "MNIST",
            "OxfordIIITPet",
            "STL10",
            "SVHN",
        ]
        | None,
        Field(validate_default=True),
    ] = None
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
            given = "neither is given" if value is None else "both are given"
            raise fail(f"exactly one of `folder: images/` and `dataset: CIFAR10` says where the images are; {given}")
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
    """Number of candidates in total, also after a resume. Default: 40, or as many as fit into `time` where that is
    given.
    """
    time: Seconds = None
    """How long the search may take in all, such as 90s, 30m or 1h30m, with the finalists' evaluation. Default: no
    end.
    """
    rungs: bool | None = None
    """Whether candidates begin untrained and only the best are trained, from one choice of `recovery` to the next.
    Only the sampler ehvi knows how. Default: true where training takes far longer than the rest of a trial."""
    ensembles: bool = False
    """Whether, after the trials, ensembles of two or three candidates are tried: one file that averages their outputs.
    Those that are foretold to be on the front are measured, at most 8, beside the `trials`. Default: false."""
    seed: Annotated[int, Field(ge=0, lt=2**32), NO_BOOL] = 0
    """Seed of every random choice. Default: 0."""


class Measure(Strict):
    """How candidates are measured."""

    threads: Count = MeasurementSettings.threads
    """CPU threads of the runtime while latency is measured. Default: 1."""
    batch: Count = MeasurementSettings.batch
    """Inputs per call while latency is measured. Default: 1."""
    seconds: Positive = MeasurementSettings.seconds
    """Time spent on one latency measurement, in seconds; a fifth where latency is neither an objective nor limited, and
    up to four times as much for the finalists. Default: 0.5."""
    calibration_images: Annotated[int, Field(ge=16), NO_BOOL] = MeasurementSettings.calibration_images
    """Training inputs that set activation ranges and BatchNorm statistics. Default: 512."""
    target: Annotated[str, AfterValidator(_checked_target)] = DEFAULT
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
        str, AfterValidator(checked_name), Field(json_schema_extra=lambda schema: schema.pop("default"))
    ] = "study"
    """Name of the study: letters, digits, `-_.`. Default: the name of the configuration file without `.yaml`."""
    task: Annotated[
        Annotated[str, AfterValidator(_checked_function), Tag("<text>")] | Annotated[BuiltinTask, Tag("<mapping>")],
        Discriminator(
            form,
            custom_error_type="form",
            custom_error_message="must be FILE.py:FUNCTION, or a mapping that starts with model: mobilenet_v2",
        ),
    ]
    """What is compressed: `file.py:function` or `package.module:function` that returns a `paretorch.Task`, or a mapping
    with model, weights and data (no Python needed). Required."""
    objectives: Annotated[
        tuple[Annotated[str, parsed(Objective.parse)], ...] | None,
        BeforeValidator(as_list),
        WithJsonSchema({"anyOf": [*TEXTS["anyOf"], {"type": "null"}]}),
    ] = None
    """What to pursue: metrics (accuracy or the task's own, size_bytes, latency_ms, macs), each optionally with `min` or
    `max` before it. Default: the task's metric and size_bytes."""
    budget: Annotated[
        tuple[Annotated[str, parsed(Limit.parse)], ...], BeforeValidator(as_list), WithJsonSchema(TEXTS)
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
            distinct(tuple(Objective.parse(text).metric for text in value))
        return value

    @field_validator("budget")
    @classmethod
    def _fits_together(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            Budget.parse(value)
        except ConfigError as error:
            raise fail("; ".join(error.problems)) from error
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
