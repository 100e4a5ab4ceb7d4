"""Accuracy that is won back after all other steps, by re-estimating statistics or by training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import RecipeError
from ..plain import later
from ..rules import Axis
from ..steps import Step, Steps, in_brackets
from ..structure import Structure
from ..values import NOT_NEGATIVE, POSITIVE, Either, Entry, Flag, Number, OneOf, Settings
from .cluster import Cluster
from .quantize import Quantize
from .sparsify import Sparsify
from .technique import Choices, Encoding, Key, Technique

_METHODS = ("batchnorm", "statistics", "finetune")
_TRAINED = ("all", "last", "scales")
_SCHEDULES = ("constant", "warmup", "anneal")


@dataclass(frozen=True)
class Recover(Step):
    """Win accuracy back, by re-estimating statistics (`batchnorm`, `statistics`) or by training (`finetune`).

    `batchnorm` re-estimates BatchNorm; `statistics` does so too, and gives the outputs of layers that no BatchNorm
    follows their mean and variance back, in biases and scales. `finetune` trains for `epochs`, taught by the original
    network; a recipe may hold several of it, each of which goes on from the one before, and BatchNorm is re-estimated
    after the last.

    distill: the weight of the teacher's soft targets against the labels, at `temperature`. temperature_schedule:
    constant, warmup (from 1 up to it) or anneal (from it down to 1). features: the weight of the distance between the
    features of both networks. train: all parameters; last, those of the last third of the modules that own any, in the
    order of execution; scales, those of one dimension: scales of quantization, biases, normalisation. patience:
    training ends after so many epochs in a row without a better loss on training samples that are held out, and the
    best weights stay; 0 trains to the end, on all samples. gradual: the zeros of `Sparsify` grow during the first half
    of training, from none to all of them, by the cubic schedule of Zhu & Gupta 2017; the smallest weights of that
    moment are zero. Those of codebooks are there from the start.
    """

    method: str
    epochs: float = 0.0
    learning_rate: float = 0.01
    distill: float = 0.9
    temperature: float = 2.0
    train: str = later("all")
    temperature_schedule: str = later("constant")
    features: float = later(0.0)
    patience: int = later(0)
    gradual: bool = later(False)

    @property
    def target(self) -> str | None:
        """The network, or None for training, which a recipe may hold several steps of."""
        return None if self.method == "finetune" else ""


def _check(step: Recover) -> None:
    trains = step.method == "finetune"
    if step.method not in _METHODS or step.epochs < 0 or trains != (step.epochs > 0):
        raise RecipeError(
            f"recover: method {step.method!r}, epochs {step.epochs}; choose batchnorm or statistics without epochs, "
            "or finetune with epochs > 0"
        )
    if step.learning_rate <= 0 or step.temperature <= 0 or not 0 <= step.distill <= 1:
        raise RecipeError(
            f"recover: learning_rate {step.learning_rate}, distill {step.distill}, temperature {step.temperature}; "
            "learning_rate > 0, distill in 0..1, temperature > 0"
        )
    if step.train not in _TRAINED or step.temperature_schedule not in _SCHEDULES:
        raise RecipeError(
            f"recover: train {step.train!r}, temperature_schedule {step.temperature_schedule!r}; choose train from "
            f"{', '.join(_TRAINED)} and temperature_schedule from {', '.join(_SCHEDULES)}"
        )
    if step.features < 0 or step.patience < 0:
        raise RecipeError(f"recover: features {step.features}, patience {step.patience}; both must be 0 or more")
    # A method that does not train has none of the settings of training but those that it always had.
    usual = replace(step, train="all", temperature_schedule="constant", features=0.0, patience=0, gradual=False)
    if not trains and step != usual:
        raise RecipeError(
            f"recover: {step.method} does not train; leave out train, temperature_schedule, features, patience "
            "and gradual"
        )


def _problems(recipe: Steps) -> None:
    steps = recipe.of(Recover)
    trained = [step for step in steps if step.method == "finetune"]
    if trained and len(trained) < len(steps):
        raise RecipeError(
            "recover: batchnorm or statistics beside finetune; BatchNorm is re-estimated after training anyway"
        )
    if not any(step.gradual for step in trained):
        return
    if any(step.gradual for step in trained[1:]):
        raise RecipeError(
            "recover: gradual in a training step after the first, by when the zeros are there; leave it out"
        )
    rounding = {step.layer: step.rounding for step in recipe.of(Quantize)}
    clustered = {step.layer for step in recipe.of(Cluster)}
    for step in recipe.of(Sparsify):
        methods = step.criterion, rounding.get(step.layer, "nearest")
        if step.layer not in clustered and methods != ("magnitude", "nearest"):
            raise RecipeError(
                f"recover: gradual with criterion {methods[0]}, rounding {methods[1]} for layer {step.layer}; "
                "zeros that "
                "grow are the smallest weights of their moment, so choose magnitude and nearest, or leave gradual out"
            )


def how(training: Sequence[Recover]) -> str:
    """What is unusual about the training, for people: ` (last layers, features)`."""
    words = []
    for what, text in (("last", "last layers"), ("scales", "scales and biases")):
        words += [text] if any(step.train == what for step in training) else []
    words += ["features"] if any(step.features for step in training) else []
    words += sorted({step.temperature_schedule for step in training} - {"constant"})
    words += ["patience"] if any(step.patience for step in training) else []
    words += ["zeros grow"] if any(step.gradual for step in training) else []
    return in_brackets(words)


def _describe(steps: Sequence[Recover]) -> list[str]:
    if any(step.epochs for step in steps):
        return [f"{' + '.join(f'{step.epochs:g}' for step in steps)} epochs of recovery{how(steps)}"]
    words = {"batchnorm": "BatchNorm re-estimated", "statistics": "BatchNorm re-estimated, biases corrected"}
    return [words[steps[0].method]]


def recoveries(space: Any, choice: Recover | None, growing: bool = True) -> tuple[Recover, ...]:
    """The steps of a choice of a space's recovery, see `Space.recoveries`."""
    if choice is None:
        return ()
    if not space.ladder or not choice.epochs:
        return (choice if growing or not choice.gradual else replace(choice, gradual=False),)
    steps = [step for step in space.recovery[: space.recovery.index(choice) + 1] if step and step.epochs]
    return tuple(replace(step, gradual=step.gradual and growing and not n) for n, step in enumerate(steps))


