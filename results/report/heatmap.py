"""The sensitivity of layers as a heat map: a table for the terminal, a picture, and the numbers.

Rows are layers in the order of execution; columns are levels (bits, then sparsity), the mildest first. The color scale
is logarithmic, because the divergences within one network span five orders of magnitude.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runners.files.atomic import write_atomic
from ...runners.sensitivity import KL, Level, Sensitivity, order

if TYPE_CHECKING:
    from rich.table import Table

FILES = ("sensitivity.json", "sensitivity.csv", "sensitivity.png")
# The styles of cells by upper bounds on the divergence, in nats. Below 0.01 hardly any predicted class changes; above 1
# hardly any prediction stays the same.
_STYLES = ((0.001, "dim green"), (0.01, "green"), (0.1, "yellow"), (1.0, "red"), (math.inf, "bold red"))


def short(value: float) -> str:
    """Format a divergence in at most four characters.

    >>> [short(value) for value in (0.0, 0.00012, 0.0349, 0.96, 1.26, 34.5, 5.4e6, math.inf)]
    ['0', '1e-4', '0.03', '0.96', '1.3', '34', '5e6', 'inf']
    """
    if not value or math.isinf(value):
        return f"{value:g}"
    if value < 0.01 or value >= 1000:
        digits, _, power = f"{value:.0e}".partition("e")
        return f"{digits}e{int(power)}" if int(power) > -100 else "0"
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _levels(sensitivity: Sensitivity) -> list[Level]:
    return sorted({(row.weight_bits, row.sparsity) for row in sensitivity.rows}, key=order)


def _layers(sensitivity: Sensitivity) -> list[str]:
    return list(dict.fromkeys(row.layer for row in sensitivity.rows))


def _share(sparsity: float | str) -> str:
    """A sparsity in a column's name: `50%`, a pattern such as `2:4` unchanged, empty for a dense layer."""
    if isinstance(sparsity, str):
        return sparsity
    return f"{100 * sparsity:.3g}%" if sparsity else ""


