"""The interactive page of a front: a single file that needs no other files and no network access."""

from __future__ import annotations

import base64
import html
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...objectives.display import show
from ...spaces.recipe import Recipe
from ..candidate import OVER_BUDGET
from .cells import Cell
from .plots import FAINT, ROLES, Panel, Plots, Point, bars, linear_ticks, log_ticks
from .sentences import SENSITIVITY
from .view import View, front_cells

_STYLE = (
    "\n"
    "body{margin:0;background:#f5f7fa;color:#1f2933;"
    "font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}\n"
    "main{max-width:1240px;margin:0 auto;padding:24px 28px 56px;background:#fff;min-height:100vh;"
    "box-sizing:border-box}\n"
    "h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:30px 0 8px}"
    ".lead{margin:0 0 6px;color:#3e4c59}\n"
    ".budget{margin:0 0 10px;color:#52606d;font-size:14px}"
    "code,pre{font:13px/1.45 ui-monospace,'DejaVu Sans Mono',monospace;background:#f0f4f8;border-radius:4px}\n"
    "code{padding:1px 6px;margin-right:6px}pre{padding:10px 14px;overflow-x:auto;white-space:pre-wrap}\n"
    ".wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px}\n"
    "th{text-align:left;color:#52606d;font-weight:600;border-bottom:2px solid #e4e7eb;padding:6px 12px 6px 0;"
    "white-space:nowrap}\n"
    "td{border-bottom:1px solid #e4e7eb;padding:7px 12px 7px 0;vertical-align:top}"
    "td:first-child{font-weight:600;color:#0b6e99;white-space:nowrap}\n"
    "td small{display:block;color:#7b8794;font-size:12px;white-space:nowrap}summary{cursor:pointer}"
    "img{max-width:100%}details pre{margin:6px 0 0;max-height:260px;overflow:auto;font-size:12px}\n"
)
_SIZES = {"baseline": 17, "front": 10, "trivial": 9}


def html_page(view: View, plots: Plots) -> str:
    """The HTML page, with plotly, the charts and the pictures embedded."""
    name = html.escape(view.name)
    body = [f"<h1>{name}</h1>", f"<p class=lead>{_bold(html.escape(view.summary))}</p>"]
    if view.budget:
        lines = " ".join(f"<code>{html.escape(line)}</code>" for line in view.budget)
        body.append(f"<p class=budget>Budget: {lines}</p>")
    body += [_charts(plots), *(_front(view) if view.members else _nearest(view))]
    if view.outcomes.failed:
        failed = [[f"#{number}", " ".join(reason.split())] for number, reason in view.outcomes.failed]
        body += ["<h2>Failed</h2>", _table(["#", "why"], failed)]
    if view.sensitivity:
        data = base64.b64encode(view.sensitivity.read_bytes()).decode()
        body.append(
            f"<h2>Which layers are sensitive</h2><p>{SENSITIVITY}</p>"
            f"<img alt='the sensitivity of each layer' src='data:image/png;base64,{data}'>"
        )
    if view.members:
        command = f"paretorch export {html.escape(view.study)} --pick {view.pick} --to deploy"
        body.append(f"<h2>Using it</h2><pre>{command}</pre>")
    return (
        f"<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>{name}</title>"
        f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>"
    )


# ---- text and tables -------------------------------------------------------------------------------------------------


def _bold(text: str) -> str:
    for mark in ("<b>", "</b>"):
        text = text.replace("**", mark, 1)
    return text


def _front(view: View) -> list[str]:
    heads, lines = front_cells(view)
    table = _table(heads, lines, [_steps(member.candidate.recipe) for member in view.members])
    return ["<h2>The front</h2>", table, *(f"<p>{html.escape(line)}</p>" for line in view.certainty)]


def _nearest(view: View) -> list[str]:
    lines = [[str(near.number), near.what, "; ".join(near.misses), "; ".join(near.keeps)] for near in view.nearest]
    return ["<h2>No candidate kept the budget</h2>", _table(["#", "what", "misses", "would keep"], lines)]


