"""A recipe: what is done to a trained network, exactly. Plain frozen data without a tensor.

`Recipe()` is the untouched network. A recipe is never a space: it names final numbers (this layer has 4 bits, that
group keeps 24 channels), so it means the same in production, without Optuna and without the search that found it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from typing import Any, TypeVar

from ..errors import RecipeError

VERSION = 1


def later(default: Any) -> Any:
    """A field that older recipes do not have: at its default it is not written, so that their text and key stay."""
    return field(default=default, metadata={"later": True})


def plain(value: Any) -> Any:
    """A dataclass as plain data, as `asdict` gives it, without `later` fields that stand at their default."""
    if isinstance(value, tuple):
        return tuple(plain(entry) for entry in value)
    if not is_dataclass(value):
        return value
    shown = (f for f in fields(value) if not f.metadata.get("later") or getattr(value, f.name) != f.default)
    return {f.name: plain(getattr(value, f.name)) for f in shown}


def pattern_of(text: str) -> tuple[int, int]:
    """N and M of a pattern `N:M`: N of every M neighbouring weights stay; raises `RecipeError` for any other text.

    >>> pattern_of("2:4")
    (2, 4)
    """
    keep, _, of = text.partition(":")
    if not (keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of) <= 32):
        raise RecipeError(
            f"pattern {text!r}: write N:M, such as 2:4 or 4:8, for N of every M (at most 32) weights that stay"
        )
    return int(keep), int(of)


def zeros_of(choice: float | str) -> float:
    """The share of zeros that a choice of sparsity means: itself, or that of a pattern.

    >>> zeros_of(0.3), zeros_of("2:8")
    (0.3, 0.75)
    """
    if isinstance(choice, str):
        keep, of = pattern_of(choice)
        return 1 - keep / of
    return choice


CRITERIA = ("magnitude", "taylor", "activation", "obs", "random")
STUDENT = re.compile(r"[\w.-]+", re.ASCII)  # what a student may be called; "teacher" is the network itself
_FUNCTION = re.compile(r"[^:]+:[A-Za-z_]\w*")


def known_criterion(name: str) -> bool:
    """Whether it is one of `CRITERIA`, or the name of a function of the user's, FILE.py:FUNCTION.

    >>> known_criterion("obs"), known_criterion("rules.py:score"), known_criterion("obss")
    (True, True, False)
    """
    return name in CRITERIA or bool(_FUNCTION.fullmatch(name))


ROUNDINGS = ("nearest", "gptq", "adaround")
RANGES = ("mse", "minmax", "percentile", "entropy")
ACTIVATIONS = ("static", "dynamic")
SCHEMES = ("symmetric", "affine")
GROUP_SIZES = (16, 32, 64, 128, 256)
EQUALIZATIONS = ("weights", "activations")
ACTIVATION_BITS = (4, 8, 16, 32)


@dataclass(frozen=True)
class Student:
    """A network in place of the teacher: without whole residual blocks, or another architecture.

    drop: the blocks that are left out, by module name; the others keep their weights. factory: the name of a network that the
    task makes (`Task.students`); all other steps of the recipe, blocks to drop included, then refer to its layers. epochs: how
    long it is trained before all other steps, taught by the original network as `Recover` does, 0 for one that comes trained;
    learning_rate: the highest of this training.
    """

    drop: tuple[str, ...] = ()
    factory: str = later("")
    epochs: float = later(0.0)
    learning_rate: float = later(0.05)

    @property
    def training(self) -> Recover | None:
        """The training before all other steps."""
        return Recover("finetune", self.epochs, self.learning_rate) if self.epochs else None


@dataclass(frozen=True)
class Prune:
    """Keep `keep` channels of a dependency group (named by its first layer); the others are really removed."""

    group: str
    keep: int


@dataclass(frozen=True)
class LowRank:
    """Replace a linear layer or a convolution by two of inner width `rank`; later steps for its name apply to both."""

    layer: str
    rank: int


@dataclass(frozen=True)
class Equalize:
    """Divide channels where they are made and multiply them where they are read, so that their ranges become alike (Nagel et al. 2019).

    Wherever only functions with f(s x) = s f(x) lie between (ReLU, pooling); the network computes what it did. by: weights, the
    paper's way: the largest weights on both sides; activations: the largest values on the calibration images and the
    largest weights that read them.
    """

    by: str = "weights"


@dataclass(frozen=True)
class Sparsify:
    """Set the share `ratio` of a layer's weights to zero, those that the `criterion` finds least important.

    magnitude: the smallest. taylor: those with the least effect on the outputs by their gradients (Molchanov et al. 2019).
    activation: the least products with the norm of their input (Wanda, Sun et al. 2024). obs: those that cost least after
    the others were adjusted, which they then are (SparseGPT, Frantar & Alistarh 2023). random: a draw. FILE.py:FUNCTION: what
    a function of the user's says, which the task holds under this name (`Task.criteria`).
    pattern: "" (anywhere), or N:M such as 2:4: N of every M neighbouring input channels stay; then ratio is 1 - N/M.
    """

    layer: str
    ratio: float
    criterion: str = later("magnitude")
    pattern: str = later("")


@dataclass(frozen=True)
class Cluster:
    """Store a layer's weights as indices of `bits` (2..8) into a codebook of float32 values that k-means finds."""

    layer: str
    bits: int


