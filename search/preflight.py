"""What can be known before the search: does everything work here, and can the budget be kept at all?

The preflight exports and measures the untouched network, compresses every kind of layer once in the smallest recipe
of the space, and exports, reloads and measures that too. Whatever would fail after hours fails here in seconds.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from ..errors import ConfigError, Diverged
from ..objectives import cost
from ..objectives.measurement import Estimate, Measurement
from ..objectives.objective import COSTS, Budget, Limit, Objective, show
from ..runners.compression.compress import compress
from ..runners.compression.freeze import folded_norms
from ..runners.compression.library import Method
from ..runners.local import LocalRunner
from ..runners.operators.fold import channel_factors
from ..runners.operators.quantize import codes
from ..runners.targets.runtime import sums_are_exact
from ..runners.targets.target import DEFAULT, Target, everything
from ..spaces.recipe import Recipe
from ..spaces.rules import Axis, Rule
from ..spaces.space import Space
from ..spaces.steps import Step
from ..spaces.structure import Structure, inside, kept_channels
from ..spaces.techniques.equalize import Equalize
from ..spaces.techniques.prune import Prune
from ..spaces.techniques.quantize import Quantize
from ..spaces.techniques.recover import Recover
from ..spaces.techniques.sparsify import zeros_of
from ..spaces.techniques.student import Student

TOLERANCE = 0.01  # predicted bytes are right within 1%
_SAMPLED_CHANNELS, _SAMPLED_WEIGHTS = 32, 1 << 16  # at least, of a layer whose rounding is looked at beforehand


@dataclass(frozen=True)
class Preflight:
    """What the preflight found: the network, its numbers, and the cheapest recipe of the space with its numbers.

    overheads: those of the students' files, by name.
    """

    structure: Structure
    axes: tuple[Axis, ...]
    baseline: Measurement
    overhead: cost.FileOverhead
    smallest: Recipe
    smallest_measured: Measurement
    warnings: tuple[str, ...] = ()
    overheads: Mapping[str, cost.FileOverhead] = field(default_factory=dict)


def check_metrics(objectives: tuple[Objective, ...], budget: Budget, metric: str) -> None:
    """Raises one `ConfigError` with every objective and limit on a metric that is not measured."""
    known = (metric, *COSTS)
    problems = [
        f"objectives: unknown metric {o.metric!r}; choose from {', '.join(known)}"
        for o in objectives
        if o.metric not in known
    ]
    problems += [f"budget: {x.text!r}: unknown metric {x.metric!r}; choose from {', '.join(known)}" for x in budget.limits if x.metric not in known]  # fmt: skip
    if problems:
        raise ConfigError(problems)


def check_supported(space: Space, structure: Structure, target: Target) -> None:
    """Raises one `ConfigError` with every choice of the space that the target cannot run, its layers and the reason."""
    if target.supports is everything:
        return
    refused: dict[tuple[str, str], list[str]] = {}
    for step in _steps(space, structure):
        if reason := target.supports(step):
            refused.setdefault((Recipe((step,)).describe(), reason), []).append(getattr(step, "layer", ""))
    problems = []
    for (what, reason), layers in sorted(refused.items()):
        named = [layer.name for layer in structure.layers if layer.name in layers]
        on = f" on {', '.join(named[:3])}{f' and {len(named) - 3} more' if len(named) > 3 else ''}" if named else ""
        problems.append(f"{what}{on}: {reason}; leave that out of the space, or choose another measure.target")
    if problems:
        raise ConfigError(problems, f"space, on the target {target.name}")


def _steps(space: Space, structure: Structure) -> set[Step]:
    """Every step that a recipe of the space may hold: each choice, and all pairs of widths of weights and activations."""
    axes = space.axes(structure)
    whole = {axis.name: axis.choices.index(min(axis.choices)) for axis in axes if axis.kind == "depth"}
    picks = []
    for number, (name, _) in enumerate(space.networks(structure)):
        begin, own = whole | {"student": number}, [axis for axis in axes if axis.student in (name, None)]
        picks += [begin | {axis.name: i} for axis in own if axis.kind != "student" for i in range(len(axis.choices))]
        weights, activations = (
            [axis for axis in own if axis.kind == kind] for kind in ("weight_bits", "activation_bits")
        )
        pairs = []
        for i in range(max((len(axis.choices) for axis in weights), default=0)):
            for j in range(max((len(axis.choices) for axis in activations), default=1)):
                pair = [*((axis, i) for axis in weights), *((axis, j) for axis in activations)]
                pairs.append(begin | {axis.name: min(pick, len(axis.choices) - 1) for axis, pick in pair})
        picks += pairs
        for axis in own:
            if axis.kind == "scheme":  # which has an effect on some widths only
                picks += [pair | {axis.name: i} for pair in pairs for i in range(len(axis.choices))]
            if axis.kind == "activations":  # which has an effect on 8 bits only
                eight = {a.name: a.choices.index(8) for a in activations if 8 in a.choices}
                picks += [begin | eight | {axis.name: i} for i in range(len(axis.choices))]
    return {step for pick in picks for step in space.recipe(structure, pick).steps}


def within(space: Space, structure: Structure, target: Target) -> tuple[Space, list[str]]:
    """A derived space without the widths that the target cannot run, and what was left out, for people.

    A width of weights goes when no width of activations suits it, then a width of activations when it does not suit all
    that are left: so the weights keep most of their choices.
    """
    if target.supports is everything:
        return space, []
    layer = structure.layers[0].name

    def suits(bits: int, activations: int) -> bool:
        return bits == 32 or target.supports(Quantize(layer, bits, activations if bits <= 8 else 32)) is None

    all_bits, all_activations = (sorted({c for rule in rules for c in rule.choices}) for rules in (space.weight_bits, space.activation_bits))  # fmt: skip
    bits = [b for b in all_bits if any(suits(b, a) for a in all_activations or [32])]
    activations = [a for a in all_activations if all(suits(b, a) for b in bits)]
    if all_activations and not activations:  # none suits all of them: the one that suits most
        activations = [max(all_activations, key=lambda a: sum(suits(b, a) for b in bits))]
        bits = [b for b in bits if suits(b, activations[0])]
    gone = [f"{kind} {', '.join(map(str, lost))} bit" for kind, lost in (
        ("weights", [b for b in all_bits if b not in bits]),
        ("activations", [a for a in all_activations if a not in activations])) if lost]  # fmt: skip
    return replace(space, weight_bits=_only(space.weight_bits, bits), activation_bits=_only(space.activation_bits, activations)), gone  # fmt: skip


def _only(rules: Sequence[Rule], choices: Collection[int]) -> tuple[Rule, ...]:
    kept = [replace(rule, choices=tuple(c for c in rule.choices if c in choices)) for rule in rules]
    return tuple(rule for rule in kept if rule.choices)


def measure_overhead(
    runner: LocalRunner, baseline_size: int | None = None, axes: Sequence[Axis] = (), student: str = ""
) -> cost.FileOverhead:
    """The bytes around the layers' tensors, fitted to a few files, and what few bits round to zero at the axes' levels.

    The files are the baseline (of `baseline_size` bytes, where they are known) and those of 8-bit weights with float, with 8-bit
    and with mixed activations, without the blocks that can be left out, and with half of the channels. student: the name of the
    network whose files they are, as it was before any training; that of the task when "".
    """
    begin = [Student(factory=student)] if student else []
    structure = runner.structure.named(student)

    def mixed(*modes: int, without: tuple[str, ...] = ()) -> list[Quantize]:
        """Activation bits in turn for the layers that are there, 0 for none; weights of 8 and 4 bits in turn."""
        names = [layer.name for layer in structure.layers if not inside(layer.name, without)]
        steps = zip(names, itertools.cycle(modes), strict=False)
        return [Quantize(name, 4 if i // len(modes) % 2 else 8, mode) for i, (name, mode) in enumerate(steps) if mode]

    middle = structure.layers[len(structure.layers) // 2].name
    recipes = [
        Recipe(tuple(begin)),
        Recipe((*begin, *mixed(32))),
        Recipe((*begin, *mixed(8))),
        Recipe((*begin, *mixed(8, 32))),
        Recipe((*begin, Quantize(middle, 8, 8))),
    ]
    if structure.blocks:
        recipes.append(Recipe((Student(structure.blocks, student), *mixed(8, without=structure.blocks))))
    if structure.groups:
        halves = [Prune(g.name, kept_channels(g.channels, 0.5, g.round_to)) for g in structure.groups]
        narrower = [step for step in halves if step.keep < structure.group(step.group).channels]
        recipes.append(Recipe((*begin, *narrower, *mixed(8, 32, 0, 0))))
    if any(axis.kind == "activations" and "dynamic" in axis.choices for axis in axes):
        linear = [layer.name for layer in structure.layers if layer.kind == "linear"]
        recipes.append(Recipe((*begin, *(Quantize(name, 8, 8, activations="dynamic") for name in linear))))
    known = [] if baseline_size is None else [baseline_size]
    sizes = [*known, *(len(runner.build(recipe, recovery=False)) for recipe in recipes[len(known) :])]
    shares = cost.FileOverhead(nonzero=nonzero_shares(runner, runner.network(recipes[0]), structure, axes))
    rest = [size - cost.layer_bytes(structure, recipe, shares) for size, recipe in zip(sizes, recipes, strict=True)]
    made_of = [vars(cost.contents(structure, recipe)) for recipe in recipes]
    # Least squares of the least norm: where nothing tells two coefficients apart, they share.
    fitted, *_ = np.linalg.lstsq(np.array([list(row.values()) for row in made_of], float), np.array(rest), rcond=None)
    coefficients = dict(zip(made_of[0], map(float, fitted), strict=True))
    return cost.FileOverhead(**coefficients, nonzero=shares.nonzero)


def nonzero_shares(
    runner: LocalRunner, model: nn.Module, structure: Structure, axes: Sequence[Axis]
) -> dict[str, dict[str, float]]:
    """By layer and level of the axes, the share of its weights that are not zero after masking and rounding.

    Of a large layer some output channels stand for all: each has a scale of its own, or all have the one of these. Nearest
    rounding stands for the other ways to round, and zeros of least magnitude for the other criteria, which leave about as
    many. Where ranges may be equalised, also of the weights that are then multiplied.
    """
    models = {"none": model}
    for by in (by for axis in axes if axis.kind == "equalize" for by in axis.choices if by != "none"):
        recipe = Recipe((Equalize(by),))
        models[by] = compress(copy.deepcopy(model), recipe, structure, runner.example, None, runner.statistics)
    readers = {name for _, names in structure.pairs for name in names}
    choices = {(axis.kind, target): axis.choices for axis in axes for target in axis.targets}
    found: dict[str, dict[str, float]] = {}
    for layer in structure.layers:
        levels = {(4, 0.0), (8, 0.0)}  # those of the files that the overhead is fitted to
        levels |= set(
            itertools.product(
                choices.get(("weight_bits", layer.name), ()), choices.get(("sparsity", layer.name), (0.0,))
            )
        )
        for by, network in models.items():
            if by != "none" and layer.name not in readers:
                continue
            weight = network.get_submodule(layer.name).weight.detach()  # type: ignore[operator,union-attr]
            every = max(1, len(weight) // max(_SAMPLED_CHANNELS, _SAMPLED_WEIGHTS // weight[0].numel()))
            weight, norm = weight[::every], folded_norms(network, structure).get(layer.name)
            schemes = dict.fromkeys(("symmetric", *choices.get(("scheme", layer.name), ())))
            for (bits, zeros), scheme in itertools.product(sorted(levels, key=str), schemes):
                if 1 < bits <= 8:
                    affine = scheme == "affine"
                    method = Method(pattern=zeros if isinstance(zeros, str) else "", scheme=scheme)
                    factor = channel_factors(norm)[::every] if affine and norm is not None else torch.ones(len(weight))
                    made = runner.library.compress_layer(weight, bits, zeros_of(zeros), method, factor=factor)
                    assert made.scale is not None
                    kept = weight if made.mask is None else weight * made.mask
                    step = made.scale.clamp_min(1e-12) / (factor if affine else 1)
                    whole = codes(kept, step, bits, made.zero)
                    share = float(whole.count_nonzero()) / whole.numel()
                    found.setdefault(layer.name, {})[cost.level(bits, zeros, by, affine)] = share
    return found


def smallest_recipe(
    space: Space,
    structure: Structure,
    overhead: cost.FileOverhead,
    metric: str = "size_bytes",
    overheads: Mapping[str, cost.FileOverhead] | None = None,
) -> Recipe:
    """The recipe of the space with the least predicted bytes (or MACs): each decision at its cheapest, of every network.

    The axes of a network do not work against each other (fewer channels never make fewer bits dearer), so they are decided
    in turn. overheads: those of the students' files by name.
    """

    def predicted(recipe: Recipe, name: str) -> float:
        if metric == "macs":
            return cost.macs(structure, recipe)
        return cost.size_bytes(structure, recipe, (overheads or {})[name] if name else overhead)

    found: list[tuple[float, Recipe]] = []
    axes = space.axes(structure)
    for number, (name, _) in enumerate(space.networks(structure)):
        picks = {"student": number}
        for axis in axes:
            if axis.student == name:
                each = [
                    predicted(space.recipe(structure, picks | {axis.name: i}), name) for i in range(len(axis.choices))
                ]
                picks[axis.name] = each.index(min(each))
        recipe = space.recipe(structure, picks)
        # Costs do not depend on training, and the preflight must not train.
        steps = [
            replace(s, epochs=0.0) if isinstance(s, Student) else s for s in recipe.steps if not isinstance(s, Recover)
        ]
        found.append((predicted(recipe, name), Recipe(tuple(steps))))
    return min(found, key=lambda entry: entry[0])[1]


def preflight(
    runner: LocalRunner, space: Space, budget: Budget, baseline: Measurement, say: Callable[[str], None]
) -> Preflight:
    """Run the preflight after the baseline was measured.

    Raises `ConfigError` for a pattern that selects nothing or a limit that no recipe of the space can keep,
    `ExportFailed` or `RecipeError` when compression itself does not work on this network.
    """
    structure = runner.structure
    axes = space.axes(structure)
    say("compressing every kind of layer once")
    own = {name: [axis for axis in axes if axis.student == name] for name, _ in space.networks(structure)}
    overhead = measure_overhead(runner, int(baseline.value("size_bytes")), own.get("", ()))
    overheads = {name: measure_overhead(runner, None, own[name], name) for name in own if name}
    smallest = smallest_recipe(space, structure, overhead, overheads=overheads)
    problems, warnings = [], []
    try:
        measured = runner.run(smallest) if smallest.steps else baseline
    except Diverged as error:  # its metric is lost, as may be expected of the smallest of all; its size is known
        warnings.append(f"the smallest recipe ({smallest.describe()}) does not compute any more: {error}")
        size = Estimate.exact(len(runner.build(smallest)))
        measured = Measurement({"size_bytes": size, "latency_ms": Estimate.exact(math.nan)})
    for limit in budget.limits:
        reachable = None
        if limit.metric == "size_bytes" and limit.upper:
            reachable = min(measured.value("size_bytes"), baseline.value("size_bytes"))
        elif limit.metric == "macs" and limit.upper:
            reachable = cost.macs(structure, smallest_recipe(space, structure, overhead, "macs", overheads))
        if reachable is not None and limit.excess(reachable, baseline.value(limit.metric)) > (
            TOLERANCE if limit.metric == "size_bytes" else 0
        ):
            problems.append(_impossible(limit, reachable, baseline))
        elif (
            limit.metric == "latency_ms"
            and limit.excess(measured.value("latency_ms"), baseline.value("latency_ms")) > 0
        ):
            warnings.append(f"{limit.text}: the smallest recipe takes {show('latency_ms', measured.value('latency_ms'))}, above the limit of "
                            f"{show('latency_ms', limit.resolve(baseline.value('latency_ms')))}; another recipe may be faster, few are")  # fmt: skip
    if problems:
        raise ConfigError(problems, "budget")
    offered = {(axis.kind, choice) for axis in axes if axis.kind.endswith("_bits") for choice in axis.choices}
    runs_there = runner.target.name == DEFAULT or runner.target.milliseconds is not None
    if runs_there and {("weight_bits", 8), ("activation_bits", 8)} <= offered and not sums_are_exact():
        warnings.append("this processor has no VNNI, and ONNX Runtime adds up products of 8 bits in 16 there, which overflow: layers with "
                        "8-bit weights and activations lose accuracy; leave 8 out of space.weight_bits (7 bits are exact)")  # fmt: skip
    return Preflight(structure, axes, baseline, overhead, smallest, measured, tuple(warnings), overheads)


def _impossible(limit: Limit, reachable: float, baseline: Measurement) -> str:
    bound = show(limit.metric, limit.resolve(baseline.value(limit.metric)))
    share = 100 * reachable / baseline.value(limit.metric)
    return (f"{limit.text!r} (= {bound}) cannot be kept: the smallest recipe of this space reaches {show(limit.metric, reachable)}; "
            f"raise the limit to at least {share:.1f}%, or widen the space (fewer bits, more sparsity, narrower or shallower students)")  # fmt: skip
