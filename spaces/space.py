"""The search space: for each layer, group and network, the choices that a recipe is put together from.

A space is a handful of rules (`rules`), which become a flat, static list of axes against a `Structure`, each with
ordered choices, which any sampler can handle as integers. `Space.recipe` turns picks into the canonical `Recipe`: two
picks that mean the same network give equal recipes. What a key may say, and which step a choice becomes, stands with
its technique.

Where there are students to choose from, the choice of the network comes first, and every network has axes of its own,
by the same rules; the axes of the others have no effect then. So the list of axes stays flat and static.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, RecipeError
from .recipe import Recipe
from .rules import Axis
from .shapes import shapes
from .steps import LayerStep, Step
from .structure import Structure, inside
from .techniques.recover import RECOVERY, Recover, grown, recoveries
from .techniques.student import STUDENTS, dropped
from .techniques.table import KEYS, TECHNIQUES, SpaceKeys, layer_steps, rank_of, technique_of
from .techniques.technique import Choices, Encoding
from .values import possible

_OF_ALL = (STUDENTS, RECOVERY)  # one axis for all networks, before and after those of each
_WANTED = {key.kind: key.wanted for key in KEYS}


@dataclass(frozen=True)
class Space(SpaceKeys):
    """Rules per technique; an empty field leaves that technique out.

    weight_bits: 1..8, 16, 32. activation_bits: 4, 8, 16 or 32 (below 32 with weights of at most 8 bits). cluster_bits:
    2..8 (indices into a codebook, whatever weight_bits says), 32 (no codebook). rank: shares of the full rank that two
    factors keep, rounded as channels are; 1 leaves a layer whole, and so does a share that would save nothing.
    sparsity: shares of zeros, or patterns such as "2:4"; without effect where weights are signs. criterion, rounding,
    ranges: which weights become zero, how they are rounded, how their range is found (see `Sparsify` and `Quantize`).
    activations: static or dynamic ranges of 8-bit activations. group_size: how many weights of a row share a scale, 0
    for all of them. scheme: symmetric or affine, without effect on signs and groups. channels: shares of a dependency
    group's channels that are removed. width: shares of all channels that stay. depth: how many blocks are left out,
    least important first. recovery: `Recover` or None; with `ladder` each choice that trains goes on from those before
    it, instead of from the untrained candidate. students: the networks to begin with, `Student` with a factory, or None
    for the original one, which is the only one when empty. equalize: whether ranges of channels are equalised: none,
    weights, activations (see `Equalize`); without effect where nothing is sparse, clustered or quantized, and refused
    beside recovery that compares features.
    """

    def networks(self, structure: Structure) -> list[tuple[str, Structure]]:
        """The networks that recipes may begin with, by name ("" is the original one), and their structures.

        Raises `RecipeError` for a student that the task does not make.
        """
        names = [student.factory if student else "" for student in self.students or (None,)]
        return [(name, structure.named(name)) for name in names]

    def axes(self, structure: Structure) -> tuple[Axis, ...]:
        """All decisions for this network; raises `ConfigError` with every impossible choice and idle pattern."""
        problems = self._problems()
        axes = STUDENTS.make_axes(self.students, structure, {})
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
        problems += [text for pattern, text in idle[0].items() if all(pattern in unused for unused in idle[1:])]
        axes += RECOVERY.make_axes(self.recovery, structure, {})
        if problems:
            raise ConfigError(problems, "space")
        return tuple(axes)

    def _axes(self, structure: Structure, problems: list[str], idle: dict[str, str]) -> list[Axis]:
        """The decisions about one network. idle: is given what to say of patterns that select nothing."""
        axes: list[Axis] = []
        for key in KEYS:
            if key not in _OF_ALL:
                axes += key.make_axes(getattr(self, key.name), structure, idle)
        problems += _refusals(axes, structure)
        return axes

    def _problems(self) -> list[str]:
        """What is wrong with the choices themselves, whatever the network."""
        problems = []
        for key in KEYS:
            if key.own:
                continue
            entries = getattr(self, key.name)
            listed = [(key.name, entries)]
            if key.of:
                listed = [(f"{key.name}.{number}.choices", rule.choices) for number, rule in enumerate(entries)]
            for where, choices in listed:
                wrong = [f"{choice!r} is not possible" for choice in choices if not possible(key.value, choice)]
                texts = wrong if choices else ["no choice"]
                problems += [f"{where}: {text}; choose from {key.choose_from()}" for text in texts]
        for technique in TECHNIQUES:
            problems += technique.space_problems(self)
        return problems

    def recipe(self, structure: Structure, picks: Mapping[str, int]) -> Recipe:
        """The canonical recipe of the picked choices (by axis name; an axis that is not picked takes its first)."""
        axes = self.axes(structure)
        student = self.students[picks.get("student", 0)] if self.students else None
        name = student.factory if student else ""
        structure = structure.named(name)
        network: dict[str, Any] = {"width": 1.0}
        targets: dict[tuple[str, str], Any] = {}
        by_rules = {key.kind for key in KEYS if key.of}
        for axis in axes:
            if axis.student in (name, None):
                chosen = axis.choices[picks.get(axis.name, 0)]
                if axis.kind in by_rules:
                    targets.update({(axis.kind, target): chosen for target in axis.targets})
                else:
                    network[axis.kind] = chosen
        choices = Choices(structure, network, targets)
        steps: list[Step] = []
        for technique in TECHNIQUES:
            steps += technique.network_steps(self, choices)
        narrowed = shapes(structure, Recipe(tuple(steps)))
        gradual = any(step.gradual for step in self.recoveries(network["recovery"]))
        of_layer: dict[str, dict[str, Any]] = {layer: {"gradual": gradual} for layer in narrowed}
        for (kind, target), chosen in targets.items():
            if target in of_layer:
                of_layer[target][kind] = chosen
        for layer in structure.layers:
            if layer.name in narrowed:
                steps += layer_steps(layer, of_layer[layer.name], narrowed[layer.name])
        for technique in TECHNIQUES:
            steps += technique.final_steps(self, choices, steps)
        return Recipe(tuple(steps))

    def as_ladder(self) -> Space:
        """The space with its choices of recovery as a ladder, untrained at its foot.

        As it is when nothing is trained, or when zeros grow in some of the choices only: one cannot go on from the
        other.
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

        >>> one, two = Recover("finetune", 1), Recover("finetune", 2)
        >>> [step.epochs for step in Space(recovery=(one, two), ladder=True).recoveries(two)]
        [1, 2]
        """
        return recoveries(self, choice, growing)

    def encode(self, structure: Structure, recipe: Recipe) -> dict[str, int] | None:
        """Picks that give this recipe, or None when the space does not hold it.

        Axes of another network than the recipe's are at their first choice.
        """
        name = recipe.factory
        if recipe.student not in (self.students or (None,)):
            return None
        axes = self.axes(structure)
        own = tuple(axis for axis in axes if axis.student in (name, None))
        stored = {
            step.layer: rank_of(type(step))
            for step in recipe.of(LayerStep)
            if (technique := technique_of(step)) and technique.stores
        }

        def taken(layer: str, kind: type[Step]) -> bool:
            return stored.get(layer, rank_of(kind)) < rank_of(kind)

        encoding = Encoding(self, structure.named(name), recipe, own, taken, grown(recipe))
        drop = dropped(recipe)
        picks: dict[str, int] = {}
        for axis in axes:
            targets = [target for target in axis.targets if not inside(target, drop)]
            wanted = _WANTED[axis.kind](axis, targets, encoding) if axis in own else set()
            wanted = wanted or {axis.choices[0]}
            if len(wanted) > 1 or not wanted <= set(axis.choices):
                return None
            picks[axis.name] = axis.choices.index(wanted.pop())
        return picks if self.recipe(structure, picks) == recipe else None


def _refusals(axes: Sequence[Axis], structure: Structure) -> list[str]:
    """The choices that some of their layers cannot have."""
    reasons: dict[str, list[str]] = {}
    keys = {key.kind: key for key in KEYS}
    for axis in axes:
        key = keys[axis.kind]
        for choice in axis.choices if key.of == "layer" else ():
            for target in axis.targets:
                if why := key.refuse(structure.layer(target), choice):
                    problem = f"{axis.kind}: {choice!r} is not possible everywhere"
                    reasons.setdefault(problem, []).append(f"{target}: {why}")
    for technique in TECHNIQUES:
        reasons |= technique.conflicts(axes, structure)
    return [
        f"{problem}; write a rule of its own for such layers; {'; '.join(layers[:3])}"
        + (f"; and {len(layers) - 3} more" if len(layers) > 3 else "")
        for problem, layers in reasons.items()
    ]
