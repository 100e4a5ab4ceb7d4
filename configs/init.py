"""The files that `paretorch init DIR` writes: a commented configuration, a task file, and the schema for editors."""

from __future__ import annotations

import json
import os
import tempfile
from importlib import resources
from pathlib import Path

from ..errors import ConfigError
from .load import json_schema

SCHEMA_FILE = "paretorch.schema.json"


def write_templates(directory: Path) -> list[Path]:
    """Write config.yaml, task.py and the JSON schema into a folder.

    Each file is written completely or not at all. If one cannot be written, the others are removed again.

    Args:
        directory: The folder; it is created where it does not exist.

    Returns:
        The paths of the files.

    Raises:
        ConfigError: One of the files exists already, or the folder cannot be written to.

        >>> [path.name for path in write_templates(Path("my-study"))]  # doctest: +SKIP
        ['config.yaml', 'task.py', 'paretorch.schema.json']
    """
    directory = Path(directory)
    templates = resources.files(__package__) / "templates"
    texts = {
        directory / "config.yaml": (templates / "config.yaml").read_text("utf-8"),
        directory / "task.py": (templates / "task.py").read_text("utf-8"),
        directory / SCHEMA_FILE: json.dumps(json_schema(), indent=2) + "\n",
    }
    present = [path.name for path in texts if path.exists()]
    if present:
        raise ConfigError(
            f"{', '.join(present)}: exists already and is not overwritten; name another folder", str(directory)
        )
    written: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            _write(path, text)
            written.append(path)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise ConfigError(f"cannot be written to: {error.strerror or error}", str(directory)) from error
    return written


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp creates private files
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
