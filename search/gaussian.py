"""A Gaussian process over recipes, written as rows of choice positions.

The kernel is a sum of four parts:

- a constant;
- the additive part: for every axis a few fixed functions of its choices (`Curves`) with normal weights, and once more
  for all axes of one kind together, since these (the bits of all layers, say) are expected to behave alike;
- smooth interactions: a squared exponential kernel of the whole row, in which each axis is scaled to one;
- pair interactions: an independent number for every pair of choices of two axes, which need not be smooth.

Observations have independent noise. The five hyperparameters (sizes, one length scale, the noise) are the maximum of
the posterior density under log-normal priors. A loss is modelled on a logarithmic scale (`Warp`): a network tolerates
compression for long and then breaks, and on that scale the breaking is about linear.

The pair interactions are what finds the last members of a front where losses do not add up: on synthetic problems with
random interactions a smooth kernel alone ranked the missing recipes hardly better than chance. Tried in their place and
no better: a rougher kernel (Matern 1/2 and 3/2), one of several length scales (rational quadratic), and a warp that
stretches small losses less.

References: Rasmussen & Williams (2006), Gaussian Processes for Machine Learning; Duvenaud et al. (2011), Additive
Gaussian processes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_TRAINING_ROWS = 192  # a model is fitted to at most so many trials: most of them the best, and some others
MAX_PAIR_CHOICES = 16  # an axis of more choices has no pair interactions: neighbouring choices are much alike
_BLOCK = 96  # rows predicted at once: larger arrays leave the processor's cache, and need fresh memory pages
_COMMON = 4.0  # prior deviation of the weights that axes of one kind share, in units of the deviation of an axis's own
_CONSTANT = 4.0  # prior variance of the constant, in units of the variance of the observations
# The hyperparameters, as logarithms: size of the curves, size and length scale of the smooth interactions, noise, size
# of the pair interactions. Means and deviations of their normal priors, and bounds for the optimizer.
_PRIOR = np.array([0.0, -1.0, -1.0, -2.0, -1.0])
_PRIOR_WIDTH = np.array([1.0, 1.0, 0.7, 1.0, 1.0])
_BOUNDS = [(-3.0, 3.0), (-5.0, 2.0), (-3.0, 1.0), (-4.0, 0.0), (-5.0, 2.0)]


@dataclass(frozen=True)
class Conditions:
    """Which axes are conditional: such an axis is active only where its parent axis has a certain choice.

    Attributes:
        parents: By axis the position of its parent axis, -1 for an axis that is always active.
        choices: By axis the position of the parent's choice at which it is active.
    """

    parents: Ints
    choices: Ints

    @classmethod
    def of(cls, names: Sequence[str], conditions: Mapping[str, tuple[str, int]]) -> Conditions | None:
        """From `{axis: (parent, position of the parent's choice)}`; None when every axis is always active."""
        pairs = [conditions.get(name, ("", 0)) for name in names]
        parents = np.array([names.index(parent) if parent in names else -1 for parent, _ in pairs], dtype=np.int64)
        choices = np.array([choice for _, choice in pairs], dtype=np.int64)
        return cls(parents, choices) if (parents >= 0).any() else None

    def active(self, rows: Ints) -> NDArray[np.bool_]:
        """`[rows, axes]`: whether an axis is active in a row."""
        return np.asarray((self.parents < 0) | (rows[:, self.parents] == self.choices))

    def free(self, row: Ints) -> Ints:
        """The axes that are active in a row and no parent of another axis."""
        free = self.active(row[None])[0]
        free[self.parents[self.parents >= 0]] = False
        return np.flatnonzero(free)


@dataclass(frozen=True)
class Curves:
    """The features of a recipe: fixed functions of one axis each, tabulated over the choices of all axes in turn.

    Attributes:
        table: `[functions, choices]`; the first function rises linearly from -0.5 to 0.5.
        starts: By axis the column of `table` at which its choices begin.
        few: The axes that have pair interactions.
        common: `[axes, kinds]`, the matrix that sums the functions of the axes of one kind.
        conditions: Which axes are conditional; where an axis is inactive its features and its pair interactions are
            zero.
    """

    table: Floats
    starts: Ints
    few: Ints
    common: Floats
    conditions: Conditions | None = None

    @classmethod
    def make(
        cls,
        counts: Ints,
        priors: Sequence[Sequence[float] | None],
        kinds: Sequence[Hashable],
        conditions: Conditions | None = None,
        max_pair_choices: int = MAX_PAIR_CHOICES,
    ) -> Curves:
        """The functions for axes with so many choices each.

        Args:
            counts: The number of choices by axis.
            priors: By axis a number per choice that becomes one more function (a measured sensitivity), or None.
            kinds: By axis what it decides; axes of equal kinds are expected to behave alike.
            conditions: Which axes are conditional.
            max_pair_choices: Axes of more choices have no pair interactions.
        """
        starts = np.cumsum(counts) - counts
        place = (np.arange(counts.sum()) - starts.repeat(counts)) / np.maximum(counts - 1, 1).repeat(counts)
        down = 1 - place
        rows = [place - 0.5, down**2 - 1 / 3, down**4 - 1 / 5]
        if any(prior is not None for prior in priors):
            sensitivities = np.zeros(len(place))
            for start, count, prior in zip(starts, counts, priors, strict=True):
                if prior is not None:
                    sensitivities[start : start + count] = prior
            rows.append(3 * sensitivities / (float(np.abs(sensitivities).max()) or 1.0))
        several = [kind for kind, amount in Counter(kinds).items() if amount > 1]
        common = np.array([[kind == other for other in several] for kind in kinds], dtype=float)
        common *= _COMMON / np.sqrt(common.sum(0))
        few = np.flatnonzero(counts <= max_pair_choices)
        return cls(np.stack(rows) / math.sqrt(len(counts)), starts, few, common, conditions)

    @cached_property
    def counts(self) -> Ints:
        """The number of choices by axis."""
        return np.diff(self.starts, append=self.table.shape[1])

    def features(self, picks: Ints) -> Floats:
        """`[functions, rows, axes + kinds]`: the functions of each axis, and their sums over the axes of one kind."""
        own = self.table.take(picks + self.starts, axis=1)
        if self.conditions is not None:
            own *= self.conditions.active(picks)
        return np.concatenate([own, own @ self.common], axis=2)

    def one_hot(self, picks: Ints) -> NDArray[np.float32] | None:
        """`[rows, choices]` of the axes with pair interactions, None when there are no such axes.

        Scaled so that the product of two rows is the share of these axes at which they have the same choice.
        """
        if not len(self.few):
            return None
        counts = self.counts[self.few]
        width = int(counts.sum())
        places = picks[:, self.few] + np.cumsum(counts) - counts + width * np.arange(len(picks))[:, None]
        encoded = np.zeros(len(picks) * width, dtype=np.float32)
        share: Floats | float = 1 / math.sqrt(len(self.few))
        if self.conditions is not None:
            active = self.conditions.active(picks)[:, self.few]
            share = (active / np.sqrt(np.maximum(active.sum(1, keepdims=True), 1))).ravel()
        encoded[places.ravel()] = share  # assigning by one flat index is faster than by two
        return encoded.reshape(len(picks), width)

    def sums(self, weights: Floats) -> list[Floats]:
        """By axis, what each choice adds to the features' weighted sum; weights `[functions, axes + kinds]`."""
        axes = len(self.starts)
        own = weights[:, :axes] + weights[:, axes:] @ self.common.T
        return np.split((self.table * own.repeat(self.counts, axis=1)).sum(0), self.starts[1:])


