"""An Optuna sampler for compression: Bayesian optimization with expected hypervolume improvement over ordered choices.

A recipe is a vector of ordered choices (bits, sparsities, widths). A suggestion is made in four steps:

1. Every objective and limit that was measured gets a Gaussian process (`gaussian`): an additive part, since the losses
   of layers nearly add up, and interactions for the rest. Sensitivities, where they are given, are further features of
   the additive part, so their scale is learned.
2. Costs that can be computed (bytes, MACs) are computed, not modelled.
3. Candidates are proposed (`moves`): the knapsack's front of the additive part (of its posterior mean and of a sample,
   in turn: Thompson sampling), mutations of the front, crossings of its members, and random recipes.
4. The candidate of the greatest expected hypervolume improvement (`improvement`) is suggested, after two rounds in
   which the neighbours of the best candidates become the candidates.

The first four recipes are the most expensive, the cheapest, and two of the front that there would be if all axes were
alike. (Even steps between the ends, tried before, overlook that some layers weigh far more than others.) The fourth is
nearer to the cheapest recipe when the third keeps the limits and is better than the reference, else nearer to the most
expensive one.

On small networks of which all 46,656 recipes are known, this finds 99% of the true hypervolume in 20 to 30 evaluations
and needs no sensitivities (`benchmarks/search_quality.py`, which also compares the alternatives that were tried). The
candidates are not what limits it: the best one has about the expected improvement of the best of all recipes.

A suggestion is a function of the seed and of the finished and running trials alone, so a study that was interrupted
continues as if it had not been. What is cached between suggestions only saves time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
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
from threadpoolctl import ThreadpoolController

from ..objectives.pareto import nondominated
from .gaussian import Conditions, Curves, Floats, Ints, Model, training_rows
from .improvement import expected_improvement, feasibility
from .moves import Grid, Known, crossed, decoded, keys, mutated, neighbours, scattered

# User attribute of a trial: the objectives (positions) and limits (names) that were not measured.
UNKNOWN = "paretorch:unknown"
START = 4  # recipes before the first one that the models suggest
_LEVELS = 64  # an axis of more choices is sampled independently


class EHVISampler(BaseSampler):
    """Expected hypervolume improvement for spaces of ordered choices and one or several objectives.

    Axes are `IntDistribution`, `CategoricalDistribution` (in the given order) and `FloatDistribution` with a step, of
    at most 64 choices; other parameters are sampled at random. Infeasible trials (Optuna's constraints) teach the
    models and are no members of the front, failed ones teach a model of failures, and running ones are assumed to come
    out as predicted.

    Args:
        seed: Seed of all random choices.
        known: Computes objectives and constraint values for many recipes at once. It is given the positions of the
            choices by axis, and returns values by position of the objective and excesses by name of the constraint.
        reference: The point up to which the hypervolume is counted, in the objectives' own units; by default the worst
            values seen.
        prior: By axis a number per choice, the loss it is expected to cause, in any unit (sensitivities). Axes may be
            left out.
        noisy: Positions of objectives with measurement noise, such as times.
        ladder: The name of the rung axis (how long a candidate is trained), whose promotions somebody else decides:
            recipes are compared by what is predicted for its last choice, and suggested at its first.
        conditions: Conditional axes: by axis its parent axis, and the position of the parent's choice at which it is
            active. An inactive axis is suggested at its first choice.
        kinds: By axis what it decides (the bits of a layer, say). Axes of one kind with as many choices are expected to
            behave alike; by default axes with equal choices are.

    Example:
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
        self._fits: dict[tuple[str, int], Floats] = {}  # hyperparameters by model and number of rows
        self._rows: dict[int, _Row | None] = {}  # finished trials by number
        self._cached_for: object = None  # the study and the space that these two belong to

    def reseed_rng(self) -> None:
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        space = self._space.calculate(study)
        return {name: d for name, d in sorted(space.items()) if choices(d) is not None and not d.single()}

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
        observed = self._observed(study, trials, search_space)
        # Matrices of some hundred rows: several threads take three to ten times as long over them as one.
        with _libraries().limit(limits=1, user_api="blas"):
            picks = _Suggestion(self, observed, values).make()
        suggested = {name: axis[int(pick)] for (name, axis), pick in zip(values.items(), picks, strict=True)}
        return suggested | ({self.ladder: values[self.ladder][0]} if self.ladder in values else {})

    def _observed(self, study: Study, trials: Sequence[FrozenTrial], space: Mapping[str, BaseDistribution]) -> Observed:
        """The trials as arrays; a finished trial is converted once."""
        about = (study.study_name, tuple(space))
        if about != self._cached_for:
            self._cached_for, self._rows, self._fits = about, {}, {}
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
        """A model of one column; the hyperparameters are fitted again each time the rows have grown by a sixth."""
        use = np.flatnonzero(np.isfinite(column))
        mark = START
        while mark + max(1, mark // 6) <= len(use):
            mark += max(1, mark // 6)
        if (name, mark) not in self._fits:
            first = use[:mark]
            first = first[training_rows(column[first])]
            self._fits[name, mark] = Model.fit_hyperparameters(curves, picks[first], column[first], warped)
        use = use[training_rows(column[use])]
        return Model(curves, picks[use], column[use], warped, self._fits[name, mark])


@cache
def _libraries() -> ThreadpoolController:
    """The linear algebra libraries of this process; looking for them takes long enough to do it once."""
    return ThreadpoolController()


class _Suggestion:
    """One suggestion, from the trials so far."""

    def __init__(self, sampler: EHVISampler, observed: Observed, values: Mapping[str, tuple[Any, ...]]) -> None:
        names = list(values)
        self.sampler, self.observed = sampler, observed
        self.counts = np.array([len(axis) for axis in values.values()])
        self.kinds = [(sampler.kinds.get(name, axis), len(axis)) for name, axis in values.items()]
        running = observed.running
        self.random = np.random.default_rng([sampler.seed, int((~running).sum()), int(running.sum())])
        ladder = names.index(sampler.ladder) if sampler.ladder in names else None
        conditions = Conditions.of(names, sampler.conditions)
        self.grid = Grid(names, self.counts, observed.signs, sampler.known, conditions, ladder)
        self.tried = set(keys(self.grid.canonical(observed.picks)))

    def make(self) -> Ints:
        """The suggested recipe, as the positions of its choices."""
        observed, counts, grid = self.observed, self.counts, self.grid
        if (~observed.running).sum() < START or not observed.informative():
            return self._first_untried(self._start())
        priors = [self.sampler.prior.get(name) for name in grid.names]
        models = self._models(Curves.make(counts, priors, self.kinds, grid.conditions))
        pool = self._pool(models)
        best: Ints | None = None
        for attempt in range(3):
            pool = grid.canonical(pool)
            untried = {key: place for place, key in enumerate(keys(pool)) if key not in self.tried}
            pool = pool[list(untried.values())]
            if not len(pool):
                break
            order = np.argsort(-self._acquisition(pool, models), kind="stable")
            best = pool[order[0]]
            if attempt < 2:
                starts = grid.randomize_inactive(pool[order[:8]], self.random)
                pool = neighbours(starts, counts, self.random, 400)
        return best if best is not None else self._first_untried(scattered(counts, self.random, 300))

    def _start(self) -> Ints:
        """The most expensive recipe, the cheapest, and two in between, of which the second depends on the first."""
        grid, observed = self.grid, self.observed
        random = np.random.default_rng(self.sampler.seed)
        directions, drawn = grid.cost_directions(), random.integers(0, self.counts, (START, len(self.counts)))
        third = grid.balanced(0.4, directions, drawn[2])
        same = (grid.canonical(observed.picks) == grid.canonical(third[None])).all(1) & ~observed.running
        good = True
        if same.any():
            better = (observed.losses[same] < self._reference()).all()
            good = bool(better and (observed.violation()[same] <= 0).all())
        last = grid.balanced(0.15 if good else 0.7, directions, drawn[3])
        ends = [grid.uniform(share, directions, drawn[place]) for place, share in enumerate((1.0, 0.0))]
        return np.stack([*ends, third, last])

    def _first_untried(self, rows: Ints) -> Ints:
        """The first row that was not tried yet, in canonical form; a random one when all were."""
        for row in self.grid.canonical(np.concatenate([rows, scattered(self.counts, self.random, 100)])):
            if row.tobytes() not in self.tried:
                return np.asarray(row)
        return np.asarray(scattered(self.counts, self.random, 1)[0])

    def _models(self, curves: Curves) -> dict[str, Model]:
        """A model of every objective and limit that cannot be computed, and of failures when there are any."""
        observed = self.observed
        objectives, excesses = self.grid.computed(observed.picks[:1])
        columns = {
            f"objective {position}": observed.losses[:, position]
            for position in range(observed.losses.shape[1])
            if position not in objectives
        }
        columns |= {f"limit {name}": column for name, column in observed.excess.items() if name not in excesses}
        if observed.failed.any():
            columns["failure"] = np.where(observed.running, np.nan, observed.failed)
        measured = {name: column for name, column in columns.items() if np.isfinite(column).any()}
        models = {
            name: self.sampler.fitted(name, observed.picks, column, curves, name != "failure")
            for name, column in measured.items()
        }
        if observed.running.any():
            running = observed.picks[observed.running]
            models = {name: model.with_predicted(running) for name, model in models.items()}
        return models

    def _reference(self) -> Floats:
        """The point up to which the hypervolume is counted, as losses."""
        if self.sampler.reference is not None:
            return np.asarray(self.sampler.reference, dtype=float) * self.observed.signs
        worst: Floats = np.where(np.isfinite(self.observed.losses), self.observed.losses, -np.inf).max(0)
        return worst

    def _pool(self, models: Mapping[str, Model]) -> Ints:
        """The first candidates, from the front; where nothing is feasible yet, from the five of least violation."""
        observed, counts, random = self.observed, self.counts, self.random
        good = observed.picks[observed.front]
        if not len(good):
            good = observed.picks[np.argsort(observed.violation(), kind="stable")[:5]]
        parts = [
            mutated(self.grid.randomize_inactive(good, random), counts, random, 300),
            crossed(good, random, 100),
            scattered(counts, random, 50),
        ]
        model = next((models[name] for name in sorted(models) if name.startswith("objective")), None)
        if model is not None:
            base = good[random.integers(len(good))]
            table = model.additive(random if len(observed.picks) % 2 else None)
            free, costs = self.grid.choice_costs(base)
            parts.append(decoded([table[axis] for axis in free], costs, free, base))
        return np.concatenate(parts)

    def _acquisition(self, pool: Ints, models: Mapping[str, Model]) -> Floats:
        """What candidates are ranked by: expected hypervolume improvement times the probability of being feasible.

        As long as nothing feasible is known, that probability minus the expected excess.
        """
        observed = self.observed
        objectives, excesses = self.grid.computed(pool)
        probability, excess = feasibility(pool, models, excesses, observed.excess)
        front = observed.losses[observed.front]
        if not len(front) and excess.any():
            return probability - excess
        gain = expected_improvement(pool, models, objectives, self.sampler.noisy, front, self._reference())
        return gain * probability - 1e-12 * excess


@dataclass(frozen=True)
class Observed:
    """The trials as arrays.

    Attributes:
        picks: `[trials, axes]`, positions of choices.
        losses: `[trials, objectives]`, to be minimized, NaN where unknown.
        signs: By objective 1, or -1 where it is maximized; value = sign * loss.
        excess: By limit `[trials]`, NaN where unknown; a limit is kept when its excess is at most 0.
        failed: Which trials failed.
        running: Which trials are still running.
    """

    picks: Ints
    losses: Floats
    signs: Floats
    excess: Mapping[str, Floats]
    failed: NDArray[np.bool_]
    running: NDArray[np.bool_]

    def informative(self) -> bool:
        """Whether there is anything to learn from: an objective with two different values."""
        return any(len(np.unique(column[np.isfinite(column)])) > 1 for column in self.losses.T)

    def violation(self) -> Floats:
        """By trial the sum of its excesses; infinite where one is unknown, or where the trial failed or is running."""
        total = np.where(self.failed | self.running, np.inf, 0.0)
        for column in self.excess.values():
            total = total + np.maximum(np.nan_to_num(column, nan=np.inf), 0)
        return total

    @cached_property
    def front(self) -> Ints:
        """The feasible nondominated trials, sorted by the last objective; of equal losses the first."""
        rows = np.flatnonzero((self.violation() <= 0) & np.isfinite(self.losses).all(1))
        if not len(rows):
            return rows
        rows = rows[nondominated(self.losses[rows])]
        rows = rows[np.lexsort(self.losses[rows].T)]
        points = self.losses[rows]
        return np.asarray(rows[np.append(True, (points[1:] != points[:-1]).any(1))])


def choices(distribution: BaseDistribution) -> tuple[Any, ...] | None:
    """The ordered values of an axis; None when there are more than 64, or when it is continuous."""
    if isinstance(distribution, CategoricalDistribution):
        values: Sequence[Any] = distribution.choices
    elif isinstance(distribution, IntDistribution) and not distribution.log:
        if (distribution.high - distribution.low) // distribution.step >= _LEVELS:
            return None
        values = range(distribution.low, distribution.high + 1, distribution.step)
    elif isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        if count > _LEVELS:
            return None
        values = [distribution.low + i * distribution.step for i in range(count)]
    else:
        return None
    return tuple(values) if len(values) <= _LEVELS else None


class _Row(NamedTuple):
    """One trial: the positions of its choices (as an array's bytes, quick to join), its losses and excesses."""

    picks: bytes
    losses: tuple[float, ...]
    excess: Mapping[str, float]
    state: TrialState


def _row(trial: FrozenTrial, space: Mapping[str, BaseDistribution], signs: Floats) -> _Row | None:
    """A trial's row; None when it has not all parameters of the space."""
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
        signed = enumerate(zip(trial.values, signs, strict=True))
        losses = [math.nan if position in unknown else value * float(sign) for position, (value, sign) in signed]
        excess = {name: value for name, value in trial.constraints.items() if name not in unknown}
    return _Row(np.array(picks, dtype=np.int64).tobytes(), tuple(losses), excess, trial.state)
