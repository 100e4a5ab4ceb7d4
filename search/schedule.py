"""The time budget of a study: how long trials take, how many remain, and how much time to reserve for the end."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ..objectives.display import duration
from ..spaces.space import Space
from . import ensembles
from .finalists import START
from .history import History
from .promotion import Promotions

REPORT_SECONDS = 7.0  # for the report and the end of the MLflow run
RUNG_COST_RATIO = 3.0  # rungs are worthwhile where training takes at least so many times as long as an untrained trial
_FINALISTS = 12  # the expected number of finalists before there is a front


@dataclass(frozen=True)
class Guess:
    """Durations in seconds, measured before the first trial. The names are those of `seconds` in study.json.

    Args:
        trial: A trial without training.
        evaluate: The evaluation in such a trial.
        epoch: An epoch of training.
        parity: The comparison of a finalist with its simulation; 0 in studies that did not measure it yet.
    """

    trial: float
    evaluate: float
    epoch: float
    parity: float = 0.0

    def pays(self, space: Space) -> bool:
        """Whether training takes so long that rungs are worthwhile."""
        longest = max(choice.epochs if choice else 0.0 for choice in space.recovery)
        return longest * self.epoch > RUNG_COST_RATIO * self.trial


class Schedule:
    """Estimates the remaining time and trials of a study.

    Args:
        guess: The durations measured before the first trial.
        space: The search space.
        history: The candidates so far.
        promotions: The rung of each candidate.
        samples: The number of samples of each split.
        seconds: The duration of one latency measurement.
        combines: Whether ensembles are tried after the trials.
        limit: Seconds for the whole search; infinite for no limit.
        started: When the search began, as `time.perf_counter` counts.
    """

    def __init__(
        self,
        guess: Guess,
        space: Space,
        history: History,
        promotions: Promotions,
        samples: Mapping[str, int],
        seconds: float,
        combines: bool,
        limit: float,
        started: float,
    ) -> None:
        self.guess, self.space, self.history, self.promotions = guess, space, history, promotions
        self.samples, self.seconds, self.combines = samples, seconds, combines
        self.limit, self.started = limit, started

    def typical(self, rung: int) -> float:
        """Seconds that a trial on a rung takes: the mean of those so far, or the guess with fewer than three.

        Reference recipes do not count: most of them do not train, and none is stopped early.
        """
        numbers = [s.number for s in self.promotions.ladder.rungs[rung] if not s.given]
        candidates = self.history.candidates
        measured = [m.seconds["total"] for n in numbers if (m := candidates[n].measurement) and "total" in m.seconds]
        if len(measured) >= 3:
            return statistics.mean(measured)
        choices = [choice.epochs if choice else 0.0 for choice in self.space.recovery]
        epochs = choices[rung] if self.space.ladder else statistics.mean(choices)
        return float(self.guess.trial + self.guess.epoch * epochs)

    def per_trial(self) -> float:
        """Expected seconds per remaining trial over all rungs; a recipe rejected by its predicted cost takes none."""
        candidates = self.history.candidates
        carried = sum(c.measurement is not None for c in candidates) / max(1, len(candidates))
        shares = self.promotions.ladder.shares()
        mean = math.fsum(share * self.typical(rung) for rung, share in enumerate(shares))
        return max(carried, 0.05) * mean if candidates else mean

    def time_left(self, members: int) -> float:
        """Seconds left for trials, without the time reserved for the end; `members` is the size of the front so far."""
        later = self.reserve(members) + self._for_ensembles()
        return self.remaining() - min(later, self.limit / 4)

    def remaining(self) -> float:
        """Seconds left for everything."""
        return self.limit - (time.perf_counter() - self.started)

    def trials_left(self, trials: int | None, seconds: float) -> float:
        """The number of remaining trials, with `trials` in total and at most `seconds` left."""
        by_time = seconds / max(self.per_trial(), 1e-3)
        return max(0.0, min(by_time, math.inf if trials is None else trials - self.history.trials))

    def reserve(self, members: int, parity: float | None = None) -> float:
        """Seconds to reserve for the finalists and the report.

        Args:
            members: The size of the front so far.
            parity: Seconds for the comparison of one finalist with its simulation; by default those of `guess`.
        """
        tests = self.samples.get("test", 0)
        images = tests / self.samples["validation"]
        candidates = self.history.candidates
        laps = [m.seconds["evaluate"] for c in candidates if (m := c.measurement) and "evaluate" in m.seconds]
        one = (statistics.median(laps) if laps else self.guess.evaluate) * images
        one += 4 * self.seconds if tests else 0.0
        finalists = members if candidates else _FINALISTS
        parity = self.guess.parity if parity is None else parity
        return 1.1 * (one * (1 + finalists) + parity * finalists) + START + REPORT_SECONDS

    def _for_ensembles(self) -> float:
        """Seconds for ensembles: each network's outputs, and about two untrained trials for each ensemble tried."""
        if not self.combines:
            return 0.0
        return _FINALISTS * self.guess.evaluate + 2 * ensembles.TRIED * self.guess.trial

    def plan(self, trials: int | None, seconds: float, members: int) -> str:
        """A line for people before the start: what will be executed and how long it will take."""
        left = self.trials_left(trials, seconds)
        ladder = self.promotions.ladder
        parts = [
            f"{max(1, round(left * share))} {name} ({duration(self.typical(rung), exact=True)} each)"
            for rung, (share, name) in enumerate(zip(ladder.shares(), ladder.names, strict=True))
        ]
        total = duration(left * self.per_trial())
        return f"plan      about {', '.join(parts)}: {total}, and {duration(self.reserve(members))} for the finalists"
