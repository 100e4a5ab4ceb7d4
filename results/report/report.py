"""What a study found, for people: tables, pictures and one page that explains them.

Every number stands with its 95% interval, and a difference inside the intervals is called none. `report.md` is the text,
`front.png` the picture for a README, `front.html` the same to explore (one file, works offline), `front.csv` and
`front.json` the numbers. Plotting libraries are imported when they are needed.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ...objectives.display import against as _against
from ...objectives.display import show
from ...objectives.display import spread as _spread
from ...objectives.measurement import Estimate, flat
from ...objectives.objective import COSTS, Limit
from ...objectives.pareto import hypervolume, nondominated
from ...search.finalists import described_clusters, optimism, parity_failure
from ...spaces.recipe import Recipe
from ..candidate import FAILED, OK, OVER_BUDGET, STOPPED, Candidate
from ..front import Front

if TYPE_CHECKING:
    from rich.table import Table

_Cell = tuple[str, str, str]

FILES = ("front.html", "front.png", "front.csv", "front.json", "report.md")
_NAMES = {"size_bytes": "size", "zstd_bytes": "size, zstd", "latency_ms": "latency", "macs": "MACs"}
# What a point on a plot is: legend, colour, plotly's and matplotlib's marker.
_ROLES = {
    "other": ("candidate", "#9aa5b1", "circle", "o"),
    OVER_BUDGET: ("over budget", "#d1495b", "circle-open", "o"),
    "trivial": ("trivial baseline", "#e09f3e", "diamond", "D"),
    "front": ("front", "#0b6e99", "circle", "o"),
    "baseline": ("untouched network", "#1f2933", "star", "*"),
}


def write_report(
    front: Front,
    directory: Path,
    *,
    name: str,
    config_text: str = "",
    budget_lines: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """Write `front.csv`, `front.json`, `front.png`, `front.html` and `report.md` into a folder; returns the markdown.

    `budget_lines` describe the limits (default: the front's own), `notes` are further remarks, a paragraph each. Every
    file is replaced whole or not at all.

    Raises OSError when the folder cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    budget = list(budget_lines) or front.budget.describe(_values(front))
    notes = [*_sensitivity(front, folder), *notes]
    text = _markdown(front, name, config_text, budget, notes)
    write_whole(folder / "front.csv", _csv(front).encode())
    write_whole(folder / "front.json", json.dumps(_json(front, name, budget), indent=1).encode())
    write_whole(folder / "front.png", _png(front, name))
    write_whole(folder / "front.html", _html(front, name, budget).encode())
    write_whole(folder / "report.md", text.encode())
    return text


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a full disk or a kill leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what a kill of `write_whole` has left anywhere in a folder."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


# ---- numbers in words ------------------------------------------------------------------------------------------------


def _costs(front: Front) -> list[str]:
    """The costs that were measured, other than the metric itself; MACs only where nothing else says what it costs."""
    quality = front.quality
    known = [name for name in ("size_bytes", "latency_ms") if name in front.baseline.metrics and name != quality]
    wanted = [o.metric for o in front.objectives if o.metric in COSTS] + [x.metric for x in front.budget.limits]
    if "macs" in front.baseline.metrics and quality != "macs" and ("macs" in wanted or not known):
        known.append("macs")
    return known


def _values(front: Front) -> dict[str, float]:
    return {name: metric.value for name, metric in front.baseline.metrics.items()}


def _interval(name: str, metric: Estimate) -> str:
    if metric.low == metric.high:
        return show(name, metric.value)
    return f"{show(name, metric.value)} [{show(name, metric.low)}, {show(name, metric.high)}]"


def _metric(candidate: Candidate, name: str) -> Estimate | None:
    return candidate.measurement.metrics.get(name) if candidate.measurement else None


def needed(limit: Limit, value: float, baseline: float) -> str:
    """The limit, written in its own kind, that this value would just keep.

    >>> needed(Limit.parse("size_bytes <= 25%"), 273.0, 1000.0), needed(Limit.parse("accuracy >= -1%"), 0.93, 0.95)
    ('size_bytes <= 27.3%', 'accuracy >= -2%')
    """
    unit, scale = "", 1.0
    if limit.kind == "share":
        amount, unit = 100 * value / baseline, "%"
    elif limit.kind == "difference":
        amount, unit = 100 * ((value / baseline - 1) if limit.metric in COSTS else value - baseline), "%"
    elif limit.metric == "size_bytes":
        unit, scale = next(((u, s) for u, s in (("MB", 1e6), ("kB", 1e3)) if value >= s), ("B", 1.0))
        amount = value / scale
    else:
        amount = value
    # Rounded to the side that keeps the value inside: three digits and as many steps more as rounding errors ask for.
    digits = 2 - math.floor(math.log10(abs(amount))) if amount else 2
    toward: Callable[[float], int] = math.ceil if limit.upper else math.floor
    start = toward(round(amount * 10**digits, 6))
    for step in range(4):
        number = (start + (step if limit.upper else -step)) / 10**digits
        sign = "+" if limit.kind == "difference" and number >= 0 else ""
        text = f"{limit.metric} {'<=' if limit.upper else '>='} {sign}{number:.15g}{unit}"
        if Limit.parse(text).excess(value, baseline) <= 0:
            return text
    return f"{limit.metric} {'<=' if limit.upper else '>='} {value!r}"


def _misses(front: Front, candidate: Candidate) -> list[tuple[str, str]]:
    """Each limit that a candidate exceeds: by how much, and what it would have to be."""
    out = []
    for limit in front.budget.limits:
        excess = candidate.excess.get(limit.text, 0.0)
        if excess > 0:
            base = front.baseline.value(limit.metric)
            bound = limit.resolve(base)
            # A recipe refused by arithmetic was never measured, but its excess tells the predicted number.
            value = bound + (excess if limit.upper else -excess) * (abs(bound) or 1.0)
            word = "over" if limit.upper else "under"
            out.append((f"{show(limit.metric, value)}, {100 * excess:.3g}% {word} {limit.text}", needed(limit, value, base)))  # fmt: skip
    return out


def _nearest(front: Front, count: int) -> list[Candidate]:
    """The candidates over the budget that miss it by the least; predicted ones where none was measured."""
    over = [c for c in front.candidates if c.state == OVER_BUDGET and c.excess]
    return front.least_violating(count) or sorted(over, key=lambda c: (c.violation, c.number))[:count]


def _of(front: Front, member: Candidate, name: str) -> Estimate | None:
    """The number that counts: a finalist's latency is that of the clean process."""
    found = _metric(member, name)
    return member.test.get(name, found) if name == "latency_ms" else found


def _beside(front: Front, member: Candidate, name: str) -> str:
    """A member's number beside the baseline's: `14% of baseline`, `2.1x faster`."""
    metric = _metric(member, name)
    if name == "latency_ms" and (pair := front.latency(member)):
        return _against(name, *pair)
    return _against(name, metric, front.baseline.metrics[name]) if metric and name in front.baseline.metrics else ""


def marks(front: Front, member: Candidate) -> list[str]:
    """What a table says of a member behind its recipe: `knee`, `recommended`, `like #3`, `not what was simulated`."""
    said = ["knee"] if member.number == front.knee().number else []
    cluster = list(front.clusters.values())
    head = front.clusters.get(member.number)
    if head == member.number and cluster.count(head) > 1:
        said.append("recommended")
    elif head not in (None, member.number):
        said.append(f"like #{head}")
    return [*said, *(["not what was simulated"] if parity_failure(member) else [])]


def preferred(front: Front) -> str:
    """What to pick by default: the knee, or what stands for it where the test split has been looked at."""
    return "recommended" if front.clusters else "knee"


def warned(front: Front) -> list[str]:
    """What one should know before a member is taken: which are slower than the baseline, whose file is another network."""
    slower = [f"#{m.number}" for m in front.members if front.speed(m) == "slower"]
    said = [f"Slower than the untouched network: {', '.join(slower)}"] if slower else []
    return said + [f"#{m.number} is not what was simulated: {why}" for m in front.members if (why := parity_failure(m))]


def hypervolume_curve(front: Front) -> list[float]:
    """The front's hypervolume after each candidate, in the order of `front.candidates`."""
    best: list[list[float]] = []
    volume, curve = 0.0, []
    for candidate in front.candidates:
        if candidate.state == OK and candidate.measurement is not None:
            point = front.losses(candidate)
            if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in best):
                best.append(point)
                best = [p for p, keep in zip(best, nondominated(best), strict=True) if keep]
                volume = hypervolume(best, [1.0] * len(front.objectives))
        curve.append(volume)
    return curve


