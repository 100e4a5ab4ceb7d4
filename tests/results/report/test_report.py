"""The report of a study: tables, pictures, the page and the text."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paretorch.errors import ParetorchError
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Limit, Objective
from paretorch.results.candidate import Candidate
from paretorch.results.front import Front
from paretorch.results.report.report import (
    FILES,
    front_table,
    hypervolume_curve,
    least_violating_table,
    needed,
    rows,
    write_report,
)
from paretorch.runners.files.atomic import write_scores
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LAYERS = [f"layer{i}.conv" for i in range(12)]


def measured(hits: int, size: float, latency: float | None = 0.5, metric: str = "accuracy") -> Measurement:
    metrics = {metric: Estimate.rate(hits, 1000), "size_bytes": Estimate.exact(size)}
    if latency is not None:
        metrics["latency_ms"] = Estimate(latency, latency * 0.97, latency * 1.03, 40)
    return Measurement(metrics, {"evaluate": 1.0})


def recipe(bits: int, **more: float) -> Recipe:
    steps = [Quantize(layer, bits, 8 if bits <= 8 else 32) for layer in LAYERS]
    return Recipe((*steps, Recover("finetune", **more)) if more else tuple(steps))


def study(
    limits: tuple[str, ...] = ("size_bytes <= 50%",), latency: bool = True, metric: str = "accuracy", test: bool = False
) -> Front:
    def one(hits: int, size: float, time: float) -> Measurement:
        return measured(hits, size, time if latency else None, metric)

    base = one(950, 100_000, 1.0)
    budget = Budget.parse([limit.replace("accuracy", metric) for limit in limits])
    values = {name: m.value for name, m in base.metrics.items()}
    told = [
        (Recipe(), base, "untouched"), (recipe(16), one(950, 51_000, 1.01), "FP16"), (recipe(8), one(946, 27_000, 0.5), "uniform 8 bit"),
        (recipe(4), one(890, 15_000, 0.5), "uniform 4 bit"), (Recipe((Prune("layer0.conv", 3),)), one(880, 60_000, 0.7), "pruned 50%"),
        (recipe(5, epochs=2.0), one(944, 19_000, 0.45), ""), (recipe(3, epochs=2.0), one(905, 12_000, 0.44), ""),
        (recipe(2, epochs=1.0), one(400, 9_000, 0.44), ""), (recipe(6, epochs=1.0), one(930, 22_000, 0.6), ""),
    ]  # fmt: skip
    found = []
    for number, (what, measurement, label) in enumerate(told):
        excess = budget.excess({name: m.value for name, m in measurement.metrics.items()}, values)
        over = [text for text, value in excess.items() if value > 0]
        state, why = ("over_budget", f"over {', '.join(over)}") if over else ("ok", "")
        found.append(Candidate(number, what, state, why, measurement, excess, {"a": number}, label))
    found.append(Candidate(9, recipe(7), "failed", "ExportFailed: <b>layer1</b> [red]has[/red] no | shape\nline two"))
    found.append(Candidate(10, recipe(6), "over_budget", "refused by arithmetic", None, {budget.limits[0].text: 0.25} if budget.limits else {}))  # fmt: skip
    objectives = ("accuracy", "size_bytes", "latency_ms") if latency else ("accuracy", "size_bytes")
    front = Front(tuple(found), tuple(Objective.parse(o.replace("accuracy", metric)) for o in objectives), budget, base)
    if not test:
        return front
    members = {member.number for member in front.members}
    # Each loses 14 images in a thousand from validation to test, the untouched network 10.
    tested = [
        replace(c, test={metric: Estimate.rate(round(1000 * c.measurement.value(metric)) - 14, 1000)})
        if c.number in members and c.measurement
        else c
        for c in found
    ]
    return replace(front, candidates=tuple(tested), test_baseline=Estimate.rate(940, 1000))


def test_the_sensitivity_is_shown_when_it_was_measured(tmp_path: Path) -> None:
    front = replace(study(), directory=tmp_path)
    assert "sensitivity." not in write_report(front, tmp_path / "report", name="a study")
    (tmp_path / "sensitivity.png").write_bytes(b"\x89PNG and so on")
    assert "![the sensitivity of each layer](../sensitivity.png)" in write_report(
        front, tmp_path / "report", name="a study"
    )
    page = (tmp_path / "report" / "front.html").read_text()
    (inside,) = re.findall(r"<img [^>]*src='data:image/png;base64,([^']*)'>", page)
    assert base64.b64decode(inside) == b"\x89PNG and so on"
    elsewhere = write_report(front, tmp_path / "a b" / "plot", name="a study")
    assert "](../../sensitivity.png)" in elsewhere


def printed(table: object, width: int = 80) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return text.getvalue()


CASES = {
    "whole": study(test=True),
    "unlimited": study(()),
    "empty": study(("size_bytes <= 2%", "accuracy >= -0.1%")),
    "one member": replace(study(), candidates=study().candidates[:3]),
    "no candidate": replace(study(), candidates=()),
    "nothing measured": replace(study(), candidates=study().candidates[9:]),
    "no latency": study(latency=False),
    "another metric": study(metric="f1_score", limits=("size_bytes <= 50%", "f1_score >= 0.5")),
    "an error to minimise": replace(
        study(metric="error_rate"), objectives=(Objective.parse("min error_rate"), Objective.parse("size_bytes"))
    ),
    "costs alone": replace(study(), objectives=(Objective.parse("size_bytes"), Objective.parse("latency_ms"))),
}


@pytest.mark.parametrize("name", CASES)
def test_every_study_can_be_reported(name: str, tmp_path: Path) -> None:
    front = CASES[name]
    text = write_report(front, tmp_path / "deep" / "report", name=name)
    folder = tmp_path / "deep" / "report"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert (folder / "report.md").read_text() == text
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "front.png").stat().st_size > 10_000
    data = json.loads((folder / "front.json").read_text())
    assert [Candidate.from_dict(member) for member in data["members"]] == list(front.members)
    assert data["baseline"] == front.baseline.to_dict()
    page = (folder / "front.html").read_text()
    assert "Plotly.newPlot" in page
    assert len(page) > 1_000_000, "plotly is not inside the page"
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", page), "the page asks for another file"
    assert "Traceback" not in text
    for table in (front_table(front), least_violating_table(front)):
        assert max(len(line.rstrip()) for line in printed(table).splitlines()) <= 80


def test_the_text_tells_a_colleague_what_was_found(tmp_path: Path) -> None:
    front = replace(CASES["whole"], directory=tmp_path / "my study")
    text = write_report(
        front, tmp_path, name="digits", config_text="trials: 11\n", budget_lines=["size_bytes <= 50%"], notes=["Mind the gap."]
    )  # fmt: skip
    knee = front.knee()
    assert f"The knee of the front is **#{knee.number}: accuracy" in text
    assert "| accuracy | 95.00% [93.47%, 96.19%] |" in text
    assert "19 kB, 19% of baseline" in text
    assert "x faster" in text
    assert "beaten by #6" in text
    assert "(within the intervals)" in text
    assert "dominated: 0.420 by the trivial baselines alone, 0.496 with the search" in text
    assert "over size_bytes <= 50%" in text
    assert "1 of them refused by arithmetic" in text
    assert "- #9: ExportFailed: &lt;b>layer1&lt;/b> [red]has[/red] no | shape line two" in text
    assert "cannot be told apart from the best" in text
    assert "the members lost 0.40 points more than the baseline" in text
    assert f"paretorch export '{tmp_path}/my study' --pick knee --to deploy" in text
    assert 'paretorch.load("deploy")' in text
    block = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert block is not None
    assert Recipe.from_dict(json.loads(block[1])) == knee.recipe
    assert max(map(len, block[1].splitlines())) < 150
    assert "Mind the gap." in text
    assert "```yaml\ntrials: 11\n```" in text


def test_an_empty_front_shows_what_the_limits_would_have_to_be(tmp_path: Path) -> None:
    front = CASES["empty"]
    text = write_report(front, tmp_path, name="digits")
    assert "No candidate kept the budget" in text
    assert "`size_bytes <= 12%`" in text
    assert "--pick 7 " in text or "--pick 6 " in text
    assert "size_bytes <= 12%" in printed(least_violating_table(front), 80)
    nothing = write_report(CASES["nothing measured"], tmp_path, name="digits")
    assert "`size_bytes <= 62.5%`" in nothing, "the predicted size of a refused recipe"


@pytest.mark.parametrize(
    "text",
    ["size_bytes <= 25%", "size_bytes <= -75%", "size_bytes <= 10kB", "size_bytes <= 3MB", "latency_ms <= 0.2", "accuracy >= -1%",
     "accuracy >= 0.99", "macs <= 1M", "loss <= 0.3", "f1 >= +2%"],
)  # fmt: skip
@pytest.mark.parametrize("value", [1e-7, 0.0312499, 0.93, 1.0, 12.3456, 27_499.5, 1_999_999, 123_456_789.0])
def test_the_limit_that_would_be_kept_is_kept(text: str, value: float) -> None:
    if text.startswith("accuracy") and value > 1:
        value = value % 1  # it lies between 0 and 1
    written = Limit.parse(needed(Limit.parse(text), value, 0.95 if value < 2 else value * 1.7))
    assert written.excess(value, 0.95 if value < 2 else value * 1.7) <= 0
    assert written.metric == Limit.parse(text).metric


def test_speed_inside_the_spread_is_no_gain() -> None:
    front = study()
    slow = replace(front.candidates[8], measurement=measured(960, 22_000, 1.02))
    told = {row["number"]: row for row in rows(replace(front, candidates=(front.candidates[5], slow)))}
    assert told[8]["latency_ms against baseline"] == "same speed"
    assert told[5]["latency_ms against baseline"] == "2.22x faster"


def test_the_curve_is_the_fronts_hypervolume() -> None:
    front = study()
    assert hypervolume_curve(front) == pytest.approx([front.hypervolume(c.number + 1) for c in front.candidates])


def test_the_terminal_table_shows_text_as_it_is() -> None:
    odd = replace(study().candidates[5], label="[bold]x[/bold]")
    text = printed(front_table(replace(study(), candidates=(odd,))))
    assert "[bold]x[/bold]" in text.replace("\n", "").replace(" ", "") or "[bold]x" in text
    assert "±" in text
    assert "2.22x faster" in text
    assert "(knee)" in text


def test_the_csv_holds_every_candidate_the_front_first(tmp_path: Path) -> None:
    import pandas as pd

    front = CASES["whole"]
    write_report(front, tmp_path, name="digits")
    table = pd.read_csv(tmp_path / "front.csv")
    assert len(table) == len(front.candidates)
    assert set(table["number"][: len(front.members)]) == {m.number for m in front.members}
    assert [Recipe.from_dict(json.loads(text)).key for text in table["recipe"]] == [
        front.candidates[n].recipe.key for n in table["number"]
    ]


def test_a_report_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(study(), tmp_path, name="first")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(study(()), tmp_path, name="second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
def test_a_browser_without_a_network_draws_the_page(tmp_path: Path) -> None:
    write_report(CASES["whole"], tmp_path, name="digits <study>")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1400", "--virtual-time-budget=10000", "--dump-dom",
        (tmp_path / "front.html").as_uri(),
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert page.count('class="main-svg"') >= 2, "plotly drew nothing"
    assert len(re.findall(r'<path class="point[" ]', page)) >= 2 * len(CASES["whole"].members)
    assert "digits &lt;study&gt;" in page
    assert "untouched network" in page
    assert "<h2>The front</h2>" in page


def test_errors_are_ours() -> None:
    """An empty front has no knee; the report must not ask for one."""
    with pytest.raises(ParetorchError):
        CASES["empty"].knee()


def test_finalists_are_shown_with_what_is_known_of_them(tmp_path: Path) -> None:
    """The paired difference, the clean process's latency, clusters, slower ones, and files that are another network."""
    found = study(test=True)
    members = found.members
    (tmp_path / "finalists").mkdir()
    tested = {}
    for place, member in enumerate(members):
        write_scores(tmp_path / "finalists" / f"{member.recipe.key}.npy", np.arange(1000) % 10 < 9)
        known = {"accuracy_difference": Estimate(-0.004, -0.01, 0.002, 1000), "latency_ratio": Estimate(1.25, 1.2, 1.3, 40),
                 "latency_ms": Estimate(1.25, 1.2, 1.3, 40), "parity_metric": Estimate(0, -0.001, 0.001, 1000),
                 "parity_agreement": Estimate.rate(1000 if place else 980, 1000), "parity_simulated": Estimate.rate(900, 1000)}  # fmt: skip
        tested[member.number] = replace(member, test={**member.test, **known})
    front = replace(found, candidates=tuple(tested.get(c.number, c) for c in found.candidates), directory=tmp_path,
                    objectives=found.objectives[:2])  # fmt: skip
    first, second, *_ = front.members
    shown = printed(front_table(front))
    assert "1.25x slower" in shown
    assert "-0.40 ±0.60" in shown
    assert "simulated)" in shown
    text = write_report(front, tmp_path / "report", name="a study")
    others = ", ".join(f"#{m.number}" for m in front.members[2:])
    told = f"#{second.number} is recommended over {others}: cheaper, and in accuracy not told apart on the test split (paired, 5% for each pair)."
    assert f"- {told}" in text
    assert told in html.unescape((tmp_path / "report" / "front.html").read_text())
    assert f"- Slower than the untouched network: {', '.join(f'#{m.number}' for m in front.members)}." in text
    assert f"- #{first.number} is not what was simulated: 98.00% of 1000 answers" in text
    assert "-0.40 ±0.60 against the baseline" in text
    assert "--pick recommended" in text
    data = json.loads((tmp_path / "report" / "front.json").read_text())
    assert [m["speed"] for m in data["members"]] == ["slower"] * len(front.members)
    assert [m.get("cluster") for m in data["members"]] == [None, *[second.number] * (len(front.members) - 1)]
    table = (tmp_path / "report" / "front.csv").read_text().splitlines()
    assert {"speed", "cluster", "parity", "test_accuracy_difference_low", "test_latency_ratio"} <= set(
        table[0].split(",")
    )
    row = rows(front)[1]
    assert (row["cluster"], row["latency_ms against baseline"]) == (second.number, "1.25x slower")
