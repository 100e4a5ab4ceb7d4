"""The model of recipes: what it learns from few of them, and what it says about the others."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretorch.search.gaussian import Curves, Model, Warp


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_the_warp_keeps_order_and_comes_back(values):
    column = np.array(values)
    warp = Warp(column)
    there = warp.forward(column)
    assert np.isfinite(there).all()
    assert (np.diff(there[np.argsort(column, kind="stable")]) >= 0).all()
    assert warp.backward(there) == pytest.approx(column, rel=1e-6, abs=1e-6)


def test_the_model_learns_an_additive_function():
    random = np.random.default_rng(0)
    counts = np.full(8, 5)
    picks = random.integers(0, 5, (120, 8))
    own = random.gamma(1.0, 1.0, 8)

    def loss(rows):
        return ((1 - rows / 4) ** 3 * own).sum(1)

    curves = Curves.make(counts, [None] * 8, [0] * 8)
    model = Model(curves, picks, loss(picks), False, Model.fit_hyperparameters(curves, picks, loss(picks), False))
    fresh = random.integers(0, 5, (200, 8))
    mean, deviation = model.predict(fresh)
    assert np.corrcoef(mean, loss(fresh))[0, 1] > 0.999
    assert (np.abs(mean - loss(fresh)) < 4 * deviation).mean() > 0.9
    table = model.additive(None)
    spans = np.array([row[0] - row[-1] for row in table])
    assert np.corrcoef(spans, own)[0, 1] > 0.99, "the layers that matter are the ones that it names"


def test_what_axes_have_in_common_is_learned_from_few_recipes():
    """Twenty axes that do the same, seven recipes: too few to know anything of each, but for those of like choices."""
    random = np.random.default_rng(0)
    counts = np.full(20, 6)
    picks, fresh = random.integers(0, 6, (7, 20)), random.integers(0, 6, (200, 20))

    def loss(rows):
        return ((1 - rows / 5) ** 2).sum(1)

    correlations = []
    for kinds in ([0] * 20, range(20)):
        curves = Curves.make(counts, [None] * 20, kinds)
        model = Model(curves, picks, loss(picks), False, Model.fit_hyperparameters(curves, picks, loss(picks), False))
        correlations.append(np.corrcoef(model.predict(fresh)[0], loss(fresh))[0, 1])
        spans = np.array([row[0] - row[-1] for row in model.additive(None)])
        assert len(correlations) == 2 or (spans > 0.3).all(), "each of the axes is worth something"
    assert correlations[0] > 0.95 > 0.75 > correlations[1]


def test_the_model_learns_pairs_of_choices_that_no_curve_describes():
    """Every pair of choices of two axes has a random number: the model tells unseen recipes apart by them."""
    random = np.random.default_rng(0)
    counts, pairs = np.full(5, 4), list(itertools.combinations(range(5), 2))
    tables = random.normal(0, 1, (len(pairs), 4, 4))
    everything = random.permutation(np.array(list(itertools.product(range(4), repeat=5))))
    picks, fresh = everything[:180], everything[180:]

    def loss(rows):
        return sum(table[rows[:, a], rows[:, b]] for table, (a, b) in zip(tables, pairs, strict=True))

    correlations = []
    for most in (16, 3):
        curves = Curves.make(counts, [None] * 5, [0] * 5, max_pair_choices=most)
        model = Model(curves, picks, loss(picks), False, Model.fit_hyperparameters(curves, picks, loss(picks), False))
        mean, deviation = model.predict(fresh)
        assert (np.abs(mean - loss(fresh)) < 3 * deviation).mean() > 0.95
        correlations.append(np.corrcoef(mean, loss(fresh))[0, 1])
    assert correlations[0] > 0.85 > 0.7 > correlations[1]


def test_only_axes_of_few_choices_take_part_in_pairs():
    curves = Curves.make(np.array([3, 40, 2]), [None] * 3, [0, 1, 1])
    one_hot = curves.one_hot(np.array([[0, 7, 1], [0, 39, 0], [2, 7, 0]]))
    assert one_hot @ one_hot.T == pytest.approx(np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]]))
    assert Curves.make(np.array([40, 40]), [None] * 2, [0] * 2).one_hot(np.zeros((1, 2), dtype=np.int64)) is None


@pytest.mark.parametrize("counts", [[40, 40, 40], [40, 3, 3]], ids=["many choices", "many and few"])
def test_a_recipe_that_was_seen_is_predicted_as_seen(counts):
    random = np.random.default_rng(0)
    picks = random.integers(0, counts, (30, 3))
    column = (picks / np.array(counts)).sum(1) + (picks[:, 1] == picks[:, 2])
    curves = Curves.make(np.array(counts), [None] * 3, [0, 1, 1])
    model = Model(curves, picks, column, False, np.array([0.0, -1.0, -3.0, -4.0, -1.0]))
    mean, deviation = model.predict(picks, include_noise=False)
    assert mean == pytest.approx(column, abs=0.05)
    assert (deviation < 0.05).all()
    assert (model.predict(random.integers(0, counts, (200, 3)), include_noise=False)[1] > 0.05).any()


def test_a_prior_is_worth_what_it_turns_out_to_be():
    """Sensitivities in the wrong unit and of irregular shape still tell the model where the losses are."""
    random = np.random.default_rng(1)
    counts, own = np.full(6, 6), random.gamma(0.5, 1.0, (6, 6))
    picks, fresh = random.integers(0, 6, (25, 6)), random.integers(0, 6, (200, 6))

    def loss(rows):
        return sum(own[axis][rows[:, axis]] for axis in range(6))

    errors = []
    for prior in ([None] * 6, [tuple(100 * row) for row in own]):
        curves = Curves.make(counts, prior, [0] * 6)
        model = Model(curves, picks, loss(picks), False, Model.fit_hyperparameters(curves, picks, loss(picks), False))
        errors.append(np.abs(model.predict(fresh)[0] - loss(fresh)).mean())
    assert errors[1] < 0.5 * errors[0]