def rows(front: Front) -> list[dict[str, Any]]:
    """The front's members as plain data, a row each, the smallest first."""
    out = []
    for member in front.members:
        row: dict[str, Any] = {"number": member.number}
        for name in (front.quality, *_costs(front)):
            metric = _metric(member, name)
            if metric is None:
                continue
            row |= flat({name: metric})
            row[f"{name} against baseline"] = _beside(front, member, name)
        row |= {f"test_{name}": value for name, value in flat(member.test).items()}
        row |= front.verdicts(member)
        row["what"] = member.recipe.describe()
        row["label"] = member.label
        out.append(row)
    return out


def _csv(front: Front) -> str:
    """All candidates, the front's members first."""
    table = front.table()
    if len(table):
        table = table.sort_values("front", ascending=False, kind="stable")
    return str(table.to_csv(index=False))


def _json(front: Front, name: str, budget: Sequence[str]) -> dict[str, Any]:
    states = Counter(c.state for c in front.candidates)
    return {
        "name": name,
        "objectives": [f"{'max' if o.maximize else 'min'} {o.metric}" for o in front.objectives],
        "budget": [{"limit": limit.text, "metric": limit.metric, "upper": limit.upper,
                    "value": limit.resolve(front.baseline.value(limit.metric))} for limit in front.budget.limits],
        "budget_lines": list(budget),
        "baseline": front.baseline.to_dict(),
        "test_baseline": vars(front.test_baseline) if front.test_baseline else None,
        "candidates": dict(states),
        "hypervolume": front.hypervolume(),
        "knee": front.knee().number if front.members else None,
        "recommended": front.recommended().number if front.members else None,
        "members": [member.to_dict() | front.verdicts(member) for member in front.members],
    }  # fmt: skip


# ---- the terminal ----------------------------------------------------------------------------------------------------


def front_table(front: Front) -> Table:
    """The front for a terminal of 80 columns: each number over its spread or its share of the baseline."""
    from rich.table import Table

    quality, costs = front.quality, _costs(front)
    tested = any(quality in member.test for member in front.members)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", title_justify="left", width=80)
    table.add_column("#", justify="right", style="bold", no_wrap=True, min_width=3)
    for name in (quality, *costs):
        table.add_column(_NAMES.get(name, name), min_width=9, max_width=14, overflow="fold")
    if tested:
        table.add_column(f"test {quality}" if len(quality) < 9 else "test", min_width=7, max_width=11, overflow="fold")
    table.add_column("what", ratio=1, overflow="fold", min_width=16)

    def cell(name: str, metric: Estimate | None, beside: str = "") -> str:
        if metric is None:
            return "-"
        under = "\n".join(text for text in (_spread(name, metric), beside.removesuffix(" of baseline")) if text)
        under = f"[yellow]{under}[/yellow]" if beside.endswith("slower") else f"[dim]{under}[/dim]"
        return f"{show(name, metric.value)}\n{under}"

    base = front.baseline.metrics
    cells = [cell(name, base.get(name)) for name in (quality, *costs)]
    tests = [cell(quality, front.test_baseline)] if tested else []
    table.add_row("-", *cells, *tests, "[dim]the untouched network[/dim]")
    for member in front.members:
        cells = [cell(quality, _metric(member, quality))]
        cells += [cell(name, _of(front, member, name), _beside(front, member, name)) for name in costs]
        tests = [cell(quality, member.test.get(quality), _difference(front, member))] if tested else []
        what = _plain(member.recipe.describe()) + (f" [dim]({_plain(member.label)})[/dim]" if member.label else "")
        said = ", ".join(marks(front, member))
        table.add_row(str(member.number), *cells, *tests, what + (f" [bold]({said})[/bold]" if said else ""))
    return table