def _steps(recipe: Recipe) -> str:
    """A recipe for people, one step per line."""
    lines = []
    networks = recipe.networks()
    for place, network in enumerate(networks, 1):
        lines += [f"network {place} of {len(networks)}"] if len(networks) > 1 else []
        for step in network.to_dict()["steps"]:
            kind, *values = step.items()
            lines.append(f"{kind[1]:9} " + "  ".join(f"{key}={_flat(value)}" for key, value in values))
    return "\n".join(lines)


def _flat(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str | Cell]], steps: Sequence[str] = ()) -> str:
    """An HTML table; where `steps` are given, the last cell of a row can be expanded to show them."""

    def shown(cell: str | Cell) -> str:
        if isinstance(cell, str):
            return html.escape(cell)
        small = "".join(f"<small>{html.escape(part)}</small>" for part in (cell.interval, cell.beside) if part)
        return html.escape(cell.value or "-") + small

    def row(index: int, cells: Sequence[str | Cell]) -> Iterator[str]:
        for place, cell in enumerate(cells):
            text = shown(cell)
            if place == len(cells) - 1 and index < len(steps) and steps[index]:
                text = f"<details><summary>{text}</summary><pre>{html.escape(steps[index])}</pre></details>"
            yield f"<td>{text}</td>"

    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(row(i, cells))}</tr>" for i, cells in enumerate(lines))
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


# ---- charts ----------------------------------------------------------------------------------------------------------


def _charts(plots: Plots) -> str:
    """The panels side by side, above the curve of the hypervolume, with plotly embedded."""
    columns = max(1, len(plots.panels))
    figure = make_subplots(
        rows=2,
        cols=columns,
        specs=[[{} for _ in range(columns)], [{"colspan": columns}, *[None] * (columns - 1)]],
        row_heights=[0.74, 0.26],
        vertical_spacing=0.15,
        horizontal_spacing=0.08,
    )
    named: set[str] = set()
    for column, panel in enumerate(plots.panels, 1):
        _add_stairs(figure, panel, column)
        _add_points(figure, panel, column, named)
        _add_limits(figure, panel, column)
        _set_axes(figure, panel, column)
    _add_curve(figure, plots.curve)
    figure.update_layout(
        template="plotly_white",
        height=760,
        margin={"l": 70, "r": 20, "t": 40, "b": 50},
        hovermode="closest",
        legend={
            "orientation": "h",
            "traceorder": "reversed",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
            "itemsizing": "constant",
        },
        hoverlabel={
            "bgcolor": "white",
            "bordercolor": "#cbd2d9",
            "font": {"color": "#1f2933", "size": 13},
            "align": "left",
        },
    )
    buttons = [["zoom2d", "pan2d", "resetScale2d", "toImage"]]
    config = {"displaylogo": False, "responsive": True, "showTips": False, "modeBarButtons": buttons}
    return str(figure.to_html(full_html=False, include_plotlyjs=True, config=config))


def _add_curve(figure: Any, curve: Sequence[tuple[int, float]]) -> None:
    """The hypervolume after each candidate."""
    volumes = [volume for _, volume in curve]
    trace = go.Scatter(
        x=[number for number, _ in curve],
        y=volumes,
        mode="lines",
        line={"shape": "hv", "color": "#0b6e99", "width": 2},
        fill="tozeroy",
        fillcolor="rgba(11,110,153,0.08)",
        showlegend=False,
        hovertemplate="after #%{x}<br>hypervolume %{y:.4f}<extra></extra>",
    )
    figure.add_trace(trace, row=2, col=1)
    top = max(volumes, default=0.0)
    low = max(0.0, min([v for v in volumes if v] or [0.0]) - 0.3 * (top or 1))
    figure.update_xaxes(title_text="candidate", row=2, col=1)
    figure.update_yaxes(
        title_text="hypervolume", row=2, col=1, rangemode="tozero", nticks=4, range=[low, top * 1.06 or 1]
    )


def _right(panel: Panel) -> float:
    """The right end of the x axis."""
    return panel.span[1] * 1.25 if panel.log else panel.span[1] + panel.pad


