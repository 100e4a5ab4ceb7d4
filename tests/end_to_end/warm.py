"""A warm process that starts `paretorch` commands by forking, because importing torch, ONNX Runtime and MLflow takes
longer than most of what the tests look at. What it starts is a process like any other: it can be killed, limited, and
given signals. One JSON request a line on stdin, one answer a line on stdout.
"""

import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback


def _child(request):
    os.setsid()
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(request[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
    sys.argv = ["paretorch", *request["arguments"]]
    from paretorch.cli import main

    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


# All that a search imports on its way; what is missing here only makes the tests slower.
PRELOAD = (
    "paretorch.cli",
    "paretorch.configs.plugins",
    "paretorch.cli.show",
    "paretorch.cli.watcher",
    "paretorch.results.export",
    "paretorch.results.report.write",
    "paretorch.search.study",
    "paretorch.results.tracking.tracker",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tracking.client",
    "pandas",
    "plotly.graph_objects",
    "plotly.subplots",
    "rich.live",
    "sympy",
    "torch._dynamo",
    "torch.onnx",
    "torch_pruning",
)


def main():
    for name in PRELOAD:
        importlib.import_module(name)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["seconds"])
        else:
            answer = os.fork()
            if not answer:
                _child(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
