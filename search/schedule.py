"""The time of a study: how long trials take, how many are to come, and what to keep for the end."""

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

REPORT_SECONDS = 7.0  # that the report and the end of the MLflow run take
RUNG_COST_RATIO = 3.0  # times as long as a trial without training must take the training of one that rungs are worth it
_FINALISTS = 12  # guessed before there is a front


@dataclass(frozen=True)
class Guess:
    """Seconds that were measured before the first trial; the names are those of `seconds` in study.json.

    Args:
        trial: Of a trial without training.
        evaluate: Of these, for the evaluation.
        epoch: Of an epoch of training.
        parity: Of the comparison of a finalist with its simulation; an older study does not know it.
    """

    trial: float
    evaluate: float
    epoch: float
    parity: float = 0.0

    def pays(self, space: Space) -> bool:
        """Whether training takes so long that rungs are worth it."""
        longest = max(choice.epochs if choice else 0.0 for choice in space.recovery)
        return longest * self.epoch > RUNG_COST_RATIO * self.trial


class Schedule:
    """What a study expects of the time to come.

    Args:
        guess: What was measured before the first trial.
        space: What is searched.
        history: The candidates so far.
        promotions: On which rung each of them is.
        samples: By split the number of samples.
        seconds: Of one latency measurement.
        combines: Whether ensembles are tried at the end.
        limit: Seconds that the whole search may take, infinite for no limit.
        started: When it began, on `time.perf_counter`.
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
        """Seconds that a trial on a rung takes: the mean of those that were carried out, else what is guessed.

        The reference recipes do not count: most of them do not train, and none is stopped early.
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
        """Seconds per trial to come, over all rungs; what is rejected by predicted cost takes none."""
        candidates = self.history.candidates
        carried = sum(c.measurement is not None for c in candidates) / max(1, len(candidates))
        shares = self.promotions.ladder.shares()
        mean = math.fsum(share * self.typical(rung) for rung, share in enumerate(shares))
        return max(carried, 0.05) * mean if candidates else mean

    def time_left(self, members: int) -> float:
        """Seconds left for trials when the end is kept free; `members`: of the front so far."""
        later = self.reserve(members) + self._for_ensembles()
        return self.remaining() - min(later, self.limit / 4) if math.isfinite(self.limit) else math.inf

    def remaining(self) -> float:
        """Seconds left for everything."""
        return self.limit - (time.perf_counter() - self.started)

    def trials_left(self, trials: int | None, seconds: float) -> float:
        """How many trials are to come, of `trials` in all, in so many seconds."""
        by_time = seconds / max(self.per_trial(), 1e-3)
        return max(0.0, min(by_time, math.inf if trials is None else trials - self.history.trials))

    def reserve(self, members: int, parity: float | None = None) -> float:
        """Seconds to keep for the finalists and the report.

        Args:
            members: Of the front so far.
            parity: For the comparison of one finalist with its simulation; what was guessed when None.
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
        """Seconds for ensembles: each network's outputs, and about twice a trial without training for each tried."""
        if not self.combines:
            return 0.0
        return _FINALISTS * self.guess.evaluate + 2 * ensembles.TRIED * self.guess.trial

    def plan(self, trials: int | None, seconds: float, members: int) -> str:
        """For people, before the start: what will be carried out and how long it will take."""
        left = self.trials_left(trials, seconds)
        ladder = self.promotions.ladder
        parts = [
            f"{max(1, round(left * share))} {name} ({duration(self.typical(rung), exact=True)} each)"
            for rung, (share, name) in enumerate(zip(ladder.shares(), ladder.names, strict=True))
        ]
        total = duration(left * self.per_trial())
        return f"plan      about {', '.join(parts)}: {total}, and {duration(self.reserve(members))} for the finalists"
