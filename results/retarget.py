"""The front of a finished study, measured on another target from the stored files, without a new search.

The file of each member is timed on the target interleaved with the baseline's, for as long as finalists are timed, and
its outputs are compared with ONNX Runtime's on the same inputs. The study's own objectives and limits decide which
members are on the front of the new target, with the latency measured there (and the metric, where the task is given).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ExportFailed, StudyError
from ..objectives.measurement import Estimate, Measurement
from ..objectives.objective import COSTS
from ..objectives.pareto import nondominated
from ..runners.evaluate import evaluate
from ..runners.files import packing
from ..runners.files.atomic import write_atomic
from ..runners.settings import MeasurementSettings
from ..runners.targets.catalog import DEFAULT, as_target
from ..runners.targets.target import Network, Target
from ..runners.task import Task, batches
from ..runners.timing.compare import verdict
from .candidate import OK, OVER_BUDGET, Candidate
from .export import settings_of
from .folder import StudyFolder
from .front import Front, open_front

VERSION = 1
_INPUTS, _CHUNK = 256, 32  # how many inputs outputs are compared on, and how many of them at a time


@dataclass(frozen=True)
class TargetAgreement:
    """How well the outputs of a file on the target agree with ONNX Runtime's.

    Args:
        inputs: The number of inputs.
        top1: The share of inputs with the same class.
        difference: The largest difference as a share of the largest output.
    """

    inputs: int
    top1: float
    difference: float


@dataclass(frozen=True)
class MemberOnTarget:
    """A member of the front on the other target.

    Args:
        number: The candidate's number.
        recipe: Its recipe in one line.
        before: Its latency as a share of the baseline's on the study's own target.
        latency_ms: The latency on the other target; None when it does not run there.
        ratio: That latency as a share of the baseline's on the same target; None when it does not run there.
        verdict: The ratio in words: faster, slower, or no significant difference.
        agreement: How its outputs compare with ONNX Runtime's; None for a target whose latency is computed.
        metric: The task's metric on the target and the validation split; None where it was not measured.
        on_front: Whether it is on the front of the other target.
        reason: Why it does not run there, or which limit it exceeds there.
    """

    number: int
    recipe: str
    before: Estimate
    latency_ms: Estimate | None = None
    ratio: Estimate | None = None
    verdict: str = ""
    agreement: TargetAgreement | None = None
    metric: Estimate | None = None
    on_front: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Retargeted:
    """The front of a study on another target.

    Args:
        study: The name of the study's folder.
        judged_by: The metrics of the study's objectives and limits.
        found_on: The target that the study searched on.
        target: The other target.
        environment: Versions and devices on which it was measured.
        protocol: The settings of the measurement.
        inputs: The inputs on which outputs were compared, for people.
        baseline_ms: The baseline's latency on the other target.
        members: The members of the study's front.
        pareto: The numbers of the members that are on the front of the metric and the latency alone.
        timed: Whether latencies were measured; False where the target computes them.
    """

    study: str
    judged_by: tuple[str, ...]
    found_on: str
    target: str
    environment: Mapping[str, str]
    protocol: MeasurementSettings
    inputs: str
    baseline_ms: Estimate
    members: tuple[MemberOnTarget, ...]
    pareto: tuple[int, ...]
    timed: bool

    def to_dict(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    def write(self, study: Path) -> Path:
        """Write `targets/NAME.json` into the study's folder, whole or not at all."""
        path = StudyFolder(study).target(self.target)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path