def _difference(front: Front, member: Candidate) -> str:
    """The paired difference to the baseline on the test split: `-0.56 ±1.20`, in points for an accuracy."""
    found = member.test.get(f"{front.quality}_difference")
    if found is None:
        return ""
    name = f"{front.quality}_difference"
    return f"{show(name, found.value).removesuffix(' points')} {_spread(name, found)}".rstrip()


def least_violating_table(front: Front, count: int = 3) -> Table:
    """For a terminal of 80 columns: the candidates that miss the budget by the least, and the limits they would keep."""
    from rich.table import Table

    quality = front.quality
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", width=80)
    table.add_column("#", justify="right", style="bold", no_wrap=True, min_width=3)
    table.add_column(quality, min_width=8, max_width=12, overflow="fold")
    table.add_column("misses", ratio=1, overflow="fold")
    table.add_column("would keep", ratio=1, overflow="fold")
    table.add_column("what", ratio=1, overflow="fold")
    for candidate in _nearest(front, count):
        metric = _metric(candidate, quality)
        misses = _misses(front, candidate)
        table.add_row(
            str(candidate.number), show(quality, metric.value) if metric else "-",
            _plain("\n".join(text for text, _ in misses)), _plain("\n".join(text for _, text in misses)),
            _plain(candidate.recipe.describe()),
        )  # fmt: skip
    return table


def _plain(text: str) -> str:
    """A text in which rich finds no markup."""
    from rich.markup import escape

    return escape(text)


# ---- the text --------------------------------------------------------------------------------------------------------


def _cells(front: Front) -> tuple[list[str], list[list[_Cell]]]:
    """Heads and cells of the front's table, for markdown and HTML: value, interval, against the baseline."""
    quality, costs = front.quality, _costs(front)
    names = [name for name in (quality, *costs) if name in front.baseline.metrics]
    if "zstd_bytes" in front.baseline.metrics:
        names.insert(names.index("size_bytes") + 1 if "size_bytes" in names else len(names), "zstd_bytes")
    tested = any(quality in member.test for member in front.members)
    heads = ["#", *(_NAMES.get(name, name) for name in names), *([f"test {quality}"] if tested else []), "what"]
    out = []
    for member in front.members:
        line = [(str(member.number), "", "")]
        for name in names:
            line.append((*_both(name, _of(front, member, name)), _beside(front, member, name)))
        if tested:
            beside = f"{found} against the baseline" if (found := _difference(front, member)) else ""
            line.append((*_both(quality, member.test.get(quality)), beside))
        said = ", ".join([member.label] * bool(member.label) + marks(front, member))
        out.append([*line, (member.recipe.describe() + (f" ({said})" if said else ""), "", "")])
    return heads, out


def _both(name: str, metric: Estimate | None) -> tuple[str, str]:
    """The value and its interval, apart."""
    value, _, interval = (_interval(name, metric) if metric else "-").partition(" [")
    return value, f"[{interval}" if interval else ""


def _joined(cell: _Cell) -> str:
    value, interval, against = cell
    return f"{value} {interval}".rstrip() + (f", {against}" if against else "")


def _markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([row(heads), "|" + " --- |" * len(heads), *(row(line) for line in lines)])


def _study(front: Front) -> str:
    """The study's folder as one would type it here."""
    if front.directory is None:
        return "STUDY"
    path = front.directory.resolve()
    short = os.path.relpath(path)
    return shlex.quote(str(path) if short.startswith("..") else short)


def _summary(front: Front) -> str:
    """One sentence: the knee against the baseline, or that there is none."""
    count = Counter(c.state for c in front.candidates)
    tried = f"{len(front.candidates)} candidates: {count[OK]} inside the budget, {count[OVER_BUDGET]} over it, {count[FAILED]} failed."
    if count[STOPPED]:
        tried = f"{tried[:-1]}, {count[STOPPED]} given up early as beyond doubt worse."
    if not front.members:
        return f"{tried} **No candidate kept the budget.**"
    knee, quality = front.knee(), front.quality
    said = []
    for name in (quality, *_costs(front)):
        if metric := _of(front, knee, name):
            said.append(f"{_NAMES.get(name, name)} {show(name, metric.value)} ({_beside(front, knee, name)})")
    return f"{tried} The knee of the front is **#{knee.number}: {', '.join(said)}**."


def _trivial(front: Front) -> list[Candidate]:
    return [c for c in front.candidates if c.label and c.recipe != Recipe()]


def _beaten(front: Front, trivial: Candidate) -> str:
    """What the search has to say against a trivial baseline."""
    if trivial.measurement is None or trivial.state != OK:
        return trivial.reason or trivial.state.replace("_", " ")
    if trivial.number in {member.number for member in front.members}:
        return "on the front: search found nothing better in every objective"
    mine = front.losses(trivial)
    better = [m for m in front.members if all(a <= b for a, b in zip(front.losses(m), mine, strict=True))]
    if not better:
        return "as good as a member of the front"
    best = min(better, key=lambda m: sum(front.losses(m)))
    gains = []
    for objective in front.objectives:
        ours, theirs = best.measurement.metrics[objective.metric], trivial.measurement.metrics[objective.metric]  # type: ignore[union-attr]
        if ours.value == theirs.value:
            continue
        gain = f"{100 * (ours.value / theirs.value - 1):+.0f}%" if objective.metric in COSTS and theirs.value else _against(objective.metric, ours, theirs)  # fmt: skip
        noise = "" if ours.low > theirs.high or ours.high < theirs.low else " (within the intervals)"
        gains.append(f"{_NAMES.get(objective.metric, objective.metric)} {gain}{noise}")
    return f"beaten by #{best.number}" + (f": {', '.join(gains)}" if gains else "")


