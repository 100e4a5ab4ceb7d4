"""Checks that a study can run at all: its metrics are known, and the target supports every step of its space."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from ..errors import ConfigError, TaskError
from ..objectives.objective import COSTS, Budget, Objective
from ..runners.runner import TaskFacts
from ..runners.targets.target import Target, everything
from ..spaces.defaults import default_space
from ..spaces.recipe import Recipe
from ..spaces.rules import Rule
from ..spaces.space import Space
from ..spaces.steps import Step
from ..spaces.structure import Structure
from ..spaces.techniques.quantize import Quantize
from ..spaces.techniques.sparsify import CRITERIA


def check_metrics(objectives: tuple[Objective, ...], budget: Budget, metric: str) -> None:
    """Check that all metrics of objectives and limits are measured.

    Raises:
        ConfigError: Some are not; one error names all of them.
    """
    known = (metric, *COSTS)
    problems = [
        f"objectives: unknown metric {o.metric!r}; choose from {', '.join(known)}"
        for o in objectives
        if o.metric not in known
    ]
    problems += [
        f"budget: {x.text!r}: unknown metric {x.metric!r}; choose from {', '.join(known)}"
        for x in budget.limits
        if x.metric not in known
    ]
    if problems:
        raise ConfigError(problems)


def check_supported(space: Space, structure: Structure, target: Target) -> None:
    """Check that the target can run every choice of the space.

    Raises:
        ConfigError: It cannot; one error names all such choices with their layers and reasons.
    """
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
    """Every step that a recipe of the space may contain: each choice, and all pairs of weight and activation widths."""
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
            if axis.kind == "scheme":  # it affects only some widths
                picks += [pair | {axis.name: i} for pair in pairs for i in range(len(axis.choices))]
            if axis.kind == "activations":  # it affects only 8 bits
                eight = {a.name: a.choices.index(8) for a in activations if 8 in a.choices}
                picks += [begin | eight | {axis.name: i} for i in range(len(axis.choices))]
    return {step for pick in picks for step in space.recipe(structure, pick).steps}


def within(space: Space, structure: Structure, target: Target) -> tuple[Space, list[str]]:
    """A derived space without the widths that the target cannot run.

    First the widths of weights that work with no width of activations are dropped, then the widths of activations that
    do not work with all remaining widths of weights. In this order most choices for the weights remain.

    Returns:
        The space, and what was left out, for people.
    """
    if target.supports is everything:
        return space, []
    layer = structure.layers[0].name

    def suits(bits: int, activations: int) -> bool:
        return bits == 32 or target.supports(Quantize(layer, bits, activations if bits <= 8 else 32)) is None

    all_bits, all_activations = (
        sorted({c for rule in rules for c in rule.choices}) for rules in (space.weight_bits, space.activation_bits)
    )
    bits = [b for b in all_bits if any(suits(b, a) for a in all_activations or [32])]
    activations = [a for a in all_activations if all(suits(b, a) for b in bits)]
    if all_activations and not activations:  # none works with all of them: keep the one that works with most
        activations = [max(all_activations, key=lambda a: sum(suits(b, a) for b in bits))]
        bits = [b for b in bits if suits(b, activations[0])]
    gone = [
        f"{kind} {', '.join(map(str, lost))} bit"
        for kind, lost in (
            ("weights", [b for b in all_bits if b not in bits]),
            ("activations", [a for a in all_activations if a not in activations]),
        )
        if lost
    ]
    return replace(
        space, weight_bits=_only(space.weight_bits, bits), activation_bits=_only(space.activation_bits, activations)
    ), gone


def _only(rules: Sequence[Rule], choices: Collection[int]) -> tuple[Rule, ...]:
    kept = [replace(rule, choices=tuple(c for c in rule.choices if c in choices)) for rule in rules]
    return tuple(rule for rule in kept if rule.choices)


def check_criteria(space: Space, known: Collection[str], task: str) -> None:
    """Check that every criterion of the space is in `known`: built in, or a function of the task.

    Raises:
        TaskError: One is not.
    """
    wanted = {choice for rule in space.criterion for choice in rule.choices}
    if missing := sorted(wanted - {*CRITERIA, *known}):
        raise TaskError(
            f"task {task!r} has no function for the criterion {', '.join(missing)}; give it as "
            f"Task(criteria={{{missing[0]!r}: function}}); it has: {', '.join(known) or 'none'}"
        )


def checked_space(
    given: Space | None, facts: TaskFacts, target: Target, task: str, say: Callable[[str], None]
) -> Space:
    """The space of a study: the given one, or one derived from the network that the target can run.

    Args:
        given: The space; None to derive it from the network.
        facts: What the runner knows of the task.
        target: The target.
        task: The name of the task.
        say: Called with a line about what was left out of a derived space.

    Raises:
        ConfigError: The target cannot run every choice of the given space.
        TaskError: The space names a criterion that the task does not define.
    """
    structure, space = facts.structure, given
    if space is None:
        space, gone = within(default_space(structure, facts.samples["train"]), structure, target)
        if gone:
            say(f"target    {target.name} cannot run all of the derived space; left out: {'; '.join(gone)}")
    check_supported(space, structure, target)
    check_criteria(space, facts.criteria, task)
    return space
