"""Layers, groups and blocks as plain data, and how many channels stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretorch.errors import RecipeError
from paretorch.spaces.structure import Group, Layer, Structure, inside, kept_channels


@given(st.integers(1, 2048), st.floats(0, 1), st.sampled_from((1, 2, 4, 8, 16)))
def test_kept_channels_is_a_multiple_or_all(channels, share, round_to):
    kept = kept_channels(channels, share, round_to)
    assert 1 <= kept <= channels
    assert kept == channels or kept % round_to == 0
    # Rounding moves it by half a step, except where it would be nothing.
    assert abs(kept - channels * share) <= max(round_to / 2, round_to if kept == round_to else 0) or kept == channels


@given(st.integers(1, 512), st.floats(0, 1), st.floats(0, 1), st.sampled_from((1, 4, 8)))
def test_a_larger_share_keeps_no_fewer(channels, one, two, round_to):
    low, high = sorted((one, two))
    assert kept_channels(channels, low, round_to) <= kept_channels(channels, high, round_to)
    assert kept_channels(channels, 1.0, round_to) == channels


@pytest.mark.parametrize(
    ("channels", "share", "round_to", "kept"),
    [
        (64, 0.5, 8, 32),
        (64, 0.75, 8, 48),
        (64, 0.0, 8, 8),
        (6, 0.5, 8, 6),
        (10, 1.0, 4, 10),
        (12, 1.0, 4, 12),
        (3, 0.01, 1, 1),
    ],
)
def test_kept_channels(channels, share, round_to, kept):
    assert kept_channels(channels, share, round_to) == kept


def test_inside_takes_whole_names():
    assert inside("layer1.2.conv1", ("layer1.2",))
    assert inside("layer1.2", ("layer1.2",))
    assert not inside("layer1.20.conv1", ("layer1.2",))
    assert not inside("layer1.2.conv1", ())


def test_an_unknown_name_is_a_recipe_error():
    """A bare StopIteration would end a generator without a word."""
    structure = Structure((Layer("fc", "linear", (10, 4), 40),), (Group("fc", 10, 1),))
    assert structure.layer("fc").params == 40
    assert structure.group("fc").channels == 10
    with pytest.raises(RecipeError, match="no layer 'conv'"):
        structure.layer("conv")
    with pytest.raises(RecipeError, match="no group of channels 'conv'"):
        structure.group("conv")
