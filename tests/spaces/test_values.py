"""What a value may be, said once for spaces and configurations."""

import pytest

from paretorch.errors import RecipeError
from paretorch.spaces.values import Either, Entry, Flag, Number, OneOf, Settings, Text, possible


def short(text):
    if len(text) > 3:
        raise RecipeError(f"{text!r} is too long")


@pytest.mark.parametrize(
    ("value", "good", "bad"),
    [
        (Number(above=0, most=1), (0.5, 1, 1.0), (0, 1.1, True, "1", None, float("nan"))),
        (Number(least=0, below=1), (0, 0.0, 0.99), (1, -0.1, float("inf"))),
        (Number(least=0, whole=True), (0, 7), (1.0, -1, False)),
        (OneOf((2, 4)), (2, 4), (3, 4.0, "4", None)),
        (OneOf((1, 2)), (1,), (True,)),
        (OneOf(("a", "b")), ("a",), ("c", 0)),
        (Flag(), (True, False), (0, 1, "true")),
        (Text(short), ("abc", ""), ("abcd", 3)),
        (Either(Number(above=0), Text(short), lambda value: isinstance(value, str)), (1, "abc"), (0, "abcd")),
        (Settings("S", "", (Entry("x", Flag(), ""),)), (), ({}, {"x": True})),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_choice_is_possible_or_not(value, good, bad):
    assert [choice for choice in good if not possible(value, choice)] == []
    assert [choice for choice in bad if possible(value, choice)] == []