def retarget(
    study: Path, target: Target, task: Task | None = None, say: Callable[[str], None] = lambda text: None
) -> Retargeted:
    """Measure the front of a study on another target.

    Args:
        study: The study's folder.
        target: The other target.
        task: The study's task: its metric is measured on the target too, and outputs are compared on its validation
            inputs. Without it, outputs are compared on random inputs.
        say: Called with a line of text before each member is measured.

    Raises:
        StudyError: The study or the baseline's file is missing, or the front is empty.
        TargetError: The target cannot be used.
        ExportFailed: The baseline does not run on the target.
    """
    front = open_front(study)
    if not front.members:
        raise StudyError(f"the front of {study} is empty: there is nothing to measure")
    folder = StudyFolder(study)
    protocol, _ = settings_of(folder, folder.read_about())
    baseline = _onnx(folder.baseline)
    if baseline is None:
        raise StudyError(f"{folder.baseline} is missing, and every latency is relative to it; restore the file")
    reference = as_target(DEFAULT)
    inputs = list(_inputs(reference.load(baseline, 1), _shape(baseline), task))
    batch = np.resize(inputs[0], (protocol.batch, *inputs[0].shape[1:]))
    say("the baseline")
    network = target.load(baseline, protocol.threads)
    baseline_latency = target.baseline_latency(baseline, batch, 2 * protocol.seconds, protocol.threads)
    moved, candidates = [], []
    for position, member in enumerate(front.members, 1):
        say(f"candidate {member.number} ({position} of {len(front.members)})")
        result = MemberOnTarget(member.number, member.recipe.describe(), _before(member, front.baseline))
        steps = [step for network in member.recipe.networks() for step in network.steps]
        refused = [reason for step in steps if (reason := target.supports(step))]
        model = None if refused else _onnx(folder.candidates.packed(member.recipe))
        if model is None:
            moved.append(replace(result, reason=refused[0] if refused else "its file is not there any more"))
            continue
        try:
            latency, ratio = target.latency(
                model, network, batch, baseline_latency.value, 4 * protocol.seconds, protocol.threads
            )
            result = replace(result, latency_ms=latency, ratio=ratio, verdict=verdict(ratio))
            if target.milliseconds is None:
                runs = target.load(model, protocol.threads)
                result = replace(result, agreement=_agreement(runs, reference.load(model, protocol.threads), inputs))
                if task is not None:
                    result = replace(result, metric=Estimate.of(evaluate(runs, task, batches(task, "validation"))))
        except ExportFailed as error:
            moved.append(replace(result, reason=str(error)))
            continue
        candidates.append(_there(member, result, front, baseline_latency, task))
        moved.append(replace(result, reason=candidates[-1].reason))
    there = replace(front, candidates=tuple(candidates), baseline=_with(front.baseline, latency_ms=baseline_latency))
    on = {member.number for member in there.members}
    return Retargeted(
        study=front.directory.name if front.directory else study.name,
        judged_by=tuple(
            dict.fromkeys([*(o.metric for o in front.objectives), *(x.metric for x in front.budget.limits)])
        ),
        found_on=_name(protocol.target),
        target=target.name,
        environment=dict(target.environment),
        protocol=protocol,
        inputs=f"{sum(map(len, inputs))} {'inputs of the validation split' if task else 'made-up inputs (normal)'}",
        baseline_ms=baseline_latency,
        members=tuple(replace(member, on_front=member.number in on) for member in moved),
        pareto=_pareto(there),
        timed=target.milliseconds is None,
    )


def _name(target: str | Mapping[str, Any]) -> str:
    return target if isinstance(target, str) else str(target.get("name"))


def _onnx(path: Path) -> bytes | None:
    """The ONNX model in a packed file; None when there is no file.

    Raises:
        ArtifactError: The file is damaged.
    """
    return packing.onnx_bytes(path.read_bytes()) if path.exists() else None


def _shape(model: bytes) -> tuple[int, ...]:
    """The shape of one input."""
    import onnx

    sizes = onnx.load_from_string(model).graph.input[0].type.tensor_type.shape.dim
    return tuple(size.dim_value for size in sizes[1:])


