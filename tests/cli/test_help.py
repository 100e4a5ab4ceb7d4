"""What the help names is there: the targets, and each command under its name."""

import pytest
from typer.testing import CliRunner

from paretorch.cli import _COMMANDS, app
from paretorch.runners.targets.catalog import TARGETS


def help_of(*command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    return result.output


def test_the_help_of_retarget_names_every_target():
    assert f"{', '.join(TARGETS)}, or a profile's .yaml." in " ".join(help_of("retarget").split())


@pytest.mark.parametrize("name", _COMMANDS)
def test_each_command_is_listed(name):
    lines = [line.split() for line in help_of().partition("Commands:")[2].splitlines() if line.strip()]
    assert name in [line[0] for line in lines]
    assert "verify-here" not in [line[0] for line in lines]
    assert help_of(name).startswith("Usage: ")
