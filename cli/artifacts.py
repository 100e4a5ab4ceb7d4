"""Commands for deployment: export a candidate, register it, verify an artifact, apply a recipe again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import DIFFERENT, Force, Pick, StudyArgument, TaskConfig, TaskFunction
from .prepare import make_console, open_runner, read_task

if TYPE_CHECKING:
    from ..results.candidate import Candidate
    from ..results.tracking.registry import Registered
    from ..runners.record import Record


def export(
    study: StudyArgument,
    to: Annotated[Path, typer.Option("--to", help="The directory to write; an older artifact there is replaced.")],
    pick: Pick = "knee",
    force: Force = False,
) -> None:
    """Write one candidate for production: ONNX, packed weights, recipe, measurements, environment, model card."""
    from ..results.front import open_front

    front = open_front(study)
    candidate = front.select(pick)
    path = front.export(str(candidate.number), to, force)
    typer.echo(f"wrote candidate {candidate.number} ({candidate.recipe.describe()}) to {path}")
    for item in sorted(path.iterdir()):
        typer.echo(f"  {item.name:<20} {item.stat().st_size:>10,} bytes")
    _note_excess(candidate)


def register(
    study: StudyArgument,
    name: Annotated[str, typer.Option("--name", help="The registered model; a new version of it is made.")],
    pick: Pick = "knee",
    alias: Annotated[
        str | None, typer.Option("--alias", help="The alias that points to it from now on, such as champion.")
    ] = None,
    uri: Annotated[
        str | None, typer.Option("--uri", help="The MLflow store [default: the one that the study was logged to].")
    ] = None,
    force: Force = False,
) -> None:
    """Put one candidate into the MLflow model registry, to be loaded and served without paretorch and torch."""
    from ..results.front import open_front
    from ..results.register import register as register_candidate

    front = open_front(study)
    candidate = front.select(pick)
    model = register_candidate(front, candidate, name, alias, uri, force)
    typer.echo(
        f"registered candidate {candidate.number} ({candidate.recipe.describe()}) as version {model.version} of {name}"
    )
    if model.alias:
        before = f", before that version {model.moved_from}" if model.moved_from else ""
        typer.echo(f"alias {model.alias}: version {model.version}{before}")
    typer.echo(_how_to_serve(model))
    _note_excess(candidate)


def _how_to_serve(model: Registered) -> str:
    from shlex import quote

    example = f"@{quote(str(model.files / 'serving_input_example.json'))}" if model.files else "'{\"inputs\": [...]}'"
    return f"""
Load it, where mlflow and onnxruntime are installed (paretorch and torch are not needed):
  export MLFLOW_TRACKING_URI={quote(model.store)}
  python -c 'import mlflow; model = mlflow.pyfunc.load_model("{model.uri}")'
Serve it, to this machine only; inputs are float32 [{", ".join(map(str, model.shape))}]:
  mlflow models serve -m {quote(model.uri)} --env-manager local -h 127.0.0.1 -p 5001
  curl -H 'Content-Type: application/json' -d {example} http://127.0.0.1:5001/invocations"""


def _note_excess(candidate: Candidate) -> None:
    if candidate.state != "ok":
        typer.echo(f"note: it is over the budget: {candidate.reason}", err=True)


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `export` or `apply` has written.")],
    task: TaskFunction = None,
    config: TaskConfig = None,
) -> None:
    """Check every file of an artifact and run it in a clean process; with a task, measure it again.

    Exit codes: 0 all agrees; 2 the artifact is damaged, or the task is not its task; 4 the files are intact, but
    numbers differ from what was recorded.
    """
    options = [f"--task={task}"] if task else []
    options += [f"--config={config}"] if config else []
    # The new process inherits only the module paths of this one: the artifact is measured where nothing else has run,
    # and a file that crashes the runtime does not crash this process.
    start = f"import sys; sys.path[:] = {sys.path!r}; from paretorch.cli import main; main()"
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, "-P", "-c", start, "verify-here", *options, "--", str(directory)], check=False
    )
    if done.returncode < 0:
        from ..errors import ArtifactError

        number = -done.returncode
        raise ArtifactError(
            f"{directory}: the process that ran it was ended by signal {number} ({signal.Signals(number).name})"
        )
    raise typer.Exit(done.returncode)


