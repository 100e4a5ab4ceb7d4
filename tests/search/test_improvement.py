"""Hypervolume improvement: against the hypervolume itself, with and without the new point."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretorch.objectives.pareto import hypervolume
from paretorch.search.improvement import hypervolume_improvement


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_an_improvement_is_what_the_hypervolume_grows_by(seed, members):
    random = np.random.default_rng(seed)
    points = random.uniform(0, 1.2, (members, 2))
    front = np.array([p for p in points if not any((q <= p).all() and (q < p).any() for q in points)]).reshape(-1, 2)
    new = random.uniform(-0.2, 1.2, (5, 2))
    gains = hypervolume_improvement([new[:, :1], new[:, 1:]], front, np.ones(2))[:, 0]
    before = hypervolume(front, (1, 1)) if members else 0.0
    for point, gain in zip(new, gains, strict=True):
        grown = hypervolume([*front, point], (1, 1)) - before
        assert gain == pytest.approx(grown, abs=1e-9)


@pytest.mark.parametrize("unit", [(1.0, 1.0, 1.0), (1.0, 1e6, 1e-3)], ids=["one unit", "shares, bytes, seconds"])
def test_with_three_objectives_it_ranks_like_the_hypervolume(unit):
    random, unit = np.random.default_rng(0), np.array(unit)
    front = random.uniform(0.2, 1, (6, 3))
    front = np.array([p for p in front if not any((q <= p).all() and (q < p).any() for q in front)])
    new = random.uniform(0, 0.6, (40, 3))
    gains = hypervolume_improvement([unit[i] * new[:, [i]] for i in range(3)], unit * front, unit)[:, 0]
    grown = [hypervolume([*front, point], (1, 1, 1)) - hypervolume(front, (1, 1, 1)) for point in new]
    assert np.corrcoef(gains, grown)[0, 1] > 0.99
