"""The progress of a study: a live display in a terminal, a line per trial anywhere else.

A candidate has the same number, `#7`, here, on the front and in the commands; next to it is the progress, `8/40`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..objectives.display import duration, show, spread

if TYPE_CHECKING:
    from ..objectives.measurement import Measurement
    from ..results.candidate import Candidate
    from ..results.front import Front
    from ..search.preflight import Preflight

_STYLES = {"ok": "green", "over_budget": "yellow", "stopped": "dim", "failed": "red"}
_STATES = {"ok": "ok", "over_budget": "over", "stopped": "stop", "failed": "failed"}
_RECENT = 8  # trials in the live table


class Watcher:
    """A `Listener` that prints."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None
        self.started = time.monotonic()
        self.current = ""
        self.done, self.total, self.eta = 0, 0, 0.0
        self.front_size = 0
        self.recent: list[tuple[Candidate, bool]] = []
        self.front: Front | None = None

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        """Show the display until the end of the block; lines from `say` remain on the screen."""
        if not self.console.is_terminal:
            yield self
            return
        with Live(
            get_renderable=self._display, console=self.console, refresh_per_second=4, transient=True
        ) as self.live:
            yield self
        self.live = None

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(Text(text))

    def phase(self, text: str) -> None:
        """Show the current activity below the live display."""
        self.current = text

    def checked(self, preflight: Preflight) -> None:
        """Print the network, the baseline, the smallest candidate and the budget after the preflight."""
        from ..runners.targets.catalog import DEFAULT

        structure, small = preflight.structure, preflight.smallest_measured
        layers, groups, blocks = (len(x) for x in (structure.layers, structure.groups, structure.blocks))
        dimensions = sum(len(axis.choices) > 1 for axis in preflight.axes)
        self.say(
            f"network   {layers} layers, {groups} channel groups, {blocks} removable blocks; {dimensions} decisions"
        )
        if preflight.target != DEFAULT:
            how = "latency computed for it" if preflight.computed else "latency and metric measured there"
            self.say(f"target    {preflight.target}: {how}")
        self.say(f"baseline  {numbers(preflight.baseline, None, preflight.metric)}")
        size, latency = (show(name, small.value(name)) for name in ("size_bytes", "latency_ms"))
        self.say(f"smallest  {size}, {latency} ({preflight.smallest.describe()})")
        for line in preflight.limits:
            self.say(f"budget    {line}")
        for warning in preflight.warnings:
            self.console.print(Text(f"warning   {warning}", style="yellow"))

    def finished(self, candidate: Candidate, front: Front, done: int, total: int, eta: float) -> None:
        """Show a finished trial; `eta` is in seconds."""
        self.done, self.total, self.eta, self.front = done, total, eta, front
        self.front_size = len(front.members)
        member = candidate in front.members
        self.recent = [*self.recent, (candidate, member)][-_RECENT:]
        if self.live is None:
            self.console.print(_line(candidate, front, member, done, total, eta))
        else:
            self.live.refresh()

    def _display(self) -> Any:
        parts: list[Any] = []
        if self.recent and self.front:
            table = Table(box=None, padding=(0, 1, 0, 0), width=min(100, self.console.width))
            for name in ("#", "", "quality", "bytes", "latency", "what"):
                table.add_column(
                    name, justify="right" if name == "#" else "left", no_wrap=True, ratio=1 if name == "what" else None
                )
            for candidate, member in self.recent:
                state, *cells = _cells(candidate, self.front, member)
                style = _style(candidate, member)
                table.add_row(str(candidate.number), Text(state, style=style), *(Text(cell) for cell in cells))
            parts.append(table)
        if self.total:
            bar = ProgressBar(total=self.total, completed=self.done, width=24)
            text = Text(
                f" {self.done}/{self.total} trials, {self.front_size} on the front, about {duration(self.eta)} left"
            )
            grid = Table.grid()
            grid.add_row(bar, text)
            parts.append(grid)
        elapsed = duration(time.monotonic() - self.started)
        parts.append(Text(f"{elapsed}  {self.current}"[: self.console.width], style="dim"))
        return Group(*parts)


class Steps:
    """Progress of equal steps: the current one in a terminal, a line every few seconds anywhere else."""

    def __init__(self, watcher: Watcher, every: float = 10.0) -> None:
        self.watcher, self.every = watcher, every
        self.started = self.said = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report that `done` of `total` steps are finished and that `what` is next."""
        now = time.monotonic()
        if done == 0:
            self.started = now
        left = f", about {duration((now - self.started) * (total - done) / done)} left" if done else ""
        self.watcher.phase(f"{done}/{total} {what}{left}")
        if self.watcher.live is None and now - self.said >= self.every:
            self.said = now
            self.watcher.say(f"{done}/{total} {what}{left}")


def numbers(measurement: Measurement, base: Measurement | None, metric: str) -> str:
    """A measurement in one line, with intervals, and relative to the baseline where there is one."""
    quality, size, latency = (measurement.metrics[name] for name in (metric, "size_bytes", "latency_ms"))
    text = f"{metric} {show(metric, quality.value)} {spread(metric, quality)}, {show('size_bytes', size.value)}"
    if base:
        text += f" ({100 * size.value / base.value('size_bytes'):.1f}%)"
    return text + f", {show('latency_ms', latency.value)} {spread('latency_ms', latency)}".rstrip()


def _cells(candidate: Candidate, front: Front, member: bool) -> list[str]:
    """The state, the metric, bytes, latency and description of a candidate."""
    state = "front" if member else _STATES[candidate.state]
    if candidate.measurement is None:
        return [state, "-", "-", "-", candidate.reason.replace("\n", " ")]
    measurement, base = candidate.measurement, front.baseline
    metric = next(n for n in measurement.metrics if not n.endswith("_bytes") and n not in ("macs", "latency_ms"))
    size, latency = measurement.value("size_bytes"), measurement.value("latency_ms")
    return [
        state,
        show(metric, measurement.value(metric)),
        f"{show('size_bytes', size)} {100 * size / base.value('size_bytes'):.0f}%",
        f"{show('latency_ms', latency)} {base.value('latency_ms') / latency:.1f}x",
        (f"{candidate.label}: " if candidate.label else "") + candidate.recipe.describe(),
    ]


def _style(candidate: Candidate, member: bool) -> str:
    return "bold green" if member else _STYLES[candidate.state]


def _line(candidate: Candidate, front: Front, member: bool, done: int, total: int, eta: float) -> Text:
    """A line such as `#7  8/40 front  97.50% 12.3 kB 25%   0.0123 ms 1.4x weights 4 bit`."""
    state, quality, size, latency, what = _cells(candidate, front, member)
    digits = len(str(total))
    head = f"{f'#{candidate.number}':>{digits + 1}} {done:>{digits}}/{total} {state:<6} "
    body = f"{quality:>7} {size:<13} {latency:<14} " if candidate.measurement else ""
    tail = f" (about {duration(eta)} left)" if eta >= 1 else ""
    text = Text(head, style=_style(candidate, member))
    room = max(20, 80 - len(head) - len(body) - len(tail))
    shown = what if len(what) <= room else what[: room - 3] + "..."
    text.append(f"{body}{shown}{tail}", style="default")
    text.no_wrap = True
    return text