class Model:
    """The posterior of one objective or limit, given the recipes evaluated so far.

    Where the evaluation is deterministic, the noise stands for what the kernel cannot express: a recipe that came out
    better than predicted stays better. Predictions therefore include the noise unless told otherwise.

    Args:
        curves: The features of recipes.
        picks: `[rows, axes]`, the recipes.
        column: `[rows]`, what was measured.
        warped: Whether to model the column on the logarithmic scale of `Warp`.
        hyperparameters: Five logarithms, as `fit_hyperparameters` returns them.
    """

    def __init__(self, curves: Curves, picks: Ints, column: Floats, warped: bool, hyperparameters: Floats) -> None:
        self.curves, self.hyperparameters, self.warped = curves, hyperparameters, warped
        self.picks, self.column = picks, column
        self.features, self.one_hot = curves.features(picks), curves.one_hot(picks)
        self.warp = Warp(column) if warped else Warp(None)
        self.target, self.mean, self.scale = _standardized(self.warp.forward(column))
        linear, squares = _products(self.features, self.features, picks.shape[1])
        covariance = _covariance(linear, squares, _overlap(self.one_hot, self.one_hot), hyperparameters)
        covariance[np.diag_indices(len(picks))] += math.exp(2 * hyperparameters[3])
        self.factor = np.linalg.cholesky(covariance)
        self.alpha = cho_solve((self.factor, True), self.target)

    @staticmethod
    def fit_hyperparameters(curves: Curves, picks: Ints, column: Floats, warped: bool) -> Floats:
        """The hyperparameters of greatest posterior density, by L-BFGS-B in at most 15 iterations."""
        target, _, _ = _standardized(Warp(column if warped else None).forward(column))
        features = curves.features(picks)
        linear, squares = _products(features, features, picks.shape[1])
        one_hot = curves.one_hot(picks)
        overlap = _overlap(one_hot, one_hot)
        diagonal = np.diag_indices(len(picks))

        def negative_log_posterior(hyperparameters: Floats) -> float:
            covariance = _covariance(linear, squares, overlap, hyperparameters)
            covariance[diagonal] += np.exp(2 * hyperparameters[3])
            factor = np.linalg.cholesky(covariance)
            part = solve_triangular(factor, target, lower=True)
            prior = (((hyperparameters - _PRIOR) / _PRIOR_WIDTH) ** 2).sum() / 2
            return float(part @ part / 2 + np.log(np.diag(factor)).sum() + prior)

        result = minimize(negative_log_posterior, _PRIOR, method="L-BFGS-B", bounds=_BOUNDS, options={"maxiter": 15})
        return np.asarray(result.x)

    def predict(self, picks: Ints, include_noise: bool = True) -> tuple[Floats, Floats]:
        """Posterior mean and deviation of each row, on the warped scale."""
        blocks = [self._predict(picks[i : i + _BLOCK], include_noise) for i in range(0, len(picks), _BLOCK)]
        mean, deviation = np.concatenate(blocks, axis=1)
        return mean, deviation

    def _predict(self, picks: Ints, include_noise: bool) -> tuple[Floats, Floats]:
        features = self.curves.features(picks)
        overlap = _overlap(self.curves.one_hot(picks), self.one_hot)
        linear, squares = _products(features, self.features, picks.shape[1])
        cross = _covariance(linear, squares, overlap, self.hyperparameters)
        curve, joint, _, noise, pairs = np.exp(2 * self.hyperparameters)
        own = _CONSTANT + 10 * curve * np.einsum("fra,fra->r", features, features) + joint + noise * include_noise
        own += pairs * (len(self.curves.few) > 0)
        mean = self.mean + self.scale * (cross @ self.alpha)
        explained = solve_triangular(self.factor, cross.T, lower=True, overwrite_b=True, check_finite=False)
        variance = np.maximum(own - np.einsum("ij,ij->j", explained, explained), 1e-9)
        return mean, self.scale * np.sqrt(variance)

    def probability_below(self, picks: Ints, bound: float) -> tuple[Floats, Floats]:
        """The probability that each row's true value is at most `bound`, without noise, and the row's median."""
        mean, deviation = self.predict(picks, include_noise=False)
        median = self.warp.backward(mean)
        if not self.warp.covers(bound):
            return np.zeros(len(picks)), median
        return ndtr((self.warp.forward(np.array(bound)) - mean) / deviation), median

    def with_predicted(self, picks: Ints) -> Model:
        """The model as if these rows had come out as predicted (kriging believer, Ginsbourger et al. 2010)."""
        believed = self.warp.backward(self.predict(picks)[0])
        rows, column = np.concatenate([self.picks, picks]), np.concatenate([self.column, believed])
        return Model(self.curves, rows, column, self.warped, self.hyperparameters)

    def quantiles(self, picks: Ints, nodes: Floats, include_noise: bool = True) -> Floats:
        """`[rows, nodes]`: the values so many deviations away from the mean, in the unit of the observations."""
        mean, deviation = self.predict(picks, include_noise)
        return self.warp.backward(mean[:, None] + deviation[:, None] * nodes)

    def additive(self, random: np.random.Generator | None) -> list[Floats]:
        """By axis, what each choice adds to the warped loss: the posterior mean, or a sample of it.

        The sample is drawn by Matheron's rule: a sample of the prior, corrected by what it misses at the observations.
        """
        size = math.sqrt(10) * math.exp(self.hyperparameters[0])
        functions, _, columns = self.features.shape
        weights, alpha = np.zeros((functions, columns)), self.alpha
        if random is not None:
            weights = size * random.standard_normal((columns, functions)).T
            joint, noise, pairs = np.exp(2 * self.hyperparameters[[1, 3, 4]])
            rest = math.sqrt(joint + noise + pairs * (len(self.curves.few) > 0))
            other = rest * random.standard_normal(len(self.target)) + math.sqrt(_CONSTANT) * random.standard_normal()
            alpha = cho_solve((self.factor, True), self.target - np.einsum("fra,fa->r", self.features, weights) - other)
        weights = weights + size**2 * (alpha @ self.features)
        return self.curves.sums(weights)


