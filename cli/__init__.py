"""The command line: `paretorch search CONFIG.yaml` and the other commands.

Exit codes: 0 done; 2 invalid input (the message names it and says what to do); 3 the search ended without a recipe
inside the budget; 4 the files of an artifact are intact, but its numbers differ when measured again; 130 interrupted.

A command is a plain function in one of the modules of this folder and a line in `_COMMANDS`. Heavy imports are inside
the commands, so that `--help` is fast.
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from ..errors import ParetorchError
from . import analyses, artifacts, studies, templates
from .options import INTERRUPTED

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
# In the order of `--help`: the function, and its line there if that is not the first line of the docstring.
_COMMANDS: dict[str, tuple[Callable[..., None], str | None]] = {
    "search": (studies.search, None),
    "check": (studies.check, "Tell in seconds whether a search will work."),
    "sensitivity": (analyses.sensitivity, "Measure how sensitive each layer is to compression."),
    "schema": (templates.schema, None),
    "init": (templates.init, "Write a commented configuration and task to start from."),
    "front": (studies.front, None),
    "explain": (analyses.explain, "Measure how much each decision of a candidate contributes to its loss."),
    "export": (artifacts.export, "Write one candidate for production."),
    "register": (artifacts.register, "Put one candidate into the MLflow model registry."),
    "verify": (artifacts.verify, "Check an artifact, and measure it again."),
    "apply": (artifacts.apply, "Apply a recipe to a newer checkpoint."),
    "measure": (analyses.measure, "Time an ONNX file, or compare two of them."),
    "retarget": (analyses.retarget, "Measure a front again, on another target."),
    "ui": (studies.ui, "Open a study in the MLflow UI."),
}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="Search bits x sparsity x architecture of a trained network under a real budget.",
)
for _name, (_function, _short_help) in _COMMANDS.items():
    app.command(_name, short_help=_short_help)(_function)
app.command("verify-here", hidden=True)(artifacts.verify_here)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit()


def main() -> None:
    """The entry point: run the command and turn expected errors into messages."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except ParetorchError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno in _FULL:
            _fail(
                f"the disk is full ({error.strerror}{_of(error)}); free some space and run the same command again: "
                "every finished trial is kept"
            )
        if error.errno in _READ_ONLY:
            _fail(
                f"cannot write ({error.strerror}{_of(error)}); make it writable, or choose another folder "
                "(--output, --to, --plot)"
            )
        raise
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _of(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def _fail(message: str, code: int = 2) -> NoReturn:
    sys.stdout.flush()
    print(f"paretorch: {message}", file=sys.stderr)
    sys.exit(code)
