"""How fast a sampler finds a front that is known exactly: shares of the true hypervolume after so many evaluations.

    python benchmarks/search_quality.py [--truths NAME ...] [--samplers NAME ...] [--seeds 10] [--trials 200]
    python benchmarks/search_quality.py --samplers gp --seeds 3 --trials 100      # seconds per suggestion

The truths are those of `benchmarks/truths.py`; the hypervolume is counted from the error of guessing and the bytes of
the largest recipe. Objectives are the error and the bytes. Samplers:

- `random`, `nsga2` (population 20), `tpe` (multivariate), `tpe-univariate`: Optuna's, as they come; so is `gp`, which
  is slow and therefore only run when named;
- `additive`: the knapsack's front over measured sensitivities (every layer at every level alone), spread over its
  length; `additive+tpe`, `additive+nsga2`: the first 20 of it, then the sampler. The sensitivities are evaluations of
  whole recipes and are charged: they come first, and count for the front as what they are;
- `ehvi`: paretorch's, and `ehvi+sensitivities`: with the measured ones as its prior, charged.

Prints means and standard errors over the seeds, and medians: of the evaluations until 0.98, of a suggestion's
milliseconds, and of the seconds until 0.98 when an evaluation takes as long as `--seconds-per-evaluation` says. Before
them, how few evaluations would do for whoever knew the front, which no sampler can beat.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from truths import Problem, everything

from paretorch.objectives.pareto import hypervolume
from paretorch.search.ehvi import EHVISampler
from paretorch.search.knapsack import front as knapsack_front

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore")
MARKS = (30, 50, 100, 200)
SAMPLERS = (
    "random",
    "nsga2",
    "tpe",
    "tpe-univariate",
    "additive",
    "additive+nsga2",
    "additive+tpe",
    "ehvi",
    "ehvi+sensitivities",
)
ENOUGH = 0.98


@dataclass(frozen=True)
class Run:
    """After each evaluation: the share of the hypervolume, and the seconds that suggestions took so far."""

    shares: list[float]
    spent: list[float]
    per_suggestion: float

    def reached(self) -> float:
        """The evaluations until `ENOUGH`."""
        return next((n for n, share in enumerate(self.shares, 1) if share >= ENOUGH), np.inf)

    def seconds(self, per_evaluation: float) -> float:
        """The seconds until `ENOUGH`."""
        n = self.reached()
        return n * per_evaluation + self.spent[int(n) - 1] if np.isfinite(n) else np.inf


class Search:
    """Evaluates recipes of a truth and keeps the share of its hypervolume after each."""

    def __init__(self, truth: Problem, total: float) -> None:
        self.truth, self.total = truth, total
        self.points: list[tuple[float, float]] = []
        self.shares: list[float] = []

    def __call__(self, picks: tuple[int, ...]) -> tuple[float, float]:
        point = self.truth.losses(picks)
        self.points.append(point)
        known = self.shares[-1] if self.shares else 0.0
        better = all(p[0] > point[0] or p[1] > point[1] for p in self.points[:-1])
        self.shares.append(hypervolume(self.points, self.truth.reference) / self.total if better else known)
        return point


def sampler_of(name: str, truth: Problem, seed: int, sensitivities: list[list[float]] | None) -> BaseSampler:
    largest = sum(max(row) for row in truth.bytes)
    tables = [np.asarray(row) / largest for row in truth.bytes]

    def known(picks: Mapping[str, np.ndarray]) -> tuple[dict[int, np.ndarray], dict[str, np.ndarray]]:
        return {1: np.sum([table[picks[f"layer{layer}"]] for layer, table in enumerate(tables)], axis=0)}, {}

    match name:
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True)
        case "tpe-univariate":
            return optuna.samplers.TPESampler(seed=seed)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed)
        case "ehvi":
            prior = {f"layer{i}": row for i, row in enumerate(sensitivities)} if sensitivities else None
            return EHVISampler(seed, known=known, reference=truth.reference, prior=prior)
    raise SystemExit(f"{name!r} is not a sampler here; choose from {', '.join(SAMPLERS)}, gp")


def search(truth: Problem, total: float, name: str, seed: int, trials: int) -> Run:
    run = Search(truth, total)
    space = {f"layer{i}": optuna.distributions.IntDistribution(0, n - 1) for i, n in enumerate(truth.shape)}
    base, _, rest = name.partition("+")
    first: list[tuple[int, ...]] = []
    sensitivities: list[list[float]] | None = None
    if base == "additive" or rest == "sensitivities":
        largest = tuple(n - 1 for n in truth.shape)
        first = [largest]
        for layer, count in enumerate(truth.shape):
            first += [tuple(v if i == layer else x for i, x in enumerate(largest)) for v in range(count - 1)]
        values = {picks: truth.losses(picks)[0] for picks in first}
        sensitivities = [
            [
                values[tuple(v if i == layer else x for i, x in enumerate(largest))] - values[largest]
                for v in range(count)
            ]
            for layer, count in enumerate(truth.shape)
        ]
    if base == "additive":
        assert sensitivities is not None
        found = [choice.levels for choice in knapsack_front(sensitivities, truth.bytes)]
        amount = min(len(found), 20 if rest else trials)
        first += [found[i] for i in np.linspace(0, len(found) - 1, amount).round().astype(int)]
        base = rest or "random"
    first = list(dict.fromkeys(first))[:trials]
    sampler = sampler_of(base, truth, seed, sensitivities if rest == "sensitivities" else None)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for picks in first:
        system = {"NSGAIISampler:generation": 0} if base == "nsga2" else {}
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(zip(space, picks, strict=True)), distributions=space, values=run(picks), system_attrs=system
            )
        )
    known = set(first)
    spent = [0.0] * len(first)
    asked, started = 0, time.perf_counter()
    while len(run.points) < trials and asked < 20 * trials and name != "additive":
        trial = study.ask(space)
        picks = tuple(trial.params.values())
        # A repeated suggestion costs no evaluation: whoever searches remembers what has been evaluated.
        study.tell(trial, truth.losses(picks) if picks in known else run(picks))
        known.add(picks)
        asked += 1
        spent += [time.perf_counter() - started] * (len(run.points) - len(spent))
    seconds = time.perf_counter() - started
    return Run((run.shares + [run.shares[-1]] * trials)[:trials], spent, seconds / max(1, asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truths", nargs="*", default=[])
    parser.add_argument("--samplers", nargs="*", default=list(SAMPLERS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seconds-per-evaluation", type=float, default=1.0)
    arguments = parser.parse_args()
    marks = [mark for mark in MARKS if mark <= arguments.trials]
    print(
        f"{'truth':14}{'sampler':20}"
        + "".join(f"{mark:>16}" for mark in marks)
        + f"  to {ENOUGH}  ms per suggestion  seconds to {ENOUGH} at {arguments.seconds_per_evaluation:g} each"
    )
    for truth in everything():
        if arguments.truths and truth.name not in arguments.truths:
            continue
        total = truth.total()
        print(
            f"{truth.name:14}whoever knows the front needs {truth.fewest(ENOUGH)} evaluations to {ENOUGH}", flush=True
        )
        for name in arguments.samplers:
            runs = [search(truth, total, name, seed, arguments.trials) for seed in range(arguments.seeds)]
            shares = np.array([run.shares for run in runs])
            error = shares.std(0, ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else np.zeros(arguments.trials)
            cells = "".join(f"{shares[:, m - 1].mean():9.4f} ±{error[m - 1]:.4f}" for m in marks)
            reached = np.median([run.reached() for run in runs])
            milliseconds = 1000 * np.median([run.per_suggestion for run in runs])
            seconds = np.median([run.seconds(arguments.seconds_per_evaluation) for run in runs])
            print(f"{truth.name:14}{name:20}{cells}  {reached:7.0f}  {milliseconds:17.0f}  {seconds:15.1f}", flush=True)


if __name__ == "__main__":
    main()