def _add_stairs(figure: Any, panel: Panel, column: int) -> None:
    if not panel.stairs:
        return
    xs, ys = zip(*panel.stairs, strict=True)
    floor = panel.window[0] if panel.up else panel.window[1]
    trace = go.Scatter(
        x=[xs[0], *xs, _right(panel)],
        y=[floor, *ys, ys[-1]],
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        line={"shape": "hv", "color": "#0b6e99", "width": 2},
        opacity=0.7,
        legendgroup="front",
    )
    figure.add_trace(trace, row=1, col=column)


def _add_points(figure: Any, panel: Panel, column: int, named: set[str]) -> None:
    """Add a trace per role; a role gets its legend entry on the first panel that has it."""
    for role, (legend, colour, marker, _) in ROLES.items():
        points = panel.of(role)
        if not points:
            continue
        faint = role in FAINT
        style = {
            "color": _faded(colour) if faint else colour,
            "thickness": 0.6 if faint else 1.2,
            "width": 0,
            "type": "data",
            "symmetric": False,
        }
        x_bars, y_bars = bars([p.x for p in points]), bars([p.y for p in points])
        over = role == OVER_BUDGET
        trace = go.Scatter(
            x=[p.x.value for p in points],
            y=[p.y.value for p in points],
            name=legend,
            mode="markers+text" if any(p.label for p in points) else "markers",
            text=[html.escape(p.label) for p in points],
            textposition="bottom right",
            textfont={"size": 11, "color": "#52606d"},
            legendgroup=role,
            showlegend=role not in named,
            customdata=[_hover(p) for p in points],
            hovertemplate="%{customdata}<extra></extra>",
            opacity=0.7 if faint else 1.0,
            error_x=style | {"arrayminus": x_bars[0], "array": x_bars[1]},
            error_y=style | {"arrayminus": y_bars[0], "array": y_bars[1]},
            marker={
                "symbol": marker,
                "color": colour,
                "size": _SIZES.get(role, 7),
                "line": {"width": 1.2 if over else 0.5, "color": colour if over else "white"},
            },
        )
        figure.add_trace(trace, row=1, col=column)
        named.add(role)


def _hover(point: Point) -> str:
    """The hover text of a point; plotly reads it as HTML."""
    lines = [*_wrapped(point.what), *point.numbers, *_wrapped(point.outcome)[:4]]
    head = f"<b>{html.escape(point.name)}</b> {html.escape(point.remark)}".rstrip()
    return "<br>".join([head, *map(html.escape, lines)])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 60)


def _add_limits(figure: Any, panel: Panel, column: int) -> None:
    right = math.log10(_right(panel)) if panel.log else _right(panel)
    for axis, text, value in panel.limits:
        add = figure.add_vline if axis == "x" else figure.add_hline
        add(value, line={"dash": "dash", "color": "#d1495b", "width": 1.2}, row=1, col=column)
        # Placed by hand, because plotly misplaces the annotation of a line on a logarithmic axis.
        place = math.log10(value) if axis == "x" and panel.log else value
        figure.add_annotation(
            text=html.escape(text),
            showarrow=False,
            font={"size": 11, "color": "#d1495b"},
            bgcolor="rgba(255,255,255,0.75)",
            row=1,
            col=column,
            x=place if axis == "x" else right,
            y=panel.window[0] if axis == "x" else value,
            xanchor="left" if axis == "x" else "right",
            yanchor="bottom",
        )


def _set_axes(figure: Any, panel: Panel, column: int) -> None:
    if panel.log:
        ticks = log_ticks(panel)
        ends = [math.log10(panel.span[0] / 1.25), math.log10(panel.span[1] * 1.25)]
    else:
        ticks = list(linear_ticks(*panel.span))
        ends = [panel.span[0] - panel.pad, _right(panel)]
    texts = [show(panel.x, tick) for tick in ticks]
    kind = {"type": "log"} if panel.log else {}
    figure.update_xaxes(**kind, tickvals=ticks, ticktext=texts, range=ends, row=1, col=column)
    figure.update_xaxes(title_text=panel.x_title, row=1, col=column)
    tickformat = ".1%" if panel.percent else None
    figure.update_yaxes(title_text=panel.y, range=list(panel.window), row=1, col=column, tickformat=tickformat)


def _faded(colour: str, share: float = 0.3) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"
