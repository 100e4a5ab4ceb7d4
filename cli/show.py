"""The output of commands: fronts, layers, explanations, comparisons. `objectives.display` formats the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..objectives.display import half_interval, show, signed, spread
from ..spaces.techniques.recover import Recover
from ..spaces.techniques.table import METHODS, RULE_KEYS
from .prepare import short

if TYPE_CHECKING:
    from rich.console import Console

    from ..objectives.measurement import Estimate
    from ..results.explain import Explanation
    from ..results.front import Front
    from ..results.retarget import MemberOnTarget, Retargeted
    from ..runners.record import RecordComparison, RecordRow
    from ..runners.timing.compare import LatencyComparison
    from ..search.preflight import Preflight
    from ..spaces.recipe import Recipe
    from ..spaces.rules import Axis
    from ..spaces.structure import Layer, Structure


def show_front(console: Console, front: Front, directory: Path) -> None:
    """Print the front or the nearest misses, a summary of all trials, and the next commands."""
    from ..results.report.terminal import front_table, least_violating_table, summary
    from ..results.report.view import view_of

    view = view_of(front)
    console.print()
    if view.members:
        console.print(front_table(view))
    else:
        console.print(
            Text("No candidate kept the budget. The nearest ones, and the limits they would keep:", style="bold yellow")
        )
        console.print(least_violating_table(view))
    for line in summary(view):
        console.print(line)
    folder = short(directory)
    console.print("\nNext:")
    console.print(Text(f"  paretorch ui {folder}                  # every candidate, in the MLflow UI"))
    console.print(Text(f"  paretorch export {folder} --pick {view.pick} --to deploy"))
    console.print(Text(f"  the report: {folder}/report/front.html"))


def show_layers(console: Console, preflight: Preflight) -> None:
    """Print the choices of the space for the layers of each network it starts from."""
    names = dict.fromkeys(axis.student for axis in preflight.axes if axis.student is not None)
    for name in names:
        if len(names) > 1 or name:
            console.print(Text(f"\nstudent {name}" if name else "\nthe network itself", style="bold"))
        _show_network(
            console, preflight.structure.named(name), [axis for axis in preflight.axes if axis.student == name]
        )


def _show_network(console: Console, structure: Structure, axes: Sequence[Axis]) -> None:
    shared = [axis for axis in axes if axis.kind in METHODS and len(axis.targets) > 1]
    own = [axis for axis in axes if axis not in shared]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", width=min(80, console.width))
    table.add_column("layer", overflow="fold", ratio=2)
    table.add_column("kind")
    table.add_column("weights", justify="right")
    table.add_column("what may be done", overflow="fold", ratio=3)
    for layer in structure.layers:
        options = "; ".join(_options(layer, own)) or "nothing"
        table.add_row(Text(layer.name), layer.kind, f"{layer.params:,}", Text(options))
    console.print()
    console.print(table)
    for axis in axes:
        if axis.kind in ("width", "depth", "equalize"):
            console.print(Text(f"{axis.kind}: {_choices(axis)}{_first_removed(axis, structure)}"))
    for axis in shared:
        console.print(Text(f"{axis.kind}: {_choices(axis)} (one for {len(axis.targets)} layers)"))
    if structure.refused:
        console.print("\nLeft as it is:")
        for name, reason in structure.refused:
            console.print(Text(f"  {name}: {reason}"))


def _options(layer: Layer, axes: Sequence[Axis]) -> list[str]:
    """The choices for one layer, of the axes that are about layers."""
    kinds = {"weight_bits": "bits", "activation_bits": "activations", "cluster_bits": "codebook bits"}
    kinds = {kind: kind for kind in RULE_KEYS} | kinds
    options = []
    for axis in axes:
        target = layer.output if axis.kind == "channels" else layer.name
        if axis.kind in kinds and target in axis.targets:
            group = f" (with {target})" if axis.kind == "channels" and target != layer.name else ""
            options.append(f"{kinds[axis.kind]} {_choices(axis)}{group}")
    return options


def _choices(axis: Axis) -> str:
    return " ".join(choice if isinstance(choice, str) else f"{choice:g}" for choice in axis.choices)


def _first_removed(axis: Axis, structure: Structure) -> str:
    """For an axis of depth: the blocks in the order in which they are removed."""
    most = max(axis.choices) if axis.kind == "depth" else 0
    return f" ({', '.join(structure.blocks[:most])} first)" if most else ""


def show_explanation(console: Console, number: int, recipe: Recipe, metric: str, told: Explanation, rows: int) -> None:
    """Print the contribution of each decision of a candidate, the most expensive first, and the suggestion."""

    def points(difference: Estimate) -> str:
        return f"{signed(metric, difference.value)} {half_interval(metric, difference)}"

    trained = any(step.epochs for step in recipe.of(Recover))
    console.print(f"#{number}: {recipe.describe()}", markup=False, soft_wrap=False)
    console.print(
        f"{'before its training: ' if trained else ''}{metric} {show(metric, told.metric.value)} on {told.images} "
        f"validation images, divergence {told.divergence:.3g}, {show('size_bytes', told.size_bytes)}",
        markup=False,
        soft_wrap=False,
    )
    shown = told.costs[:rows]
    lines = [
        (
            cost.what,
            points(cost.metric),
            f"{100 * cost.divergence / told.divergence:+.0f}%" if told.divergence else "-",
            f"{'-' if cost.size_bytes >= 0 else '+'}{show('size_bytes', abs(cost.size_bytes))}",
        )
        for cost in shown
    ]
    show_cells(console, ("decision", f"costs {metric}", "of the divergence", "bytes"), lines)
    if len(shown) < len(told.costs):
        console.print(f"and {len(told.costs) - len(shown)} that cost less (--rows)", markup=False)
    if told.suggestion is None:
        console.print("\nNo milder decision brings the outputs closer to the baseline's.", markup=False)
        return
    best = told.suggestion
    kept = "the limits on bytes and MACs still hold" if told.keeps else "it breaks a limit on bytes or MACs"
    size = f"{show('size_bytes', abs(best.size_bytes))} {'more' if best.size_bytes >= 0 else 'less'}"
    console.print(
        f"\nSuggestion: {best.what}. {points(best.metric)} {metric}, "
        f"{100 * best.divergence / told.divergence:.0f}% less divergence, {size}; {kept}.",
        markup=False,
        soft_wrap=False,
    )


def show_changes(console: Console, rows: Sequence[RecordRow]) -> None:
    """Print each number of a compressed network beside the original model's."""

    def cell(metric: str, estimate: Estimate | None) -> str:
        return "-" if estimate is None else f"{show(metric, estimate.value)} {spread(metric, estimate)}"

    cells = [(r.name, cell(r.metric, r.baseline), cell(r.metric, r.estimate), r.change()) for r in rows]
    show_cells(console, ("", "untouched", "compressed", "change"), cells)


