"""The trials of a study: the journal on disk, the candidates, and the Optuna study that is rebuilt from them.

A candidate is always recorded in this order: on disk, in the history, in the sampler.
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
        journal: The file that is the source of truth.
        history: The candidates; new ones are added.
        promotions: The rungs on which candidates are placed.
        judge: Decides what the sampler is told about a candidate.
        distributions: The axes with more than one choice, as Optuna's distributions.
        sampler: The name of the sampler.
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
        """Restore the history, the rungs and Optuna to their state when the last record was written."""
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
        """Ask the sampler for a suggestion: Optuna's trial, and its choices."""
        self.optuna.sampler = sampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.optuna.ask(self.distributions)
        return trial, dict(trial.params)

    def remember(self, trial: optuna.Trial | None, candidate: Candidate) -> None:
        """Record a candidate and tell the sampler; `trial` is None when the sampler did not suggest it."""
        system = self._system(trial)
        self.journal.append({"candidate": candidate.to_dict(), "system": system})
        self.history.records += 1
        self._register(candidate)
        self._tell(trial, candidate, candidate.picks, system)

    def repeat(self, trial: optuna.Trial, twin: Candidate, picks: Mapping[str, int]) -> None:
        """Tell the sampler the known numbers of a recipe that it suggested again; the recipe is not run again."""
        system = self._system(trial)
        self.journal.append({"same_as": twin.number, "picks": dict(picks), "system": system})
        self.history.records += 1
        self._tell(trial, twin, picks, system)

    def _register(self, candidate: Candidate) -> None:
        self.history.add(candidate)
        self.promotions.place(candidate)

    def _system(self, trial: optuna.Trial | None) -> dict[str, int]:
        """What a sampler stored on a trial and needs again when the study is resumed: NSGA's generation."""
        key = GENERATION.get(self.sampler)
        if key is None:
            return {}
        # A reference recipe belongs to the first generation, from which all others descend.
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
        """Also tell the sampler the numbers of a candidate with nothing to recover as those on the top rung.

        Training would not change them, and the sampler chooses recipes by their expected numbers on the top rung. It
        would otherwise learn nothing there about candidates that are never promoted.
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
