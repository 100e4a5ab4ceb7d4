"""The report for a terminal of 80 columns. It needs neither plotly nor matplotlib."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..candidate import FAILED, STOPPED
from .cells import Cell, heading
from .view import MemberView, View


def front_table(view: View) -> Table:
    """The front as a table; below each number, its spread or its share of the baseline."""
    quality = view.quality
    table = _table()
    for name in view.metrics:
        table.add_column(heading(name), min_width=9, max_width=14, overflow="fold")
    if view.tested:
        head = f"test {quality}" if len(quality) < 9 else "test"
        table.add_column(head, min_width=7, max_width=11, overflow="fold")
    table.add_column("what", ratio=1, overflow="fold", min_width=16)
    cells = [_cell(view.baseline_cell(name)) for name in view.metrics]
    tests = [_cell(view.test_baseline_cell)] if view.tested else []
    table.add_row("-", *cells, *tests, "[dim]the original model[/dim]")
    for member in view.members:
        cells = [_cell(member.numbers[name], beside=name != quality) for name in view.metrics]
        tests = [_cell(member.test)] if view.tested else []
        table.add_row(str(member.candidate.number), *cells, *tests, _what(member))
    return table


def least_violating_table(view: View) -> Table:
    """The candidates that miss the budget by the least, and the limits they would keep."""
    table = _table()
    table.add_column(view.quality, min_width=8, max_width=12, overflow="fold")
    for head in ("misses", "would keep", "what"):
        table.add_column(head, ratio=1, overflow="fold")
    for near in view.nearest:
        texts = ("\n".join(near.misses), "\n".join(near.keeps), near.what)
        table.add_row(str(near.number), near.quality.value or "-", *map(escape, texts))
    return table


def summary(view: View) -> Iterator[Text]:
    """The outcomes of the trials, failures with their reasons, and notes on the members."""
    outcomes = view.outcomes
    stopped = outcomes.states.get(STOPPED, 0)
    by_limit = ", ".join(f"{count} by {limit}" for limit, count in outcomes.exceeded)
    counts = [
        f"{len(view.members)} on the front",
        f"{outcomes.over - outcomes.rejected} measured over the budget",
        f"{outcomes.rejected} rejected by predicted cost",
        *([f"{stopped} stopped early"] if stopped else []),
        f"{outcomes.states.get(FAILED, 0)} failed",
    ]
    over = f" (over: {by_limit})" if by_limit else ""
    yield Text(f"\n{outcomes.total} trials: {', '.join(counts)}{over}")
    for number, reason in outcomes.failed[:5]:
        yield Text(f"  #{number} failed: {(reason.splitlines() or [''])[0]}", style="red")
    for line in (*view.clusters, *([view.optimism] if view.optimism else [])):
        yield Text(line)
    for line in view.warnings:
        yield Text(line, style="yellow")


def _table() -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", width=80)
    table.add_column("#", justify="right", style="bold", no_wrap=True, min_width=3)
    return table


def _cell(cell: Cell, beside: bool = True) -> str:
    if not cell.value:
        return "-"
    compared = cell.beside if beside else ""
    under = "\n".join(text for text in (cell.spread, compared.removesuffix(" of baseline")) if text)
    style = "yellow" if compared.endswith("slower") else "dim"
    return f"{cell.value}\n[{style}]{under}[/{style}]"


def _what(member: MemberView) -> str:
    """The recipe with the member's label and marks; recipe and label are escaped for rich."""
    text = escape(member.what)
    if member.candidate.label:
        text += f" [dim]({escape(member.candidate.label)})[/dim]"
    return text + (f" [bold]({', '.join(member.marks)})[/bold]" if member.marks else "")