def _inputs(reference: Network, shape: Sequence[int], task: Task | None) -> Iterator[NDArray[np.float32]]:
    """The batches on which outputs are compared.

    Raises:
        StudyError: The inputs of the task have another shape.
    """
    if task is None:
        rng = np.random.default_rng(0)
        for _ in range(0, _INPUTS, _CHUNK):
            yield rng.standard_normal((_CHUNK, *shape)).astype(np.float32)
        return
    seen = 0
    for x, _ in batches(task, "validation"):
        if tuple(x.shape[1:]) != tuple(shape):
            raise StudyError(
                f"the task {task.name!r} has inputs of shape {list(x.shape[1:])}, and the study's files take "
                f"{list(shape)}; name "
                "the study's task"
            )
        yield x.numpy()
        seen += len(x)
        if seen >= _INPUTS:
            return


def _agreement(network: Network, reference: Network, inputs: Sequence[NDArray[np.float32]]) -> TargetAgreement:
    mine, theirs = (np.concatenate([run(x) for x in inputs]) for run in (network, reference))
    classes = [outputs.reshape(len(outputs), -1).argmax(1) for outputs in (mine, theirs)]
    largest = float(np.abs(theirs).max()) or 1.0
    return TargetAgreement(
        len(mine), float((classes[0] == classes[1]).mean()), float(np.abs(mine - theirs).max()) / largest
    )


def _before(member: Candidate, baseline: Measurement) -> Estimate:
    assert member.measurement is not None
    # The latency of a finalist is more precise: it was timed for longer.
    latency = member.test.get("latency_ms", member.measurement.metrics["latency_ms"])
    base = baseline.value("latency_ms")
    return Estimate(latency.value / base, latency.low / base, latency.high / base, latency.n)


def _with(measurement: Measurement, **metrics: Estimate) -> Measurement:
    return replace(measurement, metrics={**measurement.metrics, **metrics})


def _there(member: Candidate, result: MemberOnTarget, front: Front, baseline: Estimate, task: Task | None) -> Candidate:
    """The member as a candidate on the other target: inside the limits there, or over them."""
    assert member.measurement is not None
    assert result.latency_ms is not None
    new = {"latency_ms": result.latency_ms} | ({task.metric_name: result.metric} if task and result.metric else {})
    measured = _with(member.measurement, **new)
    base = front.baseline.values | {"latency_ms": baseline.value}
    excess = front.budget.excess(measured.values, base)
    over = [text for text, value in excess.items() if value > 0]
    reason = f"over {', '.join(over)}" if over else ""
    return replace(member, measurement=measured, excess=excess, state=OVER_BUDGET if over else OK, reason=reason)


def _pareto(front: Front) -> tuple[int, ...]:
    """The numbers of the members that are nondominated in the metric and the latency."""
    quality = next((o for o in front.objectives if o.metric not in COSTS), None)
    if quality is None:
        return ()
    inside = [(c, c.measurement) for c in front.candidates if c.state == OK and c.measurement]
    base = front.baseline.value(quality.metric)
    points = [(quality.loss(m.value(quality.metric), base), m.value("latency_ms")) for _, m in inside]
    return tuple(c.number for (c, _), kept in zip(inside, nondominated(points), strict=True) if kept)


def table_rows(data: Mapping[str, Any]) -> list[dict[str, object]]:
    """The content of a `targets/NAME.json` as plain rows, for MLflow's table.

    >>> member = {"number": 3, "recipe": "weights 4 bit", "before": {"value": 0.5}, "latency_ms": None, "ratio": None,
    ...           "verdict": "", "agreement": None, "metric": None, "on_front": False, "reason": "no unit"}
    >>> table_rows({"members": [member]})[0]["reason"]
    'no unit'
    """

    def part(entry: Mapping[str, Any] | None, key: str) -> object:
        return "-" if entry is None else entry[key]

    return [
        {
            "number": m["number"],
            "on front": m["on_front"],
            "ratio before": m["before"]["value"],
            "latency_ms": part(m["latency_ms"], "value"),
            "ratio": part(m["ratio"], "value"),
            "ratio low": part(m["ratio"], "low"),
            "ratio high": part(m["ratio"], "high"),
            "verdict": m["verdict"],
            "same class": part(m["agreement"], "top1"),
            "metric": part(m["metric"], "value"),
            "reason": m["reason"],
            "recipe": m["recipe"],
        }
        for m in data["members"]
    ]
