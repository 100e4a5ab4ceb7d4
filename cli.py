"""The command line: `paretorch search CONFIG.yaml` and what belongs to it.

Exit codes: 0 done; 2 bad input (the message says which and what to do); 3 the search ended without a recipe inside the
budget; 4 an artifact is sound, but measured again its numbers differ; 130 interrupted. Heavy imports stand inside the
commands, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time as time_module
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ParetorchError

if TYPE_CHECKING:
    from rich.console import Console

    from .configs.schema import Config
    from .console import Watcher
    from .objectives.measurement import Estimate
    from .results.explain import Explanation
    from .results.front import Front
    from .results.retarget import Retargeted
    from .runners.local import LocalRunner
    from .runners.record import MeasurementProtocol, Record, RecordComparison, RecordRow
    from .runners.task import Task
    from .runners.timing import compare
    from .search.preflight import Preflight
    from .search.study import Study
    from .spaces.recipe import Recipe
    from .spaces.rules import Axis
    from .spaces.structure import Structure

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None,
                  help="Search bits x sparsity x architecture of a trained network under a real budget.")  # fmt: skip

ConfigFile = Annotated[Path, typer.Argument(help="The configuration, a YAML file.", metavar="CONFIG.yaml")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key, such as search.seed=1. Repeatable."),
]
StudyFolder = Annotated[Path, typer.Argument(help="The study's folder, such as studies/digits.", metavar="STUDY")]
PICK = "knee, recommended (the knee, or the cheapest one that the test split cannot tell from it), a candidate's number, an objective's name, or 'size_bytes <= 80kB'."
Force = Annotated[
    bool, typer.Option("--force", help="Also a candidate whose file does not compute what was simulated.")
]
TaskFunction = Annotated[
    str | None, typer.Option("--task", metavar="FILE.py:FUNCTION", help="The task: network, data and metric.")
]
TaskConfig = Annotated[
    Path | None, typer.Option("--config", metavar="CONFIG.yaml", help="A configuration that names the task.")
]
NO_FEASIBLE, DIFFERENT, INTERRUPTED = 3, 4, 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def _console() -> Console:
    from rich.console import Console

    # A pipe or a log file has no width of its own; 80 columns fit everywhere.
    return Console(width=None if sys.stdout.isatty() else 80, soft_wrap=not sys.stdout.isatty(), highlight=False)


def _study(config: Config, listener: Any) -> Study:
    from .configs.accelerator import load_target
    from .configs.load import config_dict
    from .configs.plugins import load_task
    from .search.study import Study

    target = load_target(config.measure.target, config.folder)

    listener.phase("loading the task")
    task = load_task(config)
    text = config.source.read_text() if config.source else ""
    return Study(
        task,
        config.to_space(),
        objectives=config.objectives,
        budget=config.budget,
        directory=config.directory,
        sampler=config.search.sampler,
        rungs=config.search.rungs,
        ensembles=config.search.ensembles,
        seed=config.search.seed,
        threads=config.measure.threads,
        batch=config.measure.batch,
        seconds=config.measure.seconds,
        calibration_images=config.measure.calibration_images,
        target=target,
        mlflow=config.mlflow.uri,
        experiment=config.mlflow.experiment,
        listener=listener,
        config=config_dict(config),
        config_text=text,
        config_file=config.source.absolute() if config.source else None,
    )


@app.command()
def search(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006  (typer reads the default and never changes it)
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Trials in all, resumed ones included.")] = None,
    time: Annotated[
        str | None,
        typer.Option("--time", help="How long it may take in all, such as 30m or 2h; as many trials as fit."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The study's folder [default: studies/NAME].")
    ] = None,
) -> None:
    """Search, or go on with a search that was interrupted. Checks first that everything works and the budget can be kept."""
    from .configs.load import load
    from .console import Watcher

    given = {"search.trials": trials, "search.time": time, "output": str(output.absolute()) if output else None}
    # As overrides they are checked like any other, and kept with the study.
    options = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    if time and not trials:  # whoever says how long does not want to stop earlier
        options.append("search.trials=null")
    loaded = load(config, [*set_, *options])
    console = _console()
    watcher = Watcher(console)
    study = None
    try:
        with watcher.watching():
            study = _study(loaded, watcher)
            # Whoever gives it a minute counts from when the command was typed.
            limit = loaded.search.time and max(1e-3, loaded.search.time - _age())
            front = study.run(loaded.search.trials, limit)
    except KeyboardInterrupt:
        done = len(study.candidates) if study else 0
        if study and done:
            _show_front(console, study.front, study.directory)
        console.print(f"\nInterrupted after {done} trials; nothing is lost. The same command goes on.")
        raise typer.Exit(INTERRUPTED) from None
    _show_front(console, front, study.directory)
    if not front.members:
        raise typer.Exit(NO_FEASIBLE)


def _age() -> float:
    """Seconds since this process began (proc(5): field 22 of stat, in clock ticks since boot)."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return time_module.clock_gettime(time_module.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def _show_front(console: Console, front: Front, directory: Path) -> None:
    from rich.text import Text

    from .results.report.report import front_table, least_violating_table, preferred

    console.print()
    if front.members:
        console.print(front_table(front))
    else:
        console.print(
            Text("No candidate kept the budget. The nearest ones, and the limits they would keep:", style="bold yellow")
        )
        console.print(least_violating_table(front))
    _summary(console, front)
    folder = os.path.relpath(directory)
    folder = folder if len(folder) < len(str(directory)) else str(directory)
    pick = (
        preferred(front)
        if front.members
        else str(front.least_violating(1)[0].number)
        if front.least_violating(1)
        else "NUMBER"
    )
    console.print("\nNext:")
    console.print(Text(f"  paretorch ui {folder}                  # every candidate, in the MLflow UI"))
    console.print(Text(f"  paretorch export {folder} --pick {pick} --to deploy"))
    console.print(Text(f"  the report: {folder}/report/front.html"))


