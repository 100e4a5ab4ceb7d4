"""The study: asks for recipes, has them carried out, judges them, remembers them, and ends with a front.

Everything a study knows lies in its folder, so that a kill at any moment loses at most the trial that was running:

    study.json        what was asked, the baseline, the environment (written once)
    trials.jsonl      one line per finished trial: the truth (`search.journal`)
    candidates/       the packed files of the front, of the nearest misses and of the baseline
    report/           front.html, front.png, front.csv, front.json, report.md
    mlflow.db, ...    the MLflow mirror, unless another store is named

The order of a trial: predict by arithmetic (over the budget: refused, nothing is compressed), compress, export, time,
evaluate, remember on disk, tell the sampler, mirror to MLflow. A refused recipe is told to the sampler like any other,
with what is known of it, so that it teaches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from ..errors import OverBudget, StudyError, TrialError
from ..objectives import cost
from ..objectives.measurement import Measurement, Metric
from ..objectives.objective import Budget, Objective, show
from ..runners.files import write_atomic
from ..runners.local import LocalRunner, environment
from ..runners.task import Task, dataset
from ..spaces.recipe import Recipe
from ..spaces.space import Axis, Space, anchors, default_space
from .candidate import FAILED, OK, OVER_BUDGET, Candidate
from .front import Front
from .journal import Journal, locked
from .preflight import TOLERANCE, Preflight, check_metrics, preflight
from .sampler import GENERATION, make_sampler

VERSION = 1
_SPENT = 300  # repeated suggestions in a row after which a space counts as searched through


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
    that is there already goes on. mlflow: tracking URI, None for a store in the folder, False for no MLflow.

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
        sampler: str = "tpe",
        seed: int = 0,
        threads: int = 1,
        batch: int = 1,
        seconds: float = 0.5,
        calibration_images: int = 512,
        mlflow: str | bool | None = None,
        experiment: str | None = None,
        listener: Listener | None = None,
        config: Mapping[str, Any] | None = None,
        config_text: str = "",
    ) -> None:
        self.task, self.given_space, self.sampler_name, self.seed = task, space, sampler, seed
        self.objectives = tuple(Objective.parse(text) for text in objectives or (task.metric_name, "size_bytes"))
        self.budget = Budget.parse(budget)
        check_metrics(self.objectives, self.budget, task.metric_name)
        make_sampler(sampler, 0, 0)
        self.directory = Path(directory or Path("studies") / task.name).absolute()
        self.measure = {
            "threads": threads,
            "batch": batch,
            "seconds": seconds,
            "calibration_images": calibration_images,
        }
        self.mlflow, self.experiment = mlflow, experiment
        self.listener: Listener = listener or Quiet()
        self.config, self.config_text = config, config_text
        self.candidates: list[Candidate] = []
        self.seconds: list[float] = []  # what each measured trial of this session took
        self.overhead_seconds: list[float] = []  # of that, what was neither compressing, training nor measuring

    # ---------------------------------------------------------------------------------------------- opening

    def check(self) -> Preflight:
        """The preflight alone, in a throw-away folder; raises what `run` would raise at its start."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self._load_runner(Path(folder))
            baseline, _ = self.runner.baseline()
            found = preflight(self.runner, self.space, self.budget, baseline, self.listener.phase)
        self.listener.checked(found, self)
        return found

    def _load_runner(self, folder: Path) -> None:
        self.listener.phase("loading the network and the data, tracing")
        self.runner = LocalRunner(self.task, folder, seed=self.seed, **self.measure)  # type: ignore[arg-type]
        train_images = len(dataset(self.task, "train"))  # type: ignore[arg-type]
        self.space = self.given_space or default_space(self.runner.structure, train_images)
        self.axes = self.space.axes(self.runner.structure)
        self.distributions: dict[str, BaseDistribution] = {
            axis.name: IntDistribution(0, len(axis.choices) - 1) for axis in self.axes if len(axis.choices) > 1
        }

    def _snapshot(self) -> dict[str, Any]:
        """What must not change when a study goes on: all that decides which recipes come and how they are judged."""
        structure = json.dumps(asdict(self.runner.structure), sort_keys=True, default=list)
        recipe = {
            "task": self.task.name,
            "network": hashlib.sha256(structure.encode()).hexdigest()[:16],
            "weights": _digest(self.runner),
            "space": asdict(self.space),
            "objectives": [f"{'max' if o.maximize else 'min'} {o.metric}" for o in self.objectives],
            "budget": [limit.text for limit in self.budget.limits],
            "sampler": self.sampler_name,
            "seed": self.seed,
            "measure": self.measure,
        }
        return json.loads(json.dumps(recipe))  # type: ignore[no-any-return]

    def _open(self) -> None:
        """Load the task, measure or restore the baseline, read the journal, run the preflight of a new study."""
        (self.directory / "candidates").mkdir(exist_ok=True)
        self._load_runner(self.directory / "candidates")
        self.journal = Journal(self.directory / "trials.jsonl")
        about, snapshot = self.directory / "study.json", self._snapshot()
        if about.exists():
            stored = _read_about(about)
            changed = [key for key in snapshot if stored["snapshot"].get(key) != snapshot[key]]
            if changed:
                raise StudyError(_changed(self.directory, changed, stored["snapshot"], snapshot))
            self.baseline = Measurement.from_dict(stored["baseline"])
            self.overhead = cost.FileOverhead(**stored["overhead"])
            packed = (self.directory / "baseline.safetensors").read_bytes()
            self.runner.use_baseline(packed, self.baseline.value("latency_ms"))
        else:
            self.listener.phase("measuring the baseline")
            self.baseline, packed = self.runner.baseline()
            found = preflight(self.runner, self.space, self.budget, self.baseline, self.listener.phase)
            self.overhead = found.overhead
            self.runner.path(found.smallest).unlink(missing_ok=True)
            self.listener.checked(found, self)
            write_atomic(self.directory / "baseline.safetensors", packed)
            record = {
                "version": VERSION,
                "snapshot": snapshot,
                "baseline": self.baseline.to_dict(),
                "overhead": asdict(found.overhead),
                "environment": environment(),
                "objectives": [asdict(o) for o in self.objectives],
            }
            write_atomic(about, json.dumps(record, indent=1))
        self._rebuild(self.journal.read())

    # ------------------------------------------------------------------------------------- Optuna, in memory

    def _rebuild(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The Optuna study and the candidates as they were when the last record was written."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = ["maximize" if o.maximize else "minimize" for o in self.objectives]
        self.optuna = optuna.create_study(directions=directions)
        self.candidates, self.records = [], 0
        self.by_key: dict[str, Candidate] = {}
        for record in records:
            self.records += 1
            if "candidate" in record:
                candidate = Candidate.from_dict(record["candidate"])
                self.candidates.append(candidate)
                self.by_key[candidate.recipe.key] = candidate
                picks = candidate.picks
            else:
                candidate, picks = self.candidates[record["same_as"]], record["picks"]
            if picks is not None and candidate.state != FAILED:
                self._add(candidate, picks, record.get("system", {}))

    def _add(self, candidate: Candidate, picks: Mapping[str, int], system: Mapping[str, Any]) -> None:
        values, constraints = self._told(candidate)
        self.optuna.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                values=values,
                params={name: picks[name] for name in self.distributions},
                distributions=self.distributions,
                constraints=constraints,
                system_attrs=dict(system),
            )
        )

    def _told(self, candidate: Candidate) -> tuple[list[float], dict[str, float]]:
        """What the sampler learns: the objectives, and for every limit its excess as a share of the limit.

        Of a recipe that was refused, what is not known is told as the worst there is (a metric of zero, the baseline's
        cost): among infeasible trials samplers rank by the excess, which is known.
        """
        known = self._predicted(candidate.recipe)
        if candidate.measurement:
            known = {name: metric.value for name, metric in candidate.measurement.metrics.items()}
        base = self._baseline_values()
        values = [known.get(o.metric, 0.0 if o.maximize else base[o.metric]) for o in self.objectives]
        return values, {limit.text: candidate.excess.get(limit.text, 0.0) for limit in self.budget.limits}

    def _baseline_values(self) -> dict[str, float]:
        return {name: metric.value for name, metric in self.baseline.metrics.items()}

    def _predicted(self, recipe: Recipe) -> dict[str, float]:
        structure = self.runner.structure
        return {
            "size_bytes": float(cost.size_bytes(structure, recipe, self.overhead)),
            "macs": float(cost.macs(structure, recipe)),
        }

    # ----------------------------------------------------------------------------------------------- trials

    def run(self, trials: int = 40, time_limit: float | None = None) -> Front:
        """Search until the study has `trials` finished trials in all, or `time_limit` seconds are over.

        A study that was interrupted goes on where it stopped; one that has its trials just gives its front. On Ctrl-C
        the report of the front so far is written before `KeyboardInterrupt` goes on. Raises `StudyError` when the
        folder cannot be used or belongs to another configuration.
        """
        started = time.perf_counter()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = locked(self.directory)
            lock.__enter__()
        except OSError as error:
            raise StudyError(f"the study's folder {self.directory} cannot be written: {error.strerror or error}; name another "
                             "one with --output DIR or the key `output`") from error  # fmt: skip
        with contextlib.ExitStack() as stack:
            stack.push(lock.__exit__)
            self._open()
            self.tracker = self._tracker(trials)
            try:
                self._search(trials, started, time_limit)
                self._finalists()
            except KeyboardInterrupt:
                self._finish("KILLED")
                raise
            except Exception:
                if self.tracker:
                    with contextlib.suppress(Exception):  # the first error is the one to tell
                        self.tracker.finish(
                            self.front,
                            self.directory / "report",
                            "The search stopped with an error; resume it.",
                            "FAILED",
                        )
                raise
            self._finish("FINISHED")
        return self.front

    @property
    def front(self) -> Front:
        """The front of all candidates so far."""
        test = getattr(self, "test_baseline", None)
        return Front(tuple(self.candidates), self.objectives, self.budget, self.baseline, self.directory, test)

    def _search(self, trials: int, started: float, time_limit: float | None) -> None:
        pending = [
            (label, recipe)
            for label, recipe in anchors(self.space, self.runner.structure)
            if recipe.key not in self.by_key
        ]
        repeats = 0
        while len(self.candidates) < trials:
            elapsed = time.perf_counter() - started
            typical = statistics.median(self.seconds) if self.seconds else 0.0
            if time_limit is not None and elapsed + typical > time_limit:
                self.listener.say(
                    f"the time of {time_limit:.0f} s is over after {len(self.candidates)} of {trials} trials"
                )
                break
            begin = time.perf_counter()
            if pending:
                label, recipe = pending.pop(0)
                trial, picks = None, self.space.encode(self.runner.structure, recipe)
            else:
                trial, picks = self._ask()
                label, recipe = "", self.space.recipe(self.runner.structure, picks)
            twin = self.by_key.get(recipe.key)
            if twin is not None:
                repeats += 1
                assert picks is not None
                self._repeat(trial, twin, picks)
                if repeats >= _SPENT:
                    self.listener.say(f"the sampler suggested {repeats} known recipes in a row: the space counts as searched "
                                      f"through after {len(self.candidates)} trials")  # fmt: skip
                    break
                continue
            repeats = 0
            asked = time.perf_counter() - begin
            candidate = self._evaluate(recipe, picks, label)
            working = time.perf_counter() - begin - asked
            begin_store = time.perf_counter()
            self._remember(trial, candidate)
            self.overhead_seconds.append(asked + time.perf_counter() - begin_store)
            if candidate.measurement:
                self.seconds.append(asked + working)
            left = trials - len(self.candidates)
            measured = sum(c.measurement is not None for c in self.candidates) / len(self.candidates)
            eta = left * measured * (statistics.mean(self.seconds) if self.seconds else 0.0)
            if time_limit is not None:
                eta = min(eta, max(0.0, time_limit - (time.perf_counter() - started)))
            self.listener.finished(candidate, self.front, len(self.candidates), trials, eta)

    def _ask(self) -> tuple[optuna.Trial, dict[str, int]]:
        self.optuna.sampler = make_sampler(self.sampler_name, self.seed, self.records)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.optuna.ask(self.distributions)
        return trial, dict(trial.params)

    def _evaluate(self, recipe: Recipe, picks: Mapping[str, int] | None, label: str) -> Candidate:
        number = len(self.candidates)
        base = self._baseline_values()

        def judge(values: Mapping[str, float], tolerance: float) -> None:
            excess = self.budget.excess(values, base)
            over = {
                limit: value
                for limit, value in excess.items()
                if value > (tolerance if limit.startswith("size") else 0)
            }
            if over:
                raise OverBudget(_over(values, over, self.budget, base), excess)

        def report(phase: str, metrics: Mapping[str, Metric]) -> None:
            self.listener.phase(f"trial {number}: {phase}")
            if phase == "measured before training" and not label:
                judge({name: metric.value for name, metric in metrics.items() if name != self.task.metric_name}, 0.0)

        begin = time.perf_counter()
        try:
            if not label:  # the trivial baselines are measured whatever they weigh: the front is compared with them
                judge(self._predicted(recipe), TOLERANCE)
            gate = any(limit.metric == "latency_ms" for limit in self.budget.limits)
            measurement = self.runner.run(recipe, report, gate_latency=gate)
        except OverBudget as refusal:
            return Candidate(number, recipe, OVER_BUDGET, f"refused: {refusal}", None, refusal.excess, picks, label)
        except TrialError as failure:
            reason = f"{type(failure).__name__}: {failure}"
            return Candidate(number, recipe, FAILED, reason, None, {}, picks, label)
        measurement = replace(measurement, seconds={**measurement.seconds, "total": time.perf_counter() - begin})
        values = {name: metric.value for name, metric in measurement.metrics.items()}
        excess = self.budget.excess(values, base)
        over = {limit: value for limit, value in excess.items() if value > 0}
        reason = _over(values, over, self.budget, base) if over else ""
        return Candidate(number, recipe, OVER_BUDGET if over else OK, reason, measurement, excess, picks, label)

    def _remember(self, trial: optuna.Trial | None, candidate: Candidate) -> None:
        """Onto the disk first, then to the sampler, then to MLflow."""
        system: dict[str, Any] = {}
        if trial is not None:
            system = dict(trial._trial_id and self.optuna._storage.get_trial(trial._trial_id).system_attrs)
        elif self.sampler_name in GENERATION:
            system = {GENERATION[self.sampler_name]: 0}
        self.journal.append({"candidate": candidate.to_dict(), "system": system})
        self.records += 1
        self.candidates.append(candidate)
        self.by_key[candidate.recipe.key] = candidate
        self._tell(trial, candidate, candidate.picks, system)
        front = self.front
        self._keep_files(front)
        if self.tracker:
            members = {member.number for member in front.members}
            self.tracker.log(candidate, front.hypervolume(), candidate.number in members, self._readable(candidate))

    def _repeat(self, trial: optuna.Trial | None, twin: Candidate, picks: Mapping[str, int]) -> None:
        """A known recipe is told again with its known numbers, never run again."""
        self.journal.append({"same_as": twin.number, "picks": dict(picks)})
        self.records += 1
        self._tell(trial, twin, picks, {})

    def _tell(
        self,
        trial: optuna.Trial | None,
        candidate: Candidate,
        picks: Mapping[str, int] | None,
        system: Mapping[str, Any],
    ) -> None:
        if trial is None:
            if picks is not None and candidate.state != FAILED:
                self._add(candidate, picks, system)
            return
        values, constraints = self._told(candidate)
        for name, value in constraints.items():
            trial.set_constraint(name, value)
        if candidate.state == FAILED:
            self.optuna.tell(trial, state=TrialState.FAIL)
        else:
            self.optuna.tell(trial, values)

    def _keep_files(self, front: Front) -> None:
        """Only files that can still be wanted stay: the front's, the nearest misses', the trivial baselines'."""
        wanted = {c.recipe.key for c in (*front.members, *front.least_violating(3))}
        wanted |= {c.recipe.key for c in front.candidates if c.label}
        for path in self.runner.directory.iterdir():
            if path.name.partition(".")[0] not in wanted:
                path.unlink(missing_ok=True)

    def _readable(self, candidate: Candidate) -> dict[str, object]:
        """The choices by axis for people: `weight_bits/fc: 4`."""
        if candidate.picks is None:
            return {}
        choices: dict[str, Axis] = {axis.name: axis for axis in self.axes}
        found: dict[str, object] = {}
        for name, index in candidate.picks.items():
            value = choices[name].choices[index]
            if choices[name].kind == "recovery":
                value = "none" if value is None else value.method + (f" {value.epochs:g}" if value.epochs else "")
            found[name] = value
        return found

    # --------------------------------------------------------------------------------------------- the end

    def _finalists(self) -> None:
        """The front's members and the baseline on the test split, read from their files; once."""
        if self.task.test is None:
            self.listener.say(
                "the task has no test data: the front's numbers are the validation split's, on which it was selected"
            )
            return
        stored = self.directory / "finalists.json"
        known: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
        members = [c for c in self.front.members if c.recipe.key not in known]
        if "baseline" not in known:
            self.listener.phase("baseline on the test split")
            packed = (self.directory / "baseline.safetensors").read_bytes()
            known["baseline"] = {n: vars(m) for n, m in self.runner.measure_again(packed).items()}
        for position, member in enumerate(members, 1):
            self.listener.phase(f"finalist {position} of {len(members)} on the test split")
            packed = self.runner.path(member.recipe).read_bytes()
            known[member.recipe.key] = {n: vars(m) for n, m in self.runner.measure_again(packed).items()}
        write_atomic(stored, json.dumps(known, indent=1))
        self._apply_finalists(known)

    def _apply_finalists(self, known: Mapping[str, Any]) -> None:
        if not known:
            return
        self.test_baseline = Metric(**known["baseline"][self.task.metric_name])
        self.candidates = [
            replace(c, test={n: Metric(**m) for n, m in known[c.recipe.key].items()}) if c.recipe.key in known else c
            for c in self.candidates
        ]

    def _tracker(self, trials: int) -> Any:
        if self.mlflow is False:
            return None
        from .tracking import Tracker

        self.listener.phase("opening the MLflow store")
        uri = self.mlflow if isinstance(self.mlflow, str) else None
        tracker = Tracker(self.directory.name, self.directory, uri, self.experiment)
        snapshot = json.loads((self.directory / "study.json").read_text())["snapshot"]
        params = {
            "objectives": ", ".join(snapshot["objectives"]),
            "budget": ", ".join(snapshot["budget"]) or "none",
            "sampler": self.sampler_name,
            "seed": str(self.seed),
            "task": self.task.name,
            "dimensions": str(len(self.distributions)),
        }
        texts = {"study.json": (self.directory / "study.json").read_text()}
        if self.config_text:
            texts["config.yaml"] = self.config_text
        tracker.start(params, texts, environment())
        volumes = [self.front.hypervolume(c.number + 1) for c in self.candidates]
        mended = tracker.sync(self.candidates, volumes, self._readable)
        if self.candidates:
            self.listener.say(f"going on with the study in {self.directory}: {len(self.candidates)} finished trials"
                              + (f", {mended} of them mended in MLflow" if mended else ""))  # fmt: skip
        return tracker

    def _finish(self, status: str) -> None:
        from .report import write_report

        self.listener.phase("writing the report")
        front = self.front
        note = write_report(
            front,
            self.directory / "report",
            name=self.directory.name,
            config_text=self.config_text,
            budget_lines=self.budget.describe(self._baseline_values()),
        )
        if self.tracker:
            self.tracker.finish(front, self.directory / "report", note, status)