def _markdown(front: Front, name: str, config: str, budget: Sequence[str], notes: Sequence[str]) -> str:
    quality, base = front.quality, front.baseline.metrics
    parts = [f"# {name}: what the search found", _summary(front)]
    parts += ["## Baseline", "The untouched network, measured like every candidate. Brackets are 95% intervals."]
    lines = [[_NAMES.get(n, n), _interval(n, base[n])] for n in (quality, *_costs(front)) if n in base]
    if front.test_baseline is not None:
        lines.append([f"test {quality}", _interval(quality, front.test_baseline)])
    parts.append(_markdown_table(["metric", "value"], lines))
    parts += ["## Budget", "\n".join(f"- `{line}`" for line in budget) or "No limit was set."]

    if front.members:
        heads, table = _cells(front)
        parts += ["## The front", "No candidate inside the budget beats one of these in every objective.",
                  _markdown_table(heads, [[_joined(cell) for cell in line] for line in table]), "![the front](front.png)",
                  "To explore: `front.html`. All candidates with intervals, reasons and recipes: `front.csv`."]  # fmt: skip
        parts += _certainty(front)
    else:
        parts += _unreachable(front)
    if trivial := _trivial(front):
        alone = replace(front, candidates=tuple(trivial)).hypervolume()
        parts += ["## What search adds to the trivial baselines"]
        if front.members:
            parts.append(f"Share of the space between baseline and ideal that is dominated: {alone:.3f} by the trivial "
                         f"baselines alone, {front.hypervolume():.3f} with the search.")  # fmt: skip
        heads = ["#", "baseline", *(_NAMES.get(n, n) for n in (quality, *_costs(front))), "verdict"]
        lines = []
        for c in trivial:
            metrics = [(n, _metric(c, n)) for n in (quality, *_costs(front))]
            lines.append(
                [str(c.number), c.label, *(show(n, m.value) if m else "-" for n, m in metrics), _beaten(front, c)]
            )
        parts.append(_markdown_table(heads, lines))
    parts += _lost(front)

    pick = preferred(front) if front.members else str(n[0].number) if (n := front.least_violating(1)) else "NUMBER"
    parts += ["## Using it",
              f"```sh\nparetorch export {_study(front)} --pick {pick} --to deploy\n```",
              "`deploy` then holds the ONNX file, the packed weights, the recipe and these measurements. `--pick` also takes "
              "a number from the tables, an objective, or a limit such as `\"size_bytes <= 80kB\"`. In Python:",
              '```python\nimport paretorch\n\nmodel = paretorch.load("deploy")\n```']  # fmt: skip
    for note in notes:
        parts.append(note)
    if config:
        parts += ["## Configuration", f"```yaml\n{config.rstrip()}\n```"]
    if front.members:
        knee = front.knee()
        # A step a line, and last: MLflow's page grows as wide as the widest line, and cuts a long text.
        steps = ",\n".join(json.dumps(step) for step in knee.recipe.to_dict()["steps"])
        body = f'{{"version": {knee.recipe.version}, "steps": [\n{steps}\n]}}'
        parts += [f"## The recipe of #{knee.number}, exactly", f"```json\n{body}\n```"]
    return "\n\n".join(parts) + "\n"


def _certainty(front: Front) -> list[str]:
    """Which members the images cannot tell apart, what selecting on validation has cost, and whom to beware of."""
    quality, said = front.quality, []
    measured = [(c, m) for c in front.members if (m := _metric(c, quality)) is not None]
    if front.clusters:
        said += [f"- {line}." for line in described_clusters(front)]
        if any(f"{quality}_difference" in m.test for m in front.members):
            said.append("- Differences to the baseline on the test split are between the same samples, with 95% intervals for pairs.")  # fmt: skip
    elif measured:
        sign = 1.0 if front.maximizes(quality) else -1.0
        best, top = max(measured, key=lambda pair: sign * pair[1].value)
        alike = [f"#{c.number}" for c, m in measured if c is not best and m.low <= top.high and top.low <= m.high]
        if alike:
            said.append(f"- In {quality} {', '.join(alike)} cannot be told apart from the best, #{best.number}: the 95% "
                        "intervals overlap. Among these the cheaper one is the better choice.")  # fmt: skip
    if (found := optimism(front)) is not None:
        scale, unit = (100, " points") if quality == "accuracy" else (1, f" {quality}")
        amount = f"{scale * abs(found.value):.2f}{unit}" if scale > 1 else f"{abs(found.value):.3g}"
        interval = f" (95% interval {scale * found.low:+.3g} to {scale * found.high:+.3g})" if found.low < found.high else ""  # fmt: skip
        than = f"{amount} {'more' if found.value > 0 else 'less'}"
        said.append(f"- Candidates were chosen on the validation images. From there to the test images, used once, the "
                    f"members lost {than} than the baseline, on average{interval}. Trust the test column.")  # fmt: skip
    said += [f"- {line}." for line in warned(front)]
    return ["## How certain this is", "\n".join(said)] if said else []


def _unreachable(front: Front) -> list[str]:
    near = _nearest(front, 3)
    parts = ["## No candidate kept the budget"]
    if not near:
        return [*parts, "Nothing was measured, and nothing was refused for its cost: see what failed below."]
    parts.append("These miss it by the least. The last column is the limit that each would keep.")
    quality, lines = front.quality, []
    for c in near:
        metric, misses = _metric(c, quality), _misses(front, c)
        lines.append(
            [
                str(c.number),
                _interval(quality, metric) if metric else "not measured",
                c.recipe.describe(),
                "; ".join(text for text, _ in misses),
                "; ".join(f"`{text}`" for _, text in misses),
            ]
        )
    parts.append(_markdown_table(["#", quality, "what", "misses", "would keep"], lines))
    parts.append("![all candidates](front.png)")
    return parts


def _lost(front: Front) -> list[str]:
    """What was over the budget, and what failed and why."""
    parts = []
    over = [c for c in front.candidates if c.state == OVER_BUDGET]
    if over:
        refused = sum(c.measurement is None for c in over)
        limits = Counter(limit for c in over for limit, excess in c.excess.items() if excess > 0)
        parts += ["## Over the budget",
                  f"{len(over)} candidates, {refused} of them refused by arithmetic before anything was compressed.\n\n"
                  + "\n".join(f"- `{limit}`: exceeded by {count}" for limit, count in limits.most_common())]  # fmt: skip
    failed = [c for c in front.candidates if c.state == FAILED]
    if failed:
        reasons: dict[str, list[str]] = {}
        for c in failed:
            reasons.setdefault(c.reason or "no reason given", []).append(f"#{c.number}")
        parts += [
            "## Failed",
            "\n".join(f"- {_few(numbers)}: {_line(why).replace('<', '&lt;')}" for why, numbers in reasons.items()),
        ]
    return parts


