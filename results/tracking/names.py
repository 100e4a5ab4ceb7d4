"""Names and texts in the form that MLflow accepts: it cuts long texts and refuses long keys and some characters."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"  # tags
TAG_LENGTH, PARAM_LENGTH, KEY_LENGTH = 8000, 6000, 250  # characters


def accepted_name(text: str) -> str:
    """A text as the name of a param, metric or tag."""
    name = re.sub(r"[^A-Za-z0-9_./ :-]", "_", text).strip()[:KEY_LENGTH] or "_"
    # MLflow also refuses a name that a path would be normalised to something else, or that leads out of its folder.
    if posixpath.normpath(name) != name or name.startswith((".", "/")):
        name = "_" + name.replace("/", "_")[: KEY_LENGTH - 1]
    return name


def accepted(named: Mapping[str, T]) -> dict[str, T]:
    """The same values under names that MLflow accepts, all of them different."""
    out: dict[str, T] = {}
    for text, value in named.items():
        name, tries = accepted_name(text), 1
        while name in out:
            tries += 1
            name = f"{accepted_name(text)[: KEY_LENGTH - 8]}_{tries}"
        out[name] = value
    return out


def description(markdown: str) -> str:
    """A report as a run's description: without pictures, and short enough.

    A text that is too long ends between two lines and outside a block of code.
    """
    # A picture by its relative path means nothing in a run's description.
    text = re.sub(r"^!\[[^\n]*\n+", "", markdown, flags=re.MULTILINE)
    if len(text) <= TAG_LENGTH:
        return text
    end = "\n\n(The rest is in report.md.)"
    room = TAG_LENGTH - len(end) - 8
    kept = text[:room].rpartition("\n")[0] or text[:room]
    fence = "\n```" if kept.count("```") % 2 else ""
    return kept + fence + end
