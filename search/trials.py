"""The memory of a study: the journal on disk, the candidates, and the Optuna study that is rebuilt from them.

What happens to a candidate always happens in this order: onto the disk, into the history, to the sampler.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from ..results.candidate import FAILED, Candidate
from ..results.journal import Journal
from .ehvi import UNKNOWN
from .history import History
from .judge import Judge
from .promotion import Promotions
from .sampler import GENERATION


class Trials:
    """The trials of a study, on disk and in Optuna.

    Args:
        journal: The file that is the truth.
        history: The candidates, which are added to.
        promotions: The rungs, on which every candidate is placed.
        judge: What a sampler learns of a candidate.
        distributions: The decisions that have a choice.
        sampler: Name of the sampler.
    """

    def __init__(
        self,
        journal: Journal,
        history: History,
        promotions: Promotions,
        judge: Judge,
        distributions: Mapping[str, BaseDistribution],
        sampler: str,
    ) -> None:
        self.journal, self.history, self.promotions, self.judge = journal, history, promotions, judge
        self.distributions, self.sampler = dict(distributions), sampler
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = [StudyDirection.MAXIMIZE if o.maximize else StudyDirection.MINIMIZE for o in judge.objectives]
        self.optuna = optuna.create_study(directions=directions)

    def load(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Bring the history, the rungs and Optuna to where they were when the last record was written."""
        for record in records:
            self.history.records += 1
            if "candidate" in record:
                candidate = Candidate.from_dict(record["candidate"])
                self._register(candidate)
                picks = candidate.picks
            else:
                candidate, picks = self.history.candidates[record["same_as"]], record["picks"]
            if picks is not None:
                self._add(candidate, picks, record.get("system", {}))
                self._tell_top_rung(candidate, picks)

    def ask(self, sampler: BaseSampler) -> tuple[optuna.Trial, dict[str, int]]:
        """A suggestion: Optuna's trial, and its choices."""
        self.optuna.sampler = sampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.optuna.ask(self.distributions)
        return trial, dict(trial.params)

    def remember(self, trial: optuna.Trial | None, candidate: Candidate) -> None:
        """Write a candidate down and tell the sampler; `trial` is None when the sampler did not ask for it."""
        system = self._system(trial)
        self.journal.append({"candidate": candidate.to_dict(), "system": system})
        self.history.records += 1
        self._register(candidate)
        self._tell(trial, candidate, candidate.picks, system)

    def repeat(self, trial: optuna.Trial, twin: Candidate, picks: Mapping[str, int]) -> None:
        """Tell a known recipe again with its known numbers; it is never run again."""
        system = self._system(trial)
        self.journal.append({"same_as": twin.number, "picks": dict(picks), "system": system})
        self.history.records += 1
        self._tell(trial, twin, picks, system)

    def _register(self, candidate: Candidate) -> None:
        self.history.add(candidate)
        self.promotions.place(candidate)

    def _system(self, trial: optuna.Trial | None) -> dict[str, int]:
        """What a sampler has noted on a trial and needs again after a resume: NSGA's generation."""
        key = GENERATION.get(self.sampler)
        if key is None:
            return {}
        # A reference recipe belongs to the generation that all others descend from.
        return {key: 0 if trial is None else self.optuna._storage.get_trial(trial._trial_id).system_attrs[key]}

    def _tell(
        self,
        trial: optuna.Trial | None,
        candidate: Candidate,
        picks: Mapping[str, int] | None,
        system: Mapping[str, Any],
    ) -> None:
        if trial is None:
            if picks is not None:
                self._add(candidate, picks, system)
                self._tell_top_rung(candidate, picks)
            return
        observation = self.judge.observation(candidate)
        if observation.unknown:
            trial.set_user_attr(UNKNOWN, observation.unknown)
        for name, value in observation.constraints.items():
            trial.set_constraint(name, value)
        if candidate.state == FAILED:
            self.optuna.tell(trial, state=TrialState.FAIL)
        else:
            self.optuna.tell(trial, observation.values)
        self._tell_top_rung(candidate, picks or {})

    def _tell_top_rung(self, candidate: Candidate, picks: Mapping[str, int]) -> None:
        """Tell the sampler, too, what training would make of a candidate that has nothing to win back: the same.

        It asks for recipes by what it expects of them at the top, and learns nothing from there of those that are never
        promoted.
        """
        top = self.promotions.top
        if self.promotions.rung(picks) < top and candidate.number in self.promotions.recovered:
            self._add(candidate, {**picks, "recovery": top}, {})

    def _add(self, candidate: Candidate, picks: Mapping[str, int], system: Mapping[str, Any]) -> None:
        observation = self.judge.observation(candidate)
        failed = candidate.state == FAILED
        self.optuna.add_trial(
            create_trial(
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                values=None if failed else observation.values,
                params={name: picks[name] for name in self.distributions},
                distributions=self.distributions,
                constraints=observation.constraints,
                user_attrs={UNKNOWN: observation.unknown} if observation.unknown else {},
                system_attrs=dict(system),
            )
        )
