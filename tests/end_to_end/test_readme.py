"""What the README shows is run: a claim that breaks breaks a test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for kind, text in fences if kind == language]


def test_bring_your_own_model_runs_as_it_is_shown(tmp_path: Path) -> None:
    program = next(block for block in blocks("python") if "paretorch.Study" in block)
    quick = program.replace("trials=20", "trials=9") + (
        "\nn = (module(x[1400:]).argmax(1) == y[1400:]).float().mean().item()\nassert n > 0.8, n\n"
    )
    assert quick.count("trials=9") == 1
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", quick], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "deploy" / "model.onnx").exists()


def test_it_is_about_twenty_lines_long() -> None:
    program = next(block for block in blocks("python") if "paretorch.Study" in block)
    assert len([line for line in program.splitlines() if line.strip()]) <= 25


def test_every_command_it_names_exists() -> None:
    from typer.testing import CliRunner

    from paretorch.cli import app

    named = set(re.findall(r"^\s*paretorch (\w+)", "\n".join(blocks("")), re.MULTILINE))
    assert named >= {"init", "check", "search", "ui", "export"}
    for command in sorted(named):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_every_link_and_picture_is_there(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()] == []
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", "\n".join(blocks("")), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_configuration_is_valid(path: Path) -> None:
    from paretorch.configs.load import load

    assert load(path).budget
