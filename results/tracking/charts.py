"""The saved view of MLflow's chart page on which a study opens, and the address of that page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .names import PARENT, accepted_name
from .store import saved_run

if TYPE_CHECKING:
    from ..front import Front


def view_key(run_id: str) -> str:
    """The name under which a study's view is saved in its experiment."""
    return f"paretorch-{run_id[:12]}"


def page(directory: Path) -> str:
    """The part of an MLflow address behind the server's that shows a study's candidates as charts."""
    known = saved_run(directory)
    base = "/#/experiments"
    if not known.get("run_id"):
        return f"{base}?workflowType=machine_learning"
    return (
        f"{base}/{known['experiment_id']}/runs?workflowType=machine_learning"
        f"&compareRunsMode=CHART&viewStateShareKey={view_key(known['run_id'])}"
    )


def view(front: Front, run_id: str) -> str:
    """The state of MLflow's chart page for a study, as its UI saves it.

    By default the page draws parent runs only. This state is internal to MLflow's UI and nothing depends on it: a UI
    that does not know it any more shows its default page.
    """
    quality = front.quality
    costs = [
        name for name in ("size_bytes", "latency_ms", "macs") if name in front.baseline.metrics and name != quality
    ]
    shown = [f"metrics.`{name}`" for name in (quality, *costs)]
    shown += [f"tags.`paretorch.{name}`" for name in ("front", "state", "reason", "what")]
    state = {
        "searchFilter": f"tags.`paretorch.role` = 'trial' and tags.`{PARENT}` = '{run_id}'",
        "orderByKey": f"metrics.`{quality}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": shown,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [
            _section("paretorch-front", "All candidates", max(1, len(costs[:2]))),
            _section("paretorch-choices", "Choices that went with the metric", 1),
        ],
        "compareRunCharts": _charts(front, quality, costs[:2]),
    }
    return json.dumps(state)


def _section(uuid: str, name: str, columns: int) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "name": name,
        "columns": columns,
        "cardHeight": 420,
        "display": True,
        "isReordered": False,
        "deleted": False,
        "isGenerated": False,
    }


def _charts(front: Front, quality: str, costs: list[str]) -> list[dict[str, Any]]:
    """The metric over each cost, and the most influential choices as parallel coordinates."""
    common = {"metricSectionId": "paretorch-front", "deleted": False, "isGenerated": False, "runsCountToCompare": 500}
    charts: list[dict[str, Any]] = [
        {
            **common,
            "uuid": f"paretorch-{cost}",
            "type": "SCATTER",
            "xaxis": {"key": cost, "type": "METRIC"},
            "yaxis": {"key": quality, "type": "METRIC"},
        }
        for cost in costs
    ]
    charts.append(
        {
            **common,
            "metricSectionId": "paretorch-choices",
            "uuid": "paretorch-parallel",
            "type": "PARALLEL",
            "selectedParams": [accepted_name(name) for name in _influential(front, quality)],
            "selectedMetrics": [*costs, quality],
            "showAllRuns": True,
        }
    )
    return charts


def _influential(front: Front, metric: str, count: int = 6) -> list[str]:
    """The choices that are correlated most strongly with the metric, the strongest first."""
    import numpy as np

    seen = [
        (c.picks, c.measurement.value(metric))
        for c in front.candidates
        if c.picks and c.measurement and metric in c.measurement.metrics
    ]
    if len(seen) < 3:
        return []
    values = np.array([value for _, value in seen])
    strength = {}
    for name in sorted({name for picks, _ in seen for name in picks}):
        chosen = np.array([picks.get(name, 0) for picks, _ in seen], dtype=float)
        if chosen.std() > 0 and values.std() > 0:
            strength[name] = abs(float(np.corrcoef(chosen, values)[0, 1]))
    return sorted(strength, key=lambda name: -strength[name])[:count]
