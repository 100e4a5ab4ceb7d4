"""A sensitivity for people: it fits the terminal, and every number is there."""

import io
import math

import pytest
from rich.console import Console

from paretorch.results.report.heatmap import FILES, heat_png, heat_rows, heat_tables, short, write_sensitivity
from paretorch.runners.sensitivity import KL, SQUARED, Sensitivity, SensitivityRow


def found(layers=3, levels=4, value=0.01, unit=KL):
    rows = [
        SensitivityRow(f"features.{i}.block.deep.conv{i}", bits, ratio, value * (i + 1), 10)
        for i in range(layers)
        for ratio in (0.0, 0.125)
        for bits in range(2, 2 + levels)
    ]
    return Sensitivity(tuple(rows), unit, 64)


@pytest.mark.parametrize("value", [0.0, 1e-120, 9.6e-7, 0.00996, 0.0994, 0.996, 9.96, 99.6, 999.6, 9.6e8, math.inf])
def test_a_number_takes_four_characters(value):
    text = short(value)
    assert len(text) <= 4
    assert float(text) == pytest.approx(value, rel=0.2, abs=1e-99)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("layers", [1, 60])
def test_it_fits_the_terminal_and_nothing_is_lost(width, layers):
    sensitivity = found(layers, 7)
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    for table in heat_tables(sensitivity, width):
        console.print(table)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    cells = [word for line in text.splitlines() for word in line.split()[1:] if "conv" in line]
    assert sorted(cells) == sorted(short(row.divergence) for row in sensitivity.rows)
    assert "-" not in cells
    assert text.count("12.5%") >= 7
    assert "…" not in text


def test_a_pattern_stands_among_the_shares():
    sensitivity = Sensitivity(
        (
            SensitivityRow("a", 32, 0.7, 0.5, 1),
            SensitivityRow("a", 8, "2:4", 0.25, 1),
            SensitivityRow("a", 8, 0.0, 0.1, 1),
        ),
        KL,
        1,
    )
    stream = io.StringIO()
    Console(file=stream, width=80).print(*heat_tables(sensitivity))
    assert stream.getvalue().split() == ["bits", "8", "8", "32", "zeros", "2:4", "70%", "a", "0.10", "0.25", "0.50"]
    assert heat_rows(sensitivity)[0]["8 bits, 2:4 zeros"] == 0.25
    assert heat_png(sensitivity, "patterns").startswith(b"\x89PNG")


def test_a_level_that_a_layer_lacks_is_a_dash():
    rows = (SensitivityRow("a", 4, 0.0, 0.5, 1), SensitivityRow("b", 8, 0.5, math.inf, 1))
    stream = io.StringIO()
    Console(file=stream, width=80).print(*heat_tables(Sensitivity(rows, KL, 1)))
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert lines == [["bits", "4", "8"], ["zeros", "50%"], ["a", "0.50", "-"], ["b", "-", "inf"]]


def test_rows_for_a_table():
    rows = (
        SensitivityRow("a", 4, 0.0, 0.5, 1),
        SensitivityRow("b", 32, 0.5, math.inf, 1),
        SensitivityRow("b", 4, 0.5, 2.0, 1),
    )
    assert heat_rows(Sensitivity(rows, KL, 1)) == [
        {"layer": "a", "4 bits": 0.5, "50% zeros": "-", "4 bits, 50% zeros": "-"},
        {"layer": "b", "4 bits": "-", "50% zeros": math.inf, "4 bits, 50% zeros": 2.0},
    ]
    assert heat_rows(Sensitivity((), KL, 1)) == []


def test_files(tmp_path):
    sensitivity = found()
    write_sensitivity(sensitivity, tmp_path / "deep", name="a [study]")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == sorted(FILES)
    assert Sensitivity.from_json((tmp_path / "deep" / "sensitivity.json").read_text()) == sensitivity


@pytest.mark.parametrize("value", [0.0, 1e-12, math.inf])
def test_a_picture_of_anything(value):
    assert heat_png(found(2, 1, value, SQUARED), "x").startswith(b"\x89PNG")