def show_comparisons(console: Console, comparisons: Sequence[RecordComparison]) -> None:
    """Print the recorded numbers, the new ones, and whether they agree."""
    show_cells(console, ("", "recorded", "now", ""), [(c.name, c.recorded, c.now, c.verdict) for c in comparisons])


def show_cells(console: Console, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table of texts."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", width=None if console.width < 80 else 80)
    for head in heads:
        table.add_column(head, overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell.rstrip()) for cell in line))
    console.print()
    console.print(table)


def comparison_lines(files: list[Path], comparison: LatencyComparison, precision: float) -> list[str]:
    """Latencies and their comparison; numbers come first, because names may be long."""

    def line(estimate: Estimate, unit: str, text: str) -> str:
        interval = f"[{estimate.low:.4g}, {estimate.high:.4g}]"
        return f"{f'{estimate.value:.4g}{unit}':<13}{interval:<20}{text}"

    lines = [line(ms, " ms", str(path)) for path, ms in zip(files, comparison.ms, strict=True)]
    ratio = comparison.ratio
    if ratio is not None:
        verdict = comparison.verdict or ""
        times = {"faster": f", {1 / ratio.value:.3g}x", "slower": f", {ratio.value:.3g}x"}.get(verdict, "")
        lines.append(line(ratio, "", f"of the time: {comparison.verdict}{times}"))
    asked = ratio or comparison.ms[0]
    half = f"±{100 * (asked.high - asked.low) / 2 / asked.value:.2g}%"
    within = f"within the {100 * precision:g}% asked for"
    if not comparison.reached:
        within = f"which is not {within}: allow more --time, or a quieter machine"
    about = comparison.environment
    threads = f"{about['threads']} thread{'s' * (about['threads'] != '1')}"
    cores = about["cores"] if about["cores"] == "not pinned" else f"pinned to core {about['cores']}"
    inputs = (", ".join(f"{name} {shape}" for name, shape in entry.items()) for entry in comparison.inputs)
    pairs = f"{comparison.pairs} {'pairs' if ratio else 'blocks'}"
    return [
        *lines,
        "",
        f"{pairs} in one process, {comparison.seconds:.1f} s: {half}, {within}",
        f"{threads}, {cores}, {about['clock']}; {' against '.join(dict.fromkeys(inputs))}",
    ]


