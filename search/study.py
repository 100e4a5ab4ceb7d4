"""The study: asks for recipes, has them carried out, judges them, remembers them, and ends with a front.

Everything a study knows lies in its folder, so that a kill at any moment loses at most the trial that was running:

    study.json        what was asked, the baseline, the environment (written once)
    trials.jsonl      one line per finished trial: the truth (`results.journal`)
    candidates/       the packed files of the front, of the nearest misses and of the baseline
    ensembles.json    of which networks ensembles were tried, where they were asked for (`search.ensembles`)
    finalists.json    the front on the test split, and finalists/ with every sample's score (`search.finalists`)
    report/           front.html, front.png, front.csv, front.json, report.md
    mlflow.db, ...    the MLflow mirror, unless another store is named

The order of a trial: predict by arithmetic (over the budget: refused, nothing is compressed), compress, export, time,
evaluate, remember on disk, tell the sampler, mirror to MLflow. A refused recipe is told to the sampler like any other,
with what is known of it, so that it teaches.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from torch import Tensor, nn

from ..errors import ConfigError, Diverged, OverBudget, Stopped, StudyError, TaskError, TrialError
from ..objectives import cost
from ..objectives.measurement import Estimate, Measurement
from ..objectives.objective import Budget, Objective, duration, show
from ..objectives.pareto import nondominated
from ..results.candidate import FAILED, OK, OVER_BUDGET, STOPPED, Candidate
from ..results.front import Front
from ..results.journal import Journal, locked, undisturbed
from ..runners.evaluate import EvaluationPlan
from ..runners.files.atomic import write_atomic
from ..runners.local import LocalRunner, environment
from ..runners.targets.target import DEFAULT, Target, as_target
from ..runners.task import Task, check_criteria, dataset, scores
from ..spaces.defaults import default_space, reference_recipes
from ..spaces.plain import plain
from ..spaces.recipe import Recipe
from ..spaces.rules import Axis
from ..spaces.space import Space
from ..spaces.techniques.ensemble import Ensemble
from ..spaces.techniques.recover import Recover, how
from . import ensembles as together
from .ehvi import UNKNOWN, EHVISampler, Floats, Ints
from .finalists import PARITY_SECONDS, START, measure_finalists, seconds_of_parity, with_tests
from .preflight import TOLERANCE, Preflight, check_metrics, check_supported, nonzero_shares, preflight, within
from .racing import Rival, race
from .rungs import PILOT, Ladder, RungEntry, ranked
from .sampler import GENERATION, in_space, make_sampler

if TYPE_CHECKING:
    from ..results.tracking.tracker import Tracker

VERSION = 1
KNOWN = ("size_bytes", "macs")  # metrics that arithmetic gives
_SPENT = 300  # repeated suggestions in a row after which a space counts as searched through
TRIALS = 40  # candidates of a study of which neither a number nor a time was said
_OURS = re.compile(
    r"[0-9a-f]{16}\.(safetensors|trained|partial-training|npy)"
)  # the files in candidates/ that are the study's
UNTIMED = 0.2  # of the usual time is spent on a latency that no objective and no limit asks for
_REPORT = 7.0  # seconds that the report and the end of the MLflow run take
_PAYS = 3.0  # times as long as a trial without training must take the training of one that rungs are worth it
_FINALISTS = 12  # guessed before there is a front
_PARITY_AT_LEAST = 2.0  # seconds for the comparison of a finalist with its simulation, however short the time
_PARTIAL = re.compile(r"\..*\.\d+\.(partial|part)")  # what a kill in the middle of writing leaves behind


class Listener(Protocol):
    """Whoever wants to follow a study."""

    def say(self, text: str) -> None:
        """A line worth keeping."""

    def phase(self, text: str) -> None:
        """What is being done at the moment."""

    def checked(self, found: Preflight, study: Study) -> None:
        """The preflight is through."""

    def finished(self, candidate: Candidate, front: Front, done: int, total: int, eta: float) -> None:
        """A trial ended; `eta` is in seconds."""


class Quiet:
    """A listener that does not listen."""

    def say(self, text: str) -> None: ...

    def phase(self, text: str) -> None: ...

    def checked(self, found: Preflight, study: Study) -> None: ...

    def finished(self, candidate: Candidate, front: Front, done: int, total: int, eta: float) -> None: ...


class Study:
    """A search over one task.

    task: what is compressed. space: what may be done (derived from the network when None). objectives: metrics such as
    `["accuracy", "size_bytes", "latency_ms"]`; the task's metric and size_bytes when None. budget: limits such as
    `["size_bytes <= 25%", "accuracy >= -1%"]`. directory: the study's folder (`studies/<task name>` when None); a study
    that is there already goes on. rungs: whether every candidate begins untrained and only the best are trained, step by
    step (see `search.rungs`); None finds out whether training takes so long that it pays. It needs our sampler. ensembles:
    whether ensembles of the candidates are tried after the trials (see `search.ensembles`). target: what
    runs the files that are measured (`onnxruntime`, `openvino`, `torch`, `torch-cuda`, or a `Target`). mlflow: tracking URI,
    None for a store in the folder, False for no MLflow. config, config_text, config_file: what was asked, with every default
    filled in, as it was written, and where; kept with the results.

        >>> from paretorch import Study                                     # doctest: +SKIP
        >>> front = Study(task, budget=["size_bytes <= 25%"]).run(trials=40)   # doctest: +SKIP

    Raises `ConfigError`, `TaskError` and `StudyError` with what to do.
    """

    def __init__(
        self,
        task: Task,
        space: Space | None = None,
        *,
        objectives: Sequence[str] | None = None,
        budget: Sequence[str] = (),
        directory: str | Path | None = None,
        sampler: str = "ehvi",
        rungs: bool | None = None,
        ensembles: bool = False,
        seed: int = 0,
        threads: int = 1,
        batch: int = 1,
        seconds: float = 0.5,
        calibration_images: int = 512,
        target: Target | str | Mapping[str, Any] = DEFAULT,
        mlflow: str | bool | None = None,
        experiment: str | None = None,
        listener: Listener | None = None,
        config: Mapping[str, Any] | None = None,
        config_text: str = "",
        config_file: Path | None = None,
    ) -> None:
        self.task, self.given_space, self.sampler_name, self.seed = task, space, sampler, seed
        self.objectives = tuple(Objective.parse(text) for text in objectives or (task.metric_name, "size_bytes"))
        self.budget = Budget.parse(budget)
        check_metrics(self.objectives, self.budget, task.metric_name)
        make_sampler(sampler, 0, 0, {})
        if rungs and sampler != "ehvi":
            raise ConfigError(f"search.rungs = true with search.sampler = {sampler!r}: only ehvi knows rungs; leave one of the two out")  # fmt: skip
        self.rungs, self.ensembles = rungs, ensembles
        self.directory = Path(directory or Path("studies") / task.name).absolute()
        self.measure = {
            "threads": threads,
            "batch": batch,
            "seconds": seconds,
            "calibration_images": calibration_images,
        }
        self.target = as_target(target)
        self.mlflow, self.experiment = mlflow, experiment
        self.listener: Listener = listener or Quiet()
        self.config, self.config_text, self.config_file = config, config_text, config_file
        self.candidates: list[Candidate] = []
        self.test_baseline: Estimate | None = None
        self.tracker: Tracker | None = None
        self.opened = False  # whether all that a report is made of is known
        self.behind = False  # whether MLflow has missed a candidate
        self.overhead_seconds: list[float] = []  # of each trial, what was neither compressing, training nor measuring

    # ---------------------------------------------------------------------------------------------- opening

    def check(self) -> Preflight:
        """The preflight alone, in a throw-away folder; raises what `run` would raise at its start."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self._load_runner(Path(folder))
            baseline, _ = self._measure_baseline()
            found = preflight(self.runner, self.space, self.budget, baseline, self.listener.phase)
        self.listener.checked(found, self)
        return found

    def _load_runner(self, folder: Path) -> None:
        self.listener.phase("loading the network and the data, tracing")
        self.runner = LocalRunner(self.task, folder, seed=self.seed, target=self.target, **self.measure)  # type: ignore[arg-type]
        if self.given_space is None:
            train_images = len(dataset(self.task, "train"))  # type: ignore[arg-type]
            derived = default_space(self.runner.structure, train_images)
            space, gone = within(derived, self.runner.structure, self.target)
            if gone:
                self.listener.say(
                    f"target    {self.target.name} cannot run all of the derived space; left out: {'; '.join(gone)}"
                )
        else:
            space = self.given_space
        check_supported(space, self.runner.structure, self.target)
        check_criteria(self.task, (choice for rule in space.criterion for choice in rule.choices))
        self._use(space)

    def _use(self, space: Space) -> None:
        self.space = space
        self.axes = self.space.axes(self.runner.structure)
        self.distributions: dict[str, BaseDistribution] = {
            axis.name: IntDistribution(0, len(axis.choices) - 1) for axis in self.axes if len(axis.choices) > 1
        }

    def _measure_baseline(self) -> tuple[Measurement, bytes]:
        self.listener.phase("measuring the baseline")
        try:
            return self.runner.baseline()
        except Diverged as error:  # of a candidate that is a result; of the network as it was given it is a mistake
            raise TaskError(f"task {self.task.name!r}: the untouched network cannot be measured: {error}. Every candidate is compared "
                            "with it, so check the metric, the validation data and the checkpoint") from error  # fmt: skip

    def _snapshot(self) -> dict[str, Any]:
        """What must not change when a study goes on: all that decides which recipes come and how they are judged."""
        # Pairs follow from the network, and studies that are older than them go on.
        bare = replace(self.runner.structure, students=(), pairs=(), unpaired=())
        structure = json.dumps(plain(bare), sort_keys=True, default=list)
        recipe = {
            "task": self.task.name,
            "network": hashlib.sha256(structure.encode()).hexdigest()[:16],
            "weights": digest(self.runner.model),
            "data": {split: len(dataset(self.task, split)) for split in ("train", "validation")},  # type: ignore[arg-type]
            "space": plain(self.space),
            "objectives": [f"{'max' if o.maximize else 'min'} {o.metric}" for o in self.objectives],
            "budget": [limit.text for limit in self.budget.limits],
            "sampler": self.sampler_name,
            "rungs": self.rungs,
            "seed": self.seed,
            **({"students": self._students()} if any(self.space.students) else {}),
            # Studies of ONNX Runtime say nothing of it, as before there were others.
            "measure": ({} if self.target.name == DEFAULT else {"target": self.target.spec}) | self.measure,
        }
        return json.loads(json.dumps(recipe))  # type: ignore[no-any-return]

    def _students(self) -> dict[str, str]:
        """By name the weights that the students of the space begin with."""
        names = [student.factory for student in self.space.students if student]
        return {name: digest(self.runner.students[name]) for name in names}

    def _open(self) -> None:
        """Load the task, measure or restore the baseline, read the journal, run the preflight of a new study."""
        self.journal = Journal(self.directory / "trials.jsonl")
        about = self.directory / "study.json"
        if self.journal.path.exists() and not about.exists():
            raise StudyError(f"{self.directory} holds trials.jsonl without the study.json they belong to; restore that file, or name "
                             "another folder with --output DIR or the key `output`")  # fmt: skip
        (self.directory / "candidates").mkdir(exist_ok=True)
        for folder in (self.directory, *(self.directory / name for name in ("candidates", "finalists", "report"))):
            for path in folder.glob(".*"):
                if _PARTIAL.fullmatch(path.name):
                    path.unlink()
        self._load_runner(self.directory / "candidates")
        snapshot = self._snapshot()
        if about.exists():
            stored = read_about(about)
            changed = [key for key in snapshot if stored["snapshot"].get(key) != snapshot[key]]
            if changed:
                raise StudyError(_changed(self.directory, changed, stored["snapshot"], snapshot))
            self.baseline = Measurement.from_dict(stored["baseline"])
            self.overhead = cost.FileOverhead(**stored["overhead"])
            self.overheads = {name: cost.FileOverhead(**of) for name, of in stored.get("overheads", {}).items()}
            self.runner.use_baseline(self._packed_baseline(), self.baseline.value("latency_ms"))
            self.runner.plan = EvaluationPlan(**stored["way"])
            self.guessed = stored["seconds"]
            self._use(self.space.as_ladder() if stored["rungs"] else self.space)
        else:
            self.baseline, packed = self._measure_baseline()
            found = preflight(self.runner, self.space, self.budget, self.baseline, self.listener.phase)
            self.overhead, self.overheads = found.overhead, dict(found.overheads)
            self.listener.checked(found, self)
            self._prepare(found, packed)
            write_atomic(self.directory / "baseline.safetensors", packed)
            record = {
                "version": VERSION,
                "snapshot": snapshot,
                "baseline": self.baseline.to_dict(),
                "overhead": asdict(found.overhead),
                "overheads": {name: asdict(overhead) for name, overhead in found.overheads.items()},
                "way": asdict(self.runner.plan),
                "seconds": self.guessed,
                "rungs": self.space.ladder,
                "environment": environment(self.target),
                "objectives": [asdict(o) for o in self.objectives],
                "config": self.config,
                "config_file": str(self.config_file) if self.config_file else None,
            }
            write_atomic(about, json.dumps(record, indent=1))
        self._teach()
        self._rebuild(self.journal.read(mend=True))
        self._apply_finalists()
        self._keep_files(self.front, interrupted=True)
        self.opened = True
        if self.candidates:
            self.listener.say(f"going on with the study in {self.directory}: {_count(len(self.candidates))} finished")

    def _prepare(self, found: Preflight, packed: bytes) -> None:
        """What makes the trials fast and their time foreseeable: the way to evaluate, and how long trials take."""
        self.listener.phase("finding the fastest way to evaluate")
        smallest = self.runner.path(found.smallest)
        works = found.smallest.steps and self.task.metric_name in found.smallest_measured.metrics
        gain = self.runner.tune_evaluation([packed, *([smallest.read_bytes()] if works else [])])
        told = f", {gain:.1f} times as fast as one batch on all threads, with the same predictions" if gain > 1 else ""
        self.listener.say(f"evaluates {self.runner.plan.describe()}{told}")
        laps = found.smallest_measured.seconds
        parity = seconds_of_parity(smallest.read_bytes() if works else packed, self.runner.calibration[:4])
        self.guessed = {"trial": math.fsum(laps.values()), "evaluate": laps.get("evaluate", 0.0), "epoch": 0.0,
                        "parity": parity}  # fmt: skip
        longest = max(choice.epochs if choice else 0.0 for choice in self.space.recovery)
        if longest:
            self.listener.phase("timing a few steps of training")
            self.guessed["epoch"] = self.runner.seconds_per_epoch()
        pays = longest * self.guessed["epoch"] > _PAYS * self.guessed["trial"]
        if self.rungs or (self.rungs is None and self.sampler_name == "ehvi" and pays):
            self._use(self.space.as_ladder())

    def _teach(self) -> None:
        """Train the students that come untrained; what few bits round to zero is that of the trained ones.

        They are trained once, before all trials, or those of a student would look many times as long as they are.
        """
        for student in filter(None, self.space.students):
            name = student.factory
            try:
                model = self.runner.network(Recipe((student,)), lambda phase, known: self.listener.phase(phase))
            except Diverged as error:  # of a candidate that is a result; no candidate of this student could be measured
                raise TaskError(f"student {name!r} cannot be taught: {error}; set a lower learning_rate than {student.learning_rate:g} in "
                                "space.students, or leave it out") from error  # fmt: skip
            own = [axis for axis in self.axes if axis.student == name]
            shares = nonzero_shares(self.runner, model, self.runner.structure.named(name), own)
            self.overheads[name] = replace(self.overheads[name], nonzero=shares)

    def _packed_baseline(self) -> bytes:
        path = self.directory / "baseline.safetensors"
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise StudyError(f"{path} is missing, and every latency is relative to it; restore the file, or search anew under "
                             "another name or --output") from error  # fmt: skip

    # ------------------------------------------------------------------------------------- Optuna, in memory

    def _rebuild(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The Optuna study and the candidates as they were when the last record was written."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = [StudyDirection.MAXIMIZE if o.maximize else StudyDirection.MINIMIZE for o in self.objectives]
        self.optuna = optuna.create_study(directions=directions)
        self.own: EHVISampler | None = None
        rungs = [_rung_name(self.space.recoveries(choice)) for choice in self.space.recovery]
        self.ladder = Ladder(tuple(rungs) if self.space.ladder else ("candidates",))
        self.placed: dict[tuple[object, int], int] = {}  # by choices and rung, the candidate
        self.scores: dict[int, NDArray[np.floating] | None] = {}  # of rivals, by number
        self.settled: set[int] = set()  # candidates that training could not make better
        self.candidates, self.records, self.combined = [], 0, 0
        self.by_key: dict[str, Candidate] = {}
        self.keys: dict[int, str] = {}  # by candidate: a recipe of many steps takes a while to hash
        for record in records:
            self.records += 1
            if "candidate" in record:
                candidate = Candidate.from_dict(record["candidate"])
                self._know(candidate)
                picks = candidate.picks
            else:
                candidate, picks = self.candidates[record["same_as"]], record["picks"]
            if picks is not None:
                self._add(candidate, picks, record.get("system", {}))
                self._foretell(candidate, picks)

    def _know(self, candidate: Candidate) -> None:
        self.candidates.append(candidate)
        self.keys[candidate.number] = key = candidate.recipe.key
        self.by_key[key] = candidate
        self.combined += bool(candidate.recipe.of(Ensemble))
        if candidate.picks is not None and (candidate.measurement or candidate.state == FAILED):
            self._place(candidate, candidate.picks)

    # ------------------------------------------------------------------------------------------------- rungs

    def _rung(self, picks: Mapping[str, int] | None) -> int:
        return picks.get("recovery", 0) if picks and self.space.ladder else 0

    def _place(self, candidate: Candidate, picks: Mapping[str, int]) -> None:
        """Put a candidate on its rung, and link it to what it was on the one below."""
        rung, number = self._rung(picks), candidate.number
        same = tuple(
            (name, pick) for name, pick in sorted(picks.items()) if name != "recovery" or not self.space.ladder
        )
        self.placed[same, rung] = number
        for origin, upper in ((self.placed.get((same, rung - 1)), number), (number, self.placed.get((same, rung + 1)))):
            if origin is not None and upper is not None:
                self.ladder.above[origin] = upper
        if candidate.measurement is None:
            if rung:
                self.ladder.rungs[rung].append(RungEntry(number, math.nan, eligible=False))
            return
        metric, own = candidate.measurement.metrics[self.task.metric_name], self.baseline.value(self.task.metric_name)
        # What has lost less than half its interval has nothing to win back that could be told from luck.
        if not candidate.recipe.steps or own - metric.value <= (metric.high - metric.low) / 4:
            self.settled.add(number)
        eligible = number not in self.settled and self._whole(candidate)
        losses = tuple(
            o.loss(candidate.measurement.value(o.metric), self.baseline.value(o.metric)) for o in self.objectives
        )
        self.ladder.rungs[rung].append(RungEntry(number, metric.value, losses, eligible, bool(candidate.label)))

    def _whole(self, candidate: Candidate) -> bool:
        """Whether all is known of a candidate, and it keeps the limits that training does not change."""
        lasting = {limit.text for limit in self.budget.limits if limit.metric != self.task.metric_name}
        return (
            candidate.state in (OK, OVER_BUDGET)
            and candidate.measurement is not None
            and all(candidate.excess.get(text, 0.0) <= 0 for text in lasting)
        )

    def _climber(self, left: float, may: Callable[[int], bool]) -> dict[str, int] | None:
        """The choices of the candidate to train further, None when a new one should be begun.

        The last trials of a study belong to the members of the front: more training can only do them good.
        """
        if not self.space.ladder:
            return None
        top = len(self.ladder.names) - 1
        standing = {s.number: rung for rung, rungs in enumerate(self.ladder.rungs) for s in rungs if s.eligible}
        waiting = [(c.number, standing[c.number]) for c in self.front.members
                   if standing.get(c.number, top) < top and c.number not in self.ladder.above]  # fmt: skip
        while True:
            last = [found for found in waiting if found[0] not in self.ladder.above and may(found[1] + 1)]
            found = last[0] if last and left <= len(waiting) else self.ladder.next_promotion(may)
            if found is None:
                return None
            number, rung = found
            picks = {**(self.candidates[number].picks or {}), "recovery": rung + 1}
            twin = self.by_key.get(self.space.recipe(self.runner.structure, picks).key)
            if twin is None:
                return picks
            self.ladder.above[number] = twin.number  # other choices gave the same recipe, which has been carried out

    def _rivals(self, rung: int, known: Mapping[str, Estimate]) -> list[Rival]:
        """Whom a candidate with these costs must not be worse than, beyond doubt, to be evaluated to its end."""
        metric, base = self.task.metric_name, self.baseline.value(self.task.metric_name)
        found = []
        last = rung == len(self.ladder.names) - 1
        untouched = self.runner.stored_scores(Recipe())
        for limit in self.budget.limits:
            if last and untouched is not None and limit.metric == metric and not limit.upper:
                found.append(Rival("the untouched network", untouched, base - limit.resolve(base)))
        # Below the top the order may still change, unless it is known to change little.
        tau = None if last else self.ladder.tau(rung)
        objective = next((o for o in self.objectives if o.metric == metric and o.maximize), None)
        if objective is None or not (last or (tau is not None and tau >= 0.5)):
            return found
        place = self.objectives.index(objective)
        mine = [o.loss(known[o.metric].value, self.baseline.value(o.metric)) for o in self.objectives if o is not objective]  # fmt: skip
        for best in self._best(rung):
            losses, number = best.losses, best.number
            if all(a <= b for a, b in zip(losses[:place] + losses[place + 1 :], mine, strict=True)):
                if number not in self.scores:
                    self.scores[number] = self.runner.stored_scores(self.candidates[number].recipe)
                scores = self.scores[number]
                if scores is not None:
                    found.append(Rival(f"#{number}", scores))
        return found

    def _best(self, rung: int) -> list[RungEntry]:
        """The candidates on a rung that nothing there beats."""
        whole = [s for s in self.ladder.rungs[rung] if self._whole(self.candidates[s.number])]
        return [s for s, kept in zip(whole, nondominated([s.losses for s in whole]), strict=True) if kept]

    # ------------------------------------------------------------------------------------------------- told

    def _add(self, candidate: Candidate, picks: Mapping[str, int], system: Mapping[str, Any]) -> None:
        values, constraints, unknown = self._told(candidate)
        failed = candidate.state == FAILED
        self.optuna.add_trial(
            create_trial(
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                values=None if failed else values,
                params={name: picks[name] for name in self.distributions},
                distributions=self.distributions,
                constraints=constraints,
                user_attrs={UNKNOWN: unknown} if unknown else {},
                system_attrs=dict(system),
            )
        )

    def _told(self, candidate: Candidate) -> tuple[list[float], dict[str, float], list[int | str]]:
        """What the sampler learns: the objectives, for every limit its excess as a share of it, and what is made up.

        Of a recipe that was refused, what is not known is told as the worst there is (a metric of zero, the baseline's
        cost): among infeasible trials Optuna's samplers rank by the excess, which is known. Ours leaves it out.
        """
        known = self._predicted(candidate.recipe)
        if candidate.measurement:
            known = {name: metric.value for name, metric in candidate.measurement.metrics.items()}
        values = [known.get(o.metric, self._worst(o)) for o in self.objectives]
        excess = {limit.text: candidate.excess.get(limit.text, 0.0) for limit in self.budget.limits}
        unknown: list[int | str] = [i for i, o in enumerate(self.objectives) if o.metric not in known]
        unknown += [text for text in excess if text not in candidate.excess]
        return values, excess, unknown

    def _worst(self, objective: Objective) -> float:
        """Where the hypervolume is counted from: a metric of zero, the baseline's cost."""
        return 0.0 if objective.maximize else self.baseline.value(objective.metric)

    def _baseline_values(self) -> dict[str, float]:
        return {name: metric.value for name, metric in self.baseline.metrics.items()}

    def _predicted(self, recipe: Recipe) -> dict[str, float]:
        structure = self.runner.structure
        if recipe.of(Ensemble):
            return {"macs": float(cost.macs(structure, recipe))}
        return {
            "size_bytes": float(cost.size_bytes(structure, recipe, self.overheads.get(recipe.factory, self.overhead))),
            "macs": float(cost.macs(structure, recipe)),
        }

    # ----------------------------------------------------------------------------------------------- trials

    def run(self, trials: int | None = None, time_limit: float | None = None) -> Front:
        """Search until the study has `trials` finished trials in all, or `time_limit` seconds are over, all included.

        trials: 40 when neither is given, any number in a given time. A study that was interrupted goes on where it
        stopped; one that has its trials just gives its front. On Ctrl-C the report of the front so far is written before
        `KeyboardInterrupt` goes on. Raises `StudyError` when the folder cannot be used or belongs to another
        configuration.
        """
        started = time.perf_counter()
        self.opened, self.tracker, self.test_baseline = False, None, None
        trials = TRIALS if trials is None and time_limit is None else trials
        with self._held():
            try:
                self._open()
                self._start_mirror()
                self._search(trials, started, time_limit)
                self._combine(math.inf if time_limit is None else started + time_limit)
                if self.space.ladder:
                    self.listener.say(f"rungs     {self.ladder.describe()}")
                self._finalists(math.inf if time_limit is None else time_limit - (time.perf_counter() - started))
                self._finish("FINISHED")
            except BaseException as error:
                self._stopped(error)
                raise
        return self.front

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the folder for this process alone; one in which no study began in the end is taken away again."""
        with contextlib.ExitStack() as stack:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.directory))
            except OSError as error:
                raise StudyError(f"the study's folder {self.directory} cannot be written: {error.strerror or error}; put that right, or "
                                 "name another one with --output DIR or the key `output`") from error  # fmt: skip
            try:
                yield
            finally:
                if not (self.directory / "study.json").exists() and not (self.directory / "trials.jsonl").exists():
                    _take_away(self.directory)

    def _stopped(self, error: BaseException) -> None:
        """What is written when the search does not come to its end; `error` is what stopped it."""
        if not self.opened:
            return
        if not isinstance(error, Exception):  # Ctrl-C
            self._finish("KILLED")
        elif self.tracker and self.tracker.run_id:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                note = f"The search stopped with an error; the same command goes on.\n\n```\n{error}\n```"
                self.tracker.finish(self.front, self.directory / "report", note, "FAILED")

    @property
    def front(self) -> Front:
        """The front of all candidates so far."""
        everything = tuple(self.candidates)
        return Front(everything, self.objectives, self.budget, self.baseline, self.directory, self.test_baseline)

    def _search(self, trials: int | None, started: float, time_limit: float | None) -> None:
        trivial = reference_recipes(self.space, self.runner.structure)
        foreign = {label for label, recipe in trivial if any(map(self.target.supports, recipe.steps))}
        if foreign:
            self.listener.say(f"target    {self.target.name} cannot run the trivial baselines {', '.join(label for label, _ in trivial if label in foreign)}")  # fmt: skip
        pending = [
            (label, recipe) for label, recipe in trivial if recipe.key not in self.by_key and label not in foreign
        ]
        repeats, begin, fresh = 0, time.perf_counter(), not self.candidates

        def time_left() -> float:
            elapsed, later = time.perf_counter() - started, self._reserve() + self._for_ensembles()
            return math.inf if time_limit is None else time_limit - elapsed - min(later, time_limit / 4)

        def may(rung: int) -> bool:
            return self._typical(rung) <= time_left()

        if trials is None or self._trials < trials:
            self._plan(trials, time_left())
        while trials is None or self._trials < trials:
            if not may(0) and not (fresh and not self.candidates):  # one at least, however short the time
                total = f" of {_count(trials)}" if trials else ""
                self.listener.say(f"the time is used up after {self._trials}{total or ' trials'}; "
                                  "the same command with more time goes on")  # fmt: skip
                return
            trial: optuna.Trial | None = None
            picks: Mapping[str, int] | None
            if pending:
                label, recipe = pending.pop(0)
                picks = self.space.encode(self.runner.structure, recipe)
            else:
                label = ""
                picks = self._climber(self._left(trials, time_left()), may)
                if picks is None:
                    trial, picks = self._ask()
                recipe = self.space.recipe(self.runner.structure, picks)
            twin = self.by_key.get(recipe.key)
            if trial is not None and twin is not None:
                self._repeat(trial, twin, picks or {})
                repeats += 1
                if repeats >= _SPENT:
                    self.listener.say(f"the sampler suggested {repeats} known recipes in a row: the space counts as searched through "
                                      f"after {_count(self._trials)}; more choices per decision make it larger")  # fmt: skip
                    return
                continue
            repeats = 0
            candidate, working = self._evaluate(recipe, picks, label)
            front = self._remember(trial, candidate)
            self.overhead_seconds.append(time.perf_counter() - begin - working)
            left = self._left(trials, time_left())
            eta = min(left * self._per_trial(), time_left())
            done = self._trials
            self.listener.finished(candidate, front, done, trials or done + round(left), eta)
            begin = time.perf_counter()

    @property
    def _trials(self) -> int:
        """How many trials there were; ensembles of their candidates do not count."""
        return len(self.candidates) - self.combined

    # ------------------------------------------------------------------------------------------------- ensembles

    def _combine(self, end: float) -> None:
        """Try ensembles of the candidates, as `search.ensembles` says; `end`: when all must be done, on `perf_counter`.

        What was looked through is noted, so that a study which is run again looks again only when it has new networks.
        """
        if not self.ensembles:
            return
        front = self.front
        there = [c for c in together.eligible(front) if self.runner.path(c.recipe).exists()]
        note, keys = self.directory / "ensembles.json", sorted(self.keys[c.number] for c in there)
        if note.exists() and _read_json(note).get("networks") == keys:
            return
        files = {c.number: self.runner.path(c.recipe).read_bytes() for c in there}
        networks = together.chosen(front, [together.Network.of(c, files[c.number]) for c in there])
        outputs: list[Tensor] = []
        for network in networks:
            if sum(found.nbytes for found in outputs) > together.MEMORY or time.perf_counter() + self._reserve() > end:
                break
            self.listener.phase(f"ensembles: what network {len(outputs) + 1} of {len(networks)} gives")
            outputs.append(self.runner.outputs(files[network.candidate.number]))
        self.listener.phase("ensembles: averaging")
        targets = self.runner.targets()
        foretold = together.combinations(
            front, networks[: len(outputs)], outputs, lambda given: self._score(given, targets)
        )
        before = len(self.candidates)
        while self._tried() < together.TRIED and (found := together.best(front, foretold, self.by_key)) is not None:
            if time.perf_counter() + self._reserve() > end:
                self.listener.say("the time is used up before all ensembles were tried; the same command with more time goes on")  # fmt: skip
                return
            candidate, _ = self._evaluate(found.recipe, None, "")
            front = self._remember(None, candidate)
            self.listener.finished(candidate, front, self._trials, self._trials, 0.0)
        write_atomic(note, json.dumps({"networks": keys}, indent=1))
        new = {c.number for c in self.candidates[before:]}
        kept = sum(member.number in new for member in front.members)
        self.listener.say(f"ensembles {len(foretold)} combinations of {len(outputs)} networks looked through, {len(new)} measured, "
                          f"{kept} on the front")  # fmt: skip

    def _score(self, outputs: Tensor, targets: Tensor) -> float:
        return float(scores(self.task, outputs, targets).mean())

    def _tried(self) -> int:
        """How many ensembles were tried since the last trial."""
        return sum(1 for _ in itertools.takewhile(lambda c: c.recipe.of(Ensemble), reversed(self.candidates)))

    def _for_ensembles(self) -> float:
        """Seconds to keep for ensembles: each network's outputs, and about twice a trial without training for each tried."""
        if not self.ensembles:
            return 0.0
        return float(_FINALISTS * self.guessed["evaluate"] + 2 * together.TRIED * self.guessed["trial"])

    # ------------------------------------------------------------------------------------------------- time

    def _typical(self, rung: int) -> float:
        """Seconds that a trial on a rung takes: the mean of those that were carried out, else what is guessed.

        The trivial baselines do not count: most of them do not train, and none is given up early.
        """
        numbers = [s.number for s in self.ladder.rungs[rung] if not s.given]
        measured = [
            m.seconds["total"] for n in numbers if (m := self.candidates[n].measurement) and "total" in m.seconds
        ]
        if len(measured) >= 3:
            return statistics.mean(measured)
        if self.space.ladder:
            last = self.space.recovery[rung]
            return float(self.guessed["trial"] + self.guessed["epoch"] * (last.epochs if last else 0.0))
        epochs = [choice.epochs if choice else 0.0 for choice in self.space.recovery]
        return float(self.guessed["trial"] + self.guessed["epoch"] * statistics.mean(epochs))

    def _per_trial(self) -> float:
        """Seconds per trial to come, over all rungs; what arithmetic refuses takes none."""
        carried = sum(c.measurement is not None for c in self.candidates) / max(1, len(self.candidates))
        shares = self.ladder.shares()
        mean = math.fsum(share * self._typical(rung) for rung, share in enumerate(shares))
        return max(carried, 0.05) * mean if self.candidates else mean

    def _left(self, trials: int | None, seconds: float) -> float:
        """How many trials are to come."""
        by_time = seconds / max(self._per_trial(), 1e-3)
        return max(0.0, min(by_time, math.inf if trials is None else trials - self._trials))

    def _reserve(self, parity: float | None = None) -> float:
        """Seconds to keep for the finalists and the report; `parity`: for the comparison of one with its simulation."""
        images = len(dataset(self.task, "test")) / len(dataset(self.task, "validation")) if self.task.test else 0.0  # type: ignore[arg-type]
        evaluations = [
            m.seconds["evaluate"] for c in self.candidates if (m := c.measurement) and "evaluate" in m.seconds
        ]
        one = (statistics.median(evaluations) if evaluations else self.guessed["evaluate"]) * images
        one += 4 * float(self.measure["seconds"]) if self.task.test else 0.0
        members = len(self.front.members) if self.candidates else _FINALISTS
        if parity is None:
            parity = float(self.guessed.get("parity", 0.0))  # an older study does not know it
        return 1.1 * (one * (1 + members) + parity * members) + START + _REPORT

    def _plan(self, trials: int | None, seconds: float) -> None:
        """Say before the start what will be carried out and how long it will take."""
        left = self._left(trials, seconds)
        shares = self.ladder.shares()
        parts = [
            f"{max(1, round(left * share))} {name} ({duration(self._typical(rung), exact=True)} each)"
            for rung, (share, name) in enumerate(zip(shares, self.ladder.names, strict=True))
        ]
        total = left * self._per_trial()
        self.listener.say(f"plan      about {', '.join(parts)}: {duration(total)}, and {duration(self._reserve())} for the finalists")  # fmt: skip

    def _outermost(self, objective: Objective) -> float:
        """The worst value that the budget allows: our sampler counts from there, so that what lies inside weighs.

        Counted from a metric of zero, two points of accuracy are nothing beside two per cent of the bytes, and a search
        spends its trials at the very edge of what the limits allow.
        """
        worst, sign = self._worst(objective), 1 if objective.maximize else -1
        limits = [limit for limit in self.budget.limits if limit.metric == objective.metric]
        bounds = [limit.resolve(self.baseline.value(objective.metric)) for limit in limits if limit.upper != objective.maximize]  # fmt: skip
        return sign * max([sign * worst, *(sign * bound for bound in bounds)])

    def _own_sampler(self) -> EHVISampler:
        """The default sampler, which is told what arithmetic knows."""
        costs = cost.many(self.runner.structure, self.axes, self.overhead, self.overheads)
        exact = {position: o.metric for position, o in enumerate(self.objectives) if o.metric in KNOWN}
        limits = [limit for limit in self.budget.limits if limit.metric in KNOWN]
        base = self._baseline_values()

        def known(picks: Mapping[str, Ints]) -> tuple[dict[int, Floats], dict[str, Floats]]:
            count = len(next(iter(picks.values())))
            columns = [picks.get(axis.name, np.zeros(count, dtype=np.int64)) for axis in self.axes]
            found = costs(np.stack(columns, axis=1))
            excess = {}
            for limit in limits:
                excess[limit.text] = limit.excess(found[limit.metric], base[limit.metric])
            return {position: found[metric] for position, metric in exact.items()}, excess

        reference = [self._outermost(objective) for objective in self.objectives]
        computed = self.target.milliseconds is not None
        noisy = [position for position, o in enumerate(self.objectives) if o.metric == "latency_ms" and not computed]
        ladder = "recovery" if self.space.ladder else None
        # By axis of one network alone, at which choice of the network it has an effect.
        places = {student.factory if student else "": n for n, student in enumerate(self.space.students)}
        conditions = {axis.name: ("student", places[axis.student]) for axis in self.axes if axis.student in places}
        sampler = EHVISampler(
            self.seed, known=known, reference=reference, noisy=noisy, ladder=ladder, conditions=conditions,
            kinds={axis.name: (axis.kind, axis.choices) for axis in self.axes},
        )  # fmt: skip
        in_space(sampler, self.distributions)
        return sampler

    def _ask(self) -> tuple[optuna.Trial, dict[str, int]]:
        if self.sampler_name == "ehvi":
            self.own = self.own or self._own_sampler()
            self.optuna.sampler = self.own
        else:
            self.optuna.sampler = make_sampler(self.sampler_name, self.seed, self.records, self.distributions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.optuna.ask(self.distributions)
        return trial, dict(trial.params)

    def _evaluate(self, recipe: Recipe, picks: Mapping[str, int] | None, label: str) -> tuple[Candidate, float]:
        """What became of a recipe, and the seconds that the runner took for it."""
        number = len(self.candidates)
        base = self._baseline_values()
        known: dict[str, Estimate] = {}

        def judge(values: Mapping[str, float], tolerance: float) -> None:
            excess = self.budget.excess(values, base)
            over = {
                limit: value
                for limit, value in excess.items()
                if value > (tolerance if limit.startswith("size") else 0)
            }
            if over:
                raise OverBudget(_over(values, over, self.budget, base), excess)

        def report(phase: str, metrics: Mapping[str, Estimate]) -> None:
            known.update(metrics)
            self.listener.phase(f"trial {number}: {phase}")
            if phase == "measured before training" and not label:
                judge({name: metric.value for name, metric in metrics.items() if name != self.task.metric_name}, 0.0)

        gate = any(limit.metric == "latency_ms" for limit in self.budget.limits)
        timed = gate or any(o.metric == "latency_ms" for o in self.objectives)
        rung, begin = self._rung(picks), None
        try:
            if not label:  # the trivial baselines are measured whatever they weigh: the front is compared with them
                judge(self._predicted(recipe), TOLERANCE)
            begin = time.perf_counter()
            measurement = self.runner.run(
                recipe,
                report,
                watch=None if label else race(lambda: self._rivals(rung, known), self.task.metric_name),
                gate_latency=gate and not rung,  # further up it was timed below
                keep_trained=0 < rung < len(self.ladder.names) - 1,
                seconds=None if timed else UNTIMED * float(self.measure["seconds"]),
            )
        except OverBudget as refusal:
            seconds = time.perf_counter() - begin if begin else 0.0
            return Candidate(
                number, recipe, OVER_BUDGET, f"refused: {refusal}", None, refusal.excess, picks, label
            ), seconds
        except Stopped as stop:
            seconds = time.perf_counter() - begin if begin else 0.0
            metrics = known | {self.task.metric_name: stop.estimate}
            excess = self.budget.excess({name: metric.value for name, metric in metrics.items()}, base)
            part = Measurement(metrics, {"total": seconds}, environment(self.target), f"{stop.estimate.n} images")
            return Candidate(number, recipe, STOPPED, str(stop), part, excess, picks, label), seconds
        except TrialError as failure:
            seconds = time.perf_counter() - begin if begin else 0.0
            reason = f"{type(failure).__name__}: {failure}"
            return Candidate(number, recipe, FAILED, reason, None, {}, picks, label), seconds
        seconds = time.perf_counter() - begin
        measurement = replace(measurement, seconds={**measurement.seconds, "total": seconds})
        values = {name: metric.value for name, metric in measurement.metrics.items()}
        excess = self.budget.excess(values, base)
        over = {limit: value for limit, value in excess.items() if value > 0}
        reason = _over(values, over, self.budget, base) if over else ""
        return Candidate(
            number, recipe, OVER_BUDGET if over else OK, reason, measurement, excess, picks, label
        ), seconds

    @undisturbed()
    def _remember(self, trial: optuna.Trial | None, candidate: Candidate) -> Front:
        """Onto the disk first, then to the sampler, then to MLflow; gives the front so far."""
        system = self._system(trial)
        self.journal.append({"candidate": candidate.to_dict(), "system": system})
        self.records += 1
        self._know(candidate)
        self._tell(trial, candidate, candidate.picks, system)
        front = self.front
        self._keep_files(front)
        if self.tracker and not self.behind:
            members = {member.number for member in front.members}
            try:
                self.tracker.log(candidate, front.hypervolume(), candidate.number in members, self._readable(candidate))
            except StudyError as error:  # a mirror must not stop what it mirrors
                self.behind = True
                self.listener.say(f"warning: {error}. The search goes on without MLflow, which is brought up to date at its end")  # fmt: skip
        return front

    @undisturbed()
    def _repeat(self, trial: optuna.Trial, twin: Candidate, picks: Mapping[str, int]) -> None:
        """A known recipe is told again with its known numbers, never run again."""
        system = self._system(trial)
        self.journal.append({"same_as": twin.number, "picks": dict(picks), "system": system})
        self.records += 1
        self._tell(trial, twin, picks, system)

    def _system(self, trial: optuna.Trial | None) -> dict[str, int]:
        """What a sampler has noted on a trial and needs again after a resume: NSGA's generation."""
        key = GENERATION.get(self.sampler_name)
        if key is None:
            return {}
        # A trivial baseline belongs to the generation that all others descend from.
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
                self._foretell(candidate, picks)
            return
        values, constraints, unknown = self._told(candidate)
        if unknown:
            trial.set_user_attr(UNKNOWN, unknown)
        for name, value in constraints.items():
            trial.set_constraint(name, value)
        if candidate.state == FAILED:
            self.optuna.tell(trial, state=TrialState.FAIL)
        else:
            self.optuna.tell(trial, values)
        self._foretell(candidate, picks or {})

    def _foretell(self, candidate: Candidate, picks: Mapping[str, int]) -> None:
        """Tell the sampler, too, what training would make of a candidate that has nothing to win back: the same.

        It asks for recipes by what it expects of them at the top. From there comes no word of those that never climb.
        """
        top = len(self.ladder.names) - 1
        if self._rung(picks) < top and candidate.number in self.settled:
            self._add(candidate, {**picks, "recovery": top}, {})

    def _keep_files(self, front: Front, *, interrupted: bool = False) -> None:
        """Only files that can still be wanted stay.

        Packed files: the front's, the nearest misses', the trivial baselines', those of which ensembles may be made. Scores: the front's, and of each rung's
        best, which are the rivals of those to come. Trained weights: of those that may climb. What is half trained: after
        an interruption, until the next trial is over, for that one is the one that was interrupted.
        """
        packed = (*front.members, *front.least_violating(3), *(c for c in front.candidates if c.label))
        wanted = {f"{self.keys[c.number]}.safetensors" for c in packed} | {self.runner.scores_path(Recipe()).name}
        wanted |= {f"{self.keys[c.number]}.npy" for c in front.members}
        wanted |= {self.runner.trained_path(Recipe((s,))).name for s in self.space.students if s and s.epochs}
        if self.ensembles:
            wanted |= {f"{self.keys[c.number]}.safetensors" for c in together.eligible(front)}
        for rung, standings in enumerate(self.ladder.rungs):
            wanted |= {self.runner.scores_path(self.candidates[s.number].recipe).name for s in self._best(rung)}
            if 0 < rung < len(self.ladder.rungs) - 1:  # at the foot nothing is trained, from the top nobody climbs
                eligible = [s for s in standings if s.eligible and s.number not in self.ladder.above]
                likely = ranked([s.losses for s in eligible], max(PILOT, len(standings) // 2))
                wanted |= {self.runner.trained_path(self.candidates[eligible[i].number].recipe).name for i in likely}
        for path in self.runner.directory.iterdir():
            if interrupted and path.suffix == ".partial-training":
                continue
            if _OURS.fullmatch(path.name) and path.name not in wanted:
                path.unlink(missing_ok=True)

    def _readable(self, candidate: Candidate) -> dict[str, object]:
        """The choices by axis for people: `weight_bits/fc: 4`."""
        if candidate.picks is None:
            return {}
        choices: dict[str, Axis] = {axis.name: axis for axis in self.axes}
        found: dict[str, object] = {}
        for name, index in candidate.picks.items():
            if choices[name].student not in (candidate.recipe.factory, None):
                continue
            value = choices[name].choices[index]
            if choices[name].kind == "student":
                value = value.factory if value else "teacher"
            elif choices[name].kind == "recovery":
                value = (
                    "none"
                    if value is None
                    else value.method + (f" {value.epochs:g}" if value.epochs else "") + how([value])
                )
            found[name] = value
        return found

    # --------------------------------------------------------------------------------------------- the end

    def _finalists(self, left: float = math.inf) -> None:
        """The front's members and the baseline on the test split, read from their files; each of them once.

        left: seconds for all that is still to be done; where they are few, parity is looked at on fewer inputs.
        """
        if self.task.test is None:
            self.listener.say(
                "the task has no test data: the front's numbers are the validation split's, on which it was selected"
            )
        members = self.front.members
        each = (left - self._reserve(parity=0.0)) / max(1, len(members))
        seconds = min(PARITY_SECONDS, max(_PARITY_AT_LEAST, each))
        measure_finalists(self.directory, members, self._packed, self.runner, self.listener, seconds)
        self._apply_finalists()

    def _packed(self, candidate: Candidate) -> Path:
        """The file of a candidate; one that somebody deleted is made again, with the same bytes."""
        path = self.runner.path(candidate.recipe)
        if not path.exists():
            write_atomic(path, self.runner.build(candidate.recipe))
        return path

    def _apply_finalists(self) -> None:
        self.candidates, self.test_baseline = with_tests(self.candidates, self.directory)

    @undisturbed()
    def _start_mirror(self) -> None:
        """Open the MLflow store and bring it up to date."""
        self.behind = False
        if self.mlflow is False:
            return
        from ..results.tracking.tracker import Tracker

        self.listener.phase("opening the MLflow store")
        uri = self.mlflow if isinstance(self.mlflow, str) else None
        about = (self.directory / "study.json").read_text()
        snapshot = json.loads(about)["snapshot"]
        params = {
            "objectives": ", ".join(snapshot["objectives"]),
            "budget": ", ".join(snapshot["budget"]) or "none",
            "sampler": self.sampler_name,
            "seed": str(self.seed),
            "task": self.task.name,
            "target": self.target.name,
            "dimensions": str(len(self.distributions)),
        }
        texts = {"study.json": about}
        if self.config_text:
            texts["config.yaml"] = self.config_text
        if self.config is not None:
            texts["config_resolved.json"] = json.dumps(self.config, indent=1)
        self.tracker = Tracker(self.directory.name, self.directory, uri, self.experiment)
        self.tracker.start(params, texts, environment(self.target))
        if mended := self._sync(self.tracker):
            self.listener.say(f"brought up to date in MLflow: {_count(mended)}")

    def _sync(self, tracker: Tracker) -> int:
        front = self.front
        volumes = [front.hypervolume(c.number + 1) for c in self.candidates]
        return tracker.sync(self.candidates, volumes, self._readable)

    @undisturbed()
    def _finish(self, status: str) -> None:
        """The report, and the end of the MLflow run."""
        from ..results.report.report import write_report

        self.listener.phase("writing the report")
        front = self.front
        note = write_report(
            front,
            self.directory / "report",
            name=self.directory.name,
            config_text=self.config_text,
            budget_lines=self.budget.describe(self._baseline_values()),
            notes=[f"Rungs: {self.ladder.describe()}."] if self.space.ladder else [],
        )
        if self.tracker and self.tracker.run_id:
            self.listener.phase("closing the MLflow run")
            try:
                if self.behind:
                    self._sync(self.tracker)
                self.tracker.finish(front, self.directory / "report", note, status, self.ladder.taus())
            except StudyError as error:
                self.listener.say(f"warning: {error}")
        self.opened = False  # nothing is left to be written


def _rung_name(steps: Sequence[Recover]) -> str:
    """A rung for people: `untrained`, `0.2 epochs`, `0.2 + 0.4 epochs`."""
    epochs = [f"{step.epochs:g}" for step in steps if step.epochs]
    return f"{' + '.join(epochs)} epoch{'s' * (epochs != ['1'])}" if epochs else "untrained"


def _count(trials: int) -> str:
    return f"{trials} trial{'s' * (trials != 1)}"


def _take_away(directory: Path) -> None:
    """Remove what an attempt to begin a study has left in its folder, and the folder if nothing else lies there."""
    with contextlib.suppress(OSError):  # what cannot be removed does no harm: the next study begins over it
        files = [directory / "baseline.safetensors", directory / ".lock"]
        for path in directory.glob("candidates/*"):
            if _OURS.fullmatch(path.name) or _PARTIAL.fullmatch(path.name):
                path.unlink()
        for path in files:
            path.unlink(missing_ok=True)
        for folder in (directory / "candidates", directory):
            folder.rmdir()


def digest(model: nn.Module) -> str:
    """A hash of a network's weights: a resumed study must not mix two checkpoints."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _over(values: Mapping[str, float], over: Mapping[str, float], budget: Budget, base: Mapping[str, float]) -> str:
    texts = []
    for limit in budget.limits:
        if limit.text in over:
            bound = show(limit.metric, limit.resolve(base[limit.metric]))
            texts.append(
                f"{limit.metric} {show(limit.metric, values[limit.metric])} against a limit of {bound} ({limit.text})"
            )
    return "; ".join(texts)


def _changed(directory: Path, changed: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    def short(value: object) -> str:
        text = json.dumps(value)
        return text if len(text) <= 80 else text[:77] + "..."

    lines = [f"  - {key}: {short(before.get(key))} then, {short(now.get(key))} now" for key in changed]
    if changed == ["weights"]:
        lines[0] += (
            "; a network that is trained anew at every start needs a seed and one thread, or its weights in a file"
        )
    return "\n".join(
        [
            f"{directory} holds a study of another configuration:",
            *lines,
            "Undo the change to go on with it, or search anew under another name or --output.",
        ]
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        return found
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}); restore it from a backup, or move the study's folder away and start anew") from error  # fmt: skip


def read_about(path: Path) -> dict[str, Any]:
    try:
        stored = _read_json(path)
        if stored["version"] > VERSION:
            raise StudyError(f"{path}: written by a newer paretorch (version {stored['version']}); upgrade")
        return stored
    except FileNotFoundError as error:
        raise StudyError(f"there is no study in {path.parent}: it has no study.json; name the folder that a search has written, such as "
                         "studies/NAME") from error  # fmt: skip
    except (OSError, KeyError, TypeError) as error:
        raise StudyError(f"{path.parent} is not a study of paretorch: {error}") from error


def open_front(directory: str | Path) -> Front:
    """The front of a study on disk, without its task; raises `StudyError` when there is none."""
    folder = Path(directory).absolute()
    stored = read_about(folder / "study.json")
    records = Journal(folder / "trials.jsonl").read()
    candidates = [Candidate.from_dict(record["candidate"]) for record in records if "candidate" in record]
    candidates, test = with_tests(candidates, folder)
    return Front(
        tuple(candidates),
        tuple(Objective(**entry) for entry in stored["objectives"]),
        Budget.parse(stored["snapshot"]["budget"]),
        Measurement.from_dict(stored["baseline"]),
        folder,
        test,
    )
