"""The progress of a study: a candidate's number is the same on its line as on the front."""

import io

import pytest
from rich.console import Console

from paretorch.cli.watcher import Steps, Watcher
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.results.candidate import Candidate
from paretorch.results.front import Front
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize


def measured(metric, value, size):
    numbers = {metric: Estimate.rate(round(100 * value), 100), "size_bytes": Estimate.exact(size)}
    return Measurement(numbers | {"latency_ms": Estimate.exact(size / 1e6), "macs": Estimate.exact(1e6)})


def front_of(candidates, metric="accuracy"):
    objectives = (Objective(metric, True), Objective("size_bytes", False))
    return Front(tuple(candidates), objectives, Budget(), measured(metric, 0.95, 200_000))


def printed(*finished, front, terminal=False):
    """What a watcher writes of trials that finish, each `(candidate, done, total, eta)`."""
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, highlight=False, color_system=None)
    watcher = Watcher(console)
    with watcher.watching():
        for candidate, done, total, eta in finished:
            watcher.finished(candidate, front, done, total, eta)
    return console.file.getvalue()


@pytest.fixture
def trials():
    recipe = Recipe((Quantize("fc", 4),))
    return [
        Candidate(0, Recipe(), "over_budget", "too large", measured("accuracy", 0.95, 200_000), label="untouched"),
        Candidate(7, recipe, "ok", measurement=measured("accuracy", 0.94, 50_000)),
        Candidate(41, recipe, "failed", "it diverged\nat step 3"),
    ]


def test_a_line_has_the_number_and_the_progress(trials):
    front = front_of(trials)
    finished = [(trials[0], 1, 40, 30.0), (trials[1], 8, 40, 0.0), (trials[2], 40, 40, 0.0)]
    lines = [line.split() for line in printed(*finished, front=front).splitlines()]
    assert [line[:3] for line in lines] == [["#0", "1/40", "over"], ["#7", "8/40", "front"], ["#41", "40/40", "failed"]]
    assert [member.number for member in front.members] == [7]
    assert lines[1][3:9] == ["94.00%", "50", "kB", "25%", "0.05", "ms"]
    assert lines[0][-3:] == ["(about", "30s", "left)"]
    assert lines[2][3:] == ["it", "diverged", "at", "step", "3"]


def test_the_live_table_has_the_same_number(trials):
    shown = printed((trials[1], 8, 40, 12.0), front=front_of(trials), terminal=True)
    row = next(line for line in shown.splitlines() if "94.00%" in line)
    assert row.split()[:2] == ["7", "front"]
    assert "8/40 trials, 1 on the front, about 12s left" in shown


def test_any_rate_is_a_percentage():
    candidate = Candidate(0, Recipe(), "ok", measurement=measured("macro_f1", 0.5, 1000))
    assert " 50.00% " in printed((candidate, 1, 1, 0.0), front=front_of([candidate], "macro_f1"))


def test_steps_print_now_and_then():
    console = Console(file=io.StringIO(), width=80, color_system=None)
    steps = Steps(Watcher(console), every=0.0)
    steps(0, 4, "conv1")
    steps(2, 4, "conv2")
    first, second = console.file.getvalue().splitlines()
    assert first == "0/4 conv1"
    assert second.startswith("2/4 conv2, about ")
