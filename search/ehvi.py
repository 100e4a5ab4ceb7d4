"""An Optuna sampler for compression: a Bayesian model of the recipe, asked where the front would grow the most.

Recipes are vectors of ordered choices (bits, sparsities, widths). Their losses nearly add up over the layers, but not
quite, and not in the metric's own unit: a network holds out for long and then breaks. So

1. a loss is modelled on the logarithm of its distance to the best one seen, where the breaking is about linear;
2. the model is a Gaussian process: for every axis three curves over its choices whose sizes are learned (the additive
   part), and once more for all axes of the same choices together (bits of all layers), since these are expected to be
   alike; for what does not add up (the interactions) a smooth function of the whole vector, and a number for every pair
   of choices of two axes, which need not be smooth. Sensitivities, where they are known, are further curves, so that
   they count for what they turn out to be worth;
3. costs that arithmetic knows (bytes, MACs) are not modelled but computed;
4. the next recipe is the one with the greatest *expected hypervolume improvement* (Emmerich et al. 2006), among: the
   knapsack's decoding of the additive part (of its mean and of a sample of it, Thompson, in turn from suggestion to
   suggestion), mutations of the front and crossings between its members; and then, twice, the neighbours of the best
   of them.

The first recipes are the most costly, the cheapest, and two of the front there would be if all axes were alike: what
saves many bytes comes first, which even steps between the ends (tried before) do not see. The last of them is nearer to
the cheapest or to the most costly, whichever the third says the interesting part is next to.

With all 46,656 recipes of small networks known, this finds 99% of the true hypervolume in 20 to 30 evaluations and
needs no sensitivities for it (`benchmarks/search_quality.py`, which also compares what was tried instead).

The numbers of pairs are what finds the last of a front where losses do not add up: on made-up truths with drawn
interactions a smooth function alone ranked the recipes that were still missing hardly better than chance. Tried in their
place, and no better at ranking them: a rougher smooth function (Matern 1/2 and 3/2), one of several lengths (rational
quadratic), a warp that stretches small losses less. Nor is the pool to blame: the best of it was expected to improve the
front about as much as the best of all recipes.

A suggestion is a function of the seed and the finished trials alone, so that a study goes on after an interruption as
if there had been none. What is cached between suggestions only saves time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri
from threadpoolctl import ThreadpoolController

from ..objectives.pareto import nondominated
from .knapsack import front as knapsack_front
from .knapsack import hull

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# What arithmetic knows of recipes, given by axis the choices' positions: objectives by position, excesses by limit.
Known = Callable[[Mapping[str, Ints]], tuple[Mapping[int, Floats], Mapping[str, Floats]]]

# User attribute of a trial: the objectives (positions) and limits (names) that were not measured.
UNKNOWN = "paretorch:unknown"
MOST = 192  # trials that the model is fitted to: the nearest to the front, and some others
START = 4  # recipes from the cheapest to the most costly before the model is asked
_DIRECTIONS = 256  # of scalarisation, with three objectives and more
_MANY = 1000  # choices of all axes from which on the additive front's hull will do: it is dense, and quickly found
_LEVELS = 64  # choices at most that one axis may have
_APART = 16  # choices at most of an axis that takes part in pairs: of more, those next to each other are much alike
_BLOCK = 96  # rows predicted at once: larger arrays leave the cache, and fresh pages are asked for each
_COMMON = 4.0  # prior deviation of what the curves of like axes have in common, in units of an axis's own
_CONSTANT = 4.0  # prior variance of the mean, in units of the observations' own
# Logarithms of: the curves' size, the smooth interactions' size and length, the noise, the pairs' size. Means and
# deviations of their priors.
_PRIOR = np.array([0.0, -1.0, -1.0, -2.0, -1.0])
_PRIOR_WIDTH = np.array([1.0, 1.0, 0.7, 1.0, 1.0])
_BOUNDS = [(-3.0, 3.0), (-5.0, 2.0), (-3.0, 1.0), (-4.0, 0.0), (-5.0, 2.0)]


class EHVISampler(BaseSampler):
    """Expected hypervolume improvement over a model of recipes; for spaces of ordered choices, and several objectives.

    seed: of all random choices. known: what arithmetic knows of a recipe, for many at once. reference: the point, in
    the objectives' own units, that the hypervolume is counted from (the worst values seen when None). prior: by axis a
    number per choice, its predicted loss in any unit (sensitivities); other axes have none. noisy: positions of objectives
    that come out otherwise the next time (times), so that a lucky one is nothing to hope for. ladder: the name of an axis
    of effort, such as training, that others than the sampler climb: recipes are judged by what is expected of them at
    its last choice, and suggested at its first. conditions: by axis another axis and the position of the choice of that one at
    which it has an effect; where it has none it is suggested at its first choice. kinds: by axis what it decides, such as the
    bits of a layer: axes of one kind and as many choices are expected to be alike; not told, axes of equal choices are.

    Axes are `IntDistribution`, `CategoricalDistribution` (in their order) and `FloatDistribution` with a step; anything
    else is drawn at random. Infeasible trials (Optuna's constraints) teach the model and stay out of the front, failed
    ones are avoided, running ones are taken for as good as predicted.

        >>> import optuna
        >>> study = optuna.create_study(directions=["minimize", "minimize"], sampler=EHVISampler(seed=0))
        >>> def objective(trial):
        ...     bits = [trial.suggest_int(f"layer{i}", 2, 8) for i in range(4)]
        ...     return sum(2.0 ** -b for b in bits), sum(bits)
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> study.optimize(objective, n_trials=10)
        >>> len(study.trials)
        10
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        known: Known | None = None,
        reference: Sequence[float] | None = None,
        prior: Mapping[str, Sequence[float]] | None = None,
        noisy: Collection[int] = (),
        ladder: str | None = None,
        conditions: Mapping[str, tuple[str, int]] | None = None,
        kinds: Mapping[str, Hashable] | None = None,
    ) -> None:
        self.seed, self.known, self.reference, self.prior = seed, known, reference, dict(prior or {})
        self.noisy = frozenset(f"objective {position}" for position in noisy)
        self.ladder, self.conditions, self.kinds = ladder, dict(conditions or {}), dict(kinds or {})
        self._random = RandomSampler(seed=seed)
        self._space = IntersectionSearchSpace()
        self._fits: dict[tuple[str, int], Floats] = {}
        self._of: object = None  # the study and the space that these belong to
        self._rows: dict[int, _Row | None] = {}

    def reseed_rng(self) -> None:
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        found = self._space.calculate(study)
        return {name: d for name, d in sorted(found.items()) if choices(d) is not None and not d.single()}

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return self._random.sample_independent(study, trial, name, distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        values = {name: choices(d) or () for name, d in search_space.items()}
        states = (TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING)
        trials = [t for t in study.get_trials(deepcopy=False, states=states) if t.number != trial.number]
        counts = np.array([len(found) for found in values.values()])
        seen = self._observed(study, trials, search_space)
        # Matrices of some hundred rows: several threads take three to ten times as long over them as one.
        with _libraries().limit(limits=1, user_api="blas"):
            picks = _Suggestion(self, seen, values, counts).make()
        suggested = {name: found[int(pick)] for (name, found), pick in zip(values.items(), picks, strict=True)}
        return suggested | ({self.ladder: values[self.ladder][0]} if self.ladder in values else {})

    def _observed(self, study: Study, trials: Sequence[FrozenTrial], space: Mapping[str, BaseDistribution]) -> Observed:
        """The trials as arrays; a finished one is read once."""
        about = (study.study_name, tuple(space))
        if about != self._of:
            self._of, self._rows, self._fits = about, {}, {}
        signs = np.array([-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions])
        rows = []
        for trial in trials:
            row = self._rows[trial.number] if trial.number in self._rows else _row(trial, space, signs)
            if trial.state.is_finished():
                self._rows[trial.number] = row
            if row is not None:
                rows.append(row)
        names = dict.fromkeys(name for row in rows for name in row.excess)
        return Observed(
            np.frombuffer(b"".join([row.picks for row in rows]), dtype=np.int64).reshape(-1, len(space)),
            np.array([row.losses for row in rows], dtype=float).reshape(-1, len(signs)),
            signs,
            {name: np.array([row.excess.get(name, math.nan) for row in rows]) for name in names},
            np.array([row.state == TrialState.FAIL for row in rows], dtype=bool),
            np.array([row.state == TrialState.RUNNING for row in rows], dtype=bool),
        )

    def fitted(self, name: str, picks: Ints, column: Floats, curves: Curves, warped: bool) -> Model:
        """A model of one column; its parameters are fitted anew whenever there is a sixth more to fit them to."""
        use = np.flatnonzero(np.isfinite(column))
        mark = START
        while mark + max(1, mark // 6) <= len(use):
            mark += max(1, mark // 6)
        if (name, mark) not in self._fits:
            first = use[:mark]
            first = first[_near(column[first], MOST)]
            self._fits[name, mark] = Model.tune(curves, picks[first], column[first], warped)
        use = use[_near(column[use], MOST)]
        return Model(curves, picks[use], column[use], warped, self._fits[name, mark])


@cache
def _libraries() -> ThreadpoolController:
    """The libraries of linear algebra in this process, looked for once."""
    return ThreadpoolController()


class _Suggestion:
    """One suggestion: what was seen, and what comes of it."""

    def __init__(
        self, sampler: EHVISampler, seen: Observed, values: Mapping[str, tuple[Any, ...]], counts: Ints
    ) -> None:
        names = list(values)
        self.sampler, self.seen, self.names, self.counts = sampler, seen, names, counts
        self.kinds = [(sampler.kinds.get(name, found), len(found)) for name, found in values.items()]
        self.random = np.random.default_rng([sampler.seed, int((~seen.running).sum()), int(seen.running.sum())])
        self.ladder = names.index(sampler.ladder) if sampler.ladder in names else None
        self.effect = Effect.of(names, sampler.conditions)
        self.taken = set(_keys(self._raised(seen.picks)))

    def make(self) -> Ints:
        seen, counts = self.seen, self.counts
        if (~seen.running).sum() < START or not _spread(seen):
            return self._fresh(self._start())
        priors = [self.sampler.prior.get(name) for name in self.names]
        curves = Curves.make(counts, priors, self.kinds, self.effect)
        models = self._models(curves)
        pool = self._pool(models)
        best: Ints | None = None
        for attempt in range(3):
            pool = self._raised(pool)
            new = {key: place for place, key in enumerate(_keys(pool)) if key not in self.taken}
            pool = pool[list(new.values())]
            if not len(pool):
                break
            order = np.argsort(-self._worth(pool, models), kind="stable")
            best = pool[order[0]]
            if attempt < 2:
                pool = _neighbours(self._anywhere(pool[order[:8]]), counts, self.random, 400)
        return best if best is not None else self._fresh(_scattered(counts, self.random, 300))

    def _start(self) -> Ints:
        """The most costly recipe, the cheapest, and two between them; the last is a cheap one if the third was any good."""
        random = np.random.default_rng(self.sampler.seed)
        rising, drawn = self._rising(), random.integers(0, self.counts, (START, len(self.counts)))
        third = self._between(0.4, rising, drawn[2])
        known = (self._raised(self.seen.picks) == self._raised(third[None])).all(1) & ~self.seen.running
        good = True
        if known.any():
            good = bool(
                (self.seen.losses[known] < self._reference()).all() and (self.seen.violation()[known] <= 0).all()
            )
        last = self._between(0.15 if good else 0.7, rising, drawn[3])
        return np.stack(
            [_even(1.0, self.counts, rising, drawn[0]), _even(0.0, self.counts, rising, drawn[1]), third, last]
        )

    def _between(self, share: float, rising: Ints, drawn: Ints) -> Ints:
        """The best recipe at a share of the way from the lowest cost to the highest, if all axes were alike.

        They lose the more the more they weigh, but only with the root of it, and what little costs leave behind hurts most,
        as bits do (the error of n of them falls with 2^-2n). Where arithmetic knows no cost all axes go the same way.
        """
        row = _even(share, self.counts, rising, drawn)
        free, costs = self._costs(row)
        losses = [math.sqrt(np.ptp(cost)) * np.linspace(1, 0, len(cost))[:: -1 if rising[axis] < 0 else 1] ** 4
                  for axis, cost in zip(free, costs, strict=True)]  # fmt: skip
        found = _decoded(losses, costs, free, row)
        if not len(found):
            return row
        cost = next(iter(self._known(found)[0].values()))
        nearest = np.abs(cost - cost.min() - share * np.ptp(cost)).argmin()
        return np.where(rising == 0, row, found[nearest])

    def _known(self, picks: Ints) -> tuple[Mapping[int, Floats], Mapping[str, Floats]]:
        """What arithmetic knows: objectives as losses by position, and excesses by limit."""
        if self.sampler.known is None:
            return {}, {}
        objectives, excesses = self.sampler.known(dict(zip(self.names, picks.T, strict=True)))
        return {position: self.seen.signs[position] * value for position, value in objectives.items()}, excesses

    def _fresh(self, rows: Ints) -> Ints:
        """The first row that was not tried; a random one when all were."""
        for row in self._raised(np.concatenate([rows, _scattered(self.counts, self.random, 100)])):
            if row.tobytes() not in self.taken:
                return np.asarray(row)
        return np.asarray(_scattered(self.counts, self.random, 1)[0])

    def _raised(self, rows: Ints) -> Ints:
        """The rows at the last choice of the ladder, where recipes are compared, axes without an effect at their first."""
        if self.ladder is not None:
            rows = rows.copy()
            rows[:, self.ladder] = self.counts[self.ladder] - 1
        return rows if self.effect is None else np.where(self.effect.at(rows), rows, 0)

    def _anywhere(self, rows: Ints) -> Ints:
        """The rows with axes that have no effect drawn at random, so that from a change of network any other recipe may come."""
        if self.effect is None:
            return rows
        return np.where(self.effect.at(rows), rows, self.random.integers(0, self.counts, rows.shape))

    def _rising(self) -> Ints:
        """By axis 1 when its last choice costs more than its first, -1 when less, 0 when arithmetic sees no difference."""
        if self.sampler.known is None:
            return np.ones(len(self.counts), dtype=np.int64)
        rows = np.repeat((self.counts // 2)[None], 2 * len(self.counts), axis=0)
        for axis, count in enumerate(self.counts):
            if self.effect is not None and self.effect.outer[axis] >= 0:
                rows[2 * axis : 2 * axis + 2, self.effect.outer[axis]] = self.effect.choice[axis]
            rows[2 * axis, axis], rows[2 * axis + 1, axis] = 0, count - 1
        objectives, excesses = self._known(rows)
        total = np.zeros(len(self.counts))
        for column in (*objectives.values(), *excesses.values()):
            total += np.sign(column[1::2] - column[::2])
        return np.sign(total).astype(np.int64)

    def _models(self, curves: Curves) -> dict[str, Model]:
        """A model of every objective and limit that arithmetic does not know, and of failures when there are any."""
        seen = self.seen
        objectives, excesses = self._known(seen.picks[:1])
        columns = {
            f"objective {position}": seen.losses[:, position]
            for position in range(seen.losses.shape[1])
            if position not in objectives
        }
        columns |= {f"limit {name}": column for name, column in seen.excess.items() if name not in excesses}
        if seen.failed.any():
            columns["failure"] = np.where(seen.running, np.nan, seen.failed)
        learned = {name: column for name, column in columns.items() if np.isfinite(column).any()}
        models = {
            name: self.sampler.fitted(name, seen.picks, column, curves, name != "failure")
            for name, column in learned.items()
        }
        if seen.running.any():  # a trial that runs is taken for as good as predicted
            rows = np.flatnonzero(seen.running)
            models = {name: model.with_believed(seen.picks[rows]) for name, model in models.items()}
        return models

    def _reference(self) -> Floats:
        if self.sampler.reference is not None:
            return np.asarray(self.sampler.reference, dtype=float) * self.seen.signs
        worst: Floats = np.where(np.isfinite(self.seen.losses), self.seen.losses, -np.inf).max(0)
        return worst

    def _pool(self, models: Mapping[str, Model]) -> Ints:
        seen, counts, random = self.seen, self.counts, self.random
        good = seen.picks[seen.front]
        if not len(good):
            good = seen.picks[np.argsort(seen.violation(), kind="stable")[:5]]
        parts = [
            _mutated(self._anywhere(good), counts, random, 300),
            _crossed(good, random, 100),
            _scattered(counts, random, 50),
        ]
        model = next((models[name] for name in sorted(models) if name.startswith("objective")), None)
        if model is not None:
            base = good[random.integers(len(good))]
            table = model.additive(random if len(seen.picks) % 2 else None)
            free, costs = self._costs(base)
            parts.append(_decoded([table[axis] for axis in free], costs, free, base))
        return np.concatenate(parts)

    def _costs(self, base: Ints) -> tuple[Ints, list[Floats]]:
        """The axes that can be changed in `base`, and what each of their choices costs more than the cheapest."""
        # Of the network that `base` is of: what another costs is not the sum of these.
        free = np.arange(len(base)) if self.effect is None else self.effect.free(base)
        counts = self.counts[free]
        rows = np.repeat(base[None], int(counts.sum()), axis=0)
        starts = np.cumsum(counts) - counts
        for axis, start, count in zip(free, starts, counts, strict=True):
            rows[start : start + count, axis] = np.arange(count)
        objectives, _ = self._known(rows)
        if not objectives or not len(free):
            return free[:0], []
        cost = next(iter(objectives.values()))
        return free, [cost[s : s + c] - cost[s : s + c].min() for s, c in zip(starts, counts, strict=True)]

    def _worth(self, pool: Ints, models: Mapping[str, Model]) -> Floats:
        """The expected hypervolume improvement of each row, times its chances to keep the limits and not to fail."""
        seen, reference = self.seen, self._reference()
        objectives, excesses = self._known(pool)
        chance, over = np.ones(len(pool)), np.zeros(len(pool))
        for name in seen.excess:
            if name in excesses:
                chance *= excesses[name] <= 0
                over += np.maximum(excesses[name], 0)
            elif f"limit {name}" in models:
                inside, expected = models[f"limit {name}"].below(pool, 0.0)
                chance *= inside
                over += np.maximum(expected, 0)
        if "failure" in models:
            chance *= 1 - np.clip(models["failure"].predict(pool)[0], 0, 0.99)
        front = seen.losses[seen.front]
        if not len(front) and over.any():  # nothing keeps the limits yet: that comes first
            return chance - over
        uncertain = [name for name in sorted(models) if name.startswith("objective")]
        nodes, weights = _nodes(len(uncertain))
        samples = []
        for position in range(len(reference)):
            name = f"objective {position}"
            if position in objectives:
                samples.append(np.repeat(objectives[position][:, None], len(weights), axis=1))
            elif name in models:
                found = models[name].quantiles(pool, nodes[uncertain.index(name)], name not in self.sampler.noisy)
                samples.append(found)
            else:  # not measured yet, and so nothing to choose by
                samples.append(np.full((len(pool), len(weights)), reference[position] - 1.0))
        return np.asarray(improvement(samples, front, reference) @ weights * chance - 1e-12 * over)


# ------------------------------------------------------------------------------------------------ observations


@dataclass(frozen=True)
class Observed:
    """Trials as arrays: choices, losses (to be minimised, NaN where unknown), excesses by limit, states."""

    picks: Ints
    losses: Floats
    signs: Floats
    excess: Mapping[str, Floats]
    failed: NDArray[np.bool_]
    running: NDArray[np.bool_]

    def violation(self) -> Floats:
        total = np.where(self.failed | self.running, np.inf, 0.0)
        for column in self.excess.values():
            total = total + np.maximum(np.nan_to_num(column, nan=np.inf), 0)
        return total

    @cached_property
    def front(self) -> Ints:
        """The rows of feasible trials that no other beats, of equal ones the first, by the last objective."""
        rows = np.flatnonzero((self.violation() <= 0) & np.isfinite(self.losses).all(1))
        if not len(rows):
            return rows
        rows = rows[nondominated(self.losses[rows])]
        rows = rows[np.lexsort(self.losses[rows].T)]
        points = self.losses[rows]
        return np.asarray(rows[np.append(True, (points[1:] != points[:-1]).any(1))])


def choices(distribution: BaseDistribution) -> tuple[Any, ...] | None:
    """The ordered values of an axis, or None when it has too many, or none in steps."""
    if isinstance(distribution, CategoricalDistribution):
        found: Sequence[Any] = distribution.choices
    elif isinstance(distribution, IntDistribution) and not distribution.log:
        if (distribution.high - distribution.low) // distribution.step >= _LEVELS:
            return None
        found = range(distribution.low, distribution.high + 1, distribution.step)
    elif isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        if count > _LEVELS:
            return None
        found = [distribution.low + i * distribution.step for i in range(count)]
    else:
        return None
    return tuple(found) if len(found) <= _LEVELS else None


class _Row(NamedTuple):
    """One trial: the positions of its choices (an array's bytes, quick to gather), its losses and excesses."""

    picks: bytes
    losses: tuple[float, ...]
    excess: Mapping[str, float]
    state: TrialState


def _row(trial: FrozenTrial, space: Mapping[str, BaseDistribution], signs: Floats) -> _Row | None:
    """What a trial has to say, or None when it does not lie in the space."""
    params = trial.params
    if any(name not in params for name in space):
        return None
    picks = []
    for name, distribution in space.items():
        if isinstance(distribution, IntDistribution | FloatDistribution):
            picks.append(round((params[name] - distribution.low) / (distribution.step or 1)))
        else:
            picks.append(int(distribution.to_internal_repr(params[name])))
    losses, excess = [math.nan] * len(signs), {}
    if trial.state == TrialState.COMPLETE and trial.values is not None:
        unknown = trial.user_attrs.get(UNKNOWN, ())
        told = enumerate(zip(trial.values, signs, strict=True))
        losses = [math.nan if position in unknown else value * float(sign) for position, (value, sign) in told]
        excess = {name: value for name, value in trial.constraints.items() if name not in unknown}
    return _Row(np.array(picks, dtype=np.int64).tobytes(), tuple(losses), excess, trial.state)


def _spread(seen: Observed) -> bool:
    """Whether there is anything to learn from: an objective with two different values."""
    return any(len(np.unique(column[np.isfinite(column)])) > 1 for column in seen.losses.T)


def _near(column: Floats, most: int) -> Ints:
    """Rows to fit to: all, or the best three quarters of `most` and every so many-th of the others."""
    if len(column) <= most:
        return np.arange(len(column))
    order = np.argsort(column, kind="stable")
    best = most * 3 // 4
    others = order[best:][np.linspace(0, len(order) - best - 1, most - best).astype(int)]
    return np.sort(np.concatenate([order[:best], others]))


# ------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Effect:
    """Where axes have an effect: by axis the column of the axis that decides on it, -1 for none, and the choice of that one."""

    outer: Ints
    choice: Ints

    @classmethod
    def of(cls, names: Sequence[str], conditions: Mapping[str, tuple[str, int]]) -> Effect | None:
        """None when every axis always has an effect."""
        found = [conditions.get(name, ("", 0)) for name in names]
        outer = np.array([names.index(decides) if decides in names else -1 for decides, _ in found], dtype=np.int64)
        return cls(outer, np.array([choice for _, choice in found], dtype=np.int64)) if (outer >= 0).any() else None

    def at(self, rows: Ints) -> NDArray[np.bool_]:
        """`[rows, axes]`: whether an axis has an effect in a row."""
        return np.asarray((self.outer < 0) | (rows[:, self.outer] == self.choice))

    def free(self, row: Ints) -> Ints:
        """The axes that have an effect in a row and decide on no other."""
        found = self.at(row[None])[0]
        found[self.outer[self.outer >= 0]] = False
        return np.flatnonzero(found)


@dataclass(frozen=True)
class Curves:
    """Functions of one axis each, tabulated for the choices of all axes one after another.

    table: `[functions, choices]`, the first function rises evenly. starts: where the choices of each axis begin.
    few: the axes of so few choices that pairs of choices are told apart. common: `[axes, kinds]`, by which the functions of axes
    of one kind are summed to functions of all of them. effect: where axes have one; elsewhere their functions are zero and they
    take part in no pair.
    """

    table: Floats
    starts: Ints
    few: Ints
    common: Floats
    effect: Effect | None = None

    @classmethod
    def make(
        cls,
        counts: Ints,
        priors: Sequence[Sequence[float] | None],
        kinds: Sequence[Hashable],
        effect: Effect | None = None,
    ) -> Curves:
        """priors, kinds: by axis; axes of equal kinds are expected to be alike."""
        starts = np.cumsum(counts) - counts
        place = (np.arange(counts.sum()) - starts.repeat(counts)) / np.maximum(counts - 1, 1).repeat(counts)
        down = 1 - place
        rows = [place - 0.5, down**2 - 1 / 3, down**4 - 1 / 5]
        if any(prior is not None for prior in priors):
            told = np.zeros(len(place))
            for start, count, prior in zip(starts, counts, priors, strict=True):
                if prior is not None:
                    told[start : start + count] = prior
            rows.append(3 * told / (float(np.abs(told).max()) or 1.0))
        several = [kind for kind, amount in Counter(kinds).items() if amount > 1]
        common = np.array([[kind == other for other in several] for kind in kinds], dtype=float)
        common *= _COMMON / np.sqrt(common.sum(0))
        return cls(np.stack(rows) / math.sqrt(len(counts)), starts, np.flatnonzero(counts <= _APART), common, effect)

    def features(self, picks: Ints) -> Floats:
        """`[functions, rows, axes + kinds]`: of each axis, and of all that are of one kind together."""
        found = self.table.take(picks + self.starts, axis=1)
        if self.effect is not None:
            found *= self.effect.at(picks)
        return np.concatenate([found, found @ self.common], axis=2)

    def marks(self, picks: Ints) -> NDArray[np.float32] | None:
        """`[rows, choices]` of the few-choice axes, so that two rows' product is the share of these that are equal."""
        if not len(self.few):
            return None
        counts = self.counts[self.few]
        width = int(counts.sum())
        places = picks[:, self.few] + np.cumsum(counts) - counts + width * np.arange(len(picks))[:, None]
        found = np.zeros(len(picks) * width, dtype=np.float32)
        share: Floats | float = 1 / math.sqrt(len(self.few))
        if self.effect is not None:
            at = self.effect.at(picks)[:, self.few]
            share = (at / np.sqrt(np.maximum(at.sum(1, keepdims=True), 1))).ravel()
        found[places.ravel()] = share  # one flat index is the quicker one
        return found.reshape(len(picks), width)

    @cached_property
    def counts(self) -> Ints:
        """The number of choices by axis."""
        return np.diff(self.starts, append=self.table.shape[1])

    def sums(self, weights: Floats) -> list[Floats]:
        """By axis, what each choice adds to the sum of the features times their weights, `[functions, axes + kinds]`."""
        axes = len(self.starts)
        own = weights[:, :axes] + weights[:, axes:] @ self.common.T
        return np.split((self.table * own.repeat(self.counts, axis=1)).sum(0), self.starts[1:])


class Model:
    """A Gaussian process over recipes: a constant, the axes' curves, smooth interactions, pairs of choices, noise.

    The noise counts as something that may be found: a network that is evaluated without chance and was lucky stays so.
    """

    def __init__(self, curves: Curves, picks: Ints, column: Floats, warped: bool, parameters: Floats) -> None:
        self.curves, self.parameters, self.warped = curves, parameters, warped
        self.picks, self.column = picks, column
        self.features, self.marks = curves.features(picks), curves.marks(picks)
        self.warp = Warp(column) if warped else Warp(None)
        self.target, self.mean, self.scale = _standardised(self.warp.forward(column))
        covariance = _covariance(
            *_products(self.features, self.features, picks.shape[1]), _shared(self.marks, self.marks), parameters
        )
        covariance[np.diag_indices(len(picks))] += math.exp(2 * parameters[3])
        self.factor = np.linalg.cholesky(covariance)
        self.alpha = cho_solve((self.factor, True), self.target)

    @staticmethod
    def tune(curves: Curves, picks: Ints, column: Floats, warped: bool) -> Floats:
        """The parameters that make the observations likeliest, times a prior (a few dozen evaluations)."""
        target, _, _ = _standardised(Warp(column if warped else None).forward(column))
        features = curves.features(picks)
        linear, squares = _products(features, features, picks.shape[1])
        marks = curves.marks(picks)
        shared = _shared(marks, marks)
        diagonal = np.diag_indices(len(picks))

        def surprise(parameters: Floats) -> float:
            covariance = _covariance(linear, squares, shared, parameters)
            covariance[diagonal] += np.exp(2 * parameters[3])
            factor = np.linalg.cholesky(covariance)
            part = solve_triangular(factor, target, lower=True)
            prior = (((parameters - _PRIOR) / _PRIOR_WIDTH) ** 2).sum() / 2
            return float(part @ part / 2 + np.log(np.diag(factor)).sum() + prior)

        found = minimize(surprise, _PRIOR, method="L-BFGS-B", bounds=_BOUNDS, options={"maxiter": 15})
        return np.asarray(found.x)

    def predict(self, picks: Ints, lucky: bool = True) -> tuple[Floats, Floats]:
        """Mean and deviation of each row on the warped scale: of an observation, or without its noise."""
        blocks = [self._predict(picks[start : start + _BLOCK], lucky) for start in range(0, len(picks), _BLOCK)]
        mean, deviation = np.concatenate(blocks, axis=1)
        return mean, deviation

    def _predict(self, picks: Ints, lucky: bool) -> tuple[Floats, Floats]:
        """`predict` for one block."""
        features = self.curves.features(picks)
        shared = _shared(self.curves.marks(picks), self.marks)
        cross = _covariance(*_products(features, self.features, picks.shape[1]), shared, self.parameters)
        curve, joint, _, noise, pairs = np.exp(2 * self.parameters)
        own = _CONSTANT + 10 * curve * np.einsum("fra,fra->r", features, features) + joint + noise * lucky
        own += pairs * (len(self.curves.few) > 0)
        mean = self.mean + self.scale * (cross @ self.alpha)
        explained = solve_triangular(self.factor, cross.T, lower=True, overwrite_b=True, check_finite=False)
        variance = np.maximum(own - np.einsum("ij,ij->j", explained, explained), 1e-9)
        return mean, self.scale * np.sqrt(variance)

    def below(self, picks: Ints, bound: float) -> tuple[Floats, Floats]:
        """The probability that each row is at most `bound`, and its median: a limit is not to be kept by luck."""
        mean, deviation = self.predict(picks, lucky=False)
        median = self.warp.backward(mean)
        if not self.warp.reaches(bound):
            return np.zeros(len(picks)), median
        return ndtr((self.warp.forward(np.array(bound)) - mean) / deviation), median

    def with_believed(self, picks: Ints) -> Model:
        """The model that has seen these rows, too, and found them as predicted."""
        believed = self.warp.backward(self.predict(picks)[0])
        seen, column = np.concatenate([self.picks, picks]), np.concatenate([self.column, believed])
        return Model(self.curves, seen, column, self.warped, self.parameters)

    def quantiles(self, picks: Ints, nodes: Floats, lucky: bool = True) -> Floats:
        """`[rows, nodes]`: the value that lies so many deviations from the mean, in the observations' unit."""
        mean, deviation = self.predict(picks, lucky)
        return self.warp.backward(mean[:, None] + deviation[:, None] * nodes)

    def additive(self, random: np.random.Generator | None) -> list[Floats]:
        """By axis, what each choice adds to the warped loss: the mean, or a sample of it (Matheron's rule)."""
        size = math.sqrt(10) * math.exp(self.parameters[0])
        functions, _, columns = self.features.shape
        weights, alpha = np.zeros((functions, columns)), self.alpha
        if random is not None:
            weights = size * random.standard_normal((columns, functions)).T
            joint, noise, pairs = np.exp(2 * self.parameters[[1, 3, 4]])
            rest = math.sqrt(joint + noise + pairs * (len(self.curves.few) > 0))
            chance = rest * random.standard_normal(len(self.target)) + math.sqrt(_CONSTANT) * random.standard_normal()
            alpha = cho_solve(
                (self.factor, True), self.target - np.einsum("fra,fa->r", self.features, weights) - chance
            )
        weights = weights + size**2 * (alpha @ self.features)
        return self.curves.sums(weights)


class Warp:
    """The logarithm of a loss's distance to the best one, softened by 0.3 of the median distance; None leaves it alone."""

    def __init__(self, column: Floats | None) -> None:
        self.best = self.soft = 0.0
        if column is not None and len(column):
            self.best = float(column.min())
            self.soft = 0.3 * float(np.median(column - self.best)) or 0.3 * float((column - self.best).mean())

    def reaches(self, value: float) -> bool:
        """Whether a value is one that the warp can tell: not far better than the best one seen."""
        return self.soft <= 0 or value - self.best + self.soft > 0

    def forward(self, values: Floats) -> Floats:
        return np.log(values - self.best + self.soft) if self.soft > 0 else values

    def backward(self, values: Floats) -> Floats:
        return np.exp(np.minimum(values, 50.0)) - self.soft + self.best if self.soft > 0 else values


@cache
def _nodes(dimensions: int) -> tuple[Floats, Floats]:
    """Points `[dimensions, nodes]` and weights that stand for independent standard normal variables."""
    if dimensions <= 1:
        points, weights = np.polynomial.hermite_e.hermegauss(9)
        return points[None], weights / weights.sum()
    random, count = np.random.default_rng(0), 16
    quantiles = ndtri((np.arange(count) + 0.5) / count)
    return np.stack([random.permutation(quantiles) for _ in range(dimensions)]), np.full(count, 1 / count)


def _standardised(raw: Floats) -> tuple[Floats, float, float]:
    """The values in units of their own deviation from their mean; the mean and the deviation."""
    mean, scale = float(raw.mean()), float(raw.std()) or 1.0
    return (raw - mean) / scale, mean, scale


def _products(features: Floats, others: Floats, axes: int) -> tuple[Floats, Floats]:
    """Of the rows of one side with those of the other: scalar products of features, squared distances of places.

    The places are the first function of each axis.
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


def _shared(marks: NDArray[np.float32] | None, others: NDArray[np.float32] | None) -> Floats | None:
    """The shares of axes where the choices of rows of both sides are equal; None without axes of few choices."""
    return None if marks is None or others is None else (marks @ others.T).astype(float)


def _covariance(linear: Floats, squares: Floats, shared: Floats | None, parameters: Floats) -> Floats:
    """Of the rows' true values, from the rows' products and the shares of axes where their choices are equal.

    A share's square is the covariance of a sum with an independent number for every pair of choices.
    """
    curve, joint, length, _, pairs = np.exp(2 * parameters)
    found = squares * (
        -0.5 / length
    )  # from here on in place: a fresh large array costs more than what it is filled with
    np.exp(found, out=found)
    found *= joint
    found += 10 * curve * linear
    found += _CONSTANT
    if shared is not None:
        found += pairs * shared**2
    return np.asarray(found)


# ------------------------------------------------------------------------------------------------- improvement


def improvement(samples: Sequence[Floats], front: Floats, reference: Floats) -> Floats:
    """By how much each sample would enlarge the hypervolume below the reference: `[rows, samples]`.

    samples: by objective `[rows, samples]`. front: `[members, objectives]`, nondominated. With two objectives exact;
    with more the mean over directions of a scalarisation that the hypervolume is the mean of (Zhang & Golovin 2020),
    times a constant.

    >>> improvement([np.array([[0.5]]), np.array([[0.5]])], np.array([[0.25, 0.75]]), np.array([1.0, 1.0]))
    array([[0.125]])
    """
    front = front[(front < reference).all(1)]
    if len(reference) == 1:
        best = front.min() if len(front) else reference[0]
        return np.asarray(np.maximum(best - samples[0], 0.0))
    if len(reference) == 2:
        front = front[np.argsort(front[:, 1])]
        edges = np.concatenate([[-np.inf], front[:, 1], [reference[1]]])
        heights = np.concatenate([[reference[0]], front[:, 0]])
        total = np.zeros(samples[0].shape)
        for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
            width = np.maximum(high - np.maximum(samples[1], low), 0.0)
            total += width * np.maximum(height - samples[0], 0.0)
        return total
    # Directions in units of what the front spans: bytes and shares have nothing in common.
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
def _directions(dimensions: int) -> Floats:
    """Unit vectors with no part below zero, drawn evenly, but none quite along an axis."""
    directions = np.abs(np.random.default_rng(0).standard_normal((_DIRECTIONS, dimensions))) + 1e-3
    return np.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))


# -------------------------------------------------------------------------------------------------- candidates


def _keys(rows: Ints) -> list[bytes]:
    """The bytes of each row, by which equal ones are found (np.unique takes far longer)."""
    whole = np.dtype((np.void, rows.itemsize * rows.shape[1]))
    return list(np.ascontiguousarray(rows).view(whole)[:, 0].tolist())


def _even(share: float, counts: Ints, rising: Ints, drawn: Ints) -> Ints:
    """The recipe whose axes are all at a share of the way from their cheapest choice; those without a cost are as drawn."""
    row = np.rint(np.where(rising < 0, 1 - share, share) * (counts - 1)).astype(np.int64)
    return np.where(rising == 0, drawn, row)


def _decoded(losses: Sequence[Floats], costs: Sequence[Floats], free: Ints, base: Ints) -> Ints:
    """The additive front of the axes `free`, whose choices have these losses and costs, with the others as in `base`."""
    if not len(free):
        return np.zeros((0, len(base)), dtype=np.int64)
    many = sum(map(len, costs)) >= _MANY
    found = hull(losses, costs, 128) if many else knapsack_front(losses, costs, resolution=64)
    decoded = np.repeat(base[None], len(found), axis=0)
    decoded[:, free] = np.array([choice.levels for choice in found], dtype=np.int64)
    return decoded


def _scattered(counts: Ints, random: np.random.Generator, amount: int) -> Ints:
    return random.integers(0, counts, (amount, len(counts)))


def _mutated(rows: Ints, counts: Ints, random: np.random.Generator, amount: int) -> Ints:
    """One or two axes changed, by up to two choices or (one time in four) to any."""
    chosen = rows[random.integers(len(rows), size=amount)]
    share = random.integers(1, 3, (amount, 1)) / len(counts)
    step = random.integers(1, 3, chosen.shape) * random.choice([-1, 1], chosen.shape)
    moved = np.where(random.random((amount, 1)) < 0.25, random.integers(0, counts, chosen.shape), chosen + step)
    changed = np.where(random.random(chosen.shape) < share, moved, chosen)
    return np.clip(changed, 0, counts - 1)


def _crossed(rows: Ints, random: np.random.Generator, amount: int) -> Ints:
    left, right = (rows[random.integers(len(rows), size=amount)] for _ in range(2))
    return np.where(random.random(left.shape) < 0.5, left, right)


def _neighbours(rows: Ints, counts: Ints, random: np.random.Generator, most: int) -> Ints:
    """The rows, and all that differ from one of them in one axis; of too many, some."""
    total = int(counts.sum())
    which = np.arange(len(rows) * total)
    if len(which) > most:
        which = random.choice(len(which), most, replace=False)
    row, place = np.divmod(which, total)
    ends = np.cumsum(counts)
    axis = np.searchsorted(ends, place, side="right")
    changed = rows[row]
    changed[np.arange(len(which)), axis] = place - (ends - counts)[axis]
    return np.concatenate([rows, changed])