@dataclass(frozen=True)
class Quantize:
    """Store a layer's weights in `weight_bits` (1..8 integers, 16 float16) and feed it `activation_bits` (4, 8, 16 or 32).

    activation_bits: 8 is what CPUs have kernels for; 4 and 16 are for accelerators, and ONNX Runtime rounds to them and computes in floats.

    rounding: nearest, gptq (Frantar et al. 2023) or adaround (Nagel et al. 2020), which round for the layer's outputs.
    ranges: how the scale of each output channel is found: mse, minmax, percentile, entropy. 2 bits are ternary, -1, 0, 1; one bit
    is a sign, -1 or 1, whose scale is the mean magnitude (XNOR-Net, Rastegari et al. 2016), the one of least squares.
    activations: where 8-bit activations have their range from: static, the calibration images; dynamic, at run time, the
    inputs of the call themselves (linear layers only).
    group_size: 0, or a scale for every so many inputs of an output channel (linear layers of float activations only).
    scheme: symmetric, a scale for each output channel and zero as code 0; affine, one scale and one zero point for the whole
    weight, BatchNorm folded into it before (Jacob et al. 2018), 2 to 8 bits.
    """

    layer: str
    weight_bits: int
    activation_bits: int = 32
    rounding: str = later("nearest")
    ranges: str = later("mse")
    activations: str = later("static")
    group_size: int = later(0)
    scheme: str = later("symmetric")


@dataclass(frozen=True)
class Recover:
    """Win accuracy back, by re-estimating statistics (`batchnorm`, `statistics`) or by training (`finetune`).

    `batchnorm` re-estimates BatchNorm; `statistics` does so too, and gives the outputs of layers that no BatchNorm follows
    their mean and variance back, in biases and scales. `finetune` trains for `epochs`, taught by the original network; a recipe may hold several of it, each of
    which goes on from the one before, and BatchNorm is re-estimated after the last.

    distill: the weight of the teacher's soft targets against the labels, at `temperature`. temperature_schedule: constant,
    warmup (from 1 up to it) or anneal (from it down to 1). features: the weight of the distance between the features of both.
    train: all parameters; last, those of the last third of the modules that own any, in the order of execution; scales, those
    of one dimension: scales of quantization, biases, normalisation. patience: training ends after so many epochs in a row without a
    better loss on training samples that are held out, and the best weights stay; 0 trains to the end, on all samples.
    gradual: the zeros of `Sparsify` grow during the first half of training, from none to all of them, by the cubic schedule of
    Zhu & Gupta 2017; the smallest weights of that moment are zero. Those of codebooks are there from the start.
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


@dataclass(frozen=True)
class Ensemble:
    """Average the outputs of 2 to 4 compressed networks, each the JSON of its recipe; it stands alone in a recipe.

    >>> Recipe((Ensemble((Recipe((Quantize("fc", 4),)).to_json(), Recipe((Quantize("fc", 8),)).to_json())),)).describe()
    '2 networks: weights 4 bit; weights 8 bit'
    """

    members: tuple[str, ...]

    @property
    def recipes(self) -> list[Recipe]:
        """The recipes of the networks, in the order of their texts."""
        return [Recipe.from_json(text) for text in self.members]


Step = Student | Prune | LowRank | Equalize | Sparsify | Cluster | Quantize | Recover | Ensemble
# The order of surgery: a step may rely on all that stand before it. (Beside an ensemble no other stands.)
PASS_ORDER: tuple[type, ...] = (Student, Prune, LowRank, Equalize, Sparsify, Cluster, Quantize, Recover, Ensemble)
_NAMES = {kind.__name__.lower(): kind for kind in PASS_ORDER}
_Kind = TypeVar("_Kind")
_METHODS = ("batchnorm", "statistics", "finetune")
_TRAINED = ("all", "last", "scales")
_SCHEDULES = ("constant", "warmup", "anneal")
# By the declared type of a field: what is accepted, what it is turned into, and how to say so.
_TYPES: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
    "str": (str, str, "a name"),
    "int": (Integral, int, "a whole number"),
    "float": (Real, float, "a finite number"),
    "bool": (bool, bool, "true or false"),
    "tuple[str, ...]": (tuple, lambda names: tuple(sorted(set(map(str, names)))), "a tuple of names"),
}


def _canonical(step: Step) -> Step:
    """The step with plain numbers and sorted names: 1, 1.0 and NumPy's 1 are equal but would give three texts."""
    if not isinstance(step, PASS_ORDER):
        raise RecipeError(f"{step!r} is not a step; steps: {', '.join(_NAMES)}")
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
    if isinstance(step, Ensemble):  # a text by hand may have spaces and steps in any order
        values["members"] = tuple(sorted({Recipe.from_json(text).to_json() for text in values["members"]}))
    return replace(step, **values)