def _summary(console: Console, front: Front) -> None:
    """What was refused, what was measured and found over the budget, what failed and why."""
    from collections import Counter

    from rich.text import Text

    from .results.report.report import warned
    from .search.finalists import described_clusters, described_optimism

    refused = sum(c.state == "over_budget" and c.measurement is None for c in front.candidates)
    over = sum(c.state == "over_budget" and c.measurement is not None for c in front.candidates)
    failed = [c for c in front.candidates if c.state == "failed"]
    stopped = sum(c.state == "stopped" for c in front.candidates)
    limits = Counter(limit for c in front.candidates for limit, value in c.excess.items() if value > 0)
    by_limit = ", ".join(f"{count} by {limit}" for limit, count in limits.most_common())
    console.print(Text(f"\n{len(front.candidates)} trials: {len(front.members)} on the front, {over} measured over the budget, "
                       f"{refused} refused by arithmetic, {f'{stopped} given up early, ' if stopped else ''}{len(failed)} failed" + (f" (over: {by_limit})" if by_limit else "")))  # fmt: skip
    for candidate in failed[:5]:
        console.print(Text(f"  #{candidate.number} failed: {candidate.reason.splitlines()[0]}", style="red"))
    for line in described_clusters(front):
        console.print(Text(line))
    if line := described_optimism(front):
        console.print(Text(line))
    for line in warned(front):
        console.print(Text(line, style="yellow"))


@app.command(short_help="Tell in seconds whether a search will work.")
def check(config: ConfigFile, set_: Overrides = []) -> None:  # noqa: B006
    """Tell in seconds whether a search will work: trace, compress every kind of layer, export, reload, measure."""
    from .configs.load import load
    from .console import Watcher

    console = _console()
    watcher = Watcher(console)
    with watcher.watching():
        study = _study(load(config, set_), watcher)
        found = study.check()
    _show_layers(console, found)
    console.print("\nThe search can start: [bold]paretorch search[/bold] " + str(config))


def _choices(axis: Axis) -> str:
    return " ".join(choice if isinstance(choice, str) else f"{choice:g}" for choice in axis.choices)


def _show_layers(console: Console, found: Preflight) -> None:
    """What may be done to each of the networks that the space begins with."""
    from rich.text import Text

    names = dict.fromkeys(axis.student for axis in found.axes if axis.student is not None)
    for name in names:
        if len(names) > 1 or name:
            console.print(Text(f"\nstudent {name}" if name else "\nthe network itself", style="bold"))
        _show_network(console, found.structure.named(name), [axis for axis in found.axes if axis.student == name])


def _show_network(console: Console, structure: Structure, axes: Sequence[Axis]) -> None:
    from rich.table import Table
    from rich.text import Text

    from .spaces.techniques.table import METHODS, RULE_KEYS

    kinds = {"weight_bits": "bits", "activation_bits": "activations", "cluster_bits": "codebook bits"}
    kinds = {kind: kind for kind in RULE_KEYS} | kinds
    shared = [axis for axis in axes if axis.kind in METHODS and len(axis.targets) > 1]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", width=min(80, console.width))
    table.add_column("layer", overflow="fold", ratio=2)
    table.add_column("kind")
    table.add_column("weights", justify="right")
    table.add_column("what may be done", overflow="fold", ratio=3)
    for layer in structure.layers:
        may = []
        for axis in axes:
            target = layer.output if axis.kind == "channels" else layer.name
            if axis.kind in kinds and target in axis.targets and axis not in shared:
                may.append(
                    f"{kinds[axis.kind]} {_choices(axis)}"
                    + (f" (with {target})" if axis.kind == "channels" and target != layer.name else "")
                )
        table.add_row(Text(layer.name), layer.kind, f"{layer.params:,}", Text("; ".join(may) or "nothing"))
    console.print()
    console.print(table)
    for axis in axes:
        if axis.kind in ("width", "depth", "equalize"):
            names = (
                f" ({', '.join(structure.blocks[: max(axis.choices)])} first)"
                if axis.kind == "depth" and max(axis.choices)
                else ""
            )
            console.print(Text(f"{axis.kind}: {_choices(axis)}{names}"))
    for axis in shared:
        console.print(Text(f"{axis.kind}: {_choices(axis)} (one for {len(axis.targets)} layers)"))
    if structure.refused:
        console.print("\nLeft as it is:")
        for name, reason in structure.refused:
            console.print(Text(f"  {name}: {reason}"))


