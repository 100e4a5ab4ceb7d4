"""The finalists: the front's members and the baseline on the test split, as files that a clean process has read.

The search selects on the validation split, so the best numbers there are partly luck. Each finalist meets the test split
once: its metric with an interval, and the *paired* difference to the baseline on the same samples, which is known two to
five times as exactly; its latency in turns with the baseline's. And its answers are compared with those of a simulation of
its graph (`runners.graphs.simulate`), so that what ships is known to compute what was meant. All of it lies in the study's folder:

    finalists.json    by recipe key, and for `baseline`: numbers with 95% intervals; {} for a file that did not compute
    finalists/*.npy   the metric of each on every test sample, so that any two can be compared

Both are written after every finalist, and none is measured twice.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ArtifactError, StudyError, TrialError
from ..objectives.measurement import Z95, Estimate
from ..objectives.objective import COSTS
from ..objectives.paired import paired
from ..results.candidate import Candidate
from ..runners.files import packing
from ..runners.files.atomic import read_scores, write_atomic, write_scores
from ..runners.graphs.onnx_export import batch_of
from ..runners.graphs.simulate import AGREE, CLOSE, INPUTS, Simulation, agreement
from ..runners.local import LocalRunner
from ..runners.task import Split, Task, batches, dataset, scores
from ..runners.timing.clean_process import process_for
from ..spaces.recipe import Recipe

if TYPE_CHECKING:
    from ..results.front import Front

BASELINE = "baseline"
START = 2.0  # seconds that the clean process takes to start
PARITY_SECONDS = 20.0  # after which a file is compared with its simulation on fewer inputs


class Listener(Protocol):
    def say(self, text: str) -> None: ...

    def phase(self, text: str) -> None: ...


def measure_finalists(
    directory: Path,
    members: Sequence[Candidate],
    path_of: Callable[[Candidate], Path],
    runner: LocalRunner,
    listener: Listener,
    parity_seconds: float = PARITY_SECONDS,
) -> None:
    """Measure the study's baseline and those members that were not measured yet, and write down each at once.

    `path_of` gives the packed file of a candidate. Without a test split the files are only compared with their
    simulation, in about `parity_seconds` at most. A file that does not compute is said and has no numbers.
    """
    task = runner.task
    known = read_finalists(directory)
    (directory / "finalists").mkdir(exist_ok=True)
    names = {c.recipe.key: f"candidate {c.number}" for c in members}
    paths: dict[str, Callable[[], Path]] = {c.recipe.key: lambda c=c: path_of(c) for c in members}  # type: ignore[misc]
    batch = batch_of(next(iter(runner.validation()))[0], runner.batch)
    base_path = directory / "baseline.safetensors"
    if task.test is not None:
        names, paths = {BASELINE: "the baseline"} | names, {BASELINE: lambda: base_path} | paths
        base = known.get(BASELINE, {}).get(task.metric_name)
        if base and base.n != len(dataset(task, "test")):  # type: ignore[arg-type]
            known = {}  # the test split is another one now

    def untested(key: str) -> bool:
        return task.test is not None and scores_on_test(directory, key) is None

    def incomplete(key: str) -> bool:
        entry = known.get(key)
        return entry is None or bool(entry and (untested(key) or (key != BASELINE and "parity_metric" not in entry)))

    left = [key for key in paths if incomplete(key)]
    with process_for(runner.target) as process:
        for position, key in enumerate(left, 1):
            place = f"({position} of {len(left)})"
            if key not in known or untested(key):
                known[key] = {}
            entry = known[key]
            try:
                path = paths[key]()
                if task.test is not None and not entry:
                    listener.phase(f"{names[key]} on the test split {place}")
                    each = process.scores(path, task, batches(task, "test"), runner.plan)
                    found = {task.metric_name: Estimate.of(each), "size_bytes": Estimate.exact(path.stat().st_size)}
                    if key != BASELINE:
                        ratio = process.ratio(path, base_path, batch, runner.threads, 4 * runner.seconds)
                        found |= _beside_baseline(directory, task.metric_name, each, ratio, runner.baseline_ms)
                    write_scores(_scores_path(directory, key), each)
                    entry |= found
                if key != BASELINE:
                    listener.phase(f"{names[key]} against its simulation {place}")
                    entry |= _parity(path.read_bytes(), task, parity_seconds)
            except (ArtifactError, TrialError) as error:
                listener.say(f"warning: {names[key]} has no numbers as a finalist: {error}")
            flat = {key: {name: vars(metric) for name, metric in entry.items()} for key, entry in known.items()}
            write_atomic(directory / "finalists.json", json.dumps(flat, indent=1))


def _beside_baseline(
    directory: Path, metric: str, each: NDArray[np.float64], ratio: Estimate, baseline_ms: float | None
) -> dict[str, Estimate]:
    """A finalist's numbers against the baseline's: latency, and the paired difference of the metric."""
    found = {"latency_ratio": ratio}
    if baseline_ms is not None:
        found["latency_ms"] = ratio.times(baseline_ms)
    if (base := scores_on_test(directory, BASELINE)) is not None:
        found[f"{metric}_difference"] = paired(each, base)
    return found


def _parity(packed: bytes, task: Task, seconds: float) -> dict[str, Estimate]:
    """A packed file in ONNX Runtime beside the simulation of its graph, on the same inputs, drawn from a split."""
    split: Split = "validation" if task.test is None else "test"
    targets: list[Tensor] = []

    def inputs() -> Iterator[Tensor]:
        end = time.perf_counter() + seconds
        for x, y in batches(task, split, batch_size=16, limit=INPUTS, shuffle=0):
            targets.append(y)
            yield x
            if time.perf_counter() > end:
                return

    found, simulated, outputs = agreement(packed, inputs())
    expected, real = (scores(task, given, torch.cat(targets)) for given in (simulated, outputs))
    known = {
        "parity_metric": paired(real, expected),
        "parity_simulated": Estimate.of(expected),
        "parity_mean_output": Estimate.exact(found.mean_difference),
        "parity_max_output": Estimate.exact(found.max_difference),
    }
    if found.answers:
        known["parity_agreement"] = Estimate.rate(round(found.agree * found.answers), found.answers)
    return known


def parity_failure(candidate: Candidate) -> str:
    """In what a finalist's file is not the network that was simulated; empty where it is, or where nobody has looked.

    At least 99.5% of 1,000 answers must be the same; of fewer the share must not be surely below that, by its 95%
    interval. (Without classes: the outputs within 5% of the largest, on average.) And the file's metric must not differ
    from the simulation's beyond chance (paired 95% interval) and beyond what the inputs tell of it (the 95% interval of
    the simulation's).
    """
    known, found = candidate.test, []
    if "parity_metric" not in known:
        return ""
    if (answers := known.get("parity_agreement")) is not None:
        if (answers.value if answers.n >= INPUTS else answers.high) < AGREE:
            found.append(f"{100 * answers.value:.2f}% of {answers.n} answers are the simulation's (at least {100 * AGREE:g}% are asked)")  # fmt: skip
    elif (mean := known["parity_mean_output"].value) > CLOSE:
        found.append(f"its outputs are {100 * mean:.3g}% of the largest off the simulation's on average (at most {100 * CLOSE:g}% are allowed)")  # fmt: skip
    difference, simulated = known["parity_metric"], known["parity_simulated"]
    chance = difference.low <= 0 <= difference.high
    if not chance and not simulated.low <= simulated.value + difference.value <= simulated.high:
        found.append(f"its metric is {difference.value:+.4g} [{difference.low:+.4g}, {difference.high:+.4g}] beside the simulation's {simulated.value:.4g}")  # fmt: skip
    return ", ".join(found)


def check_parity(candidate: Candidate) -> None:
    """Raises `StudyError` for a finalist whose file is not the network that was simulated."""
    if why := parity_failure(candidate):
        raise StudyError(f"candidate {candidate.number}: its file does not compute what was simulated: {why}; pick another one, or "
                         "take it all the same with --force (in Python force=True)")  # fmt: skip


def seconds_of_parity(packed: bytes, inputs: Tensor) -> float:
    """About how long the comparison of a file with its simulation takes on as many inputs as it gets at most."""
    simulation = Simulation(packing.unpack(packed))
    took = []
    for _ in range(2):
        begin = time.perf_counter()
        simulation(inputs)
        took.append(time.perf_counter() - begin)
    return min(PARITY_SECONDS, INPUTS * min(took) / len(inputs))


def _scores_path(directory: Path, key: str) -> Path:
    return directory / "finalists" / f"{key}.npy"


def scores_on_test(directory: Path | None, key: str) -> NDArray[np.floating] | None:
    """A finalist's metric on every test sample, by its recipe's key or `baseline`; None where it is not known."""
    return None if directory is None else read_scores(_scores_path(directory, key))


def read_finalists(directory: Path) -> dict[str, dict[str, Estimate]]:
    """What is known of a study's finalists, by recipe key and `baseline`; raises `StudyError` for a damaged file."""
    path = directory / "finalists.json"
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return {key: {name: Estimate(**entry) for name, entry in numbers.items()} for key, numbers in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise StudyError(f"{path} is damaged ({error}); delete it, and the same search measures the finalists again") from error  # fmt: skip


def with_tests(candidates: Sequence[Candidate], directory: Path) -> tuple[list[Candidate], Estimate | None]:
    """The candidates with their numbers on the test split, and the baseline's metric there."""
    known = read_finalists(directory)
    base = next((metric for name, metric in known.get(BASELINE, {}).items() if name not in COSTS), None)
    return [replace(c, test=known.get(c.recipe.key, {})) for c in candidates], base


# --- what the numbers say ---------------------------------------------------------------------------------------------


def clusters(front: Front) -> dict[int, int]:
    """Members that nothing tells apart: by a member's number that of the cheapest one of its cluster.

    From the cheapest member on, each joins the first cluster whose cheapest member it has no advantage over: the paired
    95% interval of their metrics on the test split holds zero or less, and the other costs that are objectives are not
    lower (a latency: its interval does not lie below). Else it begins a cluster of its own. So the cheapest one of a
    cluster can stand for all of it. The cheapest is the smallest in bytes; where these are no objective, that with the
    lowest first cost.

    The level is 5% for each pair, on purpose not corrected for the number of pairs: a correction makes larger clusters,
    and the mistake that costs something is to recommend a worse file as equal. Members without numbers on the test
    split are in no cluster, nor are those whose file is not what was simulated.
    """
    costs = [o.metric for o in front.objectives if o.metric in COSTS]
    first = "size_bytes" if "size_bytes" in costs or not costs else costs[0]
    found_scores = {
        m.number: s for m in front.members if (s := scores_on_test(front.directory, m.recipe.key)) is not None
    }
    known = [m for m in front.members if m.number in found_scores and m.test and not parity_failure(m)]
    sign = 1.0 if front.maximizes(front.quality) else -1.0
    heads: list[Candidate] = []
    found: dict[int, int] = {}

    def better(member: Candidate, head: Candidate) -> bool:
        mine, other = found_scores[member.number], found_scores[head.number]
        return mine.shape != other.shape or paired(sign * mine, sign * other).low > 0 or _cheaper(member, head, costs)

    for member in sorted(known, key=lambda m: (_cost(m, first).value, m.number)):
        head = next((head for head in heads if not better(member, head)), None)
        if head is None:
            heads.append(head := member)
        found[member.number] = head.number
    return found


def _cost(member: Candidate, name: str) -> Estimate:
    """A cost of a measured candidate, the latency as a finalist where it was timed as one."""
    assert member.measurement is not None
    return member.test.get(name) or member.measurement.metrics[name]


def _cheaper(member: Candidate, head: Candidate, costs: Sequence[str]) -> bool:
    return any(_cost(member, name).high < _cost(head, name).low for name in costs)


def optimism(front: Front) -> Estimate | None:
    """By how much the members lost more than the baseline from the validation to the test split, on average.

    Above zero selection has made them look better than they are. The 95% interval (normal; the two splits are
    independent, and on each of them every member meets the same samples) is there where all scores are.
    """
    name, directory = front.quality, front.directory
    members = [m for m in front.members if name in m.test and m.measurement and name in m.measurement.metrics]
    if not members or front.test_baseline is None or name not in front.baseline.metrics:
        return None
    sign = 1.0 if front.maximizes(name) else -1.0
    usual = front.baseline.value(name) - front.test_baseline.value
    value = sign * float(np.mean([m.measurement.value(name) - m.test[name].value - usual for m in members]))  # type: ignore[union-attr]
    if directory is None:
        return Estimate.exact(value)
    keys = [m.recipe.key for m in members]
    splits = (
        [read_scores(directory / "candidates" / f"{key}.npy") for key in (Recipe().key, *keys)],
        [scores_on_test(directory, key) for key in (BASELINE, *keys)],
    )
    variance = 0.0
    for base, *others in splits:
        if base is None or any(s is None or s.shape != base.shape for s in others):
            return Estimate.exact(value)
        d = np.mean([s.astype(np.float64) - base for s in others if s is not None], axis=0)
        variance += float(d.var(ddof=1)) / len(d) if len(d) > 1 else 0.0
    half = Z95 * math.sqrt(variance)
    return Estimate(value, value - half, value + half, len(members))


def described_clusters(front: Front) -> list[str]:
    """For people, a line for each cluster of several members."""
    lines = []
    for head in dict.fromkeys(front.clusters.values()):
        others = [f"#{number}" for number, its in front.clusters.items() if its == head and number != head]
        if others:
            lines.append(f"#{head} is recommended over {', '.join(others)}: cheaper, and in {front.quality} not told "
                         "apart on the test split (paired, 5% for each pair)")  # fmt: skip
    return lines


def described_optimism(front: Front) -> str:
    """For people: what selection on the validation split has made of the numbers there; empty when it is not known."""
    found = optimism(front)
    if found is None:
        return ""
    if front.quality == "accuracy":
        spread = f" ±{50 * (found.high - found.low):.2f}" if found.low < found.high else ""
        return f"Selection made the front look better by {100 * found.value:+.2f}{spread} points (validation less test, beyond the baseline's)"  # fmt: skip
    spread = f" ±{(found.high - found.low) / 2:.2g}" if found.low < found.high else ""
    return f"Optimism of selection: {found.value:+.4g}{spread} {front.quality}"