def _target(step: Step) -> str:
    """What at most one step of each kind is for: a group, a layer, or the whole network."""
    match step:
        case Prune(name) | LowRank(name) | Sparsify(name) | Cluster(name) | Quantize(name):
            return name
        case _:
            return ""


def _check(step: Step) -> None:
    match step:
        case Student(drop, factory) if not drop and not factory:
            raise RecipeError("student: it leaves out no block and names no factory; leave the step out instead")
        case Student(_, factory, epochs, rate) if epochs < 0 or rate <= 0 or (epochs and not factory):
            raise RecipeError(
                f"student {factory or '(the network itself)'}: epochs {epochs}, learning_rate {rate}; epochs >= 0, and only of a factory's "
                "network, learning_rate > 0"
            )
        case Ensemble(members) if not 2 <= len(members) <= 4:
            raise RecipeError(
                f"ensemble: {len(members)} different network{'s' * (len(members) != 1)}; it averages 2 to 4"
            )
        case Ensemble() if any(network.of(Ensemble) for network in step.recipes):
            raise RecipeError(
                "ensemble: one of its networks is an ensemble itself; name the networks of that one instead"
            )
        case Prune(group, keep) if keep < 1:
            raise RecipeError(f"prune {group}: keep = {keep}; at least 1 channel must stay")
        case LowRank(layer, rank) if rank < 1:
            raise RecipeError(f"lowrank {layer}: rank = {rank}; at least 1 must stay")
        case Equalize(by) if by not in EQUALIZATIONS:
            raise RecipeError(f"equalize: by = {by!r}; choose from {', '.join(EQUALIZATIONS)}")
        case Cluster(layer, bits) if not 2 <= bits <= 8:
            raise RecipeError(f"cluster {layer}: bits = {bits}; choose from 2..8")
        case Sparsify(layer, ratio) if not 0 < ratio < 1:
            raise RecipeError(f"sparsify {layer}: ratio = {ratio}; it must lie between 0 and 1, both excluded")
        case Sparsify(layer, _, criterion) if not known_criterion(criterion):
            raise RecipeError(
                f"sparsify {layer}: criterion = {criterion!r}; choose from {', '.join(CRITERIA)}, or name a function of yours, "
                "FILE.py:FUNCTION"
            )
        case Sparsify(layer, ratio, _, pattern) if pattern and ratio != zeros_of(pattern):
            raise RecipeError(
                f"sparsify {layer}: ratio = {ratio} with pattern {pattern}; it must be {zeros_of(pattern):g}, or leave one out"
            )
        case Quantize(layer, bits, _) if bits not in (*range(1, 9), 16):
            raise RecipeError(
                f"quantize {layer}: weight_bits = {bits}; choose from 1..8, 16, or leave the step out for 32"
            )
        case Quantize(layer, bits, activations) if activations not in ACTIVATION_BITS or (
            activations < 32 and bits > 8
        ):
            raise RecipeError(
                f"quantize {layer}: activation_bits = {activations} with weight_bits = {bits}; "
                "choose 32, or 4, 8, 16 together with weights of at most 8 bits"
            )
        case Quantize(layer, _, _, rounding, ranges) if rounding not in ROUNDINGS or ranges not in RANGES:
            raise RecipeError(
                f"quantize {layer}: rounding = {rounding!r}, ranges = {ranges!r}; choose the rounding from {', '.join(ROUNDINGS)} "
                f"and the ranges from {', '.join(RANGES)}"
            )
        case Quantize(layer, bits, _, rounding, ranges) if bits > 8 and (rounding, ranges) != ("nearest", "mse"):
            raise RecipeError(
                f"quantize {layer}: rounding {rounding}, ranges {ranges} with weight_bits = {bits}; float16 has neither, leave them out"
            )
        case Quantize(layer, 1, _, _, ranges) if ranges != "mse":
            raise RecipeError(
                f"quantize {layer}: ranges {ranges} with weight_bits = 1; the scale of signs is their mean magnitude, leave ranges out"
            )
        case Quantize(layer, activation_bits=activation_bits, activations=how) if how not in ACTIVATIONS or (
            how == "dynamic" and activation_bits != 8
        ):
            raise RecipeError(
                f"quantize {layer}: activations = {how!r} with activation_bits = {activation_bits}; choose from "
                f"{', '.join(ACTIVATIONS)}, dynamic with 8 only"
            )
        case Quantize(layer, bits, activation_bits, group_size=size) if size and (
            size not in GROUP_SIZES or bits > 8 or activation_bits != 32
        ):
            raise RecipeError(
                f"quantize {layer}: group_size = {size} with weight_bits = {bits}, activation_bits = {activation_bits}; choose from 0, "
                f"{', '.join(map(str, GROUP_SIZES))}, with at most 8 bits and float activations (32)"
            )
        case Quantize(layer, bits, scheme=scheme) if scheme not in SCHEMES or (
            scheme == "affine" and not 2 <= bits <= 8
        ):
            raise RecipeError(
                f"quantize {layer}: scheme = {scheme!r} with weight_bits = {bits}; choose from {', '.join(SCHEMES)}, affine with 2 to 8 "
                "bits only: a sign and a float16 have no zero point"
            )
        case Quantize(layer, ranges=ranges, group_size=size, scheme="affine") if size or ranges == "entropy":
            raise RecipeError(
                f"quantize {layer}: scheme = 'affine' with group_size = {size}, ranges = {ranges!r}; it has one scale for the whole weight, "
                "and no ranges by entropy: choose group_size = 0 and mse, minmax or percentile, or scheme = 'symmetric'"
            )
        case Recover(method, epochs) if method not in _METHODS or epochs < 0 or (method == "finetune") != (epochs > 0):
            raise RecipeError(
                f"recover: method {method!r}, epochs {epochs}; choose batchnorm or statistics without epochs, "
                "or finetune with epochs > 0"
            )
        case Recover(_, _, rate, distill, temperature) if rate <= 0 or temperature <= 0 or not 0 <= distill <= 1:
            raise RecipeError(
                f"recover: learning_rate {rate}, distill {distill}, temperature {temperature}; "
                "learning_rate > 0, distill in 0..1, temperature > 0"
            )
        case Recover(train=train, temperature_schedule=schedule) if train not in _TRAINED or schedule not in _SCHEDULES:
            raise RecipeError(
                f"recover: train {train!r}, temperature_schedule {schedule!r}; choose train from {', '.join(_TRAINED)} "
                f"and temperature_schedule from {', '.join(_SCHEDULES)}"
            )
        case Recover(features=features, patience=patience) if features < 0 or patience < 0:
            raise RecipeError(f"recover: features {features}, patience {patience}; both must be 0 or more")
        case Recover(method, train=train, temperature_schedule=schedule, features=features, patience=patience) if (
            method != "finetune"
            and (train, schedule, features, patience, step.gradual) != ("all", "constant", 0, 0, False)
        ):
            raise RecipeError(
                f"recover: {method} does not train; leave out train, temperature_schedule, features, patience and gradual"
            )
        case _:
            pass


