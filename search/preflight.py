"""What can be known before the search: does everything work here, and can the budget be kept at all?

The preflight exports and measures the untouched network, compresses every kind of layer once in the smallest recipe
of the space, and exports, reloads and measures that too. Whatever would fail after hours fails here in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigError, Diverged
from ..objectives import cost
from ..objectives.measurement import Measurement, Metric
from ..objectives.objective import COSTS, Budget, Limit, Objective, show
from ..runners.local import LocalRunner
from ..spaces.recipe import Quantize, Recipe, Recover
from ..spaces.space import Axis, Space
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
