"""Which layers a pattern selects."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretorch.spaces.rules import Rule, matches
from paretorch.spaces.structure import Layer, Structure

NETWORK = Structure(
    (
        Layer("stem", "conv", (16, 3, 3, 3), 1),
        Layer("blocks.0.conv1", "conv", (16, 16, 3, 3), 1),
        Layer("blocks.0.dw", "depthwise", (16, 1, 3, 3), 1),
        Layer("blocks.0.conv2", "conv", (16, 16, 3, 3), 1),
        Layer("fc", "linear", (10, 16), 1),
    )
)


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("first", {"stem"}),
        ("last", {"fc"}),
        ("linear", {"fc"}),
        ("depthwise", {"blocks.0.dw"}),
        ("conv", {"stem", "blocks.0.conv1", "blocks.0.conv2"}),
        ("grouped", set()),
        ("blocks.*", {"blocks.0.conv1", "blocks.0.conv2", "blocks.0.dw"}),
        ("blocks.0.conv[12]", {"blocks.0.conv1", "blocks.0.conv2"}),
        ("blocks", set()),
        ("STEM", set()),
    ],
)
def test_patterns(pattern, selected):
    assert {layer.name for layer in NETWORK.layers if matches(pattern, layer.name, NETWORK)} == selected


@given(st.text("abc.*?[]01", max_size=6), st.sampled_from(("a.0", "abc", "b.1.c")))
def test_any_other_pattern_is_a_glob(pattern, name):
    assert matches(pattern, name, NETWORK) == fnmatchcase(name, pattern)


def test_one_pattern_may_stand_without_a_tuple():
    """`("fc")` is a text in Python; its characters are no patterns."""
    assert Rule((4, 8), "fc") == Rule((4, 8), ("fc",))
    assert Rule([4, 8], ["fc"]) == Rule((4, 8), ("fc",))
    hash(Rule([4, 8], ["fc"]))
