"""Commands for a study: check a configuration, search, show the front, open the MLflow UI."""

from __future__ import annotations

import json
import os
import time as clock
from pathlib import Path
from typing import Annotated

import typer

from .options import INTERRUPTED, NO_FEASIBLE, ConfigFile, Overrides, StudyArgument
from .prepare import make_console, make_study


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
    """Search, or resume an interrupted search. Checks first that everything works and the budget can be kept."""
    from ..configs.load import load
    from .show import show_front
    from .watcher import Watcher

    given = {"search.trials": trials, "search.time": time, "output": str(output.absolute()) if output else None}
    # As overrides they are checked like all others and stored with the study.
    options = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    if time and not trials:  # the configuration's number of trials must not end the search before the given time
        options.append("search.trials=null")
    loaded = load(config, [*set_, *options])
    console = make_console()
    watcher = Watcher(console)
    study = None
    try:
        with watcher.watching():
            study = make_study(loaded, watcher)
            # The time limit counts from the start of the process.
            limit = loaded.search.time and max(1e-3, loaded.search.time - _age())
            front = study.run(loaded.search.trials, limit)
    except KeyboardInterrupt:
        done = len(study.candidates) if study else 0
        if study and done:
            show_front(console, study.front, study.folder.root)
        console.print(f"\nInterrupted after {done} trials; nothing is lost. The same command goes on.")
        raise typer.Exit(INTERRUPTED) from None
    show_front(console, front, study.folder.root)
    if not front.members:
        raise typer.Exit(NO_FEASIBLE)


def _age() -> float:
    """Seconds since this process started (proc(5): field 22 of stat, in clock ticks since boot)."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return clock.clock_gettime(clock.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def check(config: ConfigFile, set_: Overrides = []) -> None:  # noqa: B006  (typer never changes it)
    """Check in seconds whether a search will work: trace, compress every kind of layer, export, reload, measure."""
    from ..configs.load import load
    from .show import show_layers
    from .watcher import Watcher

    console = make_console()
    watcher = Watcher(console)
    with watcher.watching():
        preflight = make_study(load(config, set_), watcher).check()
    show_layers(console, preflight)
    console.print("\nThe search can start: [bold]paretorch search[/bold] " + str(config))


def front(
    study: StudyArgument,
    csv: Annotated[bool, typer.Option("--csv", help="Print all candidates as CSV.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write the report (front.html, front.png, ...) to this folder.")
    ] = None,
) -> None:
    """Print a study's front again, also while it runs."""
    from ..results.front import open_front
    from ..results.report.write import write_report
    from .show import show_front

    saved = open_front(study)
    if csv:
        typer.echo(saved.table().to_csv(index=False), nl=False)
        return
    show_front(make_console(), saved, study)
    if plot is not None:
        write_report(saved, plot, name=study.resolve().name)
        typer.echo(f"wrote {plot}/front.html, front.png, front.csv, front.json, report.md")


def ui(
    study: StudyArgument,
    port: Annotated[int, typer.Option("--port", help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open a study in the MLflow UI, reachable from this machine only."""
    from ..errors import StudyError
    from ..results.folder import StudyFolder
    from ..results.tracking.charts import page
    from ..results.tracking.server import serve
    from ..results.tracking.store import local_store, saved_uri

    StudyFolder(study).read_about()
    uri = saved_uri(study)
    if uri is None:
        raise StudyError(
            f"the study in {study} has no MLflow run yet; the same search brings it there: paretorch search CONFIG.yaml"
        )
    root = local_store(study.absolute())[1] if uri.startswith("sqlite") else None
    raise typer.Exit(serve(uri, root, port, page(study)))
