"""Commands that measure: the sensitivity of layers, a candidate's decisions, ONNX files, a front on another target."""

from __future__ import annotations

import json
from collections.abc import Callable, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from ..runners.targets.catalog import TARGETS
from .options import ConfigFile, Overrides, StudyArgument, TaskConfig, TaskFunction
from .prepare import make_console, open_runner, read_task, short

if TYPE_CHECKING:
    from ..results.candidate import Candidate
    from ..results.front import Front

_Value = TypeVar("_Value")


def sensitivity(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006  (typer reads the default and never changes it)
    images: Annotated[
        int | None,
        typer.Option("--images", min=16, help="Calibration images [default: measure.calibration_images]."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write [default: the study's folder].")
    ] = None,
) -> None:
    """Measure the sensitivity of layers: compress each one alone at every level of the space, without training."""
    import tempfile

    from ..configs.load import load
    from ..configs.plugins import load_task
    from ..errors import StudyError
    from ..results.report.heatmap import FILES, explained, heat_tables, write_sensitivity
    from ..results.tracking.tracker import add_sensitivity
    from ..runners.compression.build import Builder
    from ..runners.files.candidates import CandidateFiles
    from ..runners.sensitivity import levels, measure_sensitivity
    from ..runners.task import dataset
    from ..spaces.defaults import default_space
    from .watcher import Steps, Watcher

    loaded = load(config, set_)
    folder = output if output is not None else loaded.directory
    console = make_console()
    watcher = Watcher(console)
    with watcher.watching():
        watcher.phase("loading the task, the network and the data, tracing")
        task = load_task(loaded)
        count = loaded.measure.calibration_images if images is None else images
        builder = Builder(task, CandidateFiles(folder), calibration_images=count, seed=loaded.search.seed)
        samples = len(cast(Sized, dataset(task, "train")))  # torch's Dataset declares no __len__
        space = loaded.to_space() or default_space(builder.structure, samples)
        levels(space, builder.structure)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # fail before the measurement if the folder cannot be written
            pass
        measured = measure_sensitivity(builder, space, Steps(watcher))
    console.print(explained(measured), markup=False)
    for table in heat_tables(measured, min(80, console.width)):
        console.print()
        console.print(table)
    write_sensitivity(measured, folder, name=loaded.name)
    shown = short(folder)
    console.print(f"\nwrote {', '.join(FILES)} to {shown}", markup=False)
    try:
        if add_sensitivity(folder, loaded.mlflow.uri):
            console.print(f"the study's MLflow run shows them, too: paretorch ui {shown}", markup=False)
    except StudyError as error:  # the files are on disk, and a mirror must not fail what it mirrors
        console.print(
            f"warning: {error}. The study's MLflow run gets the files when the search runs again", markup=False
        )
    console.print("\nNext:")
    console.print(f"  paretorch search {config}", markup=False)
    console.print(f"  the picture: {shown}/sensitivity.png", markup=False)


def explain(
    study: StudyArgument,
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="The candidate, as the front numbers it.")],
    task: TaskFunction = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="CONFIG.yaml", help="The study's configuration [default: where it was]."),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=16, help="Validation images.")] = 1000,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Decisions to print, the most expensive first.")] = 12,
) -> None:
    """Ablate every decision of a candidate alone, without training, and print its contribution and a suggestion."""
    import yaml

    from ..errors import StudyError
    from ..results.explain import explain as explain_candidate
    from ..results.export import record_of
    from ..results.folder import StudyFolder
    from ..results.front import open_front
    from ..runners.evaluate import EvaluationPlan
    from ..runners.files.atomic import write_atomic
    from ..runners.runner import Inspect
    from .show import show_explanation
    from .watcher import Steps

    front = open_front(study)
    candidate = _explainable(front, number, study)
    folder = StudyFolder(study)
    about = folder.read_about()
    if not (task or config):
        config = _configuration(study, about)
    loaded, protocol = read_task(task, config, record_of(folder, candidate))
    console = make_console()
    plan, students = EvaluationPlan(**about["way"]), folder.candidates.directory
    with open_runner(console, loaded, protocol, plan=plan, other_students=students) as (runner, watcher):
        if runner.submit(Inspect()).result().weights != about["snapshot"]["weights"]:
            raise StudyError(
                f"the network of task {loaded.name!r} has not the weights that the study in {study} was made with; "
                "name its task, with the same checkpoint"
            )
        steps = Steps(watcher)
        told = explain_candidate(runner, candidate.recipe, front.budget, front.baseline.values, images, steps)
    show_explanation(console, number, candidate.recipe, loaded.metric_name, told, rows)
    if told.suggestion:
        kept = folder.suggestion(number)
        kept.parent.mkdir(exist_ok=True)
        write_atomic(kept, yaml.safe_dump(told.suggestion.recipe.to_dict(), sort_keys=False))
        option = f"--task {task}" if task else f"--config {config}"
        console.print("\nNext:")
        console.print(f"  paretorch apply {kept} {option} --to suggested", markup=False)


