"""`paretorch init`: files that run as they are, and that never replace anything."""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from paretorch import ConfigError
from paretorch.configs.init import write_templates
from paretorch.configs.load import json_schema, load, parse
from paretorch.configs.plugins import load_task
from paretorch.runners.task import batches, score

NAMES = ["config.yaml", "task.py", "paretorch.schema.json"]


def test_the_templates_run_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # what `load_task` adds to it is taken off again
    folder = tmp_path / "new" / "study"
    assert write_templates(folder) == [folder / name for name in NAMES]
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(NAMES), "no temporary file stays"
    config = load(folder / "config.yaml")
    assert config.budget == ("size_bytes <= 30%", "accuracy >= -2%")
    with torch.random.fork_rng(devices=[]):
        task = load_task(config)
        net = task.model()
    with torch.no_grad():
        found = score(task, ((net(x), y) for x, y in batches(task, "validation")))
    assert found.value > 0.95
    assert task.model() is not net


def test_the_template_explains_every_key(tmp_path):
    write_templates(tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=./paretorch.schema.json"
    schema = json.loads((tmp_path / "paretorch.schema.json").read_text())
    assert schema == json_schema()
    for model in (schema, *schema["$defs"].values()):
        for key in model["properties"]:
            assert f"{key}:" in text, f"{key} is not in the template"


def test_what_the_template_comments_out_is_valid(tmp_path):
    """Each block that is uncommented on its own gives a valid configuration."""
    write_templates(tmp_path)
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    for block in ("# task:", "# space:", "# mlflow:", "# output:"):
        start = next(number for number, line in enumerate(lines) if line.startswith(block))
        end = next((n for n in range(start + 1, len(lines)) if not lines[n].startswith("#   ")), len(lines))
        found = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines[start:end]))
        parse({"task": "task.py:task"} | found)


def test_an_existing_file_is_not_replaced(tmp_path):
    (tmp_path / "task.py").write_text("mine")
    with pytest.raises(ConfigError, match=r"task\.py: exists already and is not overwritten; name another folder"):
        write_templates(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["task.py"]
    assert (tmp_path / "task.py").read_text() == "mine"


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        write_templates(tmp_path / "taken")


def test_a_read_only_folder(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # The operating system's refusal: a folder's mode would not do where the tests run as root.
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(ConfigError, match="cannot be written to: Permission denied"):
        write_templates(tmp_path / "study")


def test_nothing_half_written_stays_on_a_full_disk(tmp_path, monkeypatch):
    replace = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).name == NAMES[-1]:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)  # the operating system's, on a full disk
    with pytest.raises(ConfigError, match="cannot be written to: No space left on device"):
        write_templates(tmp_path)
    assert not list(tmp_path.iterdir())
