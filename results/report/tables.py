"""The numbers of a front in machine-readable form: rows, CSV and JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ...objectives.measurement import flat
from ..front import Front
from .cells import measured
from .view import View, view_of

if TYPE_CHECKING:
    import pandas as pd


def rows(front: Front) -> list[dict[str, Any]]:
    """The front's members as plain data, one row each, the smallest first."""
    view = view_of(front)
    out = []
    for member in view.members:
        candidate = member.candidate
        row: dict[str, Any] = {"number": candidate.number}
        for name in view.metrics:
            if (estimate := measured(candidate, name)) is not None:
                row |= flat({name: estimate})
                row[f"{name} against baseline"] = member.numbers[name].beside
        row |= {f"test_{name}": value for name, value in flat(candidate.test).items()}
        row |= member.verdicts
        row |= {"what": member.what, "label": candidate.label}
        out.append(row)
    return out


def csv_text(table: pd.DataFrame) -> str:
    """All candidates, the front's members first; `table` is `Front.table()`."""
    if len(table):
        table = table.sort_values("front", ascending=False, kind="stable")
    return str(table.to_csv(index=False))


def json_text(view: View) -> str:
    """The members with all measurements, the budget, the baseline and how many candidates are in each state."""
    return json.dumps(
        {
            "name": view.name,
            "objectives": [f"{'max' if o.maximize else 'min'} {o.metric}" for o in view.objectives],
            "budget": [{"limit": x.text, "metric": x.metric, "upper": x.upper, "value": x.value} for x in view.limits],
            "budget_lines": list(view.budget),
            "baseline": view.baseline.to_dict(),
            "test_baseline": vars(view.test_baseline) if view.test_baseline else None,
            "candidates": dict(view.outcomes.states),
            "hypervolume": view.hypervolume,
            "knee": view.knee.number if view.knee else None,
            "recommended": view.recommended.number if view.recommended else None,
            "members": [member.candidate.to_dict() | dict(member.verdicts) for member in view.members],
        },
        indent=1,
    )