def heat_tables(sensitivity: Sensitivity, width: int = 80) -> list[Table]:
    """The heat map for a terminal of `width` columns; levels that do not fit go into further tables."""
    from rich.table import Table
    from rich.text import Text

    layers = _layers(sensitivity)
    value = {(row.layer, row.weight_bits, row.sparsity): row.divergence for row in sensitivity.rows}
    levels = _levels(sensitivity)
    longest = min(max(map(len, [*layers, "zeros"])), 28)
    cell = max(4, *(len(_share(sparsity)) for _, sparsity in levels))
    room = max(1, (width - longest) // (cell + 1))
    tables = []
    for start in range(0, len(levels), room):
        part = levels[start : start + room]
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
        zeros = any(sparsity for _, sparsity in part)
        table.add_column("bits" + "\nzeros" * zeros, no_wrap=True, width=longest)
        for bits, sparsity in part:
            label = f"{bits}\n{_share(sparsity)}" if zeros else f"{bits}"
            table.add_column(label, justify="right", no_wrap=True, width=cell)
        for layer in layers:
            # Names of layers differ at their ends, so the beginning is cut off.
            name = layer if len(layer) <= longest else f"...{layer[3 - longest :]}"
            cells = []
            for level in part:
                number = value.get((layer, *level))
                style = "dim" if number is None else next(s for bound, s in _STYLES if number <= bound)
                cells.append(Text("-" if number is None else short(number), style=style))
            table.add_row(Text(name), *cells)
        tables.append(table)
    return tables


def heat_rows(sensitivity: Sensitivity) -> list[dict[str, str | float]]:
    """The heat map as plain data: a row per layer, a column per level, a dash where a layer lacks the level.

    >>> from paretorch.runners.sensitivity import SensitivityRow
    >>> levels = (SensitivityRow("fc", 8, 0.0, 0.01, 36), SensitivityRow("fc", 32, 0.5, 0.02, 80))
    >>> heat_rows(Sensitivity(levels, KL, 512))
    [{'layer': 'fc', '8 bits': 0.01, '50% zeros': 0.02}]
    """
    value: dict[tuple[str, int, float | str], str | float]
    value = {(row.layer, row.weight_bits, row.sparsity): row.divergence for row in sensitivity.rows}
    names = {_name(*level): level for level in _levels(sensitivity)}
    return [
        {"layer": layer, **{name: value.get((layer, *level), "-") for name, level in names.items()}}
        for layer in _layers(sensitivity)
    ]


def _name(bits: int, sparsity: float | str) -> str:
    if not sparsity:
        return f"{bits} bits"
    return f"{_share(sparsity)} zeros" if bits == 32 else f"{bits} bits, {_share(sparsity)} zeros"


def write_sensitivity(sensitivity: Sensitivity, directory: Path, *, name: str) -> None:
    """Write `sensitivity.json`, `.csv` and `.png` into a folder, each atomically.

    Raises:
        OSError: The folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    contents: tuple[str | bytes, ...] = (
        sensitivity.to_json(),
        sensitivity.table().to_csv(index=False),
        heat_png(sensitivity, name),
    )
    for file, data in zip(FILES, contents, strict=True):
        write_atomic(directory / file, data)


def heat_png(sensitivity: Sensitivity, name: str) -> bytes:
    """The heat map as a PNG picture. It avoids pyplot, which would change settings of the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    layers, levels = _layers(sensitivity), _levels(sensitivity)
    grid = np.full((len(layers), len(levels)), np.nan)
    for row in sensitivity.rows:
        grid[layers.index(row.layer), levels.index((row.weight_bits, row.sparsity))] = row.divergence
    known = grid[np.isfinite(grid) & (grid > 0)]
    high = float(known.max()) if len(known) else 1.0
    low = max(float(known.min()) if len(known) else 0.1, high * 1e-6)
    top = high if high > low else 2 * low
    # Zero and infinity do not exist on a logarithmic scale; they are drawn at its ends.
    drawn = np.clip(grid, low, top)
    # In inches. A row is as high as its name needs, whatever the network's depth.
    tall, wide, left = 0.2 * len(layers), 0.52 * len(levels), 0.35 + 0.075 * max(map(len, layers))
    height, width = tall + 1.6, max(left + wide + 1.2, 5.2)
    figure = Figure(figsize=(width, height), dpi=150 if height < 100 else 60, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes((left / width, 0.55 / height, wide / width, tall / height))
    scale = LogNorm(low, top)
    image = ax.imshow(drawn, norm=scale, cmap="YlOrRd", aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(layers)), layers)
    ax.set_xticks(range(len(levels)), [f"{bits}\n{_share(sparsity)}" for bits, sparsity in levels])
    _lines_between(ax, len(levels), len(layers))
    for i, j in np.argwhere(~np.isnan(grid)):
        dark = np.log(drawn[i, j] / low) > 0.6 * np.log(max(high / low, 2))
        color = "white" if dark else "#1f2933"
        ax.text(j, i, short(float(grid[i, j])), ha="center", va="center", fontsize=7, color=color)
    place = ((left + wide + 0.15) / width, 0.55 / height, 0.12 / width, tall / height)
    bar = figure.colorbar(image, cax=figure.add_axes(place))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors="#52606d")
    zeros = ", below them the share of zeros" if any(sparsity for _, sparsity in levels) else ""
    x, title = 0.1 / width, f"{name}: sensitivity of each layer"
    figure.text(x, 1 - 0.15 / height, title, fontsize=11, fontweight="bold", va="top", color="#1f2933")
    legend = f"{explained(sensitivity)}\ncolumns: weight bits{zeros}"
    figure.text(x, 1 - 0.45 / height, legend, fontsize=7.5, va="top", color="#52606d")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _lines_between(ax: Any, columns: int, rows: int) -> None:
    """White lines between the cells, and grey where a layer lacks a level."""
    ax.set_facecolor("#e4e7eb")
    ax.tick_params(colors="#52606d", labelsize=8, length=0)
    ax.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="minor", length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def explained(sensitivity: Sensitivity) -> str:
    """What the numbers mean, in one line."""
    what = (
        "KL divergence of the softmax in nats"
        if sensitivity.unit == KL
        else "squared difference of the outputs / variance"
    )
    return f"{what}, each layer alone, {sensitivity.images} images"