def _check_gradual(steps: list[Step], trained: list[Recover]) -> None:
    if not any(step.gradual for step in trained):
        return
    if any(step.gradual for step in trained[1:]):
        raise RecipeError(
            "recover: gradual in a training step after the first, by when the zeros are there; leave it out"
        )
    clustered = {step.layer for step in steps if isinstance(step, Cluster)}
    sparse = {step.layer: step for step in steps if isinstance(step, Sparsify) and step.layer not in clustered}
    rounding = {step.layer: step.rounding for step in steps if isinstance(step, Quantize)}
    for layer, step in sparse.items():
        if (found := (step.criterion, rounding.get(layer, "nearest"))) != ("magnitude", "nearest"):
            raise RecipeError(
                f"recover: gradual with criterion {found[0]}, rounding {found[1]} for layer {layer}; zeros that grow are the smallest "
                "weights of their moment, so choose magnitude and nearest, or leave gradual out"
            )


@dataclass(frozen=True)
class Recipe:
    """All steps that turn the trained network into a candidate, kept in the order of surgery.

    Equal recipes have one form: blocks are sorted, numbers are plain, a step that would change nothing is refused.
    Raises `RecipeError` for a step with an impossible number, two steps of one kind for the same target, or a layer
    that is both clustered and quantized.

        >>> Recipe((Quantize("fc", 8), Student(("layer3.2",)))).describe()
        'without layer3.2, weights 8 bit'
    """

    steps: tuple[Step, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        if type(self.version) is not int or not 1 <= self.version <= VERSION:
            raise RecipeError(f"recipe version {self.version!r} is not one that this paretorch reads (1..{VERSION})")
        steps = [_canonical(step) for step in self.steps]
        for step in steps:
            _check(step)
        if len(steps) > 1 and any(isinstance(step, Ensemble) for step in steps):
            raise RecipeError(
                "ensemble: it stands alone in a recipe; write other steps into the recipes of its networks"
            )
        trained = [step for step in steps if isinstance(step, Recover) and step.method == "finetune"]
        targets = Counter((type(step).__name__.lower(), _target(step)) for step in steps if step not in trained)
        twice = [f"{kind} {target}".rstrip() for (kind, target), count in targets.items() if count > 1]
        if twice:
            raise RecipeError(f"two steps for the same target: {', '.join(twice)}")
        both = sorted({step.layer for step in steps if isinstance(step, Cluster)}
                      & {step.layer for step in steps if isinstance(step, Quantize)})  # fmt: skip
        if both:
            raise RecipeError(f"cluster and quantize for the same layer: {', '.join(both)}; its weights are stored "
                              "as indices into a codebook or as integers with scales, leave out one of the steps")  # fmt: skip
        signs = {step.layer for step in steps if isinstance(step, Quantize) and step.weight_bits == 1}
        if both := sorted(signs & {step.layer for step in steps if isinstance(step, Sparsify)}):
            raise RecipeError(f"sparsify and quantize to 1 bit for the same layer: {', '.join(both)}; a sign is never zero, choose "
                              "weight_bits = 2, which are -1, 0 and 1, or leave out one of the steps")  # fmt: skip
        if trained and targets["recover", ""]:
            raise RecipeError(
                "recover: batchnorm or statistics beside finetune; BatchNorm is re-estimated after training anyway"
            )
        _check_gradual(steps, trained)
        if any(isinstance(step, Equalize) for step in steps) and any(step.features for step in trained):
            raise RecipeError(
                "recover: features beside equalize, which gives channels another scale than they have in the teacher; leave one out"
            )
        steps.sort(key=lambda step: (PASS_ORDER.index(type(step)), _target(step)))
        object.__setattr__(self, "steps", tuple(steps))

    def of(self, kind: type[_Kind]) -> list[_Kind]:
        """The steps of one kind, in order."""
        return [step for step in self.steps if isinstance(step, kind)]

    @property
    def student(self) -> Student | None:
        """The task's other network that it begins with, with all its blocks; None for the network itself."""
        return next((replace(step, drop=()) for step in self.of(Student) if step.factory), None)

    @property
    def factory(self) -> str:
        """The name of the student that it begins with, "" for the network itself."""
        return next((step.factory for step in self.of(Student)), "")

    @property
    def key(self) -> str:
        """16 hexadecimal digits that only an equal recipe shares."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "steps": [{"step": type(step).__name__.lower(), **plain(step)} for step in self.steps],
        }

    def to_json(self) -> str:
        """Canonical JSON: equal recipes give equal texts."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` gave; raises `RecipeError` for anything else."""
        try:
            if unknown := set(data) - {"steps", "version"}:
                raise RecipeError(
                    f"a recipe has no field {', '.join(sorted(map(str, unknown)))}; fields: steps, version"
                )
            steps = []
            for entry in data["steps"]:
                values = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k != "step"}
                if entry["step"] not in _NAMES:
                    raise RecipeError(f"unknown step {entry['step']!r}; steps: {', '.join(_NAMES)}")
                kind = _NAMES[entry["step"]]
                if unknown := set(values) - {entry.name for entry in fields(kind)}:
                    raise RecipeError(f"step {entry['step']!r} has no field {', '.join(sorted(map(str, unknown)))}")
                steps.append(kind(**values))
            return cls(tuple(steps), data["version"])
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"not a recipe: {error!r}") from error

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` gave; raises `RecipeError` for anything else."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"not a recipe: {text[:80]!r} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise RecipeError(f"not a recipe: {text[:80]!r} holds no steps and version")
        return cls.from_dict(data)

    def networks(self) -> list[Recipe]:
        """The recipes of the networks whose outputs are averaged; only this one where it is no ensemble."""
        return [network for step in self.of(Ensemble) for network in step.recipes] or [self]

    def describe(self) -> str:
        """One line for people."""
        if self.of(Ensemble):
            networks = [network.describe() for network in self.networks()]
            return f"{len(networks)} networks: {'; '.join(_short(text) for text in networks)}"
        parts = [
            f"student {step.factory}" + (f" ({step.epochs:g} epochs)" if step.epochs else "")
            for step in self.of(Student)
            if step.factory
        ]
        drop = [name for step in self.of(Student) for name in step.drop]
        if drop:
            parts.append(f"without {' '.join(drop)}")
        if prunes := self.of(Prune):
            parts.append(f"{len(prunes)} group{'s' * (len(prunes) > 1)} narrowed")
        if factored := self.of(LowRank):
            parts.append(f"{len(factored)} layer{'s' * (len(factored) > 1)} of low rank")
        parts += [f"ranges equalised (by {step.by})" for step in self.of(Equalize)]
        if sparse := self.of(Sparsify):
            ways = _other((step.pattern for step in sparse), "") + _other(
                (step.criterion for step in sparse), "magnitude"
            )
            share = _span([round(100 * step.ratio) for step in sparse])
            parts.append(f"{len(sparse)} layer{'s' * (len(sparse) > 1)} {share}% sparse" + _in_brackets(ways))
        if clustered := [step.bits for step in self.of(Cluster)]:
            parts.append(f"{len(clustered)} layer{'s' * (len(clustered) > 1)} in {_span(clustered)}-bit codebooks")
        quantized = self.of(Quantize)
        if quantized:
            ways = _other((step.rounding for step in quantized), "nearest") + _other(
                (s.ranges for s in quantized), "mse"
            )
            ways += _other((step.scheme for step in quantized), "symmetric")
            ways += [f"groups of {size}" for size in sorted({step.group_size for step in quantized} - {0})]
            parts.append(f"weights {_span([step.weight_bits for step in quantized])} bit" + _in_brackets(ways))
            rounded = [step.activation_bits for step in quantized if step.activation_bits < 32]
            if rounded:
                some = f" in {len(rounded)} of {len(quantized)}" if len(rounded) < len(quantized) else ""
                parts.append(f"activations {_span(rounded)} bit{some}")
                dynamic = sum(step.activations == "dynamic" for step in quantized)
                parts[-1] += "" if not dynamic else " (dynamic)" if dynamic == len(rounded) else f" ({dynamic} dynamic)"
        recovery = self.of(Recover)
        if any(step.epochs for step in recovery):
            parts.append(f"{' + '.join(f'{step.epochs:g}' for step in recovery)} epochs of recovery{how(recovery)}")
        elif recovery:
            named = {"batchnorm": "BatchNorm re-estimated", "statistics": "BatchNorm re-estimated, biases corrected"}
            parts.append(named[recovery[0].method])
        return ", ".join(parts) or "untouched"

    def diff(self, other: Recipe) -> str:
        """What `other` has that this has not (`+`), and the reverse (`-`), one step a line."""
        mine, theirs = set(self.steps), set(other.steps)
        lines = [f"- {s}" for s in self.steps if s not in theirs] + [f"+ {s}" for s in other.steps if s not in mine]
        return "\n".join(lines)


def how(training: list[Recover]) -> str:
    """What is unusual about the training, for people: ` (last layers, features)`."""
    found = []
    for what, text in (("last", "last layers"), ("scales", "scales and biases")):
        found += [text] if any(step.train == what for step in training) else []
    found += ["features"] if any(step.features for step in training) else []
    found += sorted({step.temperature_schedule for step in training} - {"constant"})
    found += ["patience"] if any(step.patience for step in training) else []
    found += ["zeros grow"] if any(step.gradual for step in training) else []
    return f" ({', '.join(found)})" if found else ""


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _other(values: Iterable[str], default: str) -> list[str]:
    return sorted(set(values) - {default})


def _in_brackets(ways: list[str]) -> str:
    return f" ({', '.join(ways)})" if ways else ""


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"
