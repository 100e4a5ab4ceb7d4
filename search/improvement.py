"""Expected hypervolume improvement (Emmerich et al. 2006): by how much a recipe is expected to enlarge the front.

The hypervolume is the volume that the front dominates, up to a reference point. Objectives that can be computed enter
as numbers, modelled ones as a few weighted values (a quadrature over their normal posteriors), and the probability of
keeping the limits and of not failing is a factor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache

import numpy as np
from scipy.special import ndtri

from .gaussian import Floats, Ints, Model

_DIRECTIONS = 256  # directions of scalarization, for three and more objectives


def feasibility(
    pool: Ints, models: Mapping[str, Model], excesses: Mapping[str, Floats], limits: Iterable[str]
) -> tuple[Floats, Floats]:
    """By row of the pool, the probability that it keeps all limits and does not fail, and its expected excess.

    Args:
        pool: `[rows, axes]`, recipes.
        models: Models by name, those of limits as `limit NAME`, that of failures as `failure`.
        excesses: The computed excesses by limit; a limit is kept when its excess is at most 0.
        limits: The names of all limits.
    """
    probability, excess = np.ones(len(pool)), np.zeros(len(pool))
    for name in limits:
        if name in excesses:
            probability *= excesses[name] <= 0
            excess += np.maximum(excesses[name], 0)
        elif f"limit {name}" in models:
            inside, expected = models[f"limit {name}"].probability_below(pool, 0.0)
            probability *= inside
            excess += np.maximum(expected, 0)
    if "failure" in models:
        probability *= 1 - np.clip(models["failure"].predict(pool)[0], 0, 0.99)
    return probability, excess


def expected_improvement(
    pool: Ints,
    models: Mapping[str, Model],
    objectives: Mapping[int, Floats],
    noisy: Collection[str],
    front: Floats,
    reference: Floats,
) -> Floats:
    """The expected hypervolume improvement of each row of the pool.

    Args:
        pool: `[rows, axes]`, recipes.
        models: Models by name, those of objectives as `objective POSITION`.
        objectives: The computed losses by position.
        noisy: Names of the models whose noise is measurement noise, so that a lucky measurement is no improvement.
        front: `[members, objectives]`, the losses of the front.
        reference: The point up to which the hypervolume is counted.
    """
    modelled = [name for name in sorted(models) if name.startswith("objective")]
    nodes, weights = quadrature(len(modelled))
    samples = []
    for position in range(len(reference)):
        name = f"objective {position}"
        if position in objectives:
            samples.append(np.repeat(objectives[position][:, None], len(weights), axis=1))
        elif name in models:
            samples.append(models[name].quantiles(pool, nodes[modelled.index(name)], name not in noisy))
        else:  # never measured yet: the same for all rows
            samples.append(np.full((len(pool), len(weights)), reference[position] - 1.0))
    return np.asarray(hypervolume_improvement(samples, front, reference) @ weights)


def hypervolume_improvement(samples: Sequence[Floats], front: Floats, reference: Floats) -> Floats:
    """By how much each sample would enlarge the hypervolume: `[rows, samples]`.

    Exact for one and two objectives. For more it is the mean over random directions of the scalarization whose mean is
    the hypervolume (Zhang & Golovin 2020), up to a constant factor.

    Args:
        samples: By objective `[rows, samples]`, losses.
        front: `[members, objectives]`, nondominated losses.
        reference: The point up to which the hypervolume is counted.

    >>> hypervolume_improvement([np.array([[0.5]]), np.array([[0.5]])], np.array([[0.25, 0.75]]), np.array([1.0, 1.0]))
    array([[0.125]])
    """
    front = front[(front < reference).all(1)]
    if len(reference) == 1:
        best = front.min() if len(front) else reference[0]
        return np.asarray(np.maximum(best - samples[0], 0.0))
    if len(reference) == 2:
        return _two_objectives(samples, front, reference)
    return _scalarized(samples, front, reference)


def _two_objectives(samples: Sequence[Floats], front: Floats, reference: Floats) -> Floats:
    """Exactly, strip by strip between neighbouring members of the front."""
    front = front[np.argsort(front[:, 1])]
    edges = np.concatenate([[-np.inf], front[:, 1], [reference[1]]])
    heights = np.concatenate([[reference[0]], front[:, 0]])
    total = np.zeros(samples[0].shape)
    for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
        width = np.maximum(high - np.maximum(samples[1], low), 0.0)
        total += width * np.maximum(height - samples[0], 0.0)
    return total


def _scalarized(samples: Sequence[Floats], front: Floats, reference: Floats) -> Floats:
    """The mean over directions of the growth of the best length in that direction, to the power of the dimensions."""
    # Objectives have different units (bytes and shares, say), so each is scaled by the range that the front spans.
    ideal = np.min([*front, [sample.min() for sample in samples]], axis=0)
    unit = np.where(reference > ideal, reference - ideal, 1.0)
    front, reference, samples = front / unit, reference / unit, [s / u for s, u in zip(samples, unit, strict=True)]
    directions = _directions(len(reference))
    best = np.zeros(_DIRECTIONS)
    if len(front):
        best = ((reference - front)[:, None, :] / directions).min(2).max(0)
    room = [r - sample for r, sample in zip(reference, samples, strict=True)]
    total = np.zeros(samples[0].shape)
    for inverse, reached in zip(1 / directions, best, strict=True):
        length = room[0] * inverse[0]
        for left, factor in zip(room[1:], inverse[1:], strict=True):
            np.minimum(length, left * factor, out=length)
        np.maximum(length, reached, out=length)
        volume = length.copy()
        for _ in reference[1:]:  # np.power takes ten times as long
            volume *= length
        total += volume - reached ** len(reference)
    return total / _DIRECTIONS


@cache
def quadrature(dimensions: int) -> tuple[Floats, Floats]:
    """Nodes `[dimensions, nodes]` and weights that stand for independent standard normal variables.

    Nine nodes of Gauss-Hermite quadrature for one variable, a Latin hypercube sample of 16 for more.
    """
    if dimensions <= 1:
        points, weights = np.polynomial.hermite_e.hermegauss(9)
        return points[None], weights / weights.sum()
    random, count = np.random.default_rng(0), 16
    quantiles = ndtri((np.arange(count) + 0.5) / count)
    return np.stack([random.permutation(quantiles) for _ in range(dimensions)]), np.full(count, 1 / count)


@cache
def _directions(dimensions: int) -> Floats:
    """Random unit vectors of positive components, none of which is close to zero."""
    directions = np.abs(np.random.default_rng(0).standard_normal((_DIRECTIONS, dimensions))) + 1e-3
    return np.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))