@app.command(short_help="Measure which layers mind which compression.")
def sensitivity(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    images: Annotated[
        int | None,
        typer.Option("--images", min=16, help="Calibration images [default: measure.calibration_images]."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write [default: the study's folder].")
    ] = None,
) -> None:
    """Measure which layers mind which compression: every layer at every level of the space, alone, without training."""
    import tempfile

    from .configs.load import load
    from .configs.plugins import load_task
    from .console import Steps, Watcher
    from .errors import StudyError
    from .results.report.heatmap import FILES, explained, heat_tables, write_sensitivity
    from .results.tracking.tracker import add_sensitivity
    from .runners.local import LocalRunner
    from .runners.sensitivity import levels, measure_sensitivity
    from .runners.task import dataset
    from .spaces.defaults import default_space

    loaded = load(config, set_)
    folder = output if output is not None else loaded.directory
    console = _console()
    watcher = Watcher(console)
    with watcher.watching():
        watcher.phase("loading the task, the network and the data, tracing")
        task = load_task(loaded)
        count = loaded.measure.calibration_images if images is None else images
        runner = LocalRunner(task, folder, calibration_images=count, seed=loaded.search.seed)
        space = loaded.to_space() or default_space(runner.structure, len(dataset(task, "train")))  # type: ignore[arg-type]
        levels(space, runner.structure)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # better now than after all that is measured
            pass
        found = measure_sensitivity(runner, space, Steps(watcher))
    console.print(explained(found), markup=False)
    for table in heat_tables(found, min(80, console.width)):
        console.print()
        console.print(table)
    write_sensitivity(found, folder, name=loaded.name)
    short = os.path.relpath(folder)
    shown = short if len(short) < len(str(folder)) else str(folder)
    console.print(f"\nwrote {', '.join(FILES)} to {shown}", markup=False)
    try:
        if add_sensitivity(folder, loaded.mlflow.uri):
            console.print(f"the study's MLflow run shows them, too: paretorch ui {shown}", markup=False)
    except StudyError as error:  # the files are on disk, and a mirror must not fail what it mirrors
        console.print(f"warning: {error}. The study's MLflow run gets the files when the search runs again", markup=False)  # fmt: skip
    console.print("\nNext:")
    console.print(f"  paretorch search {config}", markup=False)
    console.print(f"  the picture: {shown}/sensitivity.png", markup=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from .configs.load import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command(short_help="Write a commented configuration and task to start from.")
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; nothing there is overwritten.")],
) -> None:
    """Write a commented configuration and task that run as they are and are meant to be edited."""
    from .configs.init import write_templates

    for path in write_templates(directory):
        typer.echo(f"wrote {path}")
    typer.echo(f"\nNext:\n  paretorch search {directory / 'config.yaml'}")


@app.command()
def front(
    study: StudyFolder,
    csv: Annotated[bool, typer.Option("--csv", help="Print all candidates as CSV.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write the report (front.html, front.png, ...) to this folder.")
    ] = None,
) -> None:
    """Print a study's front again, also while it runs."""
    from .results.report.report import write_report
    from .search.study import open_front

    found = open_front(study)
    if csv:
        typer.echo(found.table().to_csv(index=False), nl=False)
        return
    _show_front(_console(), found, study)
    if plot is not None:
        write_report(found, plot, name=study.resolve().name)
        typer.echo(f"wrote {plot}/front.html, front.png, front.csv, front.json, report.md")


@app.command("explain", short_help="Tell which decision of a candidate cost how much.")
def explain_(
    study: StudyFolder,
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="The candidate, as the front numbers it.")],
    task: TaskFunction = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="CONFIG.yaml", help="The study's configuration [default: where it was]."),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=16, help="Validation images.")] = 1000,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Decisions to print, the dearest first.")] = 12,
) -> None:
    """Take every decision of a candidate back alone, without training, and say what it cost; with one suggestion."""
    import yaml

    from .console import Steps
    from .errors import StudyError
    from .results.explain import explain
    from .results.export import record_of
    from .runners.evaluate import EvaluationPlan
    from .runners.files.atomic import write_atomic
    from .search.study import digest, open_front, read_about
    from .spaces.techniques.ensemble import Ensemble

    found = open_front(study)
    candidate = next((c for c in found.candidates if c.number == number), None)
    if candidate is None or candidate.measurement is None or not candidate.recipe.steps:
        why = ("there is no such candidate" if candidate is None else
               "it is the untouched network" if not candidate.recipe.steps else f"it was never measured ({candidate.reason})")  # fmt: skip
        raise StudyError(
            f"candidate {number} of {study} cannot be explained: {why}; paretorch front {study} lists the front"
        )
    if candidate.recipe.of(Ensemble):
        members = " and ".join(f"#{c.number}" for c in found.candidates if c.recipe in candidate.recipe.networks())
        raise StudyError(f"candidate {number} of {study} is an ensemble, which has no decisions of its own: explain its networks {members}")  # fmt: skip
    about = read_about(study.absolute() / "study.json")
    if not (task or config):
        config = Path(about["config_file"]) if about.get("config_file") else None
        if config is None or not config.exists():
            raise StudyError(f"the configuration that the study in {study} was made with is not at {config}; name it with --config "
                             "CONFIG.yaml, or the task with --task FILE.py:FUNCTION")  # fmt: skip
    loaded, protocol = _task(task, config, record_of(found, candidate))
    console = _console()
    with _runner(console, loaded, protocol) as (runner, watcher):
        if digest(runner.model) != about["snapshot"]["weights"]:
            raise StudyError(f"the network of task {loaded.name!r} has not the weights that the study in {study} was made with; "
                             "name its task, with the same checkpoint")  # fmt: skip
        runner.plan = EvaluationPlan(**about["way"])
        runner.take_student(candidate.recipe, study / "candidates")
        baseline = {name: metric.value for name, metric in found.baseline.metrics.items()}
        told = explain(runner, candidate.recipe, found.budget, baseline, images, Steps(watcher))
    _show_explanation(console, number, candidate.recipe, loaded.metric_name, told, rows)
    if told.suggestion:
        folder = study / "explain"
        folder.mkdir(exist_ok=True)
        kept = folder / f"{number}.yaml"
        write_atomic(kept, yaml.safe_dump(told.suggestion.recipe.to_dict(), sort_keys=False))
        option = f"--task {task}" if task else f"--config {config}"
        console.print("\nNext:")
        console.print(f"  paretorch apply {kept} {option} --to suggested", markup=False)


