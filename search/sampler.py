"""Samplers by name: paretorch's own and Optuna's, each constructed anew for every suggestion.

A suggestion depends on the seed, on the number of trials so far and on the trials themselves, and on no state that is
only in memory: a study that was interrupted resumes with the suggestions it would have made without the interruption.
Where one of Optuna's samplers keeps such state, the subclasses here make it a function of the trials.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, QMCSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from ..errors import ConfigError
from .ehvi import EHVISampler

SAMPLERS = ("ehvi", "tpe", "nsga2", "nsga3", "gp", "random", "qmc")


class _TPE(TPESampler):
    """TPE that converts all trials at once, given that every trial has every parameter and all choices are numbers.

    Optuna converts them value by value, which takes a third of a suggestion's time with 60 parameters and 200 trials.
    """

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: Study
    ) -> dict[str, NDArray[np.float64]]:
        every = [trial.params for trial in trials]
        rows = [[params[name] for name in search_space] for params in every]
        columns = np.array(rows, dtype=float).reshape(len(trials), len(search_space)).T
        return dict(zip(search_space, columns, strict=True))


class _NSGAII(NSGAIISampler):
    """NSGA-II with its parents in a fixed order; in Optuna's the first call returns another order than later ones."""

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=_number)


class _NSGAIII(NSGAIIISampler):
    """NSGA-III, likewise; its random selection of a generation's parents is the same whenever it is made."""

    def __init__(self, seed: int, parents_seed: int, population_size: int) -> None:
        super().__init__(seed=seed, population_size=population_size)
        self._parents_seed = parents_seed

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        self.get_parent_population(study, generation - 1)  # cached by this call, so that it draws nothing below
        before = self._rng.rng.get_state()
        self._rng.rng.seed((self._parents_seed + generation) % 2**32)
        chosen = sorted(super().select_parent(study, generation), key=_number)
        self._rng.rng.set_state(before)
        return chosen


def _number(trial: FrozenTrial) -> int:
    return trial.number


class _QMC(QMCSampler):
    """Quasi-Monte Carlo sampling whose position in the sequence is the number of trials, not a counter of its own."""

    def __init__(self, seed: int, position: int) -> None:
        # One sequence for the whole study: the seed scrambles it once.
        super().__init__(seed=seed, scramble=True)
        self._position = position

    def _find_sample_id(self, study: Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._position


# NSGA selects parents only among trials with a generation number; trials that were merely added it ignores.
GENERATION = {"nsga2": _NSGAII._get_generation_key(), "nsga3": _NSGAIII._get_generation_key()}


def mixed_seed(seed: int, count: int) -> int:
    """The seed of the suggestion after `count` trials."""
    return (seed * 1_000_003 + count * 7919 + 12345) % 2**32


def make_sampler(name: str, seed: int, count: int, space: Mapping[str, BaseDistribution]) -> BaseSampler:
    """The sampler for one suggestion.

    Args:
        name: One of `SAMPLERS`.
        seed: The study's seed.
        count: The number of trials so far.
        space: The search space, the same for all trials.

    Raises:
        ConfigError: There is no such sampler.
    """
    mixed = mixed_seed(seed, count)
    makers: dict[str, Callable[[], BaseSampler]] = {
        "ehvi": lambda: EHVISampler(seed),
        "tpe": lambda: _TPE(seed=mixed, multivariate=True, n_startup_trials=10),
        # Optuna's default population of 50 is too large for studies of some hundred trials.
        "nsga2": lambda: _NSGAII(seed=mixed, population_size=20),
        "nsga3": lambda: _NSGAIII(mixed, seed, population_size=20),
        "gp": lambda: optuna.samplers.GPSampler(seed=mixed),
        "random": lambda: optuna.samplers.RandomSampler(seed=mixed),
        "qmc": lambda: _QMC(seed, count),
    }
    if name not in makers:
        raise ConfigError(f"search.sampler = {name!r}: choose from {', '.join(SAMPLERS)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = makers[name]()
    if name != "random":  # samples each parameter independently
        in_space(sampler, space)
    return sampler


def in_space(sampler: BaseSampler, space: Mapping[str, BaseDistribution]) -> None:
    """Fix a sampler's search space.

    Optuna would compute the parameters that all trials have in common, which takes longer than the rest of a
    suggestion.
    """
    # Replaced on the object, because Optuna's samplers have no argument for the space.
    cast(Any, sampler).infer_relative_search_space = lambda study, trial: dict(space)
