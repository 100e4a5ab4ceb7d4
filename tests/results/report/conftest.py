"""A study of eleven candidates as fronts of many shapes, and what all tests of the report share."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.results.candidate import Candidate
from paretorch.results.front import Front
from paretorch.runners.files.atomic import write_scores
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover

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
    trials = [
        (Recipe(), base, "untouched"),
        (recipe(16), one(950, 51_000, 1.01), "FP16"),
        (recipe(8), one(946, 27_000, 0.5), "uniform 8 bit"),
        (recipe(4), one(890, 15_000, 0.5), "uniform 4 bit"),
        (Recipe((Prune("layer0.conv", 3),)), one(880, 60_000, 0.7), "pruned 50%"),
        (recipe(5, epochs=2.0), one(944, 19_000, 0.45), ""),
        (recipe(3, epochs=2.0), one(905, 12_000, 0.44), ""),
        (recipe(2, epochs=1.0), one(400, 9_000, 0.44), ""),
        (recipe(6, epochs=1.0), one(930, 22_000, 0.6), ""),
    ]
    candidates = []
    for number, (what, measurement, label) in enumerate(trials):
        excess = budget.excess({name: m.value for name, m in measurement.metrics.items()}, values)
        over = [text for text, value in excess.items() if value > 0]
        state, why = ("over_budget", f"over {', '.join(over)}") if over else ("ok", "")
        candidates.append(Candidate(number, what, state, why, measurement, excess, {"a": number}, label))
    candidates.append(
        Candidate(9, recipe(7), "failed", "ExportFailed: <b>layer1</b> [red]has[/red] no | shape\nline two")
    )
    excess = {budget.limits[0].text: 0.25} if budget.limits else {}
    candidates.append(Candidate(10, recipe(6), "over_budget", "refused by arithmetic", None, excess))
    objectives = ("accuracy", "size_bytes", "latency_ms") if latency else ("accuracy", "size_bytes")
    front = Front(
        tuple(candidates), tuple(Objective.parse(o.replace("accuracy", metric)) for o in objectives), budget, base
    )
    if not test:
        return front
    members = {member.number for member in front.members}
    # Each loses 14 images in a thousand from validation to test, the baseline 10.
    tested = [
        replace(c, test={metric: Estimate.rate(round(1000 * c.measurement.value(metric)) - 14, 1000)})
        if c.number in members and c.measurement
        else c
        for c in candidates
    ]
    return replace(front, candidates=tuple(tested), test_baseline=Estimate.rate(940, 1000))


CASES = {
    "untested": study(),
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


@pytest.fixture
def fronts() -> dict[str, Front]:
    """Fronts by what is special about them."""
    return CASES


@pytest.fixture(params=CASES)
def front(request: pytest.FixtureRequest) -> Front:
    """Each of the fronts."""
    return CASES[request.param]


@pytest.fixture
def finalists(tmp_path: Path) -> Front:
    """A front whose members met the test split: all slower than the baseline, all but the first in one cluster.

    The first one's file is not what was simulated.
    """
    tested, known = study(test=True), {}
    (tmp_path / "finalists").mkdir()
    for place, member in enumerate(tested.members):
        write_scores(tmp_path / "finalists" / f"{member.recipe.key}.npy", np.arange(1000) % 10 < 9)
        slower = Estimate(1.25, 1.2, 1.3, 40)
        known[member.number] = replace(
            member,
            test={
                **member.test,
                "accuracy_difference": Estimate(-0.004, -0.01, 0.002, 1000),
                "latency_ratio": slower,
                "latency_ms": slower,
                "parity_metric": Estimate(0, -0.001, 0.001, 1000),
                "parity_agreement": Estimate.rate(1000 if place else 980, 1000),
                "parity_simulated": Estimate.rate(900, 1000),
            },
        )
    candidates = tuple(known.get(c.number, c) for c in tested.candidates)
    return replace(tested, candidates=candidates, directory=tmp_path, objectives=tested.objectives[:2])


@pytest.fixture
def printed() -> Callable[[object], str]:
    """What a table prints in a terminal of 80 columns."""
    from rich.console import Console

    def text(table: object) -> str:
        stream = io.StringIO()
        Console(file=stream, width=80, color_system=None).print(table)
        return stream.getvalue()

    return text
