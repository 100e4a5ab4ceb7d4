"""Students as a choice of the space: one flat list of axes, of which those of the chosen network count."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretorch.errors import ConfigError, RecipeError
from paretorch.objectives.cost import FileOverhead, macs, many, size_bytes
from paretorch.spaces.defaults import reference_recipes
from paretorch.spaces.plain import plain
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.structure import Group, Layer, Structure
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.student import Student

TINY = Structure(
    (
        Layer("a", "conv", (8, 3, 3, 3), 27 * 8 * 64, True, "a"),
        Layer("b", "linear", (10, 8), 80, True, None, (("a", 8),)),
    ),
    (Group("a", 8, 4),),
    student="tiny",
)
DEEP = Structure(
    (
        Layer("a", "conv", (16, 3, 3, 3), 27 * 16 * 64, True, "a"),
        Layer("m", "conv", (16, 16, 3, 3), 9 * 256 * 64, True, "a", (("a", 16),)),
        Layer("b", "linear", (10, 16), 160, True, None, (("a", 16),)),
    ),
    (Group("a", 16, 4),),
    ("m",),
    student="deep",
)
WHOLE = replace(
    DEEP,
    layers=(*DEEP.layers[:2], replace(DEEP.layers[1], name="n"), DEEP.layers[2]),
    blocks=("n", "m"),
    students=(TINY, DEEP),
    student="",
)
SPACE = Space(
    weight_bits=(Rule((4, 8, 32)), Rule((8, 6), ("m", "n"), share=True)),
    activation_bits=(Rule((8, 32), share=True),),
    channels=(Rule((0.0, 0.5)),),
    width=(1.0, 0.5),
    depth=(0, 1),
    recovery=(None, Recover("batchnorm")),
    students=(None, Student(factory="tiny", epochs=3), Student(factory="deep")),
)


def picks_of(space, structure):
    return st.fixed_dictionaries({axis.name: st.integers(0, len(axis.choices) - 1) for axis in space.axes(structure)})


def test_every_network_has_axes_of_its_own_by_the_same_rules():
    names = [axis.name for axis in SPACE.axes(WHOLE)]
    assert len(set(names)) == len(names)
    assert (names[0], names[-1]) == ("student", "recovery")
    assert {
        "weight_bits/a",
        "tiny:weight_bits/a",
        "deep:weight_bits/a",
        "weight_bits/m+n",
        "deep:weight_bits/m+n",
    } <= set(names)
    assert "tiny:weight_bits/m+n" not in names
    alone = replace(SPACE, students=())
    assert [a.name for a in alone.axes(WHOLE)] == [a.name for a in SPACE.axes(WHOLE) if a.student in ("", None)][1:]


@settings(deadline=None, max_examples=150)
@given(picks_of(SPACE, WHOLE))
def test_only_the_chosen_networks_picks_count_and_encode_finds_them(picks):
    recipe = SPACE.recipe(WHOLE, picks)
    chosen = SPACE.students[picks["student"]]
    name = chosen.factory if chosen else ""
    assert [replace(s, drop=()) for s in recipe.of(Student) if s.factory] == ([chosen] if chosen else [])
    layers = {layer.name for layer in WHOLE.of(recipe).layers}
    assert {step.layer for step in recipe.of(Quantize)} <= layers
    other = {axis.name: 0 for axis in SPACE.axes(WHOLE) if axis.student not in (name, None)}
    assert SPACE.recipe(WHOLE, picks | other) == recipe
    found = SPACE.encode(WHOLE, recipe)
    assert found is not None
    assert set(found) == set(picks)
    assert all(found[axis] == 0 for axis in other)
    assert SPACE.recipe(WHOLE, found) == recipe


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_many_recipes_at_once_cost_what_each_does(seed):
    axes = SPACE.axes(WHOLE)
    overheads = {"": FileOverhead(1000, 10, 100), "tiny": FileOverhead(500, 7, 50), "deep": FileOverhead(800, 3, 20)}
    random = np.random.default_rng(seed)
    picks = random.integers(0, [len(axis.choices) for axis in axes], (30, len(axes)))
    found = many(WHOLE, axes, overheads[""], overheads)(picks)
    for row, size, operations in zip(picks, found["size_bytes"], found["macs"], strict=True):
        recipe = SPACE.recipe(WHOLE, {axis.name: int(pick) for axis, pick in zip(axes, row, strict=True)})
        name = next((step.factory for step in recipe.of(Student)), "")
        assert size == size_bytes(WHOLE, recipe, overheads[name])
        assert operations == macs(WHOLE, recipe)


def test_a_student_that_is_not_compressed_is_recovered_all_the_same():
    whole = {axis.name: len(axis.choices) - 1 for axis in SPACE.axes(WHOLE) if axis.kind == "weight_bits"}
    recipe = SPACE.recipe(WHOLE, whole | {"student": 1, "recovery": 1})
    assert recipe == Recipe((SPACE.students[1], Recover("batchnorm")))
    assert SPACE.recipe(WHOLE, whole | {"recovery": 1}).of(Student) == []


def test_a_student_alone_and_in_8_bits_are_trivial_baselines():
    found = dict(reference_recipes(SPACE, WHOLE))
    tiny = Student(factory="tiny", epochs=3)
    assert found["student tiny"].steps[0] == tiny
    assert {step.layer: step.weight_bits for step in found["student tiny, 8-bit"].of(Quantize)} == {"a": 8, "b": 8}
    untrained = replace(SPACE, recovery=(Recover("batchnorm"), Recover("finetune", 2)))
    assert dict(reference_recipes(untrained, WHOLE))["student deep"].of(Recover) == [Recover("finetune", 2)]
    assert dict(reference_recipes(untrained, WHOLE))["student tiny"].of(Recover)[0].epochs == 0, "it was trained before"


def test_a_pattern_has_to_select_something_in_one_of_the_networks():
    replace(SPACE, weight_bits=(Rule((4,), ("n",)),)).axes(WHOLE)
    with pytest.raises(ConfigError, match="pattern 'q' selects no layer"):
        replace(SPACE, weight_bits=(Rule((4,), ("q",)),)).axes(WHOLE)
    with pytest.raises(ConfigError, match="pattern 'n' selects no layer"):
        replace(SPACE, weight_bits=(Rule((4,), ("n",)),), students=SPACE.students[1:]).axes(WHOLE)


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ((None, Student(factory="large")), "student 'large': the task makes no such network"),
        ((Student(factory="tiny"), Student(factory="tiny", epochs=2)), "students: tiny twice"),
        ((Student(("m",)),), r"a student is Student\(factory=NAME\)"),
    ],
)
def test_impossible_students_are_refused(students, message):
    with pytest.raises(ConfigError, match=message):
        replace(SPACE, students=students).axes(WHOLE)


def test_a_space_without_students_is_written_as_before():
    assert "students" not in plain(replace(SPACE, students=()))


@pytest.mark.parametrize(
    "step", [Student(("m",), epochs=2), Student(factory="tiny", epochs=-1), Student(factory="tiny", learning_rate=0)]
)
def test_a_students_training_is_checked(step):
    with pytest.raises(RecipeError, match="epochs"):
        Recipe((step,))


def test_a_trained_student_is_told_and_read_back():
    recipe = Recipe((Student(factory="tiny", epochs=3), Prune("a", 4)))
    assert recipe.describe() == "student tiny (3 epochs), 1 group narrowed"
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert '"epochs"' not in Recipe((Student(factory="tiny"),)).to_json()
