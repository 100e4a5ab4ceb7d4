"""The study: asks for recipes, has them executed, judges and records them, and ends with a front.

Everything a study knows is in its folder (`results.folder`), so a killed process loses at most the trial that was
running. A `Study` consists of parts, each with its own state:

    Suggester    the sampler: which recipe comes next               (search.suggest)
    Runner       executes a recipe, behind one interface            (runners.runner)
    Judge        objectives, limits, predicted costs                (search.judge)
    Promotions   which candidate is trained further, and its rivals (search.promotion)
    Trials       the journal, the candidates, Optuna in memory      (search.trials)
    Schedule     how long everything takes                          (search.schedule)
    Mirror       MLflow                                             (search.mirror)

The phases of a trial: predict its costs (over the budget: rejected, nothing is compressed), compress, export, measure
latency, evaluate, write to the journal, tell the sampler, mirror to MLflow. A rejected recipe is told to the sampler
like any other, with what is known about it.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution

from ..errors import ConfigError
from ..objectives.measurement import Estimate, Measurement
from ..objectives.objective import Budget, Objective
from ..results.candidate import Candidate
from ..results.export import UNASKED_SHARE
from ..results.folder import StudyFolder
from ..results.front import Front
from ..results.journal import Journal, undisturbed
from ..results.stored import tested_baseline, with_tests
from ..runners.files.atomic import write_atomic
from ..runners.local import LocalRunner
from ..runners.runner import BuildFile, Inspect, Outcome, Runner, RunTrial, TaskFacts
from ..runners.runner import RestoreBaseline as Restore
from ..runners.settings import PARITY_SECONDS, MeasurementSettings
from ..runners.targets.catalog import DEFAULT, as_target
from ..runners.targets.target import Target
from ..runners.task import Task
from ..spaces.defaults import reference_recipes
from ..spaces.recipe import Recipe
from ..spaces.rules import Axis
from ..spaces.space import Space
from .combine import combine
from .finalists import PARITY_AT_LEAST, measure_finalists
from .history import History
from .housekeeping import keep_files
from .judge import Judge
from .listener import Listener, Quiet
from .mirror import Mirror, mirrored_params, mirrored_texts
from .opening import begin, measure_baseline, train_students
from .preflight import Preflight, preflight
from .promotion import Promotions
from .resume import Asked, Beginning, held, prepare_folder, read_beginning, write_beginning
from .sampler import make_sampler
from .schedule import Schedule
from .suggest import OURS, Suggester
from .support import check_metrics, checked_space
from .trials import Trials

TRIALS = 40  # trials of a study for which neither a number nor a time was given
MAX_REPEATS = 300  # repeated suggestions in a row after which the space counts as exhausted


class RunnerFactory(Protocol):
    """Creates the runner of a task, whose files go to `directory`."""

    def __call__(
        self, task: Task, directory: Path, settings: MeasurementSettings, *, target: Target | None
    ) -> Runner: ...


class Study:
    """A search over one task.

        >>> from paretorch import Study                                     # doctest: +SKIP
        >>> front = Study(task, budget=["size_bytes <= 25%"]).run(trials=40)   # doctest: +SKIP

    Args:
        task: The trained network with its data and metric.
        space: The search space; derived from the network when None.
        objectives: Metrics such as `["accuracy", "size_bytes", "latency_ms"]`; the task's metric and size_bytes when
            None.
        budget: Limits such as `["size_bytes <= 25%", "accuracy >= -1%"]`.
        directory: The study's folder (`studies/<task name>` when None); an existing study is resumed.
        sampler: `ehvi` (our own), or Optuna's `tpe`, `nsga2`, `nsga3`, `gp`, `random`, `qmc`.
        rungs: Whether every candidate starts untrained and only the best ones are trained, step by step (see
            `search.rungs`). None decides by how long training takes. Only `ehvi` supports rungs.
        ensembles: Whether ensembles of the candidates are tried after the trials (see `search.ensembles`).
        seed: The seed of every random choice.
        threads: CPU threads while latency is measured.
        batch: Inputs per call while latency is measured.
        seconds: The duration of one latency measurement.
        calibration_images: How many training inputs set activation ranges and BatchNorm statistics.
        target: The runtime that runs the files: `onnxruntime`, `openvino`, `torch`, `torch-cuda`, or a `Target`.
        mlflow: The tracking URI; None for a store in the folder, False for no MLflow.
        experiment: The name of the MLflow experiment.
        listener: Follows the progress.
        config: The configuration with every default filled in; stored with the results.
        config_text: The configuration as it was written.
        config_file: The file it was read from.
        make_runner: Creates the runner that executes the recipes.
        max_repeats: Repeated suggestions in a row after which the space counts as exhausted.

    Raises:
        ConfigError: The configuration cannot be searched; all problems at once.
        TaskError: The task cannot be used.
        StudyError: The folder cannot be used.
    """

    def __init__(
        self,
        task: Task,
        space: Space | None = None,
        *,
        objectives: Sequence[str] | None = None,
        budget: Sequence[str] = (),
        directory: str | Path | None = None,
        sampler: str = OURS,
        rungs: bool | None = None,
        ensembles: bool = False,
        seed: int = MeasurementSettings.seed,
        threads: int = MeasurementSettings.threads,
        batch: int = MeasurementSettings.batch,
        seconds: float = MeasurementSettings.seconds,
        calibration_images: int = MeasurementSettings.calibration_images,
        target: Target | str | Mapping[str, Any] = DEFAULT,
        mlflow: str | bool | None = None,
        experiment: str | None = None,
        listener: Listener | None = None,
        config: Mapping[str, Any] | None = None,
        config_text: str = "",
        config_file: Path | None = None,
        make_runner: RunnerFactory = LocalRunner,
        max_repeats: int = MAX_REPEATS,
    ) -> None:
        self.task, self.given_space = task, space
        parsed = tuple(Objective.parse(text) for text in objectives or (task.metric_name, "size_bytes"))
        self.target = as_target(target)
        settings = MeasurementSettings(threads, batch, seconds, calibration_images, seed, self.target.spec)
        self.asked = Asked(task.name, parsed, Budget.parse(budget), sampler, rungs, settings)
        check_metrics(parsed, self.asked.budget, task.metric_name)
        make_sampler(sampler, 0, 0, {})
        if rungs and sampler != OURS:
            raise ConfigError(
                f"search.rungs = true with search.sampler = {sampler!r}: only ehvi knows rungs; leave one of "
                "the two out"
            )
        self.combines = ensembles
        self.folder = StudyFolder(Path(directory or Path("studies") / task.name).absolute())
        self.mlflow, self.experiment = mlflow, experiment
        self.listener: Listener = listener or Quiet()
        self.config, self.config_text, self.config_file = config, config_text, config_file
        self.make_runner, self.max_repeats = make_runner, max_repeats
        self.history = History()
        self.test_baseline: Estimate | None = None
        self.opened = False  # whether everything that a report needs is known
        self.overhead_seconds: list[float] = []  # of each trial, without compressing, training and measuring

    # ---------------------------------------------------------------------------------------------- opening

    def check(self) -> Preflight:
        """Run only the preflight, in a temporary folder; it raises what `run` would raise at its start."""
        with tempfile.TemporaryDirectory() as folder, self._running(Path(folder)):
            baseline, _ = measure_baseline(self.runner, self.task.name, self.listener)
            return self._preflight(baseline)

    @contextlib.contextmanager
    def _running(self, candidates: Path) -> Iterator[None]:
        """Load the task into a runner, which is closed at the end of the block."""
        self.listener.phase("loading the network and the data, tracing")
        self.runner = self.make_runner(self.task, candidates, self.asked.settings, target=self.target)
        try:
            self.facts: TaskFacts = self.runner.submit(Inspect()).result()
            self._use(checked_space(self.given_space, self.facts, self.target, self.task.name, self.listener.say))
            yield
        finally:
            self.runner.close()

    def _use(self, space: Space) -> None:
        self.space = space
        self.axes: tuple[Axis, ...] = space.axes(self.facts.structure)
        self.distributions: dict[str, BaseDistribution] = {
            axis.name: IntDistribution(0, len(axis.choices) - 1) for axis in self.axes if len(axis.choices) > 1
        }

    def _preflight(self, baseline: Measurement) -> Preflight:
        budget = self.asked.budget
        result = preflight(self.runner, self.facts, self.space, budget, baseline, self.listener.phase)
        result = replace(
            result,
            metric=self.task.metric_name,
            target=self.target.name,
            computed=self.target.milliseconds is not None,
            limits=tuple(budget.describe(baseline.values)),
        )
        self.listener.checked(result)
        return result

    def _open(self, limit: float, started: float) -> None:
        """Measure the baseline and run the preflight of a new study, or read an existing one; then create its parts."""
        snapshot = self.asked.snapshot(self.facts, self.space)
        resumed = self.folder.about.exists()
        if resumed:
            beginning = read_beginning(self.folder, snapshot)
            packed = self.folder.read_baseline()
            latency = beginning.baseline.value("latency_ms")
            self.runner.submit(Restore(packed, latency, beginning.plan)).result()
        else:
            baseline, packed = measure_baseline(self.runner, self.task.name, self.listener)
            checked = self._preflight(baseline)
            beginning = begin(self.runner, self.asked, self.space, checked, packed, self.folder, self.listener)
            write_atomic(self.folder.baseline, packed)
            environment = self.facts.environment
            write_beginning(self.folder, beginning, self.asked, snapshot, environment, self.config, self.config_file)
        if beginning.ladder:
            self._use(self.space.as_ladder())
        trained = train_students(self.runner, self.space, self.axes, beginning, self.listener)
        self._assemble(trained, limit, started)
        journal = Journal(self.folder.journal)
        self.trials = Trials(journal, self.history, self.promotions, self.judge, self.distributions, self.asked.sampler)
        self.trials.load(journal.read(mend=True))
        self._read_finalists()
        self._keep_files(interrupted=True)
        self.opened = True
        if self.history.candidates:
            count = _count(len(self.history.candidates))
            self.listener.say(f"going on with the study in {self.folder.root}: {count} finished")

    def _assemble(self, beginning: Beginning, limit: float, started: float) -> None:
        """Create the parts of the study, without any candidate yet."""
        asked, structure = self.asked, self.facts.structure
        self.history = History()
        self.judge = Judge(
            asked.objectives, asked.budget, self.task.metric_name, structure, beginning.baseline, beginning.overheads
        )
        read_scores: Callable[[Recipe], NDArray[Any] | None] = self.folder.candidates.read_scores
        self.promotions = Promotions(self.space, structure, self.judge, self.history, read_scores)
        self.suggester = Suggester(
            asked.sampler,
            asked.settings.seed,
            self.judge,
            self.space,
            self.axes,
            self.distributions,
            computed=self.target.milliseconds is not None,
        )
        self.schedule = Schedule(
            beginning.guess,
            self.space,
            self.history,
            self.promotions,
            self.facts.samples,
            asked.settings.seconds,
            self.combines,
            limit,
            started,
        )
        self.mirror = Mirror(self.folder, self.axes, self.listener)

    # ----------------------------------------------------------------------------------------------- running

    def run(self, trials: int | None = None, time_limit: float | None = None) -> Front:
        """Search until the study has `trials` finished trials in total, or `time_limit` seconds are over.

        An interrupted study is resumed; one that has its trials already returns its front. On Ctrl-C the report of the
        front so far is written before `KeyboardInterrupt` is raised again.

        Args:
            trials: The number of trials; when None, 40, or with a time limit as many as fit.
            time_limit: Seconds for everything, including the baseline, the finalists and the report.

        Returns:
            The front of all candidates.

        Raises:
            StudyError: The folder cannot be used, or it belongs to another configuration.
        """
        started, limit = time.perf_counter(), math.inf if time_limit is None else time_limit
        self.opened, self.test_baseline = False, None
        trials = TRIALS if trials is None and time_limit is None else trials
        with held(self.folder):
            prepare_folder(self.folder)
            with self._running(self.folder.candidates.directory):
                try:
                    self._open(limit, started)
                    self._start_mirror()
                    self._search(trials)
                    self._combine()
                    if self.space.ladder:
                        self.listener.say(f"rungs     {self.promotions.ladder.describe()}")
                    self._finalists()
                    self._finish("FINISHED")
                except BaseException as error:
                    self._stopped(error)
                    raise
        return self.front

    def _stopped(self, error: BaseException) -> None:
        """Write what is known when an error or an interruption stops the search."""
        if not self.opened:
            return
        if not isinstance(error, Exception):  # Ctrl-C
            self._finish("KILLED")
            return
        with contextlib.suppress(Exception):  # the first error is the one to report
            note = f"The search stopped with an error; the same command goes on.\n\n```\n{error}\n```"
            self.mirror.fail(self.front, self.folder.report, note)

    @property
    def candidates(self) -> list[Candidate]:
        """All candidates so far."""
        return self.history.candidates

    @property
    def front(self) -> Front:
        """The front of all candidates so far."""
        asked, candidates = self.asked, tuple(self.candidates)
        return Front(
            candidates, asked.objectives, asked.budget, self.judge.baseline, self.folder.root, self.test_baseline
        )

    def _search(self, trials: int | None) -> None:
        pending = self._reference_recipes()
        repeats, begin, fresh = 0, time.perf_counter(), not self.candidates
        if trials is None or self.history.trials < trials:
            seconds = self._time_left()
            self.listener.say(self.schedule.plan(trials, seconds, self._members()))
        while trials is None or self.history.trials < trials:
            if not self._may(0) and not (fresh and not self.candidates):  # at least one trial, however short the time
                total = f" of {_count(trials)}" if trials else ""
                self.listener.say(
                    f"the time is used up after {self.history.trials}{total or ' trials'}; "
                    "run the same command with more time to resume"
                )
                return
            label, trial, picks, recipe = self._next(trials, pending)
            twin = self.history.by_key.get(recipe.key)
            if trial is not None and twin is not None:
                self._repeat(trial, twin, picks or {})
                repeats += 1
                if repeats >= self.max_repeats:
                    self.listener.say(
                        f"the sampler suggested {repeats} known recipes in a row: the space counts as searched through "
                        f"after {_count(self.history.trials)}; more choices per decision make it larger"
                    )
                    return
                continue
            repeats = 0
            outcome = self._carry_out(recipe, picks, label)
            candidate, front = self._remember(trial, recipe, outcome, picks, label)
            self.overhead_seconds.append(time.perf_counter() - begin - outcome.seconds)
            self._report_trial(trials, candidate, front)
            begin = time.perf_counter()

    def _reference_recipes(self) -> list[tuple[str, Recipe]]:
        """The reference recipes with their labels, without those that were tried already or cannot run."""
        recipes = reference_recipes(self.space, self.facts.structure)
        foreign = [label for label, recipe in recipes if any(map(self.target.supports, recipe.steps))]
        if foreign:
            self.listener.say(f"target    {self.target.name} cannot run the trivial baselines {', '.join(foreign)}")
        known = self.history.by_key
        return [(label, recipe) for label, recipe in recipes if recipe.key not in known and label not in foreign]

    def _next(
        self, trials: int | None, pending: list[tuple[str, Recipe]]
    ) -> tuple[str, optuna.Trial | None, Mapping[str, int] | None, Recipe]:
        """The next recipe: its label, the trial if the sampler suggested it, its choices, and the recipe itself."""
        structure = self.facts.structure
        if pending:
            label, recipe = pending.pop(0)
            return label, None, self.space.encode(structure, recipe), recipe
        if self.space.ladder:
            left = self.schedule.trials_left(trials, self._time_left())
            promoted = self.promotions.next(self.front, left, self._may)
            if promoted is not None:
                return "", None, promoted, self.space.recipe(structure, promoted)
        trial, picks = self.trials.ask(self.suggester.sampler(self.history.records))
        return "", trial, picks, self.space.recipe(structure, picks)

    def _members(self) -> int:
        return len(self.front.members) if self.candidates else 0

    def _time_left(self) -> float:
        return math.inf if math.isinf(self.schedule.limit) else self.schedule.time_left(self._members())

    def _may(self, rung: int) -> bool:
        """Whether there is time for a trial on a rung."""
        return math.isinf(self.schedule.limit) or self.schedule.typical(rung) <= self._time_left()

    def _report_trial(self, trials: int | None, candidate: Candidate, front: Front) -> None:
        seconds = self._time_left()
        left = self.schedule.trials_left(trials, seconds)
        eta = min(left * self.schedule.per_trial(), seconds)
        done = self.history.trials
        self.listener.finished(candidate, front, done, trials or done + round(left), eta)

    def _carry_out(self, recipe: Recipe, picks: Mapping[str, int] | None, label: str) -> Outcome:
        """Execute a recipe and return the outcome. Reference recipes are measured whatever they cost."""
        if not label and (outcome := self.judge.rejected(recipe)) is not None:
            return outcome
        rung, number = self.promotions.rung(picks), len(self.candidates)
        seconds = self.asked.settings.seconds
        request = RunTrial(
            recipe,
            budget=None if label else self.judge.budget,
            baseline=self.judge.baseline_values,
            time_first=self.judge.limits_latency and not rung,  # on higher rungs it was timed below
            rivals=() if label else self.promotions.rivals(rung),
            cost_objectives=self.judge.other_objectives,
            keep_trained=0 < rung < self.promotions.top,
            seconds=None if self.judge.times else UNASKED_SHARE * seconds,
        )
        return self.runner.submit(request, lambda phase: self.listener.phase(f"trial {number}: {phase}")).result()

    @undisturbed()
    def _remember(
        self,
        trial: optuna.Trial | None,
        recipe: Recipe,
        outcome: Outcome,
        picks: Mapping[str, int] | None,
        label: str,
    ) -> tuple[Candidate, Front]:
        """Write the candidate to disk, then tell the sampler, then log it to MLflow; return it and the new front."""
        candidate = self.judge.candidate(len(self.candidates), recipe, outcome, picks, label)
        self.trials.remember(trial, candidate)
        front = self._keep_files()
        self.mirror.log(candidate, front)
        return candidate, front

    @undisturbed()
    def _repeat(self, trial: optuna.Trial, twin: Candidate, picks: Mapping[str, int]) -> None:
        self.trials.repeat(trial, twin, picks)

    def _keep_files(self, *, interrupted: bool = False) -> Front:
        front, files = self.front, self.folder.candidates
        keep_files(files, front, self.history, self.promotions, combines=self.combines, interrupted=interrupted)
        return front

    # --------------------------------------------------------------------------------------------- the end

    def _combine(self) -> None:
        """Try ensembles of the candidates, where that was requested."""
        if not self.combines:
            return

        def run(recipe: Recipe) -> Front:
            candidate, front = self._remember(None, recipe, self._carry_out(recipe, None, ""), None, "")
            self.listener.finished(candidate, front, self.history.trials, self.history.trials, 0.0)
            return front

        combine(self.folder, self.front, self.history, self.runner, self.listener, run, self._end_is_near)

    def _end_is_near(self) -> bool:
        """Whether only the time for the finalists and the report is left."""
        return self.schedule.remaining() < self.schedule.reserve(self._members())

    def _finalists(self) -> None:
        """Measure the front's members and the baseline on the test split from their files, each of them once."""
        if "test" not in self.facts.samples:
            self.listener.say(
                "the task has no test data: the front's numbers are the validation split's, on which it was selected"
            )
        members = self.front.members
        left = self.schedule.remaining() - self.schedule.reserve(len(members), parity=0.0)
        measure_finalists(
            self.folder,
            members,
            self._packed,
            self.runner,
            self.task.metric_name,
            self.facts.samples,
            self.judge.baseline.value("latency_ms"),
            self.listener,
            min(PARITY_SECONDS, max(PARITY_AT_LEAST, left / max(1, len(members)))),
        )
        self._read_finalists()

    def _packed(self, candidate: Candidate) -> Path:
        """The packed file of a candidate; a deleted one is created again, with the same bytes."""
        path = self.folder.candidates.packed(candidate.recipe)
        if not path.exists():
            write_atomic(path, self.runner.submit(BuildFile(candidate.recipe)).result())
        return path

    def _read_finalists(self) -> None:
        finalists = self.folder.read_finalists()
        self.history.candidates[:] = with_tests(self.history.candidates, finalists)
        self.test_baseline = tested_baseline(finalists)

    @undisturbed()
    def _start_mirror(self) -> None:
        """Open the MLflow store and bring it up to date."""
        params = mirrored_params(self.asked, len(self.distributions), self.target.name)
        texts = mirrored_texts(self.folder, self.config_text, self.config)
        self.mirror.start(self.front, self.mlflow, self.experiment, params, texts, self.facts.environment)

    @undisturbed()
    def _finish(self, status: str) -> None:
        """Write the report and end the MLflow run."""
        from ..results.report.write import write_report  # plotly and matplotlib take seconds to import

        self.listener.phase("writing the report")
        front, ladder = self.front, self.promotions.ladder
        note = write_report(
            front,
            self.folder.report,
            name=self.folder.root.name,
            config_text=self.config_text,
            budget_lines=self.asked.budget.describe(self.judge.baseline_values),
            notes=[f"Rungs: {ladder.describe()}."] if self.space.ladder else [],
        )
        self.mirror.finish(front, self.folder.report, note, status, ladder.taus())
        self.opened = False  # nothing is left to write


def _count(trials: int) -> str:
    return f"{trials} trial{'s' * (trials != 1)}"
