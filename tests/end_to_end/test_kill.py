"""A search that is killed at any moment, interrupted, or run beside another one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def kill_and_resume(look, begin, study, trials, moments):
    """Kill the search at each of the moments, then let it end; nothing may be lost.

    A moment is how many trials are finished and how many seconds have passed since, so that it means the same on a slow
    machine; the trial, its files, the journal or MLflow are then somewhere in the middle.
    """
    seen = {}
    for count, seconds in moments:
        running = begin()
        deadline = time.monotonic() + 120
        while len(look.finished(study)) < count:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(seconds)
        running.kill()
        known = look.finished(study)
        assert {n: known.get(n) for n in seen} == seen, "a finished candidate was lost or changed"
        seen = known
    assert 0 < len(seen) < trials, f"the kills came too early or too late to show anything: {len(seen)}"
    begin().end()
    found = look.finished(study)
    assert {n: found.get(n) for n in seen} == seen
    assert sorted(found) == list(range(trials))
    assert len({json.dumps(c["recipe"], sort_keys=True) for c in found.values()}) == trials
    parents, children = look.runs(study / "mlflow.db")
    assert parents == ["FINISHED"]
    assert sorted(number for number, _ in children) == list(range(trials))
    assert {status for _, status in children} <= {"FINISHED", "FAILED"}
    assert not look.partial_files(study)
    return len(seen)


class Forked:
    """A search in the warm process's child."""

    def __init__(self, running):
        self.running = running

    def kill(self):
        self.running.signal(signal.SIGKILL)
        assert self.running.wait().code == -signal.SIGKILL

    def end(self):
        done = self.running.wait()
        assert done.code == 0, done.stderr


class Command:
    """A search as it is typed."""

    def __init__(self, arguments, cwd):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paretorch.cli", *arguments],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def kill(self):
        self.process.kill()
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL

    def end(self):
        output, _ = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, output


def test_killed_three_times(start, folder, look):
    study = folder / "studies" / "blobs"
    command = ("search", "config.yaml", "--trials", "14", "--set", "budget=size_bytes <= 60%")
    kill_and_resume(look, lambda: Forked(start(*command, own_store=True)), study, 14, ((0, 0.7), (2, 0.05), (9, 0.01)))


@pytest.mark.slow
def test_killed_ten_times(folder, look):
    """The whole command, interpreter and imports included, killed at ten random moments of a search of 40 trials."""
    study = folder / "studies" / "blobs"
    arguments = ["search", "config.yaml", "--trials", "40", "--set", "budget=size_bytes <= 60%"]
    draw = random.Random(7)
    # Two while it starts, eight during trials: a trial takes some 0.2 seconds.
    moments = [(0, draw.uniform(2, 6)) for _ in range(2)]
    moments += [(count, draw.uniform(0, 0.4)) for count in sorted(draw.sample(range(1, 37), 8))]
    kept = kill_and_resume(look, lambda: Command(arguments, folder), study, 40, moments)
    print(
        f"{kept} of 40 trials were finished when the last kill came; moments {[(n, round(s, 2)) for n, s in moments]}"
    )


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_among_the_finalists(start, paretorch, folder):
    """The clean process that measures them goes with the search, and what it had measured stays."""
    command = ("search", "config.yaml", "--trials", "9", "-s", "measure.seconds=0.5")
    path = folder / "studies" / "blobs" / "finalists.json"
    running = start(*command)
    running.until(path.exists)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    assert children, "the clean process"
    running.signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    known = json.loads(path.read_text())
    assert "accuracy" in known["baseline"]
    paretorch(*command)
    found = json.loads(path.read_text())
    whole = {key: entry for key, entry in known.items() if key == "baseline" or "parity_metric" in entry}
    assert {key: found[key] for key in whole} == whole
    assert len(found) > len(whole)
    assert all("parity_metric" in entry for key, entry in found.items() if key != "baseline")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(start, paretorch, folder, store, look, number):
    study = folder / "studies" / "blobs"
    running = start("search", "config.yaml", "--trials", "500")
    running.until(lambda: len(look.finished(study)) >= 9)
    running.signal(number)
    done = running.wait()
    assert done.code == 130
    assert "Traceback" not in done.stdout + done.stderr
    assert "trials; nothing is lost. The same command goes on." in done.text
    assert "export studies/blobs --pick knee" in done.text
    assert (study / "report" / "front.html").exists()
    parents, children = look.runs(store, study)
    before = look.finished(study)
    assert parents == ["KILLED"]
    assert len(children) == len(before)
    assert not look.partial_files(study)
    again = paretorch("search", "config.yaml", "--trials", str(len(before) + 1))
    assert f"{len(before)} trials finished" in again.text
    after = look.finished(study)
    assert len(after) == len(before) + 1
    assert {n: after[n] for n in before} == before
    assert look.runs(store, study)[0] == ["FINISHED"]


def test_interrupted_before_the_first_trial(start, paretorch, folder):
    (folder / "slow.py").write_text(
        "import time\nfrom task import make\n\n\ndef task():\n    open('here', 'w').close()\n    "
        "time.sleep(30)\n    return make()\n"
    )
    running = start("search", "config.yaml", "--set", "task=slow.py:task")
    running.until((folder / "here").exists)
    running.signal(signal.SIGINT)
    done = running.wait()
    assert done.code == 130
    assert "Traceback" not in done.stdout + done.stderr
    assert "Interrupted after 0 trials" in done.text
    assert not (folder / "studies" / "blobs").exists()


def test_two_searches_into_one_store(start, folder, look):
    options = ("--trials", "10", "--set", f"mlflow.uri=sqlite:///{folder}/shared.db")
    running = [start("search", "config.yaml", *options, "--set", f"name={name}") for name in ("one", "two")]
    for done in [search.wait() for search in running]:
        assert done.code == 0, done.stdout + done.stderr
    parents, children = look.runs(folder / "shared.db")
    assert parents == ["FINISHED", "FINISHED"]
    assert sorted(number for number, _ in children) == sorted([*range(10), *range(10)])


def test_a_second_search_of_the_same_study_is_refused(start, paretorch, folder, look):
    study = folder / "studies" / "blobs"
    running = start("search", "config.yaml", "--trials", "500")
    running.until(lambda: len(look.finished(study)) >= 1)
    done = paretorch("search", "config.yaml", code=2)
    assert f"{study} is in use by another search (process {running.pid}); wait for its end, stop it" in done.text
    paretorch("front", study)
    running.signal(signal.SIGINT)
    assert running.wait().code == 130