def show_retargeted(console: Console, moved: Retargeted) -> None:
    """Print the members of a front on another target."""
    base = moved.baseline_ms
    first = ("-", "1", f"{show('latency_ms', base.value)} {spread('latency_ms', base)}", "1", "", "", "")
    lines = [first, *(_retargeted_line(member) for member in moved.members)]
    show_cells(console, ("#", "before", f"on {moved.target}", "of the baseline", "", "there", "same class"), lines)
    for note in _retargeted_notes(moved):
        console.print(note, markup=False, soft_wrap=False)


def _retargeted_line(member: MemberOnTarget) -> tuple[str, ...]:
    before = f"{member.before.value:.3g}"
    ratio = member.ratio
    if member.latency_ms is None or ratio is None:
        return str(member.number), before, "cannot run", "", "", "", ""
    within = f" [{ratio.low:.3g}, {ratio.high:.3g}]" if ratio.low != ratio.high else ""
    speed = {"faster": f"{1 / ratio.value:.3g}x faster", "slower": f"{ratio.value:.3g}x slower"}
    return (
        str(member.number),
        before,
        show("latency_ms", member.latency_ms.value),
        f"{ratio.value:.3g}{within}",
        speed.get(member.verdict, "same speed"),
        "front" if member.on_front else member.reason or "beaten",
        f"{100 * member.agreement.top1:.4g}%" if member.agreement else "-",
    )


def _retargeted_notes(moved: Retargeted) -> list[str]:
    refused: dict[str, list[str]] = {}
    for member in moved.members:
        if member.latency_ms is None or member.ratio is None:
            refused.setdefault(member.reason, []).append(f"#{member.number}")
    notes = ["", f"before: the share of the baseline's latency on {moved.found_on}"]
    notes += [f"{', '.join(numbers)} cannot run there: {reason}" for reason, numbers in refused.items()]
    stay = sum(member.on_front for member in moved.members)
    notes.append(f"{stay} of {len(moved.members)} stay on the front there, by {', '.join(moved.judged_by)}")
    if "latency_ms" not in moved.judged_by:
        notes[-1] += "; latency_ms is neither an objective nor limited"
    if moved.pareto:
        notes.append(f"the front of the metric and the latency alone: {', '.join(f'#{n}' for n in moved.pareto)}")
    if compared := [member.agreement for member in moved.members if member.agreement]:
        least, most = min(a.top1 for a in compared), max(a.difference for a in compared)
        notes.append(
            f"outputs beside ONNX Runtime's on {moved.inputs}: the same class for {100 * least:.4g}% or more, "
            f"apart by {most:.1g} of the largest output or less"
        )
    if not moved.timed:
        notes.append("computed from the profile: nothing was timed, and the files were not run there")
    return notes