def can_grow(steps: Iterable[Step]) -> bool:
    """Whether there are zeros that can grow: those of a codebook are there from the start."""
    steps = list(steps)
    clustered = {step.layer for step in steps if isinstance(step, Cluster)}
    return any(step.layer not in clustered for step in steps if isinstance(step, Sparsify))


def grown(recipe: Steps) -> set[str]:
    """The layers whose zeros grow during training, so that neither criterion nor rounding has an effect there."""
    if not any(step.gradual for step in recipe.of(Recover)):
        return set()
    return {step.layer for step in recipe.of(Sparsify)} - {step.layer for step in recipe.of(Cluster)}


def _steps(space: Any, choices: Choices, made: Sequence[Step]) -> list[Step]:
    if not made:  # there is nothing to recover from
        return []
    return list(recoveries(space, choices.network["recovery"], can_grow(made)))


def _space_problems(space: Any) -> list[str]:
    problems = [] if space.recovery else ["recovery: no choice; choose from Recover(...) and None"]
    for choice in space.recovery:
        try:
            if choice is not None:
                _check(choice)
        except RecipeError as error:
            problems.append(str(error))
    return problems


def _axes(key: Key, entries: Any, structure: Structure, idle: dict[str, str]) -> Iterable[Axis]:
    return [Axis("recovery", "recovery", (), entries, None)]


def _chosen(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    if not of.recipe.steps:
        return {axis.choices[0]}
    steps, growing = tuple(of.recipe.of(Recover)), can_grow(of.recipe.steps)
    return {next((choice for choice in axis.choices if recoveries(of.space, choice, growing) == steps), "another")}


def _read(choice: str | Mapping[str, Any]) -> Recover | None:
    if not isinstance(choice, str):
        return Recover("finetune", **choice["finetune"])
    if choice == "finetune":
        return Recover("finetune", **{entry.name: entry.default for entry in FINETUNE.entries})
    return None if choice == "none" else Recover(choice)


FINETUNE = Settings(
    "Finetune",
    "How a candidate is trained after compression, taught by the original network.",
    (
        Entry("epochs", POSITIVE, "Passes over the training data; may be a fraction. Default: 1.", 1.0),
        Entry("learning_rate", POSITIVE, "Highest learning rate. Default: 0.01.", 0.01),
        Entry(
            "distill",
            Number(least=0, most=1),
            "Weight of the original network's soft answers against the labels, 0 to 1. Default: 0.9.",
            0.9,
        ),
        Entry("temperature", POSITIVE, "How soft these answers are made; 1 leaves them as they are. Default: 2.", 2.0),
        Entry(
            "train",
            OneOf(_TRAINED),
            "What is trained: `all`; `last`, the last third of the modules that have parameters, which is faster; "
            "`scales`, the\nscales of quantization, biases and normalisation alone, which changes the least. "
            "Default: all.",
            "all",
        ),
        Entry(
            "temperature_schedule",
            OneOf(_SCHEDULES),
            "The temperature during training: `constant`; `warmup`, from 1 up to it; `anneal`, from it down to 1. "
            "Default:\nconstant.",
            "constant",
        ),
        Entry(
            "features",
            NOT_NEGATIVE,
            "Weight of the distance between the features of both networks, at the last layer of each shape that both "
            "have.\nDefault: 0, none.",
            0.0,
        ),
        Entry(
            "patience",
            Number(least=0, whole=True),
            "Training ends after so many epochs in a row without a better loss on held-out training samples (a tenth, "
            "1024\nat most), and the best weights stay. Default: 0, to the end and on all samples.",
            0,
        ),
        Entry(
            "gradual",
            Flag(),
            "Zeros (`sparsity`) grow during the first half of training, from none to all, the smallest weights of each "
            "moment (Zhu &\nGupta 2017); `criterion` and `rounding` then have no effect where zeros are. "
            "Default: false.",
            False,
        ),
    ),
)
RECOVERY = Key(
    "recovery",
    Either(
        OneOf(("none", *_METHODS)),
        Settings(
            "Recovery",
            "Recovery by training, with its settings.",
            (Entry("finetune", FINETUNE, "Train the compressed network for some epochs."),),
        ),
        lambda value: not isinstance(value, str),
        "must be none, batchnorm, statistics or {finetune: {epochs: 1}}",
    ),
    "How accuracy is won back: `none`, `batchnorm` (re-estimate its statistics, seconds), `statistics` (also those "
    "of\nlayers that no BatchNorm follows, in their biases and scales) or `{finetune: {epochs: 1}}` (train). "
    "Default: [none].",
    _chosen,
    default=("none",),
    own=True,
    read=_read,
    axes=_axes,
)
TECHNIQUE = Technique(
    Recover,
    check=_check,
    problems=_problems,
    describe=_describe,
    keys=(RECOVERY,),
    space_problems=_space_problems,
    final_steps=_steps,
)
