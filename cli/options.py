"""Arguments and options that several commands share, and the exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NO_FEASIBLE, DIFFERENT, INTERRUPTED = 3, 4, 130

ConfigFile = Annotated[Path, typer.Argument(help="The configuration, a YAML file.", metavar="CONFIG.yaml")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key, such as search.seed=1. Repeatable."),
]
StudyArgument = Annotated[Path, typer.Argument(help="The study's folder, such as studies/digits.", metavar="STUDY")]
Pick = Annotated[
    str,
    typer.Option(
        "--pick",
        help="knee, recommended (the knee, or the cheapest one that the test split cannot tell from it), a candidate's "
        "number, an objective's name, or 'size_bytes <= 80kB'.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Accept a candidate whose file does not compute what was simulated.")
]
TaskFunction = Annotated[
    str | None, typer.Option("--task", metavar="FILE.py:FUNCTION", help="The task: network, data and metric.")
]
TaskConfig = Annotated[
    Path | None, typer.Option("--config", metavar="CONFIG.yaml", help="A configuration that names the task.")
]