def _show_explanation(console: Console, number: int, recipe: Recipe, metric: str, told: Explanation, rows: int) -> None:
    from .objectives.objective import show
    from .spaces.techniques.recover import Recover

    def points(found: Estimate) -> str:
        half, percent = (found.high - found.low) / 2, metric == "accuracy"
        return f"{100 * found.value:+.2f} ±{100 * half:.2f}" if percent else f"{found.value:+.4g} ±{half:.2g}"

    trained = any(step.epochs for step in recipe.of(Recover))
    console.print(f"#{number}: {recipe.describe()}", markup=False, soft_wrap=False)
    console.print(f"{'before its training: ' if trained else ''}{metric} {show(metric, told.metric.value)} on {told.images} validation images, "
                  f"divergence {told.divergence:.3g}, {show('size_bytes', told.size_bytes)}", markup=False, soft_wrap=False)  # fmt: skip
    shown = told.costs[:rows]
    lines = [
        (c.what, points(c.metric), f"{100 * c.divergence / told.divergence:+.0f}%" if told.divergence else "-",
         f"{'-' if c.size_bytes >= 0 else '+'}{show('size_bytes', abs(c.size_bytes))}")
        for c in shown
    ]  # fmt: skip
    _show_cells(console, ("decision", f"costs {metric}", "of the divergence", "bytes"), lines)
    if len(shown) < len(told.costs):
        console.print(f"and {len(told.costs) - len(shown)} that cost less (--rows)", markup=False)
    if told.suggestion is None:
        console.print("\nNo milder decision brings the outputs nearer to the untouched network's.", markup=False)
        return
    best = told.suggestion
    kept = "the limits on bytes and MACs still hold" if told.keeps else "it breaks a limit on bytes or MACs"
    console.print(f"\nSuggestion: {best.what}. {points(best.metric)} {metric}, {100 * best.divergence / told.divergence:.0f}% less "
                  f"divergence, {show('size_bytes', abs(best.size_bytes))} {'more' if best.size_bytes >= 0 else 'less'}; {kept}.", markup=False, soft_wrap=False)  # fmt: skip