def _explainable(front: Front, number: int, study: Path) -> Candidate:
    """The candidate with a number.

    Raises:
        StudyError: It has no measured decisions to explain.
    """
    from ..errors import StudyError
    from ..spaces.techniques.ensemble import Ensemble

    candidate = next((c for c in front.candidates if c.number == number), None)
    if candidate is None:
        why = "there is no such candidate"
    elif not candidate.recipe.steps:
        why = "it is the untouched network"
    elif candidate.measurement is None:
        why = f"it was never measured ({candidate.reason})"
    elif candidate.recipe.of(Ensemble):
        members = " and ".join(f"#{c.number}" for c in front.candidates if c.recipe in candidate.recipe.networks())
        raise StudyError(
            f"candidate {number} of {study} is an ensemble, which has no decisions of its own: "
            f"explain its networks {members}"
        )
    else:
        return candidate
    raise StudyError(
        f"candidate {number} of {study} cannot be explained: {why}; paretorch front {study} lists the front"
    )


def _configuration(study: Path, about: dict[str, Any]) -> Path:
    """The configuration file that a study was made with.

    Raises:
        StudyError: It is not there any more.
    """
    from ..errors import StudyError

    config = Path(about["config_file"]) if about.get("config_file") else None
    if config is None or not config.exists():
        raise StudyError(
            f"the configuration that the study in {study} was made with is not at {config}; name it with --config "
            "CONFIG.yaml, or the task with --task FILE.py:FUNCTION"
        )
    return config


def measure(
    file: Annotated[
        Path, typer.Argument(help="An ONNX file, or a directory that `export` wrote.", metavar="FILE.onnx")
    ],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="OTHER.onnx", help="What it is compared with.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="CPU threads, each pinned to a core.")] = 1,
    batch: Annotated[int | None, typer.Option("--batch", help="Inputs per run [default: 1].")] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Stop when half the 95% interval is within this share.")
    ] = "2%",
    time: Annotated[str, typer.Option("--time", help="Stop after this time at the latest.")] = "20s",
    shape: Annotated[
        list[str],
        typer.Option("--shape", metavar="NAME=SIZES", help="Shape of an input, as input=1,3,224,224. Repeatable."),
    ] = [],  # noqa: B006  (typer reads the default and never changes it)
    as_json: Annotated[bool, typer.Option("--json", help="Print all results as JSON.")] = False,
) -> None:
    """Time an ONNX file in ONNX Runtime in a fresh process, or test whether it is faster than another one."""
    from dataclasses import asdict

    from ..configs.fields import parse_duration
    from ..errors import ConfigError
    from ..runners.timing.compare import compare, parse_precision
    from ..runners.timing.random_inputs import parse_shapes
    from .show import comparison_lines

    problems: list[str] = []

    def read(option: str, parse: Callable[[Any], _Value], value: object) -> _Value | None:
        try:
            return parse(value)
        except ConfigError as error:
            problems.extend(f"{option}: {problem}" for problem in error.problems)
            return None

    within = read("--precision", parse_precision, precision)
    seconds = read("--time", parse_duration, time)
    shapes = read("--shape", parse_shapes, shape)
    if within is None or seconds is None or shapes is None:
        raise ConfigError(problems, "measure")
    files = [file] if against is None else [file, against]
    comparison = compare(files, threads=threads, batch=batch, precision=within, seconds=seconds, shapes=shapes)
    if as_json:
        typer.echo(json.dumps({"files": [str(path) for path in files]} | asdict(comparison), indent=1))
    else:
        typer.echo("\n".join(comparison_lines(files, comparison, within)))


def retarget(
    study: StudyArgument,
    target: Annotated[
        str, typer.Option("--target", metavar="NAME", help=f"{', '.join(TARGETS)}, or a profile's .yaml.")
    ],
    task: TaskFunction = None,
    config: TaskConfig = None,
) -> None:
    """Measure the files of a study's front on another target, interleaved with the baseline's; nothing is searched.

    Outputs are compared with ONNX Runtime's. With the study's task (--task or --config), they are compared on
    validation inputs instead of random ones, and the metric is measured there, too.
    """
    from ..configs.accelerator import load_target
    from ..errors import StudyError
    from ..results.retarget import retarget as measure_front
    from ..results.tracking.tracker import add_targets
    from .show import show_retargeted
    from .watcher import Watcher

    console = make_console()
    chosen = load_target(target)
    watcher = Watcher(console)
    with watcher.watching():
        watcher.phase("loading the task")
        loaded = read_task(task, config, None)[0] if task or config else None
        moved = measure_front(study, chosen, loaded, lambda text: watcher.phase(f"measuring {text} on {chosen.name}"))
    path = moved.write(study)
    show_retargeted(console, moved)
    console.print(f"\nwrote {path}", markup=False)
    try:
        if add_targets(study):
            console.print(f"the study's MLflow run has it, too: {path.parent.name}/{path.name}", markup=False)
    except StudyError as error:  # the file is on disk, and a mirror must not fail what it mirrors
        console.print(f"warning: {error}. The study's MLflow run gets it when the search runs again", markup=False)