class Warp:
    """The logarithm of a loss's distance to the best one seen, plus 0.3 of the median distance; for None the identity.

    The added distance keeps the logarithm finite at the best loss.
    """

    def __init__(self, column: Floats | None) -> None:
        self.best = self.offset = 0.0
        if column is not None and len(column):
            self.best = float(column.min())
            self.offset = 0.3 * float(np.median(column - self.best)) or 0.3 * float((column - self.best).mean())

    def covers(self, value: float) -> bool:
        """Whether `forward` is defined for a value: not for one far better than the best one seen."""
        return self.offset <= 0 or value - self.best + self.offset > 0

    def forward(self, values: Floats) -> Floats:
        """From the unit of the observations to the warped scale."""
        return np.log(values - self.best + self.offset) if self.offset > 0 else values

    def backward(self, values: Floats) -> Floats:
        """From the warped scale to the unit of the observations."""
        return np.exp(np.minimum(values, 50.0)) - self.offset + self.best if self.offset > 0 else values


def training_rows(column: Floats, most: int = MAX_TRAINING_ROWS) -> Ints:
    """The rows to fit a model to: all, or the best three quarters of `most` and a regular selection of the others."""
    if len(column) <= most:
        return np.arange(len(column))
    order = np.argsort(column, kind="stable")
    best = most * 3 // 4
    others = order[best:][np.linspace(0, len(order) - best - 1, most - best).astype(int)]
    return np.sort(np.concatenate([order[:best], others]))


