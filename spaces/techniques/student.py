"""Another network in place of the teacher, or the teacher without whole residual blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...errors import RecipeError
from ..plain import later
from ..rules import Axis
from ..steps import Step, Steps
from ..structure import Structure
from ..values import NOT_NEGATIVE, POSITIVE, Either, Entry, Number, Settings, Text
from .recover import Recover
from .technique import Choices, Encoding, Key, Technique

STUDENT = re.compile(r"[\w.-]+", re.ASCII)  # what a student may be called; "teacher" is the network itself


@dataclass(frozen=True)
class Student(Step):
    """A network in place of the teacher: without whole residual blocks, or another architecture.

    drop: the blocks that are left out, by module name; the others keep their weights. factory: the name of a network
    that the task makes (`Task.students`); all other steps of the recipe, blocks to drop included, then refer to its
    layers. epochs: how long it is trained before all other steps, taught by the original network as `Recover` does, 0
    for one that comes trained; learning_rate: the highest of this training.
    """

    removes: ClassVar[bool] = True

    drop: tuple[str, ...] = ()
    factory: str = later("")
    epochs: float = later(0.0)
    learning_rate: float = later(0.05)

    @property
    def training(self) -> Recover | None:
        """The training before all other steps."""
        return Recover("finetune", self.epochs, self.learning_rate) if self.epochs else None


def dropped(recipe: Steps) -> tuple[str, ...]:
    """The blocks that a recipe leaves out."""
    return tuple(name for step in recipe.of(Student) for name in step.drop)


def _check(step: Student) -> None:
    if not step.drop and not step.factory:
        raise RecipeError("student: it leaves out no block and names no factory; leave the step out instead")
    if step.epochs < 0 or step.learning_rate <= 0 or (step.epochs and not step.factory):
        raise RecipeError(
            f"student {step.factory or '(the network itself)'}: epochs {step.epochs}, "
            f"learning_rate {step.learning_rate}; epochs >= 0, and only of a factory's network, learning_rate > 0"
        )


def _describe(steps: Sequence[Student]) -> list[str]:
    words = [
        f"student {step.factory}" + (f" ({step.epochs:g} epochs)" if step.epochs else "")
        for step in steps
        if step.factory
    ]
    drop = [name for step in steps for name in step.drop]
    return [*words, f"without {' '.join(drop)}"] if drop else words


def _fits(step: Student, recipe: Steps, structure: Structure) -> list[str]:
    return [f"block {name!r} cannot be left out here" for name in step.drop if name not in structure.blocks]


def _space_problems(space: Any) -> list[str]:
    problems = []
    if any(student is not None and (not student.factory or student.drop) for student in space.students):
        problems.append("students: a student is Student(factory=NAME); which blocks are left out is `depth`")
    names = [student.factory if student else "the network itself" for student in space.students]
    return problems + [f"students: {name} twice" for name in sorted({name for name in names if names.count(name) > 1})]


def blocks(structure: Structure, depth: int) -> tuple[str, ...]:
    """The blocks that a choice of depth leaves out, sorted."""
    return tuple(sorted(structure.blocks[:depth]))


def _steps(space: Any, choices: Choices) -> list[Step]:
    student, drop = choices.network.get("student"), blocks(choices.structure, choices.network["depth"])
    return [replace(student or Student(), drop=drop)] if drop or student else []


def _student_axes(key: Key, entries: Any, structure: Structure, idle: dict[str, str]) -> Iterable[Axis]:
    return [Axis("student", "student", (), entries, None)] if entries else []


def _depth_axes(key: Key, entries: Any, structure: Structure, idle: dict[str, str]) -> Iterable[Axis]:
    choices = tuple(depth for depth in entries if depth <= len(structure.blocks)) or (0,)
    return [Axis("depth", "depth", structure.blocks, choices)]


def _chosen_student(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    named = [replace(step, drop=()) for step in of.recipe.of(Student) if step.factory]
    return {named[0] if named else None}


def _chosen_depth(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    return {len(dropped(of.recipe))}


def _name(text: str) -> None:
    if not STUDENT.fullmatch(text):
        raise RecipeError(f"student {text!r}: use letters, digits and -_. only, as in Task(students={{...}})")


def _read(choice: str | Mapping[str, Any]) -> Student | None:
    if isinstance(choice, str):
        return None if choice == "teacher" else Student(factory=choice)
    return Student((), choice["name"], choice["epochs"], choice["learning_rate"])


TRAINED = Settings(
    "StudentConfig",
    "A student that is trained before the trials.",
    (
        Entry("name", Text(_name), "Its name in `Task(students={...})`. Required."),
        Entry(
            "epochs",
            NOT_NEGATIVE,
            "Passes over the training data, once, before all trials, taught by the original network. "
            "Default: 0, it comes trained.",
            0.0,
        ),
        Entry("learning_rate", POSITIVE, "Highest learning rate of this training. Default: 0.05.", 0.05),
    ),
)
DEPTH = Key(
    "depth",
    Number(least=0, whole=True),
    "How many residual blocks may be left out, the least important first. Default: [0], none.",
    _chosen_depth,
    allowed="whole numbers of blocks, 0 or more",
    default=(0,),
    axes=_depth_axes,
)
STUDENTS = Key(
    "students",
    Either(
        Text(_name),
        TRAINED,
        lambda value: not isinstance(value, str),
        "must be teacher, the name of a student, or {name: small, epochs: 8}",
    ),
    "Networks to begin with: `teacher`, the network itself; names of networks that the task makes "
    "(`Task(students={...})`), or\n{name: small, epochs: 8} for one that is first trained. All other keys "
    "apply to each "
    "of them; a pattern has to select\nsomething in one of them. Default: the network itself alone.",
    _chosen_student,
    own=True,
    read=_read,
    axes=_student_axes,
    axis_kind="student",
)
TECHNIQUE = Technique(
    Student,
    check=_check,
    describe=_describe,
    fits=_fits,
    keys=(DEPTH, STUDENTS),
    space_problems=_space_problems,
    network_steps=_steps,
)
