"""A registered candidate where neither paretorch nor torch is installed: loaded, and served over HTTP, pickle
forbidden.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest

# All that paretorch needs and MLflow does not, so that nothing of it can be used by chance.
ABSENT = ("torch", "functorch", "paretorch", "optuna", "onnxscript", "safetensors", "typer", "plotly")
COMMANDS = {"mlflow": "from mlflow.cli import cli as main", "uvicorn": "from uvicorn.main import main"}


def absent(name: str) -> bool:
    """Whether an entry of site-packages stays out; a .pth file would bring in what is installed in place."""
    return name.startswith((*ABSENT, "__editable__", "onnx-", "onnx_")) or name == "onnx" or name.endswith(".pth")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """An environment of its own, with the packages of this one but for paretorch and torch; no download."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "env", symlinks=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    for home in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(home).iterdir():
            if not absent(path.name.lower()) and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    for name, code in COMMANDS.items():
        script = folder / "env" / "bin" / name
        script.write_text(f"#!{folder}/env/bin/python\n{code}\nmain()\n")
        script.chmod(0o755)
    return folder


@pytest.fixture
def clean(elsewhere, store):
    """The variables of a shell in that environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW"))}
    return kept | {
        "PATH": f"{elsewhere}/env/bin:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{store}",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def once():
    return SimpleNamespace(study=None, printed="")


@pytest.fixture
def registered(once, paretorch, folder):
    """A study of a few trials, with its knee registered as `blobs@champion`."""
    if once.study is None:
        paretorch("search", "config.yaml", "--trials", "9")
        study = folder / "studies" / "blobs"
        done = paretorch("register", study, "--name", "blobs", "--alias", "champion")
        once.study, once.printed = study, done.stdout
    return once


@pytest.fixture
def expected(registered, tmp_path):
    """Inputs, and what the exported file gives for them here."""
    import numpy as np

    from paretorch.results.front import open_front
    from paretorch.runners.targets.runtime import session

    front = open_front(registered.study)
    path = front.export("knee", tmp_path / "deploy")
    x = np.random.default_rng(0).normal(size=(7, 1, 6, 6)).astype(np.float32)
    return x, session((path / "model.onnx").read_bytes()).run(None, {"input": x})[0]


LOAD = """
import importlib.util, json, sys
for name in ("torch", "torchvision", "paretorch"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        assert error.name == name
    else:
        raise AssertionError(f"{name} is here")
    assert importlib.util.find_spec(name) is None
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("models:/blobs@champion")
print(json.dumps(model.predict(np.array(json.load(sys.stdin), np.float32)).tolist()))
"""


def test_it_loads_without_paretorch_and_torch(registered, expected, clean, tmp_path):
    x, outputs = expected
    done = subprocess.run(
        ["python", "-c", LOAD],
        input=json.dumps(x.tolist()),
        env=clean,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == outputs.tolist()


def post(address, content):
    request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"]


def test_it_is_served_without_paretorch_and_torch(registered, expected, clean, tmp_path):
    """By the very command that is printed, but for the port."""
    x, outputs = expected
    (command,) = re.findall(r"^  (mlflow models serve .*) -p 5001$", registered.printed, re.MULTILINE)
    (example,) = re.findall(r" -d @(\S+) http://127.0.0.1:5001/invocations$", registered.printed, re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    log = tmp_path / "served.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command.split(), "-p", str(port)], env=clean, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/ping", timeout=60) as answer:
                if answer.status == 200:
                    break
            time.sleep(0.1)
        found = post(f"{address}/invocations", json.dumps({"inputs": x.tolist()}).encode())
        assert found == outputs.tolist()
        assert len(post(f"{address}/invocations", Path(example).read_bytes())[0]) == 4
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(f"{address}/invocations", b'{"inputs": [[1, 2]]}')
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_what_register_prints(registered, paretorch, store):
    lines = registered.printed.splitlines()
    assert re.fullmatch(r"registered candidate \d+ \(.+\) as version 1 of blobs", lines[0])
    assert lines[1] == "alias champion: version 1"
    assert f"  export MLFLOW_TRACKING_URI=sqlite:///{store}" in lines
    assert "inputs are float32 [batch, 1, 6, 6]:" in registered.printed
    other = paretorch("register", registered.study, "--name", "over", "--pick", "0", "--alias", "first")
    assert "note: it is over the budget: size_bytes " in other.stderr
    again = paretorch("register", registered.study, "--name", "over")
    assert "as version 2 of over" in again.text
    assert "models:/over/2" in again.text
    assert "alias" not in again.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--name", "a/b"], "--name 'a/b': write letters"),
        (["--name", "a", "--alias", "latest"], "--alias 'latest': MLflow keeps"),
        (["--name", "a", "--pick", "99"], "there is no candidate 99"),
        (["--name", "a", "--uri", "http://127.0.0.1:9"], "no MLflow server answers at http://127.0.0.1:9"),
        (["--name", "a", "--uri", "./mlruns"], "MLflow 3 has no file store any more"),
        (["--name", "a", "--uri", "sqlite:////proc/nowhere/mlflow.db"], "its folder exists and is writable"),
        ([], "Missing option '--name'"),
    ],
)
def test_bad_register(registered, paretorch, options, told):
    done = paretorch("register", registered.study, *options, code=2)
    assert told in done.text
    assert not done.stdout