def _standardized(raw: Floats) -> tuple[Floats, float, float]:
    """The values minus their mean, divided by their deviation; the mean and the deviation."""
    mean, scale = float(raw.mean()), float(raw.std()) or 1.0
    return (raw - mean) / scale, mean, scale


def _products(features: Floats, others: Floats, axes: int) -> tuple[Floats, Floats]:
    """Scalar products of the features of two sets of rows, and squared distances between the rows.

    Distances are those of the first function of each axis, which is linear in the position of the choice.
    """
    linear = features[0] @ others[0].T
    for one, other in zip(features[1:], others[1:], strict=True):
        linear += one @ other.T
    here, there = features[0][:, :axes], others[0][:, :axes]
    squares = here @ there.T
    squares *= -2
    squares += (here**2).sum(1)[:, None]
    squares += (there**2).sum(1)
    return linear, squares


def _overlap(one_hot: NDArray[np.float32] | None, others: NDArray[np.float32] | None) -> Floats | None:
    """For two sets of rows, the shares of axes with equal choices; None when no axis has pair interactions."""
    return None if one_hot is None or others is None else (one_hot @ others.T).astype(float)


def _covariance(linear: Floats, squares: Floats, overlap: Floats | None, hyperparameters: Floats) -> Floats:
    """The kernel matrix without noise, from what `_products` and `_overlap` return.

    The square of the overlap is the covariance of a sum with an independent number for every pair of choices.
    """
    curve, joint, length, _, pairs = np.exp(2 * hyperparameters)
    covariance = squares * (-0.5 / length)
    # From here on in place: allocating another large array takes longer than filling it.
    np.exp(covariance, out=covariance)
    covariance *= joint
    covariance += 10 * curve * linear
    covariance += _CONSTANT
    if overlap is not None:
        covariance += pairs * overlap**2
    return np.asarray(covariance)