@app.command(short_help="Write one candidate for production.")
def export(
    study: StudyFolder,
    to: Annotated[Path, typer.Option("--to", help="The directory to write; an older artifact there is replaced.")],
    pick: Annotated[str, typer.Option("--pick", help=PICK)] = "knee",
    force: Force = False,
) -> None:
    """Write one candidate for production: ONNX, packed weights, recipe, measurements, environment, model card."""
    from .search.study import open_front

    found = open_front(study)
    candidate = found.select(pick)
    path = found.export(str(candidate.number), to, force)
    typer.echo(f"wrote candidate {candidate.number} ({candidate.recipe.describe()}) to {path}")
    for item in sorted(path.iterdir()):
        typer.echo(f"  {item.name:<20} {item.stat().st_size:>10,} bytes")
    if candidate.state != "ok":
        typer.echo(f"note: it is over the budget: {candidate.reason}", err=True)


@app.command(short_help="Put one candidate into the MLflow model registry.")
def register(
    study: StudyFolder,
    name: Annotated[str, typer.Option("--name", help="The registered model; a new version of it is made.")],
    pick: Annotated[str, typer.Option("--pick", help=PICK)] = "knee",
    alias: Annotated[
        str | None, typer.Option("--alias", help="The alias that points to it from now on, such as champion.")
    ] = None,
    uri: Annotated[
        str | None, typer.Option("--uri", help="The MLflow store [default: the one that the study was logged to].")
    ] = None,
    force: Force = False,
) -> None:
    """Put one candidate into the MLflow model registry, to be loaded and served without paretorch and torch."""
    from shlex import quote

    from .results.register import register as put
    from .search.study import open_front

    found = open_front(study)
    candidate = found.select(pick)
    model = put(found, candidate, name, alias, uri, force)
    typer.echo(
        f"registered candidate {candidate.number} ({candidate.recipe.describe()}) as version {model.version} of {name}"
    )
    if model.alias:
        before = f", before that version {model.moved_from}" if model.moved_from else ""
        typer.echo(f"alias {model.alias}: version {model.version}{before}")
    example = f"@{quote(str(model.files / 'serving_input_example.json'))}" if model.files else "'{\"inputs\": [...]}'"
    typer.echo(f"""
Load it, where mlflow and onnxruntime are installed (paretorch and torch are not needed):
  export MLFLOW_TRACKING_URI={quote(model.store)}
  python -c 'import mlflow; model = mlflow.pyfunc.load_model("{model.uri}")'
Serve it, to this machine only; inputs are float32 [{", ".join(map(str, model.shape))}]:
  mlflow models serve -m {quote(model.uri)} --env-manager local -h 127.0.0.1 -p 5001
  curl -H 'Content-Type: application/json' -d {example} http://127.0.0.1:5001/invocations""")
    if candidate.state != "ok":
        typer.echo(f"note: it is over the budget: {candidate.reason}", err=True)


@app.command(short_help="Check an artifact, and measure it again.")
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `export` or `apply` has written.")],
    task: TaskFunction = None,
    config: TaskConfig = None,
) -> None:
    """Check every file of an artifact and run it in a clean process; with a task, measure it again.

    Exit codes: 0 all agrees; 2 the artifact is damaged, or the task is not its task; 4 the files are sound, but numbers
    differ from what was recorded.
    """
    import subprocess

    options = [f"--task={task}"] if task else []
    options += [f"--config={config}"] if config else []
    # Nothing of this process but where modules are found: what the artifact is measured in has done nothing else, and
    # a file that crashes the runtime does not crash what looks at it.
    start = f"import sys; sys.path[:] = {sys.path!r}; from paretorch.cli import main; main()"
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, "-P", "-c", start, "verify-here", *options, "--", str(directory)], check=False
    )
    if done.returncode < 0:
        from .errors import ArtifactError

        raise ArtifactError(f"{directory}: the process that ran it was ended by signal {-done.returncode} "
                            f"({signal.Signals(-done.returncode).name})")  # fmt: skip
    raise typer.Exit(done.returncode)


