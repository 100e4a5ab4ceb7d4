"""The checks before a search: does everything work on this machine, and can the budget be kept at all?

The preflight exports and measures the original model. It then compresses every kind of layer once, in the smallest
recipe of the space, and exports, reloads and measures that too. What would fail after hours fails here in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .. import errors
from ..errors import ConfigError, Diverged, TrialError
from ..objectives import cost
from ..objectives.display import show
from ..objectives.measurement import Estimate, Measurement
from ..objectives.objective import Budget, Limit
from ..runners.runner import BuildFile, MeasureOverhead, Runner, RunTrial, TaskFacts
from ..spaces.recipe import Recipe
from ..spaces.rules import Axis
from ..spaces.space import Space
from ..spaces.structure import Structure
from ..spaces.techniques.recover import Recover
from ..spaces.techniques.student import Student

TOLERANCE = 0.01  # predicted bytes are accurate within 1%


@dataclass(frozen=True)
class Preflight:
    """The result of the preflight: the network, its numbers, and the cheapest recipe of the space with its numbers.

    Args:
        structure: The structure of the network.
        axes: The axes of the space.
        baseline: The original model's numbers.
        overheads: For each network by name, the bytes of its files besides its layers' tensors; "" is the original
            model.
        smallest: The cheapest recipe.
        smallest_measured: Its numbers.
        warnings: Warnings for people.
        metric: The name of the task's metric.
        target: The name of the target.
        computed: Whether the target computes latencies instead of measuring them.
        limits: The budget's limits, for people.
    """

    structure: Structure
    axes: tuple[Axis, ...]
    baseline: Measurement
    overheads: Mapping[str, cost.FileOverhead]
    smallest: Recipe
    smallest_measured: Measurement
    warnings: tuple[str, ...] = ()
    metric: str = ""
    target: str = ""
    computed: bool = False
    limits: tuple[str, ...] = field(default=())


def smallest_recipe(
    space: Space,
    structure: Structure,
    overheads: Mapping[str, cost.FileOverhead],
    metric: str = "size_bytes",
) -> Recipe:
    """The recipe of the space with the lowest predicted bytes (or MACs).

    For each network, every axis is set to its cheapest choice in turn. That is optimal because the axes do not conflict
    (with fewer channels, fewer bits never cost more).

    Args:
        space: The search space.
        structure: The structure of the network.
        overheads: As in `Preflight`.
        metric: `size_bytes` or `macs`.
    """

    def predicted(recipe: Recipe, name: str) -> float:
        if metric == "macs":
            return cost.macs(structure, recipe)
        return cost.size_bytes(structure, recipe, overheads[name])

    cheapest: list[tuple[float, Recipe]] = []
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
        cheapest.append((predicted(recipe, name), Recipe(tuple(steps))))
    return min(cheapest, key=lambda entry: entry[0])[1]


def preflight(
    runner: Runner,
    facts: TaskFacts,
    space: Space,
    budget: Budget,
    baseline: Measurement,
    say: Callable[[str], None],
) -> Preflight:
    """Run the preflight, after the baseline was measured.

    Args:
        runner: The runner of the study's task.
        facts: What the runner knows of the task.
        space: The search space.
        budget: The limits.
        baseline: The original model's numbers.
        say: Called with a description of the current activity.

    Raises:
        ConfigError: A pattern selects nothing, or no recipe of the space can keep a limit.
        ExportFailed: The smallest recipe cannot be exported for this network.
        RecipeError: The smallest recipe does not fit this network.
    """
    structure = facts.structure
    axes = space.axes(structure)
    say("compressing every kind of layer once")
    own = {name: tuple(axis for axis in axes if axis.student == name) for name, _ in space.networks(structure)}
    # The original model's overhead is always measured: the reference recipes compress the original model.
    asked = [MeasureOverhead(own.get("", ()), int(baseline.value("size_bytes")))]
    asked += [MeasureOverhead(own[name], None, name) for name in own if name]
    overheads = {request.student: runner.submit(request).result() for request in asked}
    smallest = smallest_recipe(space, structure, overheads)
    measured, warnings = _measured(runner, smallest, baseline)
    problems = []
    for limit in budget.limits:
        problem, warning = _limit_problem(limit, space, structure, overheads, measured, baseline)
        problems += [problem] if problem else []
        warnings += [warning] if warning else []
    if problems:
        raise ConfigError(problems, "budget")
    offered = {(axis.kind, choice) for axis in axes if axis.kind.endswith("_bits") for choice in axis.choices}
    if {("weight_bits", 8), ("activation_bits", 8)} <= offered and not facts.exact_products:
        warnings.append(
            "this processor has no VNNI: ONNX Runtime as it comes adds up products of 8 bits in 16 there, "
            "which overflow. "
            "Here and in paretorch.load the session option session.x64quantprecision = 1 prevents that; set it "
            "wherever "
            "the files run on such a processor, or leave 8 out of space.weight_bits (7 bits are exact)"
        )
    return Preflight(structure, axes, baseline, overheads, smallest, measured, tuple(warnings))


def _measured(runner: Runner, smallest: Recipe, baseline: Measurement) -> tuple[Measurement, list[str]]:
    """The numbers of the smallest recipe, and warnings.

    Raises:
        TrialError: Its trial failed, except by diverging.
    """
    if not smallest.steps:
        return baseline, []
    outcome = runner.submit(RunTrial(smallest)).result()
    if outcome.measurement is not None:
        return outcome.measurement, []
    assert outcome.failure is not None
    error, reason = outcome.failure.error, outcome.failure.reason.partition(": ")[2]
    if error != Diverged.__name__:
        raise getattr(errors, error, TrialError)(reason)
    # The smallest recipe may well destroy the metric; its size is still known.
    warning = f"the smallest recipe ({smallest.describe()}) does not compute any more: {reason}"
    size = Estimate.exact(len(runner.submit(BuildFile(smallest)).result()))
    return Measurement({"size_bytes": size, "latency_ms": Estimate.exact(math.nan)}), [warning]


def _limit_problem(
    limit: Limit,
    space: Space,
    structure: Structure,
    overheads: Mapping[str, cost.FileOverhead],
    measured: Measurement,
    baseline: Measurement,
) -> tuple[str, str]:
    """Why a limit cannot be kept, and a warning where it can barely be kept; both empty where it can."""
    if limit.metric == "latency_ms":
        latency, bound = measured.value("latency_ms"), baseline.value("latency_ms")
        if limit.excess(latency, bound) <= 0 or math.isnan(latency):
            return "", ""
        return "", (
            f"{limit.text}: the smallest recipe takes {show('latency_ms', latency)}, above the limit of "
            f"{show('latency_ms', limit.resolve(bound))}; another recipe may be faster, few are"
        )
    reachable = None
    if limit.metric == "size_bytes" and limit.upper:
        reachable = min(measured.value("size_bytes"), baseline.value("size_bytes"))
    elif limit.metric == "macs" and limit.upper:
        reachable = float(cost.macs(structure, smallest_recipe(space, structure, overheads, "macs")))
    tolerance = TOLERANCE if limit.metric == "size_bytes" else 0.0
    if reachable is None or limit.excess(reachable, baseline.value(limit.metric)) <= tolerance:
        return "", ""
    return _impossible(limit, reachable, baseline), ""


def _impossible(limit: Limit, reachable: float, baseline: Measurement) -> str:
    bound = show(limit.metric, limit.resolve(baseline.value(limit.metric)))
    share = 100 * reachable / baseline.value(limit.metric)
    return (
        f"{limit.text!r} (= {bound}) cannot be kept: the smallest recipe of this space reaches "
        f"{show(limit.metric, reachable)}; "
        f"raise the limit to at least {share:.1f}%, or widen the space (fewer bits, more sparsity, narrower or "
        "shallower students)"
    )