_SENSITIVITY = "How far the outputs move when one layer alone is compressed, without training."


def _sensitivity_picture(front: Front) -> Path | None:
    """Of the layers' sensitivity, when it was measured into the study's folder."""
    path = front.directory / "sensitivity.png" if front.directory else None
    return path if path and path.is_file() else None


def _sensitivity(front: Front, folder: Path) -> list[str]:
    """The section with the picture, seen from the folder of the report."""
    if (picture := _sensitivity_picture(front)) is None:
        return []
    address = quote(os.path.relpath(picture, folder))
    return ["## Which layers are sensitive", f"{_SENSITIVITY} The numbers: `sensitivity.csv`.", f"![the sensitivity of each layer]({address})"]  # fmt: skip


def _few(numbers: Sequence[str], count: int = 8) -> str:
    more = len(numbers) - count
    return ", ".join(numbers[:count]) + (f" and {more} more" if more > 0 else "")


def _line(text: str) -> str:
    return " ".join(text.split())


# ---- the pictures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """One candidate, or the untouched network, on one panel."""

    role: str
    number: int
    x: Estimate
    y: Estimate
    label: str
    hover: str


@dataclass(frozen=True)
class _Panel:
    """One plot: the metric over one cost. `window` is the part of the y axis worth looking at."""

    x: str
    y: str
    points: tuple[_Point, ...]
    stairs: tuple[tuple[float, float], ...]
    lines: tuple[tuple[str, str, float], ...]  # axis, limit as text, value
    window: tuple[float, float]
    span: tuple[float, float]
    up: bool
    knee: int

    @property
    def log(self) -> bool:
        return self.span[0] > 0 and self.span[1] / self.span[0] > 6

    def of(self, role: str) -> list[_Point]:
        return [point for point in self.points if point.role == role]


def _panels(front: Front) -> list[_Panel]:
    quality = front.quality
    costs = _costs(front)[:2]
    return [_panel(front, cost, quality) for cost in costs if quality in front.baseline.metrics]


def _panel(front: Front, x: str, y: str) -> _Panel:
    members = {member.number for member in front.members}
    points = []
    for c in front.candidates:
        mx, my = _metric(c, x), _metric(c, y)
        if mx is None or my is None or not (math.isfinite(mx.value) and math.isfinite(my.value)):
            continue
        if c.recipe == Recipe() and c.number not in members:
            continue  # the star shows it
        trivial = bool(c.label) and c.recipe != Recipe()
        role = "front" if c.number in members else "trivial" if trivial and c.state == OK else c.state
        role = role if role in _ROLES else "other"
        points.append(_Point(role, c.number, mx, my, c.label if trivial else "", _hover(front, c)))
    base = front.baseline.metrics
    told = "<br>".join(f"{_NAMES.get(n, n)} {_interval(n, base[n])}" for n in (y, *_costs(front)) if n in base)
    start = _Point("baseline", -1, base[x], base[y], "", f"<b>the untouched network</b><br>{told}")

    up = front.maximizes(y)
    inside = {c.number for c in front.candidates if c.state == OK}
    ok = [p for p in points if p.number in inside]
    keep = nondominated([[p.x.value, -p.y.value if up else p.y.value] for p in ok])
    stairs = sorted({(p.x.value, p.y.value) for p, k in zip(ok, keep, strict=True) if k})

    lines = tuple(
        (axis, limit.text, limit.resolve(base[metric].value))
        for axis, metric in (("x", x), ("y", y))
        for limit in front.budget.limits
        if limit.metric == metric
    )

    # Candidates that are lost for good would squeeze the rest into a line; they are drawn at the edge instead.
    def near(point: _Point) -> bool:
        loss = (base[y].value - point.y.value) * (1 if up else -1)
        return loss <= (0.2 if point.role == "front" else 0.08) * (abs(base[y].value) or 1.0) * (1 if up else 5)

    seen = [p for p in (*points, start) if near(p)]
    ends = [end for p in seen for end in (p.y.low, p.y.high)] + [value for axis, _, value in lines if axis == "y"]
    low, high = min(ends), max(ends)
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    xs = [p.x.value for p in (*points, start)] + [value for axis, _, value in lines if axis == "x"]
    return _Panel(
        x, y, (*points, start), tuple(stairs), lines, (low - pad, high + pad), (min(xs), max(xs)), up,
        front.knee().number if front.members else -1,
    )  # fmt: skip


def _hover(front: Front, candidate: Candidate) -> str:
    """What a point tells when it is pointed at; plotly reads it as HTML."""
    base = front.baseline.metrics
    lines = [f"<b>#{candidate.number}</b> {html.escape(candidate.label)}".rstrip()]
    lines += [html.escape(part) for part in _wrapped(candidate.recipe.describe(), 60)]
    for name in (front.quality, *_costs(front)):
        metric = _metric(candidate, name)
        if metric is not None and name in base:
            lines.append(f"{_NAMES.get(name, name)} {_interval(name, metric)}, {_against(name, metric, base[name])}")
    lines += [f"test {name} {_interval(name, metric)}" for name, metric in candidate.test.items()]
    if candidate.state != OK:
        lines += [html.escape(part) for part in _wrapped(f"{candidate.state}: {_line(candidate.reason)}", 60)[:4]]
    return "<br>".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [""]


def _ticks(panel: _Panel) -> list[float]:
    """Round numbers along a logarithmic x axis, few enough to read."""
    low, high = panel.span
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for subs in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**d for d in decades for s in subs if low * 0.8 <= s * 10.0**d <= high * 1.3]
        if len(ticks) <= 7:
            break
    return ticks


def _axis(metric: str) -> str:
    return {"size_bytes": "size of the shipped file", "latency_ms": "latency", "macs": "multiply-adds"}.get(metric, metric)  # fmt: skip