@app.command("verify-here", hidden=True)
def verify_here(directory: Path, task: TaskFunction = None, config: TaskConfig = None) -> None:
    """What `verify` does, in this process."""
    from .objectives.measurement import Estimate
    from .runners.apply import measure_again
    from .runners.artifact import inspect
    from .runners.local import environment
    from .runners.record import RecordRow, changed_environment, compare, compare_outputs

    console = _console()
    sound = inspect(directory)
    now: tuple[RecordRow, ...] = (RecordRow("size_bytes", "", Estimate.exact(len(sound.packed)), None, ""),)
    if task or config:
        loaded, protocol = _task(task, config, sound.record)
        with _runner(console, loaded, protocol) as (runner, watcher):
            now = measure_again(runner, sound.packed, sound.record, protocol, watcher.report)
    outputs = compare_outputs(sound.record.check, sound.outputs)
    found = [*compare(sound.record.rows, now), *([outputs] if outputs else [])]
    console.print(f"{directory} is sound: every SHA-256 fits, weights.safetensors gives model.onnx bit for bit, "
                  "and it runs", markup=False, soft_wrap=False)  # fmt: skip
    _show_comparisons(console, found)
    if not (task or config):
        console.print("\nThe metric and the latency were not measured; name the task for that: --task FILE.py:FUNCTION, or "
                      "--config CONFIG.yaml", markup=False, soft_wrap=False)  # fmt: skip
    if changed := changed_environment(sound.environment, environment()):
        console.print("\nRecorded in another environment:")
        for line in changed:
            console.print(f"  {line}", markup=False)
    different = [comparison.name for comparison in found if not comparison.agrees]
    if different:
        console.print(f"\nThe files are intact, but {', '.join(different)} differ{'s' * (len(different) == 1)} from what "
                      "was recorded", style="bold yellow", markup=False, soft_wrap=False)  # fmt: skip
        raise typer.Exit(DIFFERENT)
    console.print("\nAll that was measured agrees with what was recorded")


@app.command("apply", short_help="Do what a recipe says to a newer checkpoint.")
def apply_(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.yaml of an artifact.")],
    to: Annotated[Path, typer.Option("--to", help="The directory to write; an older artifact there is replaced.")],
    task: TaskFunction = None,
    config: TaskConfig = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="DIR", help="Artifact or study to compare with [default: the recipe's]."),
    ] = None,
) -> None:
    """Compress a newer checkpoint, or the same one for other data, as a recipe says, and write it for production.

    What is written is compared with the untouched network, and with what was recorded when the recipe was found.
    """
    from .errors import ConfigError
    from .results.export import recorded_in
    from .runners.apply import apply_recipe, read_recipe
    from .runners.artifact import check_free, inspect
    from .runners.record import compare

    if not (task or config):
        raise ConfigError("name the task with --task FILE.py:FUNCTION, or with --config CONFIG.yaml", "paretorch apply")
    console = _console()
    wanted, home = read_recipe(recipe)
    where = against or home
    recorded: Record | None = None
    if where is not None and (where / "study.json").exists():
        recorded = recorded_in(where, wanted)
    elif where is not None:
        sound = inspect(where)
        recorded = sound.record
        if sound.recipe != wanted:
            console.print(f"note: {where} was made by another recipe: {sound.recipe.describe()}", markup=False)
    check_free(to)
    loaded, protocol = _task(task, config, recorded)
    console.print(f"recipe    {wanted.describe()}", markup=False)
    with _runner(console, loaded, protocol) as (runner, watcher):
        made = apply_recipe(runner, wanted, protocol, to, f"{to.resolve().name}: {loaded.name}", watcher.report)
    _show_changes(console, made.rows)
    if recorded:
        console.print(f"\nBeside what {where} records ({recorded.name}):", markup=False)
        _show_comparisons(console, compare(recorded.rows, made.rows))
    console.print(f"\nwrote {to}", markup=False)
    console.print("\nNext:")
    option = f"--task {task}" if task else f"--config {config}"
    console.print(f"  paretorch verify {to} {option}", markup=False)


def _task(task: str | None, config: Path | None, recorded: Record | None) -> tuple[Task, MeasurementProtocol]:
    """The task of the options, and how to measure it: as the configuration says, or as was measured before."""
    from .configs.accelerator import load_target
    from .configs.load import load, parse
    from .configs.plugins import load_task
    from .errors import ConfigError
    from .runners.record import MeasurementProtocol

    if task and config:
        raise ConfigError("--task and --config both name a task; write one of them", "options")
    if config:
        loaded = load(config)
        asked = loaded.measure.model_dump() | {"target": load_target(loaded.measure.target, loaded.folder).spec}
        return load_task(loaded), MeasurementProtocol(**asked, seed=loaded.search.seed)
    known = recorded.protocol if recorded else None
    return load_task(parse({"task": task})), known or MeasurementProtocol()


@contextmanager
def _runner(console: Console, task: Task, protocol: MeasurementProtocol) -> Iterator[tuple[LocalRunner, Watcher]]:
    """A runner whose files go when the block ends, and what shows its progress."""
    import tempfile
    from dataclasses import asdict

    from .console import Watcher
    from .runners.local import LocalRunner

    watcher = Watcher(console)
    with tempfile.TemporaryDirectory() as folder, watcher.watching():
        watcher.phase("loading the network and the data, tracing")
        yield LocalRunner(task, Path(folder), **asdict(protocol)), watcher


