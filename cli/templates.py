"""Commands to get started: the schema for editors, and a configuration and task to edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from ..configs.load import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; nothing there is overwritten.")],
) -> None:
    """Write a commented configuration and task that run as they are and are meant to be edited."""
    from ..configs.init import write_templates

    for path in write_templates(directory):
        typer.echo(f"wrote {path}")
    typer.echo(f"\nNext:\n  paretorch search {directory / 'config.yaml'}")