def _digest(runner: LocalRunner) -> str:
    """A hash of the network's weights: a resumed study must not mix two checkpoints."""
    digest = hashlib.sha256()
    for name, tensor in sorted(runner.model.state_dict().items()):
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
    return "\n".join(
        [
            f"{directory} holds a study of another configuration:",
            *lines,
            "Undo the change to go on with it, or search anew under another name or --output.",
        ]
    )


def _read_about(path: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads(path.read_text())
        if stored["version"] > VERSION:
            raise StudyError(f"{path}: written by a newer paretorch (version {stored['version']}); upgrade")
        return stored
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(f"{path.parent} is not a study of paretorch: {error}") from error


def open_front(directory: str | Path) -> Front:
    """The front of a study on disk, without its task; raises `StudyError` when there is none."""
    folder = Path(directory).absolute()
    stored = _read_about(folder / "study.json")
    candidates = [
        Candidate.from_dict(r["candidate"]) for r in Journal(folder / "trials.jsonl").read() if "candidate" in r
    ]
    test = None
    if (folder / "finalists.json").exists():
        known = json.loads((folder / "finalists.json").read_text())
        candidates = [
            replace(c, test={n: Metric(**m) for n, m in known.get(c.recipe.key, {}).items()}) for c in candidates
        ]
        metric = next(iter(known["baseline"]))
        test = Metric(**known["baseline"][metric])
    return Front(
        tuple(candidates),
        tuple(Objective(**entry) for entry in stored["objectives"]),
        Budget.parse(stored["snapshot"]["budget"]),
        Measurement.from_dict(stored["baseline"]),
        folder,
        test,
    )
