"""The finalists: the front's members and the baseline on the test split, as files that a clean process has read.

The search selects on the validation split, so the best numbers there are partly luck. Each finalist meets the test
split once: its metric with an interval, and the *paired* difference to the baseline on the same samples, whose interval
is two to five times as narrow; its latency in turns with the baseline's. And its answers are compared with those of a
simulation of its graph (`runners.graphs.simulate`), so that the file that ships is known to compute what was meant.
Numbers and scores are kept in the study's folder (`results.folder`) after every finalist, and none is measured twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..errors import ArtifactError, TrialError
from ..objectives.measurement import Estimate
from ..objectives.paired import paired
from ..results.candidate import Candidate
from ..results.folder import BASELINE, StudyFolder
from ..runners.runner import CompareSimulation, MeasureFinalist, Runner
from .listener import Listener

START = 2.0  # seconds that the clean process takes to start
PARITY_SECONDS = 20.0  # after which a file is compared with its simulation on fewer inputs
PARITY_AT_LEAST = 2.0  # seconds for the comparison of a finalist with its simulation, however short the time

Finalists = dict[str, dict[str, Estimate]]


def measure_finalists(
    folder: StudyFolder,
    members: Sequence[Candidate],
    file_of: Callable[[Candidate], Path],
    runner: Runner,
    metric: str,
    samples: Mapping[str, int],
    latency_ms: float | None,
    listener: Listener,
    parity_seconds: float = PARITY_SECONDS,
) -> None:
    """Measure the study's baseline and those members that were not measured yet, and write down each at once.

    Without a test split the files are only compared with their simulation. A file that does not compute is reported and
    has no numbers.

    Args:
        folder: The study's.
        members: Of the front.
        file_of: Gives the packed file of a candidate.
        runner: Of the study's task.
        metric: Name of the task's metric.
        samples: By split the number of samples.
        latency_ms: What the baseline takes.
        listener: Hears what is done.
        parity_seconds: For the comparison of one file with its simulation, at most.
    """
    tests = samples.get("test")
    known = folder.read_finalists()
    if tests is not None and (base := known.get(BASELINE, {}).get(metric)) and base.n != tests:
        known = {}  # the test split is another one now
    names = {c.recipe.key: f"candidate {c.number}" for c in members}
    files: dict[str, Callable[[], Path]] = {c.recipe.key: _file(file_of, c) for c in members}
    if tests is not None:
        names, files = {BASELINE: "the baseline"} | names, {BASELINE: lambda: folder.baseline} | files

    def untested(key: str) -> bool:
        return tests is not None and folder.read_finalist_scores(key) is None

    def incomplete(key: str) -> bool:
        entry = known.get(key)
        return entry is None or bool(entry and (untested(key) or (key != BASELINE and "parity_metric" not in entry)))

    left = [key for key in files if incomplete(key)]
    for position, key in enumerate(left, 1):
        place = f"({position} of {len(left)})"
        if key not in known or untested(key):
            known[key] = {}
        entry = known[key]
        try:
            path = files[key]()
            if tests is not None and not entry:
                listener.phase(f"{names[key]} on the test split {place}")
                entry |= _on_test(folder, key, path, runner, metric, latency_ms)
            if key != BASELINE:
                listener.phase(f"{names[key]} against its simulation {place}")
                entry |= runner.submit(CompareSimulation(path.read_bytes(), parity_seconds)).result()
        except (ArtifactError, TrialError) as error:
            listener.say(f"warning: {names[key]} has no numbers as a finalist: {error}")
        folder.write_finalists(known)


def _file(file_of: Callable[[Candidate], Path], candidate: Candidate) -> Callable[[], Path]:
    return lambda: file_of(candidate)


def _on_test(
    folder: StudyFolder, key: str, path: Path, runner: Runner, metric: str, latency_ms: float | None
) -> dict[str, Estimate]:
    """A file's numbers on the test split, beside the baseline's there; its scores are written down."""
    against = None if key == BASELINE else folder.baseline
    scores, ratio = runner.submit(MeasureFinalist(path, against)).result()
    numbers = {metric: Estimate.of(scores), "size_bytes": Estimate.exact(path.stat().st_size)}
    if ratio is not None:
        numbers["latency_ratio"] = ratio
        if latency_ms is not None:
            numbers["latency_ms"] = ratio.times(latency_ms)
        if (base := folder.read_finalist_scores(BASELINE)) is not None:
            numbers[f"{metric}_difference"] = paired(scores, base)
    folder.write_finalist_scores(key, scores)
    return numbers
