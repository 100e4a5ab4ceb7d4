"""MLflow's UI as a child process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from paretorch.results.tracking.charts import page
from paretorch.results.tracking.server import serve
from paretorch.results.tracking.store import local_store
from paretorch.results.tracking.tracker import Tracker

pytest.importorskip("mlflow")


def test_a_server_is_only_pointed_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve("http://me:secret@127.0.0.1:9/", None, 5000, "/#/experiments/3") == 0
    assert capsys.readouterr().out == "MLflow: http://***@127.0.0.1:9/#/experiments/3\n"


@pytest.mark.slow
def test_the_ui_opens_on_the_study_and_ends_with_ctrl_c(directory: Path) -> None:
    Tracker("digits", directory).start({}, {}, {})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = (*local_store(directory), port, page(directory))
        code = f"from paretorch.results.tracking.server import serve\nraise SystemExit(serve(*{arguments}))"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            said = [process.stdout.readline() for _ in range(3)]
            assert said[0].startswith(f"Port {port} is taken")
            link = said[2].removeprefix("Open ").strip()
            assert link.endswith(page(directory))
            with urllib.request.urlopen(link.partition("#")[0], timeout=30) as answer:
                assert b"MLflow" in answer.read()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(link.partition("#")[0], timeout=5)
