"""The numbers that ship with a file: what was measured, on which split, how, and beside what.

A `Record` is the plain data of an artifact's `measurements.json`. `compare` tells whether two of them agree: exact
numbers must be equal, a metric must lie inside the recorded interval, and a latency is compared as its ratio to the
baseline that was timed beside it, because absolute times on two machines, or on one machine on two days, say little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import ArtifactError
from ..objectives.display import against, show, spread
from ..objectives.measurement import Estimate, Measurement
from .settings import MeasurementSettings
from .targets.catalog import TARGETS

# The share by which the ratio of two latencies differs between processes, beyond its interval within one process.
_BETWEEN_RUNS = 0.05


_ON_CPU = tuple(name for name, entry in TARGETS.items() if entry.on_cpu)


@dataclass(frozen=True)
class RecordRow:
    """One measured number of a file, beside the baseline's.

    Args:
        metric: What was measured, such as `accuracy` or `size_bytes`.
        split: The split whose inputs were used; empty where none are needed.
        estimate: The number with its interval.
        baseline: The same number of the original model; None where it has none.
        protocol: In words how it was measured.
    """

    metric: str
    split: str
    estimate: Estimate
    baseline: Estimate | None
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        base = None if self.baseline is None else asdict(self.baseline)
        return {
            "metric": self.metric,
            "split": self.split or None,
            **asdict(self.estimate),
            "baseline": base,
            "protocol": self.protocol,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecordRow:
        base = data["baseline"]
        return cls(
            str(data["metric"]),
            str(data["split"] or ""),
            _metric(data),
            None if base is None else _metric(base),
            str(data["protocol"]),
        )

    @property
    def name(self) -> str:
        """The metric and its split as people read it: `accuracy, test`."""
        return f"{self.metric}, {self.split}" if self.split and self.metric != "latency_ms" else self.metric

    def change(self) -> str:
        """The difference to the baseline: `4.08%`, `-0.41 points`, `1.3x faster`."""
        if self.baseline is None:
            return ""
        return against(self.metric, self.estimate, self.baseline).removesuffix(" of baseline")


def _metric(data: Mapping[str, Any]) -> Estimate:
    return Estimate(float(data["value"]), float(data["low"]), float(data["high"]), int(data["n"]))


@dataclass(frozen=True)
class Record:
    """All that is known of one file.

    Args:
        name: The name of the file, such as `candidate 12`.
        task: The name of the task.
        rows: The measured numbers.
        protocol: The measurement settings; None where an older paretorch did not write them down.
        budget: The limits that the file was searched for, such as `size_bytes <= 25%`.
        over_budget: By limit, by how much the file exceeds it.
        check: What `artifact.probe` gave for the file.
    """

    name: str
    task: str
    rows: tuple[RecordRow, ...]
    protocol: MeasurementSettings | None = None
    budget: tuple[str, ...] = ()
    over_budget: Mapping[str, float] = field(default_factory=dict)
    check: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without `check`, which `artifact.write` adds."""
        return {
            "name": self.name,
            "task": self.task,
            "metrics": [row.to_dict() for row in self.rows],
            "protocol": None if self.protocol is None else asdict(self.protocol),
            "budget": list(self.budget),
            "over_budget": dict(self.over_budget),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Read the record of a `measurements.json` of any version.

        Raises:
            ArtifactError: The data is something else.
        """
        try:
            if "candidate" in data:
                return _from_version_1(data)
            protocol = data.get("protocol")
            return cls(
                name=str(data.get("name", "")),
                task=str(data.get("task", "")),
                rows=tuple(RecordRow.from_dict(row) for row in data.get("metrics", ())),
                protocol=None if protocol is None else MeasurementSettings(**protocol),
                budget=tuple(data.get("budget", ())),
                over_budget=dict(data.get("over_budget", {})),
                check=data.get("check"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"measurements.json holds no measurements of paretorch: {error!r}") from error


def _from_version_1(data: Mapping[str, Any]) -> Record:
    """The record of an artifact of version 1, which held the candidate as the journal did, and no protocol."""
    candidate = data["candidate"]
    test = {name: Estimate(**entry) for name, entry in candidate["test"].items()}
    measurement, base = (Measurement.from_dict(entry) for entry in (candidate["measurement"], data["baseline"]))
    return Record(
        name=f"candidate {candidate['number']}",
        task="",
        rows=rows(measurement, base, test=test),
        budget=tuple(data["budget"]),
        over_budget=dict(data["over_budget"]),
    )


def rows(
    measurement: Measurement,
    base: Measurement,
    protocol: MeasurementSettings | None = None,
    *,
    test: Mapping[str, Estimate] | None = None,
    test_base: Estimate | None = None,
    box: float | None = None,
) -> tuple[RecordRow, ...]:
    """A file's measurement as rows.

    Args:
        measurement: What was measured of the file on the validation split.
        base: The same of the baseline.
        protocol: The measurement settings; None where they are not known.
        test: What `LocalRunner.measure_again` gave for the file on the test split, or a study for a finalist
            (`results.parity`).
        test_base: The baseline's metric on the test split.
        box: Seconds that the latency in `measurement` was measured for.
    """
    test = test or {}
    parts: list[RecordRow] = []
    for name, metric in measurement.metrics.items():
        beside = base.metrics.get(name)
        if name == "latency_ms":
            # Where a file was timed twice, the longer time counts.
            again = test.get(name)
            seconds = box if again is None else None if protocol is None else 4 * protocol.seconds
            clean = "latency_ratio" in test
            parts.append(
                RecordRow(name, "validation", again or metric, beside, _timing(protocol, seconds, beside, clean))
            )
        elif metric.n:
            parts.append(RecordRow(name, "validation", metric, beside, _scoring(protocol, "validation", metric)))
            if name in test:
                parts.append(RecordRow(name, "test", test[name], test_base, _scoring(protocol, "test", test[name])))
        else:
            parts.append(RecordRow(name, "", metric, beside, _EXACT.get(name, "exact")))
    scored = (
        "test"
        if any(metric.n and name in test for name, metric in measurement.metrics.items() if name != "latency_ms")
        else "validation"
    )
    for name, metric in test.items():
        if name not in measurement.metrics:
            beside, split = (Estimate.exact(1.0), "validation") if name == "latency_ratio" else (None, scored)
            parts.append(RecordRow(name, split, metric, beside, _FINALIST.get(name, _PAIRED)))
    return tuple(parts)


_PAIRED = (
    "the metric less the untouched network's on the same samples; 95% interval for pairs (Bonett & Price 2012 where "
    "scores are 0 or 1, else normal)"
)
_FINALIST = {
    "latency_ratio": "the latency as a share of the untouched network's, timed as latency_ms says; 95% interval",
    "parity_agreement": "the share of equal answers of the packed file in ONNX Runtime and of a simulation of its "
    "graph; 95% interval",
    "parity_metric": "the metric of the packed file less that of the simulation on the same inputs; 95% interval for "
    "pairs",
    "parity_simulated": "the metric of the simulation on these inputs; 95% interval",
    "parity_mean_output": "how far the outputs are off the simulation's, as a share of its largest, on average",
    "parity_max_output": "the same, at most",
}


_EXACT = {
    "size_bytes": "the length of weights.safetensors, which holds the whole model; exact",
    "onnx_bytes": "the length of model.onnx; exact",
    "zstd_bytes": "the length of the packed file entropy-coded by zstd in the shortest of three forms, level 19 for "
    "networks "
    f"of up to {1 << 19:,} weights and level 1 for larger ones; exact for one version of zstd",
    "macs": "multiply-adds for one input, counted from the layers' shapes; exact",
}


def _scoring(protocol: MeasurementSettings | None, split: str, metric: Estimate) -> str:
    runtime = (protocol or MeasurementSettings()).runtime
    return (
        f"the mean over the {metric.n} samples of the {split} split, computed by {runtime} from the packed file "
        "read back; "
        "95% interval"
    )


def _timing(
    protocol: MeasurementSettings | None, seconds: float | None, base: Estimate | None, clean: bool = False
) -> str:
    if protocol is None:
        return "in ONNX Runtime on the CPU, in turns with the untouched network; 95% interval"
    many = f"{protocol.batch} inputs" if protocol.batch > 1 else "one input"
    if not isinstance(protocol.target, str):
        return (
            f"a run on {many}, computed layer by layer as a roofline from the profile of "
            f"{protocol.target.get('name')}: what the hardware "
            "could do at best; exact"
        )
    clock = "the thread's CPU time" if protocol.threads == 1 and protocol.target in _ON_CPU else "the wall clock"
    place = protocol.runtime + (" on the CPU" if protocol.target in _ON_CPU else "")
    baseline_text = "" if base is None else f" times the untouched network's {base.value:.4g} ms"
    box = protocol.seconds if seconds is None else seconds
    turns = f"in turns with the untouched network within a time box of {box:g} s"
    if clean:
        turns = (
            f"in a clean process, pinned, in random order with the untouched network, until ±1% or {box:g} s are over"
        )
    return (
        f"a run on {many} of the validation split in {place}, {protocol.threads} "
        f"thread{'s' * (protocol.threads > 1)}, {clock}; {turns}; the median of the pairs' ratios{baseline_text}; "
        "95% interval"
    )


@dataclass(frozen=True)
class RecordComparison:
    """A recorded number beside the same number measured now.

    Args:
        name: The name of the row.
        recorded: The recorded number, as people read it.
        now: The number now, as people read it.
        verdict: The outcome in words.
        agrees: Whether the two are the same within what the measurement can tell.
    """

    name: str
    recorded: str
    now: str
    verdict: str
    agrees: bool


def compare(recorded: Sequence[RecordRow], now: Sequence[RecordRow]) -> list[RecordComparison]:
    """Compare the rows that both hold."""
    fresh = {(row.metric, row.split): row for row in now}
    return [_compared(row, fresh[row.metric, row.split]) for row in recorded if (row.metric, row.split) in fresh]


def _compared(then: RecordRow, now: RecordRow) -> RecordComparison:
    name, old, new = then.metric, then.estimate, now.estimate
    texts = [f"{show(name, row.estimate.value)} {spread(name, row.estimate)}".rstrip() for row in (then, now)]
    if name == "latency_ms" and then.baseline is not None and now.baseline is not None:
        (low, high), (other_low, other_high) = _ratio(then), _ratio(now)
        agrees = other_low <= high * (1 + _BETWEEN_RUNS) and low <= other_high * (1 + _BETWEEN_RUNS)
        texts = [f"{text}, {row.change()}" for text, row in zip(texts, (then, now), strict=True)]
        verdict = "same speed as recorded" if agrees else "DIFFERS: slower" if other_low > high else "DIFFERS: faster"
    elif not old.n:
        agrees = old.value == new.value
        if not agrees and texts[0] == texts[1]:
            texts = [f"{row.estimate.value:,.15g}" for row in (then, now)]
        verdict = "the same" if agrees else "DIFFERS"
    else:
        agrees = old.low <= new.value <= old.high
        verdict = "inside the interval" if agrees else f"DIFFERS by {against(name, new, old)}"
        if new.value == old.value:
            verdict = "the same"
    return RecordComparison(then.name, texts[0], texts[1], verdict, agrees)


def _ratio(row: RecordRow) -> tuple[float, float]:
    """The interval of a latency as a share of the baseline latency."""
    assert row.baseline is not None
    return row.estimate.low / row.baseline.value, row.estimate.high / row.baseline.value


def compare_outputs(recorded: Mapping[str, Any] | None, now: Mapping[str, Any]) -> RecordComparison | None:
    """Compare the outputs of a file for the fixed pseudo-random inputs with the recorded ones.

    Args:
        recorded: What `artifact.probe` gave when the file was written.
        now: What it gives now.

    Returns:
        The comparison; None where nothing was recorded.
    """
    if not recorded:
        return None
    then, outputs = list(recorded["outputs"]), list(now["outputs"])
    largest, tolerance = float(recorded["largest"]), float(recorded["tolerance"])
    same_shape = recorded["shape"] == now["shape"] and len(then) == len(outputs)
    # Two NaN at the same place are equal here.
    apart = [abs(a - b) for a, b in zip(then, outputs, strict=False) if not (a == b or (a != a and b != b))]
    worst = max((float("inf") if gap != gap else gap for gap in apart), default=0.0) / (largest or 1.0)
    agrees = same_shape and worst <= tolerance
    told = f"{100 * worst:.2g}% off" if same_shape else f"shape {now['shape']}"
    verdict = (
        "the same" if agrees and not worst else f"within {100 * tolerance:g}% of the largest" if agrees else "DIFFERS"
    )
    return RecordComparison("outputs", f"{len(then)} of {recorded['shape']}", told, verdict, agrees)


def changed_environment(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The differences between two environments (processor, versions), a line each."""
    return [
        f"{key}: {recorded[key]} then, {now[key]} now"
        for key in recorded
        if key in now and recorded[key] != now[key] and key != "platform"
    ]