def verify_here(directory: Path, task: TaskFunction = None, config: TaskConfig = None) -> None:
    """Do the work of `verify` in this process."""
    from ..objectives.measurement import Estimate
    from ..runners.apply import measure_again
    from ..runners.artifact import inspect
    from ..runners.environment import environment
    from ..runners.record import RecordRow, changed_environment, compare, compare_outputs
    from .show import show_comparisons

    console = make_console()
    artifact = inspect(directory)
    now: tuple[RecordRow, ...] = (RecordRow("size_bytes", "", Estimate.exact(len(artifact.packed)), None, ""),)
    if task or config:
        loaded, protocol = read_task(task, config, artifact.record)
        with open_runner(console, loaded, protocol) as (runner, watcher):
            now = measure_again(runner, artifact.packed, artifact.record, protocol, watcher.phase)
    outputs = compare_outputs(artifact.record.check, artifact.outputs)
    comparisons = [*compare(artifact.record.rows, now), *([outputs] if outputs else [])]
    console.print(
        f"{directory} is sound: every SHA-256 fits, weights.safetensors gives model.onnx bit for bit, and it runs",
        markup=False,
        soft_wrap=False,
    )
    show_comparisons(console, comparisons)
    if not (task or config):
        console.print(
            "\nThe metric and the latency were not measured; name the task for that: --task FILE.py:FUNCTION, or "
            "--config CONFIG.yaml",
            markup=False,
            soft_wrap=False,
        )
    if changed := changed_environment(artifact.environment, environment()):
        console.print("\nRecorded in another environment:")
        for line in changed:
            console.print(f"  {line}", markup=False)
    different = [comparison.name for comparison in comparisons if not comparison.agrees]
    if different:
        console.print(
            f"\nThe files are intact, but {', '.join(different)} differ{'s' * (len(different) == 1)} "
            "from what was recorded",
            style="bold yellow",
            markup=False,
            soft_wrap=False,
        )
        raise typer.Exit(DIFFERENT)
    console.print("\nAll that was measured agrees with what was recorded")


def apply(
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

    The result is compared with the baseline, and with the numbers that were recorded when the recipe was searched.
    """
    from ..errors import ConfigError
    from ..results.export import recorded_in
    from ..results.folder import StudyFolder
    from ..runners.apply import apply_recipe, read_recipe
    from ..runners.artifact import check_free, inspect
    from ..runners.record import compare
    from .show import show_changes, show_comparisons

    if not (task or config):
        raise ConfigError("name the task with --task FILE.py:FUNCTION, or with --config CONFIG.yaml", "paretorch apply")
    console = make_console()
    wanted, home = read_recipe(recipe)
    where = against or home
    recorded: Record | None = None
    if where is not None and StudyFolder(where).about.exists():
        recorded = recorded_in(where, wanted)
    elif where is not None:
        artifact = inspect(where)
        recorded = artifact.record
        if artifact.recipe != wanted:
            console.print(f"note: {where} was made by another recipe: {artifact.recipe.describe()}", markup=False)
    check_free(to)
    loaded, protocol = read_task(task, config, recorded)
    console.print(f"recipe    {wanted.describe()}", markup=False)
    with open_runner(console, loaded, protocol) as (runner, watcher):
        made = apply_recipe(runner, wanted, protocol, to, f"{to.resolve().name}: {loaded.name}", watcher.phase)
    show_changes(console, made.rows)
    if recorded:
        console.print(f"\nBeside what {where} records ({recorded.name}):", markup=False)
        show_comparisons(console, compare(recorded.rows, made.rows))
    console.print(f"\nwrote {to}", markup=False)
    console.print("\nNext:")
    option = f"--task {task}" if task else f"--config {config}"
    console.print(f"  paretorch verify {to} {option}", markup=False)
