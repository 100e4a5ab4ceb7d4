"""A sensitivity for people: a table for the terminal, a picture, and the numbers.

Layers stand in the order of execution, levels (bits, then the share of zeros) side by side, the mildest first. Colours
are those of the logarithm, for divergences of one network span five orders of magnitude.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...runners.files.atomic import write_atomic
from ...runners.sensitivity import KL, Level, Sensitivity, order

if TYPE_CHECKING:
    from rich.table import Table

FILES = ("sensitivity.json", "sensitivity.csv", "sensitivity.png")
# Below which divergence a cell has which style: under 0.01 nats hardly an answer changes, above 1 hardly any is left.
_STYLES = ((0.001, "dim green"), (0.01, "green"), (0.1, "yellow"), (1.0, "red"), (math.inf, "bold red"))


def short(value: float) -> str:
    """A divergence in four characters at most.

    >>> [short(value) for value in (0.0, 0.00012, 0.0349, 0.96, 1.26, 34.5, 5.4e6, math.inf)]
    ['0', '1e-4', '0.03', '0.96', '1.3', '34', '5e6', 'inf']
    """
    if not value or math.isinf(value):
        return f"{value:g}"
    if value < 0.01 or value >= 1000:
        digits, _, power = f"{value:.0e}".partition("e")
        return f"{digits}e{int(power)}" if int(power) > -100 else "0"
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _levels(found: Sensitivity) -> list[Level]:
    return sorted({(row.weight_bits, row.sparsity) for row in found.rows}, key=order)


def _share(zeros: float | str) -> str:
    if isinstance(zeros, str):
        return zeros
    return f"{100 * zeros:.3g}%" if zeros else ""


def heat_tables(found: Sensitivity, width: int = 80) -> list[Table]:
    """The heat map for a terminal of `width` columns; levels that do not fit stand in further tables."""
    from rich.table import Table
    from rich.text import Text

    layers = list(dict.fromkeys(row.layer for row in found.rows))
    value = {(row.layer, row.weight_bits, row.sparsity): row.divergence for row in found.rows}
    every = _levels(found)
    longest = min(max(map(len, [*layers, "zeros"])), 28)
    cell = max(4, *(len(_share(ratio)) for _, ratio in every))
    room = max(1, (width - longest) // (cell + 1))
    tables = []
    for start in range(0, len(every), room):
        part = every[start : start + room]
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
        zeros = any(ratio for _, ratio in part)
        table.add_column("bits" + "\nzeros" * zeros, no_wrap=True, width=longest)
        for bits, ratio in part:
            label = f"{bits}\n{_share(ratio)}" if zeros else f"{bits}"
            table.add_column(label, justify="right", no_wrap=True, width=cell)
        for layer in layers:
            name = layer if len(layer) <= longest else f"...{layer[3 - longest :]}"  # the end tells layers apart
            cells = []
            for level in part:
                number = value.get((layer, *level))
                style = "dim" if number is None else next(s for bound, s in _STYLES if number <= bound)
                cells.append(Text("-" if number is None else short(number), style=style))
            table.add_row(Text(name), *cells)
        tables.append(table)
    return tables


def heat_rows(found: Sensitivity) -> list[dict[str, str | float]]:
    """The heat map as plain data: a row per layer, a column per level, a dash where a layer lacks it.

    >>> from paretorch.runners.sensitivity import SensitivityRow
    >>> heat_rows(Sensitivity((SensitivityRow("fc", 8, 0.0, 0.01, 36), SensitivityRow("fc", 32, 0.5, 0.02, 80)), KL, 512))
    [{'layer': 'fc', '8 bits': 0.01, '50% zeros': 0.02}]
    """
    value: dict[tuple[str, int, float | str], str | float]
    value = {(row.layer, row.weight_bits, row.sparsity): row.divergence for row in found.rows}
    names = {_name(*level): level for level in _levels(found)}
    layers = dict.fromkeys(row.layer for row in found.rows)
    return [{"layer": layer, **{n: value.get((layer, *level), "-") for n, level in names.items()}} for layer in layers]


def _name(bits: int, ratio: float | str) -> str:
    if not ratio:
        return f"{bits} bits"
    return f"{_share(ratio)} zeros" if bits == 32 else f"{bits} bits, {_share(ratio)} zeros"


def write_sensitivity(found: Sensitivity, directory: Path, *, name: str) -> None:
    """Write `sensitivity.json`, `.csv` and `.png` into a folder, each whole or not at all; raises `OSError`."""
    directory.mkdir(parents=True, exist_ok=True)
    contents: tuple[str | bytes, ...] = (found.to_json(), found.table().to_csv(index=False), _png(found, name))
    for file, data in zip(FILES, contents, strict=True):
        write_atomic(directory / file, data)


def _png(found: Sensitivity, name: str) -> bytes:
    """The picture for a README. No pyplot: that would change settings of the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(row.layer for row in found.rows))
    every = _levels(found)
    grid = np.full((len(layers), len(every)), np.nan)
    for row in found.rows:
        grid[layers.index(row.layer), every.index((row.weight_bits, row.sparsity))] = row.divergence
    known = grid[np.isfinite(grid) & (grid > 0)]
    high = float(known.max()) if len(known) else 1.0
    low = max(float(known.min()) if len(known) else 0.1, high * 1e-6)
    # Zero and infinity have no place on a logarithmic scale: they are drawn at its ends.
    drawn = np.clip(grid, low, high if high > low else 2 * low)
    # In inches: a row as high as its name needs, whatever the network's depth.
    tall, wide, left = 0.2 * len(layers), 0.52 * len(every), 0.35 + 0.075 * max(map(len, layers))
    height, width = tall + 1.6, max(left + wide + 1.2, 5.2)
    figure = Figure(figsize=(width, height), dpi=150 if height < 100 else 60, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes((left / width, 0.55 / height, wide / width, tall / height))
    image = ax.imshow(
        drawn, norm=LogNorm(low, high if high > low else 2 * low), cmap="YlOrRd", aspect="auto", interpolation="nearest"
    )
    ax.set_facecolor("#e4e7eb")  # where a layer has no such level
    ax.set_yticks(range(len(layers)), layers)
    ax.set_xticks(range(len(every)), [f"{bits}\n{_share(ratio)}" for bits, ratio in every])
    ax.tick_params(colors="#52606d", labelsize=8, length=0)
    ax.set_xticks(np.arange(len(every) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(layers) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="minor", length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    for i, j in np.argwhere(~np.isnan(grid)):
        dark = np.log(drawn[i, j] / low) > 0.6 * np.log(max(high / low, 2))
        ax.text(j, i, short(float(grid[i, j])), ha="center", va="center", fontsize=7, color="white" if dark else "#1f2933")  # fmt: skip
    bar = figure.colorbar(image, cax=figure.add_axes(((left + wide + 0.15) / width, 0.55 / height, 0.12 / width, tall / height)))  # fmt: skip
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors="#52606d")
    zeros = ", below them the share of zeros" if any(ratio for _, ratio in every) else ""
    figure.text(0.1 / width, 1 - 0.15 / height, f"{name}: sensitivity of each layer", fontsize=11, fontweight="bold", va="top", color="#1f2933")  # fmt: skip
    figure.text(0.1 / width, 1 - 0.45 / height, f"{explained(found)}\ncolumns: weight bits{zeros}", fontsize=7.5, va="top", color="#52606d")  # fmt: skip
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def explained(found: Sensitivity) -> str:
    """What the numbers are, in a line."""
    what = (
        "KL divergence of the softmax in nats" if found.unit == KL else "squared difference of the outputs / variance"
    )
    return f"{what}, each layer alone, {found.images} images"
