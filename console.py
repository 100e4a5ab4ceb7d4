"""What a person sees while a study runs: a live display in a terminal, a line per trial anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .objectives.display import duration

if TYPE_CHECKING:
    from .objectives.measurement import Estimate, Measurement
    from .results.candidate import Candidate
    from .results.front import Front
    from .search.preflight import Preflight
    from .search.study import Study

_STYLES = {"ok": "green", "over_budget": "yellow", "stopped": "dim", "failed": "red"}
_RECENT = 8  # trials in the live table


class Watcher:
    """A `Listener` for people."""

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
        """Show the display until the end of the block; what was said stays on the screen."""
        if not self.console.is_terminal:
            yield self
            return
        with Live(
            get_renderable=self._display, console=self.console, refresh_per_second=4, transient=True
        ) as self.live:
            yield self
        self.live = None

    def say(self, text: str) -> None:
        self.console.print(Text(text))

    def phase(self, text: str) -> None:
        self.current = text

    def report(self, phase: str, metrics: Mapping[str, Estimate]) -> None:
        """What a runner is doing; its numbers are shown when it is done."""
        self.phase(phase)

    def checked(self, found: Preflight, study: Study) -> None:
        from .objectives.display import show
        from .runners.targets.catalog import DEFAULT

        base = found.baseline
        small = found.smallest_measured
        layers, groups, blocks = (
            len(x) for x in (found.structure.layers, found.structure.groups, found.structure.blocks)
        )
        dimensions = sum(len(axis.choices) > 1 for axis in found.axes)
        self.say(
            f"network   {layers} layers, {groups} channel groups, {blocks} removable blocks; {dimensions} decisions"
        )
        if study.target.name != DEFAULT:
            self.say(
                f"target    {study.target.name}: latency {'computed for it' if study.target.milliseconds else 'and metric measured there'}"
            )
        self.say(f"baseline  {numbers(base, None, study.task.metric_name)}")
        self.say(f"smallest  {show('size_bytes', small.value('size_bytes'))}, {show('latency_ms', small.value('latency_ms'))} "
                 f"({found.smallest.describe()})")  # fmt: skip
        base_values = base.values
        for line in study.budget.describe(base_values):
            self.say(f"budget    {line}")
        for warning in found.warnings:
            self.console.print(Text(f"warning   {warning}", style="yellow"))

    def finished(self, candidate: Candidate, front: Front, done: int, total: int, eta: float) -> None:
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
                table.add_row(*_cells(candidate, self.front, member))
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
    """Progress of equal steps: the current one in a terminal, now and then a line anywhere else."""

    def __init__(self, watcher: Watcher, every: float = 10.0) -> None:
        self.watcher, self.every = watcher, every
        self.started = self.said = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        """`done` steps of `total` are behind, `what` comes next."""
        now = time.monotonic()
        if done == 0:
            self.started = now
        left = f", about {duration((now - self.started) * (total - done) / done)} left" if done else ""
        self.watcher.phase(f"{done}/{total} {what}{left}")
        if self.watcher.live is None and now - self.said >= self.every:
            self.said = now
            self.watcher.say(f"{done}/{total} {what}{left}")


def numbers(measurement: Measurement, base: Measurement | None, metric: str) -> str:
    """A measurement in one line, with spreads, and against the baseline where there is one."""
    from .objectives.display import show, spread

    quality, size, latency = (measurement.metrics[name] for name in (metric, "size_bytes", "latency_ms"))
    text = f"{metric} {show(metric, quality.value)} {spread(metric, quality)}, {show('size_bytes', size.value)}"
    if base:
        text += f" ({100 * size.value / base.value('size_bytes'):.1f}%)"
    return text + f", {show('latency_ms', latency.value)} {spread('latency_ms', latency)}".rstrip()


def _cells(candidate: Candidate, front: Front, member: bool) -> list[Any]:
    from .objectives.display import show

    state = Text(
        {"ok": "front" if member else "ok", "over_budget": "over", "stopped": "stop", "failed": "failed"}[
            candidate.state
        ]
    )
    state.stylize("bold green" if member else _STYLES[candidate.state])
    what = (f"{candidate.label}: " if candidate.label else "") + candidate.recipe.describe()
    if candidate.measurement is None:
        return [str(candidate.number), state, "-", "-", "-", Text(candidate.reason.replace("\n", " "))]
    metric = next(
        n for n in candidate.measurement.metrics if not n.endswith("_bytes") and n not in ("macs", "latency_ms")
    )
    size, latency = candidate.measurement.value("size_bytes"), candidate.measurement.value("latency_ms")
    faster = front.baseline.value("latency_ms") / latency
    return [
        str(candidate.number),
        state,
        show(metric, candidate.measurement.value(metric)),
        f"{show('size_bytes', size)} {100 * size / front.baseline.value('size_bytes'):.0f}%",
        f"{show('latency_ms', latency)} {faster:.1f}x",
        Text(what),
    ]


def _line(candidate: Candidate, front: Front, member: bool, done: int, total: int, eta: float) -> Text:
    _number, state, quality, size, latency, what = _cells(candidate, front, member)
    head = f"{done:>{len(str(total))}}/{total} {state!s:<6} "
    body = f"{quality:>7} {size:<13} {latency:<14} " if candidate.measurement else ""
    tail = f" (about {duration(eta)} left)" if eta >= 1 else ""
    text = Text(head, style="bold green" if member else _STYLES[candidate.state])
    room = max(20, 80 - len(head) - len(body) - len(tail))
    shown = str(what)
    text.append(f"{body}{shown if len(shown) <= room else shown[: room - 3] + '...'}{tail}", style="default")
    text.no_wrap = True
    return text