def _show_changes(console: Console, rows: Sequence[RecordRow]) -> None:
    """Each number beside the untouched network's."""
    from .objectives.objective import show, spread

    cells = []
    for row in rows:
        new, base = (
            "-" if m is None else f"{show(row.metric, m.value)} {spread(row.metric, m)}"
            for m in (row.found, row.baseline)
        )
        cells.append((row.name, base, new, row.change()))
    _show_cells(console, ("", "untouched", "compressed", "change"), cells)


def _show_comparisons(console: Console, found: Sequence[RecordComparison]) -> None:
    _show_cells(console, ("", "recorded", "now", ""), [(c.name, c.recorded, c.now, c.verdict) for c in found])


def _show_cells(console: Console, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", width=None if console.width < 80 else 80)
    for head in heads:
        table.add_column(head, overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell.rstrip()) for cell in line))
    console.print()
    console.print(table)


@app.command(short_help="Time an ONNX file, or compare two of them.")
def measure(
    file: Annotated[
        Path, typer.Argument(help="An ONNX file, or a directory that `export` wrote.", metavar="FILE.onnx")
    ],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="OTHER.onnx", help="What it is held against.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="CPU threads, each pinned to a core.")] = 1,
    batch: Annotated[int | None, typer.Option("--batch", help="Inputs per run [default: 1].")] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="It ends when half the 95% interval is within this share.")
    ] = "2%",
    time: Annotated[str, typer.Option("--time", help="It ends after this time at the latest.")] = "20s",
    shape: Annotated[
        list[str],
        typer.Option("--shape", metavar="NAME=SIZES", help="Shape of an input, as input=1,3,224,224. Repeatable."),
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print all that was found as JSON.")] = False,
) -> None:
    """Time an ONNX file in ONNX Runtime, in a fresh process, or say whether it is faster than another one."""
    from dataclasses import asdict

    from .configs.fields import parse_duration
    from .errors import ConfigError
    from .runners.timing.compare import compare, parse_precision
    from .runners.timing.random_inputs import parse_shapes

    read: dict[str, Any] = {}
    problems: list[str] = []
    options = (("--precision", parse_precision, precision), ("--time", parse_duration, time), ("--shape", parse_shapes, shape))  # fmt: skip
    for option, parse, text in options:
        try:
            read[option] = parse(text)  # type: ignore[operator,arg-type]
        except ConfigError as error:
            problems += [f"{option}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems, "measure")
    files = [file] if against is None else [file, against]
    found = compare(files, threads=threads, batch=batch, precision=read["--precision"], seconds=read["--time"],
                    shapes=read["--shape"])  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"files": [str(path) for path in files]} | asdict(found), indent=1))
    else:
        typer.echo("\n".join(_measured(files, found, read["--precision"])))


def _measured(files: list[Path], found: compare.LatencyComparison, precision: float) -> list[str]:
    """A comparison for people: numbers first, because names may be long."""

    def line(metric: Estimate, unit: str, text: str) -> str:
        return f"{f'{metric.value:.4g}{unit}':<13}{f'[{metric.low:.4g}, {metric.high:.4g}]':<20}{text}"

    lines = [line(metric, " ms", str(path)) for path, metric in zip(files, found.ms, strict=True)]
    ratio = found.ratio
    if ratio is not None:
        times = {"faster": f", {1 / ratio.value:.3g}x", "slower": f", {ratio.value:.3g}x"}.get(found.verdict or "", "")
        lines.append(line(ratio, "", f"of the time: {found.verdict}{times}"))
    asked = ratio or found.ms[0]
    half = f"±{100 * (asked.high - asked.low) / 2 / asked.value:.2g}%"
    about = found.environment
    cores = about["cores"] if about["cores"] == "not pinned" else f"pinned to core {about['cores']}"
    inputs = " against ".join(dict.fromkeys(", ".join(f"{n} {x}" for n, x in entry.items()) for entry in found.inputs))
    lines += [
        "",
        f"{found.pairs} {'pairs' if ratio else 'blocks'} in one process, {found.seconds:.1f} s: {half}, "
        + (f"within the {100 * precision:g}% asked for" if found.reached else
           f"which is not within the {100 * precision:g}% asked for: allow more --time, or a quieter machine"),
        f"{about['threads']} thread{'s' * (about['threads'] != '1')}, {cores}, {about['clock']}; {inputs}",
    ]  # fmt: skip
    return lines


