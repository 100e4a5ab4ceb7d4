"""What can be known before the search: does everything work here, and can the budget be kept at all?

The preflight exports and measures the untouched network, compresses every kind of layer once in the smallest recipe
of the space, and exports, reloads and measures that too. Whatever would fail after hours fails here in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from ..errors import ConfigError, Diverged
from ..objectives import cost
from ..objectives.measurement import Measurement, Metric
from ..objectives.objective import COSTS, Budget, Limit, Objective, show
from ..runners.local import LocalRunner
from ..runners.target import Target, everything
from ..spaces.recipe import Quantize, Recipe, Recover, Step
from ..spaces.space import Axis, Rule, Space
from ..spaces.structure import Structure

TOLERANCE = 0.01  # predicted bytes are right within 1%


@dataclass(frozen=True)
class Preflight:
    """What the preflight found: the network, its numbers, and the cheapest recipe of the space with its numbers."""

    structure: Structure
    axes: tuple[Axis, ...]
    baseline: Measurement
    overhead: cost.FileOverhead
    smallest: Recipe
    smallest_measured: Measurement
    warnings: tuple[str, ...] = ()


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
    picks = [{**whole, axis.name: i} for axis in axes for i in range(len(axis.choices))]
    weights, activations = ([axis for axis in axes if axis.kind == kind] for kind in ("weight_bits", "activation_bits"))
    for i in range(max((len(axis.choices) for axis in weights), default=0)):
        for j in range(max((len(axis.choices) for axis in activations), default=0)):
            pair = [*((axis, i) for axis in weights), *((axis, j) for axis in activations)]
            picks.append(whole | {axis.name: min(pick, len(axis.choices) - 1) for axis, pick in pair})
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


def measure_overhead(runner: LocalRunner, baseline_size: int) -> cost.FileOverhead:
    """The bytes around the layers' tensors, from the baseline and a weight-only and an int8 file."""
    structure = runner.structure
    count = len(structure.layers)
    base = baseline_size - cost.layer_bytes(structure, Recipe())
    extra = []
    for activations in (32, 8):
        recipe = Recipe(tuple(Quantize(layer.name, 8, activations) for layer in structure.layers))
        extra.append((len(runner.build(recipe)) - cost.layer_bytes(structure, recipe) - base) / count)
    return cost.FileOverhead(base, extra[0], extra[1])


def smallest_recipe(
    space: Space, structure: Structure, overhead: cost.FileOverhead, metric: str = "size_bytes"
) -> Recipe:
    """The recipe of the space with the least predicted bytes (or MACs): each decision at its cheapest.

    The axes do not work against each other (fewer channels never make fewer bits dearer), so they are decided in turn.
    """

    def predicted(recipe: Recipe) -> float:
        if metric == "macs":
            return cost.macs(structure, recipe)
        return cost.size_bytes(structure, recipe, overhead)

    picks: dict[str, int] = {}
    for axis in space.axes(structure):
        if axis.kind == "recovery":
            continue
        costs = [predicted(space.recipe(structure, picks | {axis.name: i})) for i in range(len(axis.choices))]
        picks[axis.name] = costs.index(min(costs))
    recipe = space.recipe(structure, picks)
    # Costs do not depend on recovery, and the preflight must not train.
    return Recipe(tuple(s for s in recipe.steps if not isinstance(s, Recover)))


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
    overhead = measure_overhead(runner, int(baseline.value("size_bytes")))
    smallest = smallest_recipe(space, structure, overhead)
    problems, warnings = [], []
    try:
        measured = runner.run(smallest) if smallest.steps else baseline
    except Diverged as error:  # its metric is lost, as may be expected of the smallest of all; its size is known
        warnings.append(f"the smallest recipe ({smallest.describe()}) does not compute any more: {error}")
        size = Metric.exact(len(runner.build(smallest)))
        measured = Measurement({"size_bytes": size, "latency_ms": Metric.exact(math.nan)})
    for limit in budget.limits:
        reachable = None
        if limit.metric == "size_bytes" and limit.upper:
            reachable = min(measured.value("size_bytes"), baseline.value("size_bytes"))
        elif limit.metric == "macs" and limit.upper:
            reachable = cost.macs(structure, smallest_recipe(space, structure, overhead, "macs"))
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
    return Preflight(structure, axes, baseline, overhead, smallest, measured, tuple(warnings))


def _impossible(limit: Limit, reachable: float, baseline: Measurement) -> str:
    bound = show(limit.metric, limit.resolve(baseline.value(limit.metric)))
    share = 100 * reachable / baseline.value(limit.metric)
    return (f"{limit.text!r} (= {bound}) cannot be kept: the smallest recipe of this space reaches {show(limit.metric, reachable)}; "
            f"raise the limit to at least {share:.1f}%, or widen the space (fewer bits, more sparsity, narrower or shallower students)")  # fmt: skip
