"""A recipe: what is done to a trained network, exactly. Plain frozen data without a tensor.

`Recipe()` is the original network. A recipe is never a space: it names final numbers (this layer has 4 bits, that
group keeps 24 channels), so it means the same in production, without Optuna and without the search that found it.
What a step may be stands with its technique, in `spaces.techniques`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from ..errors import RecipeError
from .plain import plain
from .steps import Step, canonical
from .techniques.ensemble import Ensemble
from .techniques.student import Student
from .techniques.table import STEPS, TECHNIQUES, rank_of, stored_twice, technique_of

VERSION = 1
_Kind = TypeVar("_Kind")


def _checked(step: Step) -> Step:
    """The canonical form of a step that is possible by itself."""
    technique = technique_of(step)
    if technique is None:
        raise RecipeError(f"{step!r} is not a step; steps: {', '.join(STEPS)}")
    step = canonical(step)
    if isinstance(step, Ensemble):  # a text by hand may have spaces and steps in any order
        members = [Recipe.from_json(text) for text in step.members]
        step = Ensemble(tuple(sorted({member.to_json() for member in members})))
        technique.check(step)
        if any(member.of(Ensemble) for member in members):
            raise RecipeError(
                "ensemble: one of its networks is an ensemble itself; name the networks of that one instead"
            )
    technique.check(step)
    return step


@dataclass(frozen=True)
class Recipe:
    """All steps that turn the trained network into a candidate, kept in the order of the passes.

    Equal recipes have one form: blocks are sorted, numbers are plain, a step that would change nothing is refused.
    Raises `RecipeError` for a step with an impossible number, two steps of one kind for the same target, or steps that
    do not go together, such as two that say how the weight of one layer is stored.

        >>> from paretorch import Quantize, Student
        >>> Recipe((Quantize("fc", 8), Student(("layer3.2",)))).describe()
        'without layer3.2, weights 8 bit'
    """

    steps: tuple[Step, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        if type(self.version) is not int or not 1 <= self.version <= VERSION:
            raise RecipeError(f"recipe version {self.version!r} is not one that this paretorch reads (1..{VERSION})")
        steps = [_checked(step) for step in self.steps]
        steps.sort(key=lambda step: (rank_of(type(step)), step.target or ""))
        object.__setattr__(self, "steps", tuple(steps))
        targets = Counter((type(step).__name__.lower(), step.target) for step in steps if step.target is not None)
        if twice := [f"{kind} {target}".rstrip() for (kind, target), count in targets.items() if count > 1]:
            raise RecipeError(f"two steps for the same target: {', '.join(twice)}")
        techniques, layers = stored_twice(steps)
        if layers:
            raise RecipeError(
                f"{' and '.join(technique.name for technique in techniques)} for the same layer: "
                f"{', '.join(layers)}; its "
                f"weights are stored as {' or as '.join(technique.stores for technique in techniques)}, leave "
                "out one of "
                "the steps"
            )
        for technique in TECHNIQUES:
            technique.problems(self)

    def of(self, kind: type[_Kind]) -> list[_Kind]:
        """The steps of one kind, in order."""
        return [step for step in self.steps if isinstance(step, kind)]

    @property
    def student(self) -> Student | None:
        """The task's other network that it begins with, with all its blocks; None for the original network."""
        return next((replace(step, drop=()) for step in self.of(Student) if step.factory), None)

    @property
    def factory(self) -> str:
        """The name of the student that it begins with, "" for the original network."""
        return next((step.factory for step in self.of(Student)), "")

    @property
    def key(self) -> str:
        """16 hexadecimal digits that only an equal recipe shares."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and YAML can hold."""
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
                if entry["step"] not in STEPS:
                    raise RecipeError(f"unknown step {entry['step']!r}; steps: {', '.join(STEPS)}")
                kind = STEPS[entry["step"]].step
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
        """The recipes of the networks whose outputs are averaged; only this one where it is no ensemble.

        >>> from paretorch import Quantize
        >>> both = Ensemble(tuple(Recipe((Quantize("fc", bits),)).to_json() for bits in (4, 8)))
        >>> Recipe((both,)).describe()
        '2 networks: weights 4 bit; weights 8 bit'
        """
        return [Recipe.from_json(text) for step in self.of(Ensemble) for text in step.members] or [self]

    def describe(self) -> str:
        """One line for people."""
        if self.of(Ensemble):
            networks = [network.describe() for network in self.networks()]
            return f"{len(networks)} networks: {'; '.join(_short(text) for text in networks)}"
        present = ((technique, self.of(technique.step)) for technique in TECHNIQUES)
        words = [text for technique, steps in present if steps for text in technique.describe(steps)]
        return ", ".join(words) or "untouched"

    def diff(self, other: Recipe) -> str:
        """What `other` has that this has not (`+`), and the reverse (`-`), one step a line."""
        mine, theirs = set(self.steps), set(other.steps)
        lines = [f"- {s}" for s in self.steps if s not in theirs] + [f"+ {s}" for s in other.steps if s not in mine]
        return "\n".join(lines)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
