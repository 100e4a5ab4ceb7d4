"""The report as Markdown: `report.md`, which is also the description of the study's MLflow run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from .cells import heading
from .sentences import SENSITIVITY
from .view import View, front_cells

_USING = (
    "`deploy` then holds the ONNX file, the packed weights, the recipe and these measurements. `--pick` also takes "
    'a number from the tables, an objective, or a limit such as `"size_bytes <= 80kB"`. In Python:'
)


def markdown(view: View, folder: Path) -> str:
    """The report as Markdown, for a file in `folder`, next to `front.png`."""
    parts = [f"# {view.name}: what the search found", view.summary, *_baseline(view)]
    parts += ["## Budget", "\n".join(f"- `{line}`" for line in view.budget) or "No limit was set."]
    parts += _front(view) if view.members else _unreachable(view)
    parts += [*_trivial(view), *_lost(view), *_using(view), *_sensitivity(view, folder), *view.notes]
    if view.config:
        parts += ["## Configuration", f"```yaml\n{view.config.rstrip()}\n```"]
    return "\n\n".join([*parts, *_knee(view)]) + "\n"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([row(heads), "|" + " --- |" * len(heads), *(row(line) for line in lines)])


def _baseline(view: View) -> list[str]:
    names = [name for name in view.metrics if name in view.baseline.metrics]
    lines = [[heading(name), view.baseline_cell(name).text] for name in names]
    if view.test_baseline is not None:
        lines.append([f"test {view.quality}", view.test_baseline_cell.text])
    said = "The original model, measured like every candidate. Brackets are 95% intervals."
    return ["## Baseline", said, _table(["metric", "value"], lines)]


def _front(view: View) -> list[str]:
    heads, lines = front_cells(view)
    texts = [[cell.text + (f", {cell.beside}" if cell.beside else "") for cell in line] for line in lines]
    parts = [
        "## The front",
        "No candidate inside the budget beats one of these in every objective.",
        _table(heads, texts),
        "![the front](front.png)",
        "To explore: `front.html`. All candidates with intervals, reasons and recipes: `front.csv`.",
    ]
    if view.certainty:
        parts += ["## How certain this is", "\n".join(f"- {line}" for line in view.certainty)]
    return parts


def _unreachable(view: View) -> list[str]:
    parts = ["## No candidate kept the budget"]
    if not view.nearest:
        return [*parts, "Nothing was measured, and nothing was rejected by its predicted cost: see what failed below."]
    lines = []
    for near in view.nearest:
        quality = near.quality.text if near.quality.value else "not measured"
        keeps = "; ".join(f"`{text}`" for text in near.keeps)
        lines.append([str(near.number), quality, near.what, "; ".join(near.misses), keeps])
    return [
        *parts,
        "These miss it by the least. The last column is the limit that each would keep.",
        _table(["#", view.quality, "what", "misses", "would keep"], lines),
        "![all candidates](front.png)",
    ]


def _trivial(view: View) -> list[str]:
    if not view.trivial:
        return []
    parts = ["## What search adds to the trivial baselines"]
    if view.members:
        shares = f"{view.trivial_volume:.3f} by the trivial baselines alone, {view.hypervolume:.3f} with the search"
        parts.append(f"Share of the space between baseline and ideal that is dominated: {shares}.")
    heads = ["#", "baseline", *map(heading, view.metrics), "verdict"]
    lines = []
    for trivial in view.trivial:
        numbers = [trivial.numbers[name].value or "-" for name in view.metrics]
        lines.append([str(trivial.number), trivial.label, *numbers, trivial.verdict])
    return [*parts, _table(heads, lines)]


def _lost(view: View) -> list[str]:
    """How many candidates were over the budget, and which ones failed and why."""
    parts, outcomes = [], view.outcomes
    if outcomes.over:
        limits = "\n".join(f"- `{limit}`: exceeded by {count}" for limit, count in outcomes.exceeded_by_over)
        rejected = f"{outcomes.rejected} of them rejected by predicted cost before anything was compressed"
        parts += ["## Over the budget", f"{outcomes.over} candidates, {rejected}.\n\n{limits}"]
    reasons: dict[str, list[str]] = {}
    for number, reason in outcomes.failed:
        reasons.setdefault(reason or "no reason given", []).append(f"#{number}")
    if reasons:
        lines = [f"- {_few(numbers)}: {' '.join(why.split())}".replace("<", "&lt;") for why, numbers in reasons.items()]
        parts += ["## Failed", "\n".join(lines)]
    return parts


def _few(numbers: Sequence[str], count: int = 8) -> str:
    more = len(numbers) - count
    return ", ".join(numbers[:count]) + (f" and {more} more" if more > 0 else "")


def _using(view: View) -> list[str]:
    return [
        "## Using it",
        f"```sh\nparetorch export {view.study} --pick {view.pick} --to deploy\n```",
        _USING,
        '```python\nimport paretorch\n\nmodel = paretorch.load("deploy")\n```',
    ]


def _sensitivity(view: View, folder: Path) -> list[str]:
    """The section with the heat map, linked by its path relative to the folder of the report."""
    if view.sensitivity is None:
        return []
    address = quote(os.path.relpath(view.sensitivity, folder))
    return [
        "## Which layers are sensitive",
        f"{SENSITIVITY} The numbers: `sensitivity.csv`.",
        f"![the sensitivity of each layer]({address})",
    ]


def _knee(view: View) -> list[str]:
    """The recipe of the knee, one step per line.

    It comes last, because MLflow shows a page as wide as its widest line and may cut off its end.
    """
    if view.knee is None:
        return []
    recipe = view.knee.recipe
    steps = ",\n".join(json.dumps(step) for step in recipe.to_dict()["steps"])
    body = f'{{"version": {recipe.version}, "steps": [\n{steps}\n]}}'
    return [f"## The recipe of #{view.knee.number}, exactly", f"```json\n{body}\n```"]
