"""`paretorch` as a process, and a task so small that a trial takes tens of milliseconds."""

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

TASK = '''
"""Noisy blobs of 6x6 pixels and a network of two layers, trained in a moment."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paretorch import Task


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 4, (count,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(count, 1, 6, 6, generator=generator), labels)


def network():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    x, y = blobs(128, 1).tensors
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def make(model=network, **more):
    return Task("blobs", model, train=blobs(128, 1), validation=blobs(100, 2), test=blobs(100, 3), **more)


def task():
    return make()
'''

CONFIG = """
name: blobs
task: task.py:task
budget: [size_bytes <= 60%, accuracy >= -20%]
space:
  weight_bits: [3, 4, 6, 8]
  sparsity: [0.0, 0.5]
  channels: [0.0, 0.25, 0.5]
  width: [1.0, 0.75]
  recovery: [batchnorm]
measure: {seconds: 0.002, calibration_images: 32}
search: {trials: 10}
"""


@dataclass
class Running:
    """A command that was started."""

    pid: int
    folder: Path
    stdout: Path
    stderr: Path
    warm: "Warm"

    def wait(self, seconds=120):
        code = self.warm.ask({"wait": self.pid, "seconds": seconds})
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.warm.ask({"wait": self.pid, "seconds": 20})
            pytest.fail(f"still running after {seconds} s:\n{self.output}")
        return Done(code, self.stdout.read_text(), self.stderr.read_text())

    @property
    def output(self):
        return self.stdout.read_text() + self.stderr.read_text()

    def until(self, condition, seconds=60):
        """Wait for a moment in the life of the process."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.005)

    def signal(self, number):
        os.kill(self.pid, number)


@dataclass
class Done:
    code: int
    stdout: str
    stderr: str

    @property
    def text(self):
        """Both streams on one line, for messages that were folded."""
        return " ".join((self.stdout + self.stderr).split())


class Warm:
    """Starts `paretorch` in the folder of one test; see `warm.py`."""

    def __init__(self):
        self.process = None
        self.lock = threading.Lock()
        self.numbers = itertools.count()

    def ask(self, request):
        with self.lock:
            if self.process is None:
                environment = os.environ | {
                    "OMP_NUM_THREADS": "1",
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "COLUMNS": "80",
                }
                environment.pop("MLFLOW_TRACKING_URI", None)
                self.process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("warm.py"))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
                self.process.stdout.readline()
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def close(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait(20)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """One MLflow database for all tests that do not need their own, which takes seconds to make."""
    return tmp_path_factory.mktemp("store") / "mlflow.db"


@pytest.fixture(scope="session")
def warm():
    server = Warm()
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def start(warm, folder, store):
    """Start a command and go on."""

    def begin(*arguments, file_bytes=None, cwd=None, own_store=False):
        env = {} if own_store else {"MLFLOW_TRACKING_URI": f"sqlite:///{store}"}
        number = next(warm.numbers)
        out, err = folder / f".stdout-{number}", folder / f".stderr-{number}"
        out.touch(), err.touch()
        request = {
            "arguments": [str(a) for a in arguments],
            "cwd": str(cwd or folder),
            "env": env,
            "stdout": str(out),
            "stderr": str(err),
            "file_bytes": file_bytes,
        }
        return Running(warm.ask(request), folder, out, err, warm)

    return begin


@pytest.fixture
def paretorch(start):
    """Run a command to its end; nobody ever sees a traceback, whatever is wrong."""

    def run(*arguments, code=0, **more):
        done = start(*arguments, **more).wait()
        assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        assert code in (None, done.code), done.stdout + done.stderr
        return done

    return run


def finished(study):
    """The candidates on disk, by number."""
    path = study / "trials.jsonl"
    text = path.read_text() if path.exists() else ""
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {r["candidate"]["number"]: r["candidate"] for r in records if "candidate" in r}


def runs(database, study=None):
    """Of a study in an MLflow store (of all without one): the status of the parents; number and status of the
    children.
    """
    connection = sqlite3.connect(database)
    rows = connection.execute(
        "SELECT r.run_uuid, r.status, p.value, n.value, d.value FROM runs r "
        "LEFT JOIN tags p ON p.run_uuid = r.run_uuid AND p.key = 'mlflow.parentRunId' "
        "LEFT JOIN tags n ON n.run_uuid = r.run_uuid AND n.key = 'paretorch.number' "
        "LEFT JOIN tags d ON d.run_uuid = r.run_uuid AND d.key = 'paretorch.study_dir' WHERE r.lifecycle_stage "
        "= 'active'"
    ).fetchall()
    connection.close()
    parents = {
        run: status
        for run, status, parent, _, where in rows
        if parent is None and study in (None, where and Path(where))
    }
    return list(parents.values()), [(int(n), status) for _, status, parent, n, _ in rows if parent in parents]


def partial_files(study):
    return [path for path in study.rglob("*") if path.name.endswith((".partial", ".part"))]


@pytest.fixture
def look():
    """What lies on the disk and in MLflow."""
    return SimpleNamespace(finished=finished, runs=runs, partial_files=partial_files)