@app.command("retarget", short_help="Measure a front again, on another target.")
def retarget_(
    study: StudyFolder,
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="NAME", help="onnxruntime, openvino, torch, torch-cuda, or a profile's .yaml."
        ),
    ],
    task: TaskFunction = None,
    config: TaskConfig = None,
) -> None:
    """Measure the files of a study's front on another target, in turns with the baseline's there; nothing is searched.

    Outputs are compared with ONNX Runtime's. With the study's task (--task or --config) that happens on validation inputs
    instead of made-up ones, and the metric is measured there, too.
    """
    from .configs.accelerator import load_target
    from .console import Watcher
    from .errors import StudyError
    from .results.retarget import FOLDER, retarget
    from .results.tracking.tracker import add_targets

    console = _console()
    chosen = load_target(target)
    watcher = Watcher(console)
    with watcher.watching():
        watcher.phase("loading the task")
        loaded = _task(task, config, None)[0] if task or config else None
        found = retarget(study, chosen, loaded, lambda text: watcher.phase(f"measuring {text} on {chosen.name}"))
    path = found.write(study)
    _show_retargeted(console, found)
    console.print(f"\nwrote {path}", markup=False)
    try:
        if add_targets(study):
            console.print(f"the study's MLflow run has it, too: {FOLDER}/{path.name}", markup=False)
    except StudyError as error:  # the file is on disk, and a mirror must not fail what it mirrors
        console.print(f"warning: {error}. The study's MLflow run gets it when the search runs again", markup=False)


def _show_retargeted(console: Console, found: Retargeted) -> None:
    from .objectives.objective import show, spread

    def share(metric: Estimate) -> str:
        within = f" [{metric.low:.3g}, {metric.high:.3g}]" if metric.low != metric.high else ""
        return f"{metric.value:.3g}{within}"

    base = found.baseline_ms
    lines = [("-", "1", f"{show('latency_ms', base.value)} {spread('latency_ms', base)}", "1", "", "", "")]
    refused: dict[str, list[str]] = {}
    for member in found.members:
        before = f"{member.before.value:.3g}"
        if member.latency_ms is None or member.ratio is None:
            refused.setdefault(member.reason, []).append(f"#{member.number}")
            lines.append((str(member.number), before, "cannot run", "", "", "", ""))
            continue
        speed = {"faster": f"{1 / member.ratio.value:.3g}x faster", "slower": f"{member.ratio.value:.3g}x slower"}
        same = f"{100 * member.agreement.top1:.4g}%" if member.agreement else "-"
        on = "front" if member.on_front else member.reason or "beaten"
        latency = show("latency_ms", member.latency_ms.value)
        lines.append((str(member.number), before, latency, share(member.ratio), speed.get(member.verdict, "same speed"), on, same))  # fmt: skip
    _show_cells(console, ("#", "before", f"on {found.target}", "of the baseline", "", "there", "same class"), lines)
    notes = ["", f"before: the share of the baseline's latency on {found.found_on}"]
    notes += [f"{', '.join(numbers)} cannot run there: {reason}" for reason, numbers in refused.items()]
    stay = sum(member.on_front for member in found.members)
    notes.append(f"{stay} of {len(found.members)} stay on the front there, by {', '.join(found.judged_by)}")
    if "latency_ms" not in found.judged_by:
        notes[-1] += "; latency_ms is neither an objective nor limited"
    if found.pareto:
        notes.append(f"the front of the metric and the latency alone: {', '.join(f'#{n}' for n in found.pareto)}")
    if compared := [member.agreement for member in found.members if member.agreement]:
        least, most = min(a.top1 for a in compared), max(a.difference for a in compared)
        notes.append(f"outputs beside ONNX Runtime's on {found.inputs}: the same class for {100 * least:.4g}% or more, "
                     f"apart by {most:.1g} of the largest output or less")  # fmt: skip
    if not found.timed:
        notes.append("computed from the profile: nothing was timed, and the files were not run there")
    for note in notes:
        console.print(note, markup=False, soft_wrap=False)


@app.command(short_help="Open a study in the MLflow UI.")
def ui(
    study: StudyFolder,
    port: Annotated[int, typer.Option("--port", help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open a study in the MLflow UI, reachable from this machine only."""
    from .errors import StudyError
    from .results.tracking.tracker import local_store, page, saved_uri, serve

    if not (study / "study.json").exists():
        raise StudyError(f"there is no study in {study}: it has no study.json; name the folder that a search has written, such as "
                         "studies/NAME")  # fmt: skip
    uri = saved_uri(study)
    if uri is None:
        raise StudyError(f"the study in {study} has no MLflow run yet; the same search brings it there: paretorch search CONFIG.yaml")  # fmt: skip
    root = local_store(study.absolute())[1] if uri.startswith("sqlite") else None
    raise typer.Exit(serve(uri, root, port, page(study)))


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The entry point: runs the command and turns expected errors into messages."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except ParetorchError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno in _FULL:
            _fail(
                f"the disk is full ({error.strerror}{_of(error)}); free some space and run the same command again: every finished trial is kept"
            )
        if error.errno in _READ_ONLY:
            _fail(
                f"cannot write ({error.strerror}{_of(error)}); make it writable, or choose another folder (--output, --to, --plot)"
            )
        raise
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)


def _of(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def _fail(message: str, code: int = 2) -> None:
    sys.stdout.flush()
    print(f"paretorch: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
