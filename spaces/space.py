"""The search space: for each layer, group and network, the choices that a recipe is put together from.

A space is a handful of rules. A *rule* selects layers by patterns (glob on the name, a kind, `first`, `last`) and gives
them choices; the last rule that selects a layer wins; `share` makes one choice for all layers of the rule. Against a
`Structure` the rules become a flat, static list of *axes*, each with ordered choices, which any sampler can handle as
integers. `Space.recipe` turns picks into the canonical `Recipe`: two picks that mean the same network give equal recipes.

Width is not a step of its own: it narrows every dependency group, so it is written into the recipe as `Prune` steps.

Where there are students to choose from, the choice of the network comes first, and every network has axes of its own, by
the same rules; the axes of the others have no effect then. So the list of axes stays flat and static.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from ..errors import ConfigError, RecipeError
from .recipe import (
    ACTIVATION_BITS,
    ACTIVATIONS,
    CRITERIA,
    EQUALIZATIONS,
    GROUP_SIZES,
    RANGES,
    ROUNDINGS,
    SCHEMES,
    Cluster,
    Equalize,
    LowRank,
    Prune,
    Quantize,
    Recipe,
    Recover,
    Sparsify,
    Step,
    Student,
    known_criterion,
    later,
    pattern_of,
    zeros_of,
)
from .structure import Layer, Structure, inside, kept_channels, kept_rank, no_pairs, shapes, sides

KINDS = ("conv", "depthwise", "grouped", "linear")
# By technique: whether a number is a possible choice, and which ones are.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "width": (lambda x: 0 < x <= 1, "shares above 0, up to 1"),
    "depth": (lambda x: isinstance(x, int) and x >= 0, "whole numbers of blocks, 0 or more"),
    "channels": (lambda x: 0 <= x < 1, "shares from 0, below 1"),
    "sparsity": (
        lambda x: _is_pattern(x) if isinstance(x, str) else 0 <= x < 1,
        "shares from 0, below 1, patterns such as '2:4'",
    ),
    "weight_bits": (lambda x: isinstance(x, int) and x in (*range(1, 9), 16, 32), "1..8, 16, 32"),
    "activation_bits": (lambda x: isinstance(x, int) and x in ACTIVATION_BITS, "4, 8, 16, 32"),
    "group_size": (lambda x: isinstance(x, int) and x in (0, *GROUP_SIZES), "0, 16, 32, 64, 128, 256"),
    "cluster_bits": (lambda x: isinstance(x, int) and x in (*range(2, 9), 32), "2..8, 32"),
    "rank": (lambda x: 0 < x <= 1, "shares above 0, up to 1"),
}
# By field of `Sparsify` and `Quantize`: what may be asked for, the default first.
METHODS = {
    "criterion": CRITERIA,
    "rounding": ROUNDINGS,
    "ranges": RANGES,
    "activations": ACTIVATIONS,
    "scheme": SCHEMES,
}
# Inputs of one group: its Hessian then takes 512 MiB in double precision, its inverse and a factor as much again.
LARGEST_HESSIAN = 8192
_BY_HESSIAN = ("activation", "obs", "gptq", "adaround")


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


@dataclass(frozen=True)
class Space:
    """Rules per technique; an empty field leaves that technique out.

    weight_bits: 1..8, 16, 32. activation_bits: 4, 8, 16 or 32 (below 32 with weights of at most 8 bits).
    cluster_bits: 2..8 (indices into a codebook, whatever weight_bits says), 32 (no codebook). rank: shares of the full
    rank that two factors keep, rounded as channels are; 1 leaves a layer whole, and so does a share that would save
    nothing. sparsity: shares of zeros, or patterns such as "2:4"; without effect where weights are signs. criterion, rounding, ranges: which weights become zero,
    how they are rounded, how their range is found (see `Sparsify` and `Quantize`). activations: static or dynamic ranges of
    8-bit activations. group_size: how many weights of a row share a scale, 0 for all of them. scheme: symmetric
    or affine, without effect on signs and groups. channels: shares of a dependency
    group's channels that are removed. width: shares of all
    channels that stay. depth: how many blocks are left out, least important first. recovery: `Recover` or None; with
    `ladder` each choice that trains goes on from those before it, instead of from the untrained candidate. students: the
    networks to begin with, `Student` with a factory, or None for the original one, which is the only one when empty. equalize:
    whether ranges of channels are equalised: none, weights, activations (see `Equalize`); without effect where nothing is
    sparse, clustered or quantized, and refused beside recovery that compares features.
    """

    weight_bits: tuple[Rule, ...] = ()
    activation_bits: tuple[Rule, ...] = ()
    cluster_bits: tuple[Rule, ...] = later(())
    rank: tuple[Rule, ...] = later(())
    sparsity: tuple[Rule, ...] = ()
    channels: tuple[Rule, ...] = ()
    width: tuple[float, ...] = (1.0,)
    depth: tuple[int, ...] = (0,)
    recovery: tuple[Recover | None, ...] = field(default=(None,))
    ladder: bool = False
    criterion: tuple[Rule, ...] = later(())
    rounding: tuple[Rule, ...] = later(())
    ranges: tuple[Rule, ...] = later(())
    activations: tuple[Rule, ...] = later(())
    group_size: tuple[Rule, ...] = later(())
    scheme: tuple[Rule, ...] = later(())
    students: tuple[Student | None, ...] = later(())
    equalize: tuple[str, ...] = later(("none",))

    def networks(self, structure: Structure) -> list[tuple[str, Structure]]:
        """The networks that recipes may begin with, by name ("" is the original one), and their structures.

        Raises `RecipeError` for a student that the task does not make.
        """
        names = [student.factory if student else "" for student in self.students or (None,)]
        return [(name, structure.named(name)) for name in names]

    def axes(self, structure: Structure) -> tuple[Axis, ...]:
        """All decisions for this network; raises `ConfigError` with every impossible choice and idle pattern."""
        problems = self._problems()
        axes = [Axis("student", "student", (), self.students, None)] if self.students else []
        idle: list[dict[str, str]] = []
        try:
            networks = self.networks(structure)
        except RecipeError as error:
            raise ConfigError([*problems, f"students: {error}"], "space") from error
        for name, network in networks:
            idle.append({})
            axes += [
                replace(axis, name=f"{name}:{axis.name}" if name else axis.name, student=name)
                for axis in self._axes(network, problems, idle[-1])
            ]
        # A pattern that fits one of the networks has its use.
        problems += [problem for pattern, problem in idle[0].items() if all(pattern in found for found in idle[1:])]
        axes.append(Axis("recovery", "recovery", (), self.recovery, None))
        if problems:
            raise ConfigError(problems, "space")
        return tuple(axes)

    def _axes(self, structure: Structure, problems: list[str], idle: dict[str, str]) -> list[Axis]:
        """The decisions about one network. idle: is given what to say of patterns that select nothing."""
        layers = [layer.name for layer in structure.layers]
        groups = [group.name for group in structure.groups]
        axes = [Axis("width", "width", tuple(groups), self.width)] if groups else []
        depth = tuple(d for d in self.depth if d <= len(structure.blocks)) or (0,)
        axes.append(Axis("depth", "depth", structure.blocks, depth))
        if set(self.equalize) - {"none"}:
            if structure.pairs:
                axes.append(Axis("equalize", "equalize", (), self.equalize))
            else:
                idle["equalize"] = f"equalize: {no_pairs(structure.unpaired)}"
        axes += _rule_axes("channels", self.channels, groups, structure, idle)
        axes += _rule_axes("sparsity", self.sparsity, layers, structure, idle)
        axes += _rule_axes("weight_bits", self.weight_bits, layers, structure, idle)
        axes += _rule_axes("activation_bits", self.activation_bits, layers, structure, idle)
        axes += _rule_axes("cluster_bits", self.cluster_bits, layers, structure, idle)
        axes += _rank_axes(_rule_axes("rank", self.rank, layers, structure, idle), structure)
        for kind in (*METHODS, "group_size"):
            axes += _rule_axes(kind, getattr(self, kind), layers, structure, idle)
        problems += _refusals(axes, structure)
        return axes

    def _problems(self) -> list[str]:
        """What is wrong with the choices themselves, whatever the network."""
        found = []
        for kind, (possible, allowed) in _ALLOWED.items():
            entries = getattr(self, kind)
            if kind in ("width", "depth"):
                listed = [(kind, entries)]
            else:
                listed = [(f"{kind}.{number}.choices", rule.choices) for number, rule in enumerate(entries)]
            for key, choices in listed:
                numbers = (int, float, str) if kind == "sparsity" else (int, float)
                wrong = [c for c in choices if not isinstance(c, numbers) or isinstance(c, bool) or not possible(c)]
                problems = [f"{value!r} is not possible" for value in wrong] if choices else ["no choice"]
                found += [f"{key}: {problem}; choose from {allowed}" for problem in problems]
        for kind, allowed_names in METHODS.items():
            for number, rule in enumerate(getattr(self, kind)):
                problems = [f"{value!r} is not possible" for value in rule.choices if not _known(kind, value)]
                problems = problems if rule.choices else ["no choice"]
                own = ", or a function of yours, FILE.py:FUNCTION" if kind == "criterion" else ""
                found += [
                    f"{kind}.{number}.choices: {problem}; choose from {', '.join(allowed_names)}{own}"
                    for problem in problems
                ]
        choices = ("none", *EQUALIZATIONS)
        problems = [f"{value!r} is not possible" for value in self.equalize if value not in choices]
        problems = problems if self.equalize else ["no choice"]
        found += [f"equalize: {problem}; choose from {', '.join(choices)}" for problem in problems]
        if set(self.equalize) - {"none"} and any(choice and choice.features for choice in self.recovery):
            found.append(
                "equalize: recovery compares features, and equalised channels have another scale than the original's; leave out one"
            )
        if any(student is not None and (not student.factory or student.drop) for student in self.students):
            found.append("students: a student is Student(factory=NAME); which blocks are left out is `depth`")
        names = [student.factory if student else "the network itself" for student in self.students]
        found += [f"students: {name} twice" for name in sorted({name for name in names if names.count(name) > 1})]
        if not self.recovery:
            found.append("recovery: no choice; choose from Recover(...) and None")
        for choice in self.recovery:
            try:
                Recipe(() if choice is None else (choice,))
            except RecipeError as error:
                found.append(str(error))
        return found

    def recipe(self, structure: Structure, picks: Mapping[str, int]) -> Recipe:
        """The canonical recipe of the picked choices (by axis name; an axis that is not picked takes its first)."""
        axes = self.axes(structure)
        student = self.students[picks.get("student", 0)] if self.students else None
        network = student.factory if student else ""
        structure = structure.named(network)
        value: dict[tuple[str, str], Any] = {}
        single: dict[str, Any] = {}
        for axis in axes:
            if axis.student not in (network, None):
                continue
            chosen = axis.choices[picks.get(axis.name, 0)]
            if axis.kind in ("student", "width", "depth", "equalize", "recovery"):
                single[axis.kind] = chosen
            else:
                value.update({(axis.kind, target): chosen for target in axis.targets})
        steps: list[Step] = []
        gradual = any(step.gradual for step in self.recoveries(single["recovery"]))
        growing = False  # whether gradual zeros have a layer to grow in
        drop = structure.blocks[: single["depth"]]
        if drop or student:
            steps.append(replace(student or Student(), drop=tuple(sorted(drop))))
        alive = [layer for layer in structure.layers if not inside(layer.name, drop)]
        made = {layer.output for layer in alive}
        for group in structure.groups:
            share = single["width"] * (1 - value.get(("channels", group.name), 0.0))
            keep = kept_channels(group.channels, share, group.round_to)
            if group.name in made and keep < group.channels:
                steps.append(Prune(group.name, keep))
        narrowed = shapes(structure, Recipe(tuple(steps))) if self.rank else {}
        for layer in alive:
            if (share := value.get(("rank", layer.name), 1.0)) < 1:
                rank = kept_rank(*sides(layer, narrowed[layer.name]), share)
                steps += [LowRank(layer.name, rank)] if rank else []
            chosen = ((kind, value.get((kind, layer.name))) for kind in (*METHODS, "group_size"))
            methods = {kind: choice for kind, choice in chosen if choice is not None}
            clustered = value.get(("cluster_bits", layer.name), 32)
            bits = value.get(("weight_bits", layer.name), 32)
            zeros = value.get(("sparsity", layer.name), 0.0)
            if zeros and (bits > 1 or clustered < 32):  # a sign is never zero
                if gradual and clustered == 32:  # the smallest weights are zero, nothing else will do
                    growing = True
                    methods = {kind: c for kind, c in methods.items() if kind not in ("criterion", "rounding")}
                steps.append(sparsify(layer.name, zeros, methods))
            if clustered < 32:
                steps.append(Cluster(layer.name, clustered))
                continue
            if bits < 32:
                steps.append(quantize(layer.name, bits, value.get(("activation_bits", layer.name), 32), methods))
        recovery = self.recoveries(single["recovery"], growing)
        if (by := single.get("equalize", "none")) != "none" and _has_effect(steps, structure):
            steps.append(Equalize(by))
        return Recipe((*steps, *recovery)) if steps else Recipe()

    def as_ladder(self) -> Space:
        """The space with its choices of recovery as a ladder, untrained at its foot.

        As it is when nothing is trained, or when zeros grow in some of the choices only: one cannot go on from the other.
        """
        trained = tuple(choice for choice in self.recovery if choice and choice.epochs)
        if len({choice.gradual for choice in trained}) > 1:
            return self
        untrained = sorted((c for c in self.recovery if c not in trained), key=lambda choice: choice is None)
        rungs = (*untrained[:1], *trained)
        return replace(self, recovery=rungs, ladder=True) if trained and len(rungs) > 1 else self

    def recoveries(self, choice: Recover | None, growing: bool = True) -> tuple[Recover, ...]:
        """The steps of a choice of recovery: itself, and on a ladder all that train before it.

        growing: whether the recipe has zeros that can grow; else, and on a ladder after the first, no step is gradual.

        >>> Space(recovery=(Recover("finetune", 1), Recover("finetune", 2)), ladder=True).recoveries(Recover("finetune", 2))[0].epochs
        1
        """
        if choice is None:
            return ()
        if not self.ladder or not choice.epochs:
            return (choice if growing or not choice.gradual else replace(choice, gradual=False),)
        found = [step for step in self.recovery[: self.recovery.index(choice) + 1] if step and step.epochs]
        return tuple(replace(step, gradual=step.gradual and growing and not n) for n, step in enumerate(found))

    def encode(self, structure: Structure, recipe: Recipe) -> dict[str, int] | None:
        """Picks that give this recipe, or None when the space does not hold it.

        Axes of another network than the recipe's are at their first choice.
        """
        student, name = recipe.student, recipe.factory
        if student not in (self.students or (None,)):
            return None
        whole, structure = structure, structure.named(name)
        quantized = {step.layer: step for step in recipe.of(Quantize)}
        clustered = {step.layer: step.bits for step in recipe.of(Cluster)}
        ranks = {step.layer: step.rank for step in recipe.of(LowRank)}
        sparse = {step.layer: step for step in recipe.of(Sparsify)}
        signs = {name for name, step in quantized.items() if step.weight_bits == 1}
        dropped = sum(len(step.drop) for step in recipe.of(Student))
        steps = tuple(recipe.of(Recover))
        growing = any(name not in clustered for name in sparse)
        recovery = next((choice for choice in self.recovery if self.recoveries(choice, growing) == steps), "another")
        # With zeros that grow neither criterion nor rounding has an effect there.
        grown = set(sparse) - set(clustered) if any(step.gradual for step in steps) else set()
        axes = self.axes(whole)
        keep = {step.group: step.keep for step in recipe.of(Prune)}
        narrowed = shapes(structure, Recipe(tuple(recipe.of(Prune))))
        for width in self.width if structure.groups else (1.0,):
            picks: dict[str, int] = {}
            for axis in axes:
                drop = structure.blocks[:dropped]
                targets = [t for t in axis.targets if not inside(t, drop)]
                wanted: set[Any]
                if axis.student not in (name, None):
                    wanted = set()
                elif axis.kind == "student":
                    wanted = {student}
                elif axis.kind == "width":
                    wanted = {width}
                elif axis.kind == "depth":
                    wanted = {dropped}
                elif axis.kind == "recovery":
                    wanted = {recovery if recipe.steps else axis.choices[0]}
                elif axis.kind == "equalize":
                    chosen = next((step.by for step in recipe.of(Equalize)), "none")
                    wanted = {chosen} if _has_effect(recipe.steps, structure) else set()
                elif axis.kind == "channels":
                    wanted = _common(axis, (_ratios(axis, structure, t, width, keep) for t in targets))
                elif axis.kind == "sparsity":
                    found = [sparse.get(t) for t in targets if t not in signs]
                    wanted = {step.pattern or step.ratio if step else 0.0 for step in found}
                elif axis.kind == "criterion":  # without zeros any choice will do
                    wanted = {sparse[t].criterion for t in targets if t in sparse and t not in grown}
                elif axis.kind in (*METHODS, "group_size"):  # and where weights stay float
                    rounded = {t for t, step in quantized.items() if step.activation_bits < 32}
                    eight = {t for t in rounded if quantized[t].activation_bits == 8}
                    free = {
                        "rounding": grown,
                        "ranges": signs,
                        "activations": set(quantized) - eight,
                        "group_size": rounded,
                        "scheme": signs | {t for t, step in quantized.items() if step.group_size},
                    }[axis.kind]
                    integers = [quantized[t] for t in targets if t in quantized and quantized[t].weight_bits <= 8 and t not in free]  # fmt: skip
                    wanted = {getattr(step, axis.kind) for step in integers}
                elif axis.kind == "weight_bits":  # has no effect where weights are clustered
                    wanted = {quantized[t].weight_bits if t in quantized else 32 for t in targets if t not in clustered}
                elif axis.kind == "cluster_bits":
                    wanted = {clustered.get(t, 32) for t in targets}
                elif axis.kind == "rank":
                    wanted = _common(
                        axis, (_shares(axis, sides(structure.layer(t), narrowed[t]), ranks.get(t)) for t in targets)
                    )
                else:  # where weights stay float an activation width has no effect: any choice will do
                    wanted = {
                        quantized[t].activation_bits
                        for t in targets
                        if t in quantized and quantized[t].weight_bits <= 8
                    }
                wanted = wanted or {axis.choices[0]}
                if len(wanted) > 1 or not wanted <= set(axis.choices):
                    break
                picks[axis.name] = axis.choices.index(wanted.pop())
            else:
                if self.recipe(whole, picks) == recipe:
                    return picks
        return None


def _has_effect(steps: Sequence[Step], structure: Structure) -> bool:
    """Whether `Equalize` has an effect beside these steps."""
    dropped = tuple(name for step in steps if isinstance(step, Student) for name in step.drop)
    rounded = any(isinstance(step, Sparsify | Cluster | Quantize) for step in steps)
    return rounded and structure.equalizable(dropped)


def _common(axis: Axis, possible: Iterable[set[Any]]) -> set[Any]:
    """The least of the choices that all targets of an axis may have, or None where there is no such."""
    found = set.intersection(set(axis.choices), *possible)
    return {min(found)} if found else {None}


def sparsify(layer: str, zeros: float | str, methods: Mapping[str, Any]) -> Sparsify:
    """The step for a choice of sparsity, with what of `METHODS` was chosen."""
    pattern = zeros if isinstance(zeros, str) else ""
    return Sparsify(layer, zeros_of(zeros), methods.get("criterion", CRITERIA[0]), pattern)


def quantize(layer: str, bits: int, activation_bits: int, methods: Mapping[str, Any]) -> Quantize:
    """The step for a choice of bits below 32, with what of `METHODS` and group sizes was chosen; what has no effect above 8, on signs, groups, or float activations is left out."""
    if bits > 8:
        return Quantize(layer, bits)
    floats = activation_bits == 32
    effective = {"rounding": True, "ranges": bits > 1, "activations": activation_bits == 8, "group_size": floats}
    effective["scheme"] = bits > 1 and not (floats and methods.get("group_size"))
    chosen = {kind: methods[kind] for kind in effective if kind in methods and effective[kind]}
    return Quantize(layer, bits, activation_bits, **chosen)


def refusal(layer: Layer, kind: str, choice: Any) -> str:
    """Why a choice (of criterion, rounding, sparsity or a pattern) is not possible for a layer of such a shape, or "".

    >>> refusal(Layer("fc", "linear", (10, 25088), 250880), "rounding", "gptq")
    'rounding gptq needs a Hessian of 25088 x 25088 inputs, more than 8192; choose nearest'
    """
    if kind in METHODS and choice in _BY_HESSIAN and (inputs := math.prod(layer.weight_shape[1:])) > LARGEST_HESSIAN:
        return f"{kind} {choice} needs a Hessian of {inputs} x {inputs} inputs, more than {LARGEST_HESSIAN}; choose {METHODS[kind][0]}"
    if kind == "group_size" and choice and layer.kind != "linear":
        return f"groups of {choice} weights with a scale each are for linear layers; choose 0"
    if choice == "dynamic" and layer.kind != "linear":
        return "dynamic activations are for linear layers; a convolution runs 6 to 11 times as slowly as in floats, choose static"
    if kind in ("sparsity", "pattern") and choice and isinstance(choice, str):
        channels, of = layer.weight_shape[1], pattern_of(choice)[1]
        if channels < of:
            return (
                f"pattern {choice} needs {of} input channels of one group, it has {channels}; choose a share of zeros"
            )
    return ""


def _refusals(axes: Sequence[Axis], structure: Structure) -> list[str]:
    """The choices that some of their layers cannot have."""
    found: dict[str, list[str]] = {}
    for axis in axes:
        for choice in axis.choices if axis.kind in (*METHODS, "sparsity", "group_size") else ():
            for target in axis.targets:
                if (axis.kind == "group_size" or (isinstance(choice, str) and _known(axis.kind, choice))) and (
                    why := refusal(structure.layer(target), axis.kind, choice)
                ):
                    found.setdefault(f"{axis.kind}: {choice!r} is not possible everywhere", []).append(
                        f"{target}: {why}"
                    )
    entropy, affine = (
        {target for axis in axes if choice in axis.choices for target in axis.targets}
        for choice in ("entropy", "affine")
    )
    if both := [layer.name for layer in structure.layers if layer.name in entropy & affine]:
        problem = "ranges: 'entropy' with scheme: 'affine', which it has no ranges for; leave one of them out"
        found[problem] = both
    return [
        f"{problem}; write a rule of its own for such layers; {'; '.join(layers[:3])}"
        + (f"; and {len(layers) - 3} more" if len(layers) > 3 else "")
        for problem, layers in found.items()
    ]


def _known(kind: str, choice: str) -> bool:
    if kind == "criterion":
        return isinstance(choice, str) and known_criterion(choice)
    return choice in METHODS[kind] if kind in METHODS else _is_pattern(choice)


def _is_pattern(text: str) -> bool:
    try:
        pattern_of(text)
    except RecipeError:
        return False
    return True


def _ratios(axis: Axis, structure: Structure, name: str, width: float, keep: Mapping[str, int]) -> set[float]:
    group = structure.group(name)
    wanted = keep.get(name, group.channels)
    return {r for r in axis.choices if kept_channels(group.channels, width * (1 - r), group.round_to) == wanted}


def _shares(axis: Axis, matrix: tuple[int, int], rank: int | None) -> set[float]:
    return {share for share in axis.choices if (kept_rank(*matrix, share) if share < 1 else None) == rank}


def _rank_axes(axes: Iterable[Axis], structure: Structure) -> list[Axis]:
    """The axes of rank without targets that cannot be factored and without shares that save nothing in any of them."""
    found = []
    for axis in axes:
        layers = [structure.layer(name) for name in axis.targets]
        layers = [layer for layer in layers if layer.factorable]
        matrices = [sides(layer, (layer.weight_shape[0], layer.weight_shape[1])) for layer in layers]
        choices = tuple(
            share for share in axis.choices if share == 1 or any(kept_rank(*matrix, share) for matrix in matrices)
        )
        if any(share < 1 for share in choices):
            found.append(replace(axis, targets=tuple(layer.name for layer in layers), choices=choices))
    return found


def _rule_axes(
    kind: str, rules: Sequence[Rule], names: Sequence[str], structure: Structure, idle: dict[str, str]
) -> list[Axis]:
    if not names:
        return []
    owner: dict[str, int] = {}
    for number, rule in enumerate(rules):
        for pattern in rule.layers:
            selected = [name for name in names if matches(pattern, name, structure)]
            if not selected:
                close = difflib.get_close_matches(pattern, names, 3, 0.4) or list(names[:5])
                where = f"{kind}.{number}.layers: pattern {pattern!r}"
                idle[where] = (f"{where} selects no {'group' if kind == 'channels' else 'layer'}; "
                               f"write a name, a glob such as 'layer1.*', first, last, or a kind ({', '.join(KINDS)}); "
                               f"names here: {', '.join(close)}{', ...' if len(names) > len(close) else ''}")  # fmt: skip
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


def default_space(structure: Structure, train_images: int = 0) -> Space:
    """What is searched when nothing is said: every technique but codebooks and low rank, with few choices each.

    The first and the last layer keep at least 6 bits. Activations share one width, because int8 pays in contiguous
    regions only. Recovery sees about 20,000 images (ten epochs at most), so that a trial stays a matter of seconds or minutes.
    """
    ends = Rule((6, 8), ("first", "last"))
    recovery: list[Recover | None] = [_untrained(structure)]
    if train_images:
        recovery.append(Recover("finetune", epochs=max(0.001, round(min(10.0, 20_000 / train_images), 3))))
    return Space(
        weight_bits=(Rule((3, 4, 6, 8)), ends),
        activation_bits=(Rule((8, 32), share=True),),
        sparsity=(Rule((0.0, 0.5)),),
        channels=(Rule((0.0, 0.25, 0.5)),),
        width=(1.0, 0.75, 0.5),
        depth=(0, 1) if structure.blocks else (0,),
        recovery=tuple(recovery),
    )


def _untrained(structure: Structure) -> Recover:
    """The recovery that costs next to nothing; where BatchNorm does it all, biases need no look."""
    return Recover("batchnorm" if structure.folds else "statistics")


def reference_recipes(space: Space, structure: Structure) -> list[tuple[str, Recipe]]:
    """The trivial baselines that everybody would try first, so that the front shows what the search adds."""
    widths = {width for rule in space.activation_bits for width in rule.choices} | {32}
    usual = 8 if 8 in widths else max(widths - {32}, default=32)
    untrained = _untrained(structure)
    # A narrowed network is worth nothing before training, and nobody would compare with it.
    trained = max((r for r in space.recovery if r and r.epochs), key=lambda r: r.epochs, default=untrained)

    def recipe(*steps: Step, recovery: Recover | None = untrained) -> Recipe:
        growing = any(isinstance(step, Sparsify) for step in steps)
        return Recipe((*steps, *space.recoveries(recovery, growing)) if steps else steps)

    def uniform(network: Structure, bits: int) -> list[Step]:
        return [Quantize(layer.name, bits, usual if bits <= 8 else 32) for layer in network.layers]

    def narrow(share: float) -> list[Step]:
        kept = ((g.name, kept_channels(g.channels, share, g.round_to), g.channels) for g in structure.groups)
        return [Prune(name, keep) for name, keep, channels in kept if keep < channels]

    found = [("untouched", Recipe()), ("fp16", recipe(*uniform(structure, 16), recovery=None))]
    for bits in (8, 6, 4):
        found.append((f"uniform {bits}-bit", recipe(*uniform(structure, bits))))
    found.append(("uniform 50% sparse", recipe(*(Sparsify(layer.name, 0.5) for layer in structure.layers))))
    found.append(("uniform 25% pruning", recipe(*narrow(0.75), recovery=trained)))
    found.append(("width 0.5", recipe(*narrow(0.5), recovery=trained)))
    for student in filter(None, space.students):
        first = untrained if student.epochs else trained  # one that the task gives untrained is worth nothing before
        network = structure.named(student.factory)
        found.append((f"student {student.factory}", recipe(student, recovery=first)))
        found.append((f"student {student.factory}, 8-bit", recipe(student, *uniform(network, 8), recovery=first)))
    unique: dict[Recipe, str] = {}
    for name, made in found:
        unique.setdefault(made, name)
    return [(name, made) for made, name in unique.items()]