def _png(front: Front, name: str) -> bytes:
    """The picture for a README. No pyplot: that would change settings of the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(front)
    figure = Figure(figsize=(11.6 if len(panels) > 1 else 7.6, 4.9), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(0.012, 0.965, name, fontsize=13, fontweight="bold", va="top", color="#1f2933")
    figure.text(0.012, 0.91, _short(front, 150 if len(panels) > 1 else 92), fontsize=8.6, va="top", color="#52606d")
    shown: dict[str, Any] = {}
    axes = [figure.add_subplot(1, max(1, len(panels)), i + 1) for i in range(len(panels))]
    figure.subplots_adjust(left=0.075 if len(panels) > 1 else 0.1, right=0.985, top=0.82, bottom=0.2, wspace=0.2)
    for panel, ax in zip(panels, axes, strict=True):
        shown |= _draw(ax, panel)
    for panel, ax in zip(panels, axes, strict=True):
        _label(ax, panel, canvas)
    if shown:
        figure.legend(
            shown.values(),
            shown.keys(),
            loc="lower center",
            ncol=len(shown),
            frameon=False,
            fontsize=8.6 if len(panels) > 1 else 7.6,
            columnspacing=1.2,
            handletextpad=0.4,
        )
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _short(front: Front, width: int) -> str:
    """The summary in lines for a picture."""
    return "\n".join(_wrapped(_line(_summary(front).replace("**", "")), width)[:2])


def _draw(ax: Any, panel: _Panel) -> dict[str, Any]:
    """One panel; returns the legend's handles."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    shown: dict[str, Any] = {}
    low, high = panel.window
    ax.set_ylim(low, high)
    if panel.log:
        ax.set_xscale("log")
        ax.set_xlim(panel.span[0] / 1.25, panel.span[1] * 1.25)
        ax.set_xticks(_ticks(panel))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        pad = 0.06 * ((panel.span[1] - panel.span[0]) or abs(panel.span[1]) or 1.0)
        ax.set_xlim(panel.span[0] - pad, panel.span[1] + pad)
        ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(panel.x, value)))
    ax.yaxis.set_major_locator(MaxNLocator(7))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%" if panel.y == "accuracy" else f"{value:.4g}"))  # fmt: skip
    ax.grid(color="#e4e7eb", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#cbd2d9")
    ax.tick_params(colors="#52606d", labelsize=8.6)
    ax.set_xlabel(_axis(panel.x), fontsize=9.5, color="#1f2933")
    ax.set_ylabel(panel.y, fontsize=9.5, color="#1f2933")

    for axis, _, value in panel.lines:
        line = (ax.axvline if axis == "x" else ax.axhline)(value, color="#d1495b", linestyle="--", linewidth=1.1, alpha=0.8)  # fmt: skip
        shown["budget"] = line
    if panel.stairs:
        xs, ys = zip(*panel.stairs, strict=True)
        floor = low if panel.up else high
        # Down to the axis on the left and on to the edge on the right: everything below and beyond is beaten.
        ax.step((xs[0], *xs, ax.get_xlim()[1]), (floor, *ys, ys[-1]), where="post", color="#0b6e99", linewidth=1.6, alpha=0.75, zorder=2)  # fmt: skip
    for role, (legend, colour, _, marker) in _ROLES.items():
        points = panel.of(role)
        inside = [p for p in points if low <= p.y.value <= high]
        outside = [p for p in points if not low <= p.y.value <= high]
        faint = role in ("other", OVER_BUDGET)
        if inside:
            x, y = [p.x.value for p in inside], [p.y.value for p in inside]
            ax.errorbar(
                x, y, xerr=_bars([p.x for p in inside]), yerr=_bars([p.y for p in inside]), fmt="none", ecolor=colour,
                elinewidth=0.7 if faint else 1.1, alpha=0.16 if faint else 0.6, zorder=3 if not faint else 1,
            )  # fmt: skip
            shown[legend] = ax.scatter(
                x, y, marker=marker, s={"baseline": 190, "front": 46, "trivial": 34}.get(role, 22),
                facecolors="none" if role == OVER_BUDGET else colour, edgecolors=colour if role == OVER_BUDGET else "white",
                linewidths=1.1 if role == OVER_BUDGET else 0.7, alpha=0.75 if faint else 1.0, zorder=4 if not faint else 2,
            )  # fmt: skip
        if outside:
            edge = low + 0.018 * (high - low) if panel.up else high - 0.018 * (high - low)
            shown["off the scale"] = ax.scatter(
                [p.x.value for p in outside], [edge] * len(outside), marker="v" if panel.up else "^", s=20,
                facecolors="none", edgecolors=colour, linewidths=0.9, zorder=3,
            )  # fmt: skip
    # The legend's order is the order of importance.
    order = ["front", "trivial baseline", "untouched network", "candidate", "over budget", "off the scale", "budget"]
    return {key: shown[key] for key in order if key in shown}


def _bars(metrics: Sequence[Estimate]) -> list[list[float]]:
    return [[max(0.0, m.value - m.low) for m in metrics], [max(0.0, m.high - m.value) for m in metrics]]


def _label(ax: Any, panel: _Panel, canvas: Any) -> None:
    """Numbers at the front's members and names at the trivial baselines, each where it covers the least."""
    from matplotlib.transforms import Bbox

    renderer = canvas.get_renderer()
    low, high = panel.window
    spots = [ax.transData.transform((p.x.value, p.y.value)) for p in panel.points if low <= p.y.value <= high]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    area = ax.get_window_extent(renderer)
    named = [p for p in panel.points if low <= p.y.value <= high and (p.role in ("front", "baseline") or p.label)]
    crowd = len(panel.of("front")) > 14
    for point in sorted(named, key=lambda p: (p.role != "front", p.x.value)):
        text = point.label
        if point.role == "front" and not (crowd and not text):
            text = " ".join(part for part in (f"#{point.number}", "knee" * (point.number == panel.knee), text) if part)
        if not text:
            continue
        colour = _ROLES[point.role][1] if point.role in ("front", OVER_BUDGET) else "#52606d"
        note = ax.annotate(text, (point.x.value, point.y.value), xytext=(0, 0), textcoords="offset points", fontsize=7.6,
                           color=colour, zorder=6)  # fmt: skip
        choices: list[tuple[int, int, Any]] = []
        for dx, dy, ha, va in _AROUND:
            note.set(position=(dx, dy), ha=ha, va=va)
            box = note.get_window_extent(renderer)
            covered = sum(box.overlaps(other) for other in taken)
            out = 10 * (box.x1 > area.x1 or box.x0 < area.x0 or box.y1 > area.y1 or box.y0 < area.y0)
            choices.append((covered + out, len(choices), box))
        _, best, box = min(choices, key=lambda choice: choice[:2])
        dx, dy, ha, va = _AROUND[best]
        note.set(position=(dx, dy), ha=ha, va=va)
        taken.append(box)


_AROUND = (
    (-5, 5, "right", "bottom"), (5, -6, "left", "top"), (5, 5, "left", "bottom"), (-5, -6, "right", "top"),
    (0, 9, "center", "bottom"), (0, -10, "center", "top"), (9, 0, "left", "center"), (-9, 0, "right", "center"),
    (6, -16, "left", "top"), (-6, 16, "right", "bottom"),
)  # fmt: skip


def _html(front: Front, name: str, budget: Sequence[str]) -> str:
    """One page that needs no other file and no network."""
    heads, lines = _cells(front)
    body = [f"<h1>{html.escape(name)}</h1>", f"<p class=lead>{_bold(html.escape(_summary(front)))}</p>"]
    if budget:
        body.append(f"<p class=budget>Budget: {' '.join(f'<code>{html.escape(line)}</code>' for line in budget)}</p>")
    body.append(_charts(front))
    if front.members:
        body.append("<h2>The front</h2>")
        body.append(_html_table(heads, lines, [_steps(member) for member in front.members]))
        body += [
            f"<p>{html.escape(line.removeprefix('- '))}</p>" for line in "\n".join(_certainty(front)[1:]).splitlines()
        ]
    else:
        body.append("<h2>No candidate kept the budget</h2>")
        near = [[str(c.number), c.recipe.describe(), "; ".join(a for a, _ in m), "; ".join(b for _, b in m)]
                for c in _nearest(front, 3) for m in [_misses(front, c)]]  # fmt: skip
        body.append(_html_table(["#", "what", "misses", "would keep"], near))
    failed = [[f"#{c.number}", _line(c.reason)] for c in front.candidates if c.state == FAILED]
    if failed:
        body += ["<h2>Failed</h2>", _html_table(["#", "why"], failed)]
    if picture := _sensitivity_picture(front):
        # Inside the page, which needs no other file.
        data = base64.b64encode(picture.read_bytes()).decode()
        body.append(f"<h2>Which layers are sensitive</h2><p>{_SENSITIVITY}</p>"
                    f"<img alt='the sensitivity of each layer' src='data:image/png;base64,{data}'>")  # fmt: skip
    if front.members:
        body.append(
            f"<h2>Using it</h2><pre>paretorch export {html.escape(_study(front))} --pick {preferred(front)} --to deploy</pre>"
        )
    return (
        f"<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>{html.escape(name)}</title>"
        f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>"
    )


_STYLE = """
body{margin:0;background:#f5f7fa;color:#1f2933;font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
main{max-width:1240px;margin:0 auto;padding:24px 28px 56px;background:#fff;min-height:100vh;box-sizing:border-box}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:30px 0 8px}.lead{margin:0 0 6px;color:#3e4c59}
.budget{margin:0 0 10px;color:#52606d;font-size:14px}code,pre{font:13px/1.45 ui-monospace,'DejaVu Sans Mono',monospace;background:#f0f4f8;border-radius:4px}
code{padding:1px 6px;margin-right:6px}pre{padding:10px 14px;overflow-x:auto;white-space:pre-wrap}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px}
th{text-align:left;color:#52606d;font-weight:600;border-bottom:2px solid #e4e7eb;padding:6px 12px 6px 0;white-space:nowrap}
td{border-bottom:1px solid #e4e7eb;padding:7px 12px 7px 0;vertical-align:top}td:first-child{font-weight:600;color:#0b6e99;white-space:nowrap}
td small{display:block;color:#7b8794;font-size:12px;white-space:nowrap}summary{cursor:pointer}img{max-width:100%}details pre{margin:6px 0 0;max-height:260px;overflow:auto;font-size:12px}
"""


def _bold(text: str) -> str:
    for mark in ("<b>", "</b>"):
        text = text.replace("**", mark, 1)
    return text


def _steps(candidate: Candidate) -> str:
    """A recipe for people, a step a line."""
    lines = []
    networks = candidate.recipe.networks()
    for place, network in enumerate(networks, 1):
        lines += [f"network {place} of {len(networks)}"] if len(networks) > 1 else []
        for step in network.to_dict()["steps"]:
            kind, *values = step.items()
            lines.append(f"{kind[1]:9} " + "  ".join(f"{key}={_flat(value)}" for key, value in values))
    return "\n".join(lines)


def _flat(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _html_table(heads: Sequence[str], lines: Sequence[Sequence[str | _Cell]], steps: Sequence[str] = ()) -> str:
    """A table; the last cell of a row opens to its steps where there are some."""

    def shown(cell: str | _Cell) -> str:
        value, interval, against = (cell, "", "") if isinstance(cell, str) else cell
        text = html.escape(value)
        for part in (interval, against):
            text += f"<small>{html.escape(part)}</small>" if part else ""
        return text

    def row(index: int, cells: Sequence[str | _Cell]) -> Iterator[str]:
        for place, cell in enumerate(cells):
            text = shown(cell)
            if place == len(cells) - 1 and index < len(steps) and steps[index]:
                text = f"<details><summary>{text}</summary><pre>{html.escape(steps[index])}</pre></details>"
            yield f"<td>{text}</td>"

    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(row(i, cells))}</tr>" for i, cells in enumerate(lines))
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _charts(front: Front) -> str:
    """The panels and the hypervolume per candidate, with plotly inside the page."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = _panels(front)
    columns = max(1, len(panels))
    specs: list[list[dict[str, Any] | None]] = [
        [{} for _ in range(columns)],
        [{"colspan": columns}, *[None] * (columns - 1)],
    ]
    figure = make_subplots(
        rows=2, cols=columns, specs=specs, row_heights=[0.74, 0.26], vertical_spacing=0.15, horizontal_spacing=0.08
    )
    named: set[str] = set()
    for place, panel in enumerate(panels, 1):
        _plot(figure, go, panel, place, named)
    curve = hypervolume_curve(front)
    figure.add_trace(
        go.Scatter(
            x=[c.number for c in front.candidates], y=curve, mode="lines", line={"shape": "hv", "color": "#0b6e99", "width": 2},
            fill="tozeroy", fillcolor="rgba(11,110,153,0.08)", showlegend=False,
            hovertemplate="after #%{x}<br>hypervolume %{y:.4f}<extra></extra>",
        ),
        row=2, col=1,
    )  # fmt: skip
    top = max(curve, default=0.0)
    figure.update_xaxes(title_text="candidate", row=2, col=1)
    figure.update_yaxes(title_text="hypervolume", row=2, col=1, rangemode="tozero", nticks=4,
                        range=[max(0.0, min([v for v in curve if v] or [0.0]) - 0.3 * (top or 1)), top * 1.06 or 1])  # fmt: skip
    figure.update_layout(
        template="plotly_white", height=760, margin={"l": 70, "r": 20, "t": 40, "b": 50}, hovermode="closest",
        legend={"orientation": "h", "traceorder": "reversed", "y": 1.02, "yanchor": "bottom", "x": 0, "itemsizing": "constant"},
        hoverlabel={"bgcolor": "white", "bordercolor": "#cbd2d9", "font": {"color": "#1f2933", "size": 13}, "align": "left"},
    )  # fmt: skip
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=True,
            config={
                "displaylogo": False,
                "responsive": True,
                "showTips": False,
                "modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
            },
        )
    )


def _plot(figure: Any, go: Any, panel: _Panel, column: int, named: set[str]) -> None:
    """One panel of the page; a role gets its legend entry where it is met first."""
    low, high = panel.window
    pad = 0.06 * ((panel.span[1] - panel.span[0]) or abs(panel.span[1]) or 1.0)
    right = panel.span[1] * 1.25 if panel.log else panel.span[1] + pad
    right_edge = math.log10(right) if panel.log else right
    if panel.stairs:
        xs, ys = zip(*panel.stairs, strict=True)
        floor = low if panel.up else high
        figure.add_trace(
            go.Scatter(
                x=[xs[0], *xs, right], y=[floor, *ys, ys[-1]], mode="lines", hoverinfo="skip", showlegend=False,
                line={"shape": "hv", "color": "#0b6e99", "width": 2}, opacity=0.7, legendgroup="front",
            ),
            row=1, col=column,
        )  # fmt: skip
    for role, (legend, colour, marker, _) in _ROLES.items():
        points = panel.of(role)
        if not points:
            continue
        faint = role in ("other", OVER_BUDGET)
        bars = {
            "color": _faded(colour) if faint else colour,
            "thickness": 0.6 if faint else 1.2,
            "width": 0,
            "type": "data",
            "symmetric": False,
        }
        x_bars, y_bars = _bars([p.x for p in points]), _bars([p.y for p in points])
        figure.add_trace(
            go.Scatter(
                x=[p.x.value for p in points], y=[p.y.value for p in points], name=legend,
                mode="markers+text" if any(p.label for p in points) else "markers", text=[html.escape(p.label) for p in points],
                textposition="bottom right", textfont={"size": 11, "color": "#52606d"},
                legendgroup=role, showlegend=role not in named, customdata=[p.hover for p in points],
                hovertemplate="%{customdata}<extra></extra>", opacity=0.7 if faint else 1.0,
                error_x=bars | {"arrayminus": x_bars[0], "array": x_bars[1]},
                error_y=bars | {"arrayminus": y_bars[0], "array": y_bars[1]},
                marker={"symbol": marker, "color": colour, "size": {"baseline": 17, "front": 10, "trivial": 9}.get(role, 7),
                        "line": {"width": 1.2 if role == OVER_BUDGET else 0.5, "color": colour if role == OVER_BUDGET else "white"}},
            ),
            row=1, col=column,
        )  # fmt: skip
        named.add(role)
    for axis, text, value in panel.lines:
        add = figure.add_vline if axis == "x" else figure.add_hline
        add(value, line={"dash": "dash", "color": "#d1495b", "width": 1.2}, row=1, col=column)
        # By hand: plotly puts the note of a line on a logarithmic axis somewhere else.
        place = math.log10(value) if axis == "x" and panel.log else value
        figure.add_annotation(
            text=html.escape(text), showarrow=False, font={"size": 11, "color": "#d1495b"}, bgcolor="rgba(255,255,255,0.75)",
            row=1, col=column, x=place if axis == "x" else right_edge, y=low if axis == "x" else value,
            xanchor="left" if axis == "x" else "right", yanchor="bottom",
        )  # fmt: skip
    if panel.log:
        ticks = _ticks(panel)
        figure.update_xaxes(
            type="log", tickvals=ticks, ticktext=[show(panel.x, tick) for tick in ticks],
            range=[math.log10(panel.span[0] / 1.25), math.log10(panel.span[1] * 1.25)], row=1, col=column,
        )  # fmt: skip
    else:
        ticks = list(_round_ticks(*panel.span))
        figure.update_xaxes(
            tickvals=ticks, ticktext=[show(panel.x, tick) for tick in ticks], range=[panel.span[0] - pad, right],
            row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(title_text=_axis(panel.x), row=1, col=column)
    figure.update_yaxes(title_text=panel.y, range=[low, high], row=1, col=column,
                        tickformat=".1%" if panel.y == "accuracy" else None)  # fmt: skip


def _faded(colour: str, share: float = 0.3) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def _round_ticks(low: float, high: float) -> Iterator[float]:
    """Some round numbers between two."""
    step = 10.0 ** math.floor(math.log10((high - low) or abs(high) or 1.0))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 7)
    number = math.ceil(low / step)
    while number * step <= high:
        yield number * step
        number += 1
