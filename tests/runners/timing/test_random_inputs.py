"""Made-up inputs: what the file says, what is asked for, and what does not fit."""

from types import SimpleNamespace

import numpy as np
import pytest

from paretorch.errors import ConfigError
from paretorch.runners.timing.random_inputs import feed, parse_shapes


def entry(name, *shape, kind="float"):
    return SimpleNamespace(name=name, shape=list(shape), type=f"tensor({kind})")


IMAGE = entry("input", "batch", 3, 8, 8)
TOKENS = entry("ids", "batch", "sequence", kind="int64")


@pytest.mark.parametrize(
    ("one", "batch", "shapes", "expected"),
    [
        (IMAGE, None, {}, (1, 3, 8, 8)),
        (IMAGE, 5, {}, (5, 3, 8, 8)),
        (IMAGE, None, {"input": (2, 3, 8, 8), "other": (1,)}, (2, 3, 8, 8)),
        (IMAGE, 2, {"input": (2, 3, 8, 8)}, (2, 3, 8, 8)),
        (TOKENS, None, {"ids": (1, 128)}, (1, 128)),
        (entry("fixed", 4, 2), None, {}, (4, 2)),
        (entry("fixed", 4, 2), 4, {}, (4, 2)),
        (entry("scalar"), 4, {}, ()),
        (entry("nameless", None, 2), 3, {}, (3, 2)),
    ],
)
def test_shapes(one, batch, shapes, expected):
    assert feed([one], batch, shapes, 0)[one.name].shape == expected


@pytest.mark.parametrize(
    ("one", "batch", "shapes", "told"),
    [
        (TOKENS, None, {}, "open beyond the batch: say what N is with --shape ids=1,N"),
        (IMAGE, None, {"input": (1, 3, 9, 9)}, "which the shape 1,3,9,9 does not fit"),
        (IMAGE, None, {"input": (1, 3)}, "which the shape 1,3 does not fit"),
        (IMAGE, 4, {"input": (2, 3, 8, 8)}, "is not of batch 4; leave one out"),
        (entry("fixed", 4, 2), 3, {}, "its batch is fixed, and --batch 3 does not fit"),
        (
            entry("words", 1, kind="string"),
            None,
            {},
            "is of type tensor\\(string\\), for which no input can be made up",
        ),
    ],
)
def test_what_does_not_fit(one, batch, shapes, told):
    with pytest.raises(ConfigError, match=told):
        feed([one], batch, shapes, 0)


def test_all_that_does_not_fit_at_once():
    with pytest.raises(ConfigError) as caught:
        feed([TOKENS, IMAGE, entry("mask", "batch", "sequence")], None, {}, 0)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("kind", "dtype", "low", "high"),
    [
        ("float", np.float32, -9, 9),
        ("float16", np.float16, -9, 9),
        ("double", np.float64, -9, 9),
        ("uint8", np.uint8, 0, 255),
        ("int64", np.int64, 0, 1),
        ("int8", np.int8, 0, 1),
        ("bool", np.bool_, 0, 1),
    ],
)
def test_types(kind, dtype, low, high):
    found = feed([entry("x", 200, kind=kind)], None, {}, 0)["x"]
    assert found.dtype == dtype
    assert low <= found.min() < found.max() <= high


def test_the_seed_says_what_is_drawn():
    one, same, other = (feed([IMAGE], None, {}, seed)["input"] for seed in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).any()


def test_written_shapes():
    assert parse_shapes(["input=1,3,224,224", "a=b=2x4"]) == {"input": (1, 3, 224, 224), "a=b": (2, 4)}
    with pytest.raises(ConfigError) as caught:
        parse_shapes(["input", "input=1,0", "input=1,-3", "=1", "ok=1", "input=1,,2"])
    assert len(caught.value.problems) == 5
