"""The report of a study: the text, the pictures and the tables, each by its own writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...runners.files.atomic import write_whole
from ..front import Front
from .markdown import markdown
from .plots import plots_of
from .tables import csv_text, json_text
from .view import view_of

FILES = ("front.html", "front.png", "front.csv", "front.json", "report.md")


def write_report(
    front: Front,
    directory: Path,
    *,
    name: str,
    config_text: str = "",
    budget_lines: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """Write `front.csv`, `front.json`, `front.png`, `front.html` and `report.md` into a folder.

    All of them are generated before the first is written, and each is replaced atomically.

    Args:
        front: The front to report.
        directory: The folder; it is created where it does not exist.
        name: The study's name, used as the heading of the report.
        config_text: The study's configuration as YAML, shown at the end of the report.
        budget_lines: The limits for people; by default those of `Budget.describe`.
        notes: Further remarks in Markdown, one paragraph each.

    Returns:
        The text of `report.md`.

    Raises:
        OSError: The folder cannot be written.
    """
    # Imported here, because only these two need plotly and matplotlib.
    from .html_page import html_page
    from .png import png_bytes

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    view = view_of(front, name=name, config_text=config_text, budget_lines=budget_lines, notes=notes)
    plots = plots_of(front)
    text = markdown(view, folder)
    contents: dict[str, str | bytes] = {
        "front.csv": csv_text(front.table()),
        "front.json": json_text(view),
        "front.png": png_bytes(view, plots),
        "front.html": html_page(view, plots),
        "report.md": text,
    }
    for file, content in contents.items():
        write_whole(folder / file, content)
    return text
