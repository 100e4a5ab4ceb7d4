"""The static picture of a front: the metric over each cost.

It avoids pyplot, which would change settings of the whole process.
"""

from __future__ import annotations

import io
import textwrap
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from ...objectives.display import show
from ..candidate import OVER_BUDGET
from .plots import FAINT, ORIGINAL, ROLES, Panel, Plots, Point, bars, log_ticks
from .view import View

# The possible places of a label next to its point: offset in points, then the alignment.
_AROUND = (
    (-5, 5, "right", "bottom"),
    (5, -6, "left", "top"),
    (5, 5, "left", "bottom"),
    (-5, -6, "right", "top"),
    (0, 9, "center", "bottom"),
    (0, -10, "center", "top"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (6, -16, "left", "top"),
    (-6, 16, "right", "bottom"),
)
_SIZES = {"baseline": 190, "front": 46, "trivial": 34}
_OUTSIDE = "off the scale"
# The legend lists the roles in order of importance.
_LEGEND = ("front", "trivial baseline", ORIGINAL, "candidate", "over budget", _OUTSIDE, "budget")


def png_bytes(view: View, plots: Plots) -> bytes:
    """The picture as PNG bytes: the panels side by side below the name and the summary."""
    panels = plots.panels
    several = len(panels) > 1
    figure = Figure(figsize=(11.6 if several else 7.6, 4.9), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    lines = textwrap.wrap(" ".join(view.summary.replace("**", "").split()), 150 if several else 92)
    figure.text(0.012, 0.965, view.name, fontsize=13, fontweight="bold", va="top", color="#1f2933")
    figure.text(0.012, 0.91, "\n".join(lines[:2]), fontsize=8.6, va="top", color="#52606d")
    handles: dict[str, Any] = {}
    axes = [figure.add_subplot(1, max(1, len(panels)), i + 1) for i in range(len(panels))]
    figure.subplots_adjust(left=0.075 if several else 0.1, right=0.985, top=0.82, bottom=0.2, wspace=0.2)
    for panel, ax in zip(panels, axes, strict=True):
        _set_axes(ax, panel)
        handles |= _draw(ax, panel)
    for panel, ax in zip(panels, axes, strict=True):
        _label(ax, panel, canvas)
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="lower center",
            ncol=len(handles),
            frameon=False,
            fontsize=8.6 if several else 7.6,
            columnspacing=1.2,
            handletextpad=0.4,
        )
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _set_axes(ax: Any, panel: Panel) -> None:
    ax.set_ylim(*panel.window)
    if panel.log:
        ax.set_xscale("log")
        ax.set_xlim(panel.span[0] / 1.25, panel.span[1] * 1.25)
        ax.set_xticks(log_ticks(panel))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.set_xlim(panel.span[0] - panel.pad, panel.span[1] + panel.pad)
        ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(panel.x, value)))
    ax.yaxis.set_major_locator(MaxNLocator(7))
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.3g}%" if panel.percent else f"{value:.4g}")
    )
    ax.grid(color="#e4e7eb", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#cbd2d9")
    ax.tick_params(colors="#52606d", labelsize=8.6)
    ax.set_xlabel(panel.x_title, fontsize=9.5, color="#1f2933")
    ax.set_ylabel(panel.y, fontsize=9.5, color="#1f2933")


def _draw(ax: Any, panel: Panel) -> dict[str, Any]:
    """Draw the limits, the stairs of the front and the points; return the legend's handles by their text."""
    handles: dict[str, Any] = {}
    for axis, _, value in panel.limits:
        line = ax.axvline if axis == "x" else ax.axhline
        handles["budget"] = line(value, color="#d1495b", linestyle="--", linewidth=1.1, alpha=0.8)
    if panel.stairs:
        xs, ys = zip(*panel.stairs, strict=True)
        floor = panel.window[0] if panel.up else panel.window[1]
        # The stairs extend down to the axis on the left and to the edge on the right: all beyond them is dominated.
        xs, ys = (xs[0], *xs, ax.get_xlim()[1]), (floor, *ys, ys[-1])
        ax.step(xs, ys, where="post", color="#0b6e99", linewidth=1.6, alpha=0.75, zorder=2)
    for role in ROLES:
        handles |= _draw_points(ax, panel, role)
    return {text: handles[text] for text in _LEGEND if text in handles}


def _draw_points(ax: Any, panel: Panel, role: str) -> dict[str, Any]:
    """Draw the points of one role with their intervals; points off the scale become triangles at its edge."""
    legend, colour, _, marker = ROLES[role]
    inside = [p for p in panel.of(role) if panel.inside(p)]
    outside = [p for p in panel.of(role) if not panel.inside(p)]
    faint, over = role in FAINT, role == OVER_BUDGET
    handles: dict[str, Any] = {}
    if inside:
        x, y = [p.x.value for p in inside], [p.y.value for p in inside]
        ax.errorbar(
            x,
            y,
            xerr=bars([p.x for p in inside]),
            yerr=bars([p.y for p in inside]),
            fmt="none",
            ecolor=colour,
            elinewidth=0.7 if faint else 1.1,
            alpha=0.16 if faint else 0.6,
            zorder=3 if not faint else 1,
        )
        handles[legend] = ax.scatter(
            x,
            y,
            marker=marker,
            s=_SIZES.get(role, 22),
            facecolors="none" if over else colour,
            edgecolors=colour if over else "white",
            linewidths=1.1 if over else 0.7,
            alpha=0.75 if faint else 1.0,
            zorder=4 if not faint else 2,
        )
    if outside:
        low, high = panel.window
        edge = low + 0.018 * (high - low) if panel.up else high - 0.018 * (high - low)
        handles[_OUTSIDE] = ax.scatter(
            [p.x.value for p in outside],
            [edge] * len(outside),
            marker="v" if panel.up else "^",
            s=20,
            facecolors="none",
            edgecolors=colour,
            linewidths=0.9,
            zorder=3,
        )
    return handles


def _label(ax: Any, panel: Panel, canvas: Any) -> None:
    """Label the members with numbers and the reference recipes with names, each where it overlaps the least."""
    renderer = canvas.get_renderer()
    points = [p for p in panel.points if panel.inside(p)]
    spots = [ax.transData.transform((p.x.value, p.y.value)) for p in points]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    area = ax.get_window_extent(renderer)
    crowd = len(panel.of("front")) > 14
    for point in sorted(points, key=lambda p: (p.role != "front", p.x.value)):
        text = _text(point, panel, crowd)
        if not text:
            continue
        colour = ROLES[point.role][1] if point.role in ("front", OVER_BUDGET) else "#52606d"
        note = ax.annotate(
            text,
            (point.x.value, point.y.value),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=7.6,
            color=colour,
            zorder=6,
        )
        taken.append(_place(note, taken, area, renderer))


def _text(point: Point, panel: Panel, crowd: bool) -> str:
    """The label of a point; on a crowded panel, members without a name get none."""
    if point.role != "front" or (crowd and not point.label):
        return point.label
    return " ".join(part for part in (point.name, "knee" * (point.number == panel.knee), point.label) if part)


def _place(note: Any, taken: list[Any], area: Any, renderer: Any) -> Any:
    """Move a label to where it overlaps the least with what is drawn already; return its box."""
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
    return box
