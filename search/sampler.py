"""Optuna's samplers by name, each made anew for every suggestion.

A suggestion depends on the seed, the number of records so far and the records themselves, and on no state that lives
only in memory: a study that was interrupted goes on with the suggestions it would have made without the interruption.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import optuna
from optuna.samplers import BaseSampler

SAMPLERS = ("tpe", "nsga2", "nsga3", "gp", "random", "qmc")
# Trials that carry a generation number are the parents NSGA breeds from; it ignores all that were merely added.
GENERATION = {"nsga2": "NSGAIISampler:generation", "nsga3": "NSGAIIISampler:generation"}


def make_sampler(name: str, seed: int, count: int) -> BaseSampler:
    """The sampler for the suggestion after `count` records; raises `ValueError` for an unknown name."""
    mixed = (seed * 1_000_003 + count * 7919 + 12345) % 2**32
    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=mixed, multivariate=True, n_startup_trials=10),
        # Optuna's default population of 50 is too large for studies of some hundred trials.
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=mixed, population_size=20),
        "nsga3": lambda: optuna.samplers.NSGAIIISampler(seed=mixed, population_size=20),
        "gp": lambda: optuna.samplers.GPSampler(seed=mixed),
        "random": lambda: optuna.samplers.RandomSampler(seed=mixed),
        # A quasi-random sequence is one sequence: the seed scrambles it once.
        "qmc": lambda: optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False),
    }
    if name not in makers:
        raise ValueError(f"unknown sampler {name!r}; choose from {', '.join(SAMPLERS)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return makers[name]()
