"""MLflow's UI on one store, as a child process that ends with Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import IO, NoReturn

from ...errors import StudyError
from .store import prepare_environment, without_password


def serve(uri: str, artifact_root: str | None, port: int, link: str = "/#/experiments") -> int:
    """Run MLflow's UI on a store until Ctrl-C, reachable from this machine only.

    A store that is a server already is only pointed at. When the port is taken a free one is chosen.

    Args:
        uri: of the store.
        artifact_root: where new experiments' artifacts belong.
        port: on 127.0.0.1.
        link: the page to point at, as `charts.page` gives it.

    Returns:
        The exit code of the UI; 0 after Ctrl-C.

    Raises:
        StudyError: the UI did not come up; with the last lines of its output.
    """
    if uri.startswith("http"):
        print(f"MLflow: {without_password(uri).rstrip('/')}{link}")
        return 0
    chosen = _free_port(port)
    if chosen != port:
        print(f"Port {port} is taken; using {chosen}.")
    with tempfile.TemporaryFile() as output:
        server = _start(uri, artifact_root, chosen, output)

        def stop(*_: object) -> NoReturn:
            raise KeyboardInterrupt

        # SIGINT too: a shell that starts a program in the background has it ignored.
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            print(f"Starting MLflow's UI on {without_password(uri)} ...", flush=True)
            _await(server, chosen, output)
            print(f"Open http://127.0.0.1:{chosen}{link}\nCtrl-C ends it.", flush=True)
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _end(server)


def _free_port(port: int) -> int:
    """The wanted port, or another one when it is taken."""
    for wanted in (port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", wanted))
                return int(probe.getsockname()[1])
    raise StudyError("no free port on 127.0.0.1")


def _start(uri: str, artifact_root: str | None, port: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    if artifact_root:
        command += ["--default-artifact-root", artifact_root]
    prepare_environment()
    # MLflow starts its web server by name, so the environment's programs must be on the path; the job runner would take
    # two gigabytes for nothing that a study uses.
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment = os.environ | {"PATH": os.pathsep.join(folders), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # Its own session: Ctrl-C reaches only us, and all of the server's processes are ended together.
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def _await(server: subprocess.Popen[bytes], port: int, output: IO[bytes], seconds: float = 180.0) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    output.seek(0)
    last = output.read().decode(errors="replace").strip().splitlines()[-5:]
    raise StudyError("MLflow's UI did not come up:\n  " + "\n  ".join(last or ["(it said nothing)"]))


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server with all its processes."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, ending)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
            return
