"""The finalists: the front's members and the baseline, measured on the test split from their files in a clean process.

The search selects on the validation split, so the best numbers there are optimistic. Each finalist is measured once on
the test split: its metric with an interval, and the *paired* difference to the baseline on the same samples, whose
interval is two to five times narrower. Its latency is timed interleaved with the baseline's. Its outputs are compared
with a simulation of its graph (`runners.graphs.simulate`), to verify that the file that ships computes what was
intended. Numbers and scores are stored in the study's folder (`results.folder`) after every finalist, and none is
measured twice.
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
from ..runners.settings import PARITY_SECONDS
from .listener import Listener

START = 2.0  # seconds that the clean process takes to start
PARITY_AT_LEAST = 2.0  # seconds for the same comparison even if the study's time is used up

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
    """Measure the baseline and every member that was not measured yet, and store each result at once.

    Without a test split the files are only compared with their simulation. A file that does not run is reported and
    gets no numbers.

    Args:
        folder: The study's folder.
        members: The members of the front.
        file_of: Returns the packed file of a candidate.
        runner: The runner of the study's task.
        metric: The name of the task's metric.
        samples: The number of samples of each split.
        latency_ms: The baseline's latency; None where it is unknown.
        listener: Follows the progress.
        parity_seconds: The maximum time for the comparison of one file with its simulation.
    """
    tests = samples.get("test")
    known = folder.read_finalists()
    if tests is not None and (base := known.get(BASELINE, {}).get(metric)) and base.n != tests:
        known = {}  # the test split has changed
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
    """Measure a file on the test split and compare it with the baseline there; its scores are stored."""
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
