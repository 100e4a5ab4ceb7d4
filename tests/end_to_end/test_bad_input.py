"""Whatever a user gets wrong ends with a message that says what, where, and what to do; never with a traceback.

Every test runs the command as a process (the fixture `paretorch` looks for tracebacks in all of them).
"""

import os
import pickle
import subprocess
from contextlib import suppress

import pytest


@pytest.fixture
def nothing(folder, store, look):
    """After a mistake: no folder that looks like a study, no half-written file, no run that seems to be running."""

    def check(done, study=None):
        study = study or folder / "studies" / "blobs"
        assert not study.exists(), sorted(study.rglob("*"))
        assert not look.partial_files(folder)
        assert not store.exists() or look.runs(store, study) == ([], [])
        assert done.stderr.startswith("paretorch: ")

    return check


def task_file(folder, body, name="bad.py"):
    (folder / name).write_text(f"import torch\nfrom torch import nn\n\nimport task as good\n\n\n{body}")
    return ("--set", f"task={name}:task")


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["-s", "budgett=[size_bytes <= 30%]"],
            "budgett = ['size_bytes <= 30%']: unknown key; did you mean 'budget'? keys here: name, task",
        ),
        (
            ["-s", "search.trails=5"],
            "search.trails = 5: unknown key; did you mean 'trials'? keys here: sampler, trials",
        ),
        (
            ["-s", "space.weight_bits=[{choices: [4], layers: 'conv9*'}]"],
            "weight_bits.0.layers: pattern 'conv9*' selects no layer; write a name, a glob such as 'layer1.*', "
            "first, last, or a kind",
        ),
        (["-s", "budget=size_bytes <= 2%"], "'size_bytes <= 2%' (= 6"),
        (["-s", "budget=macs <= 1%"], "cannot be kept: the smallest recipe of this space reaches"),
        (["-s", "budget=[size_bytes <= 1 kg, accuracy <= 50%]"], "2 problems"),
        (["-s", "task=tusk.py:task"], "tusk.py does not exist; did you mean task.py?"),
        (
            ["-s", "task=task.py:tusk"],
            "has no function 'tusk'; did you mean 'task'? functions there: blobs, network, make, task",
        ),
        (["--time", "soon"], "search.time: duration 'soon'; write numbers with the units d, h, m, s"),
        (
            ["-s", "objectives=[speed]"],
            "objectives: unknown metric 'speed'; choose from accuracy, size_bytes, latency_ms, macs",
        ),
        (["-s", "search.sampler=tpa"], "search.sampler = 'tpa': choose from ehvi, tpe, nsga2"),
        (["-s", "mlflow.uri=./mlruns"], "MLflow 3 has no file store any more"),
    ],
)
def test_configuration(paretorch, nothing, options, told):
    done = paretorch("search", "config.yaml", *options, code=2)
    assert told in done.text
    if "mlflow" not in options[1]:  # which is found out when the study is there already
        nothing(done)


def test_missing_configuration(paretorch, folder, nothing):
    done = paretorch("search", "confg.yaml", code=2)
    assert done.stderr == "paretorch: confg.yaml: 1 problem\n  - there is no such file; did you mean config.yaml?\n"
    nothing(done)


def test_an_impossible_budget_says_what_is_possible(paretorch, nothing):
    done = paretorch("search", "config.yaml", "-s", "budget=size_bytes <= 2%", code=2)
    assert "cannot be kept: the smallest recipe of this space reaches" in done.text
    assert "raise the limit to at least" in done.text
    assert "or widen the space (fewer bits, more sparsity, narrower or shallower students)" in done.text
    nothing(done)


# --- the task ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["search", "check"])
@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            "def model():\n    net = good.network()\n    net[0].weight.data[0] = float('nan')\n    return "
            "net\n\n\ndef task():\n    return good.make(model)\n",
            [
                "the network's 0.weight holds NaN or infinity in 9 of 72 numbers",
                "check the checkpoint that your model function loads",
            ],
        ),
        (
            "def task():\n    return good.make(metric=lambda outputs, targets: torch.full((len(outputs),), "
            "float('nan')))\n",
            [
                "the untouched network cannot be measured: metric 'accuracy' returned nan",
                "check the metric, the validation data and the checkpoint",
            ],
        ),
        (
            "def task():\n    return good.make(metric=lambda outputs, targets: (outputs.argmax(1) == "
            "targets).float().mean())\n",
            ["metric 'accuracy' returned the shape () for 100 samples", "one score per sample"],
        ),
        (
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.net = "
            "good.network()\n\n"
            "    def forward(self, x):\n        y = self.net(x)\n        return y if len(x) < 3 else "
            "-y\n\n\ndef task():\n    return good.make(lambda: Net().eval())\n",
            ["the exported network does not compute what the torch network does", "control flow on the input"],
        ),
        (
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.net = "
            "good.network()\n\n"
            "    def forward(self, x):\n        return self.net(x), x\n\n\ndef task():\n    return "
            "good.make(lambda: Net().eval())\n",
            ["the network must return one tensor with a row per input", "returned tuple"],
        ),
        (
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.net = "
            "good.network()\n\n"
            "    def forward(self, x):\n        return print(1 / 0) if torch.jit.is_tracing() or "
            "torch.compiler.is_compiling() else self.net(x)\n\n\ndef task():\n    return good.make(lambda: "
            "Net().eval())\n",
            ["the network cannot be exported to ONNX: ZeroDivisionError"],
        ),
        (
            "def model():\n    return good.network()[:3]\n\n\ndef task():\n    raise RuntimeError('no disk today')\n",
            ["bad.py: task() failed: RuntimeError: no disk today (", "bad.py, line 12, in task)"],
        ),
        (
            "def model():\n    raise OSError('weights.pt is gone')\n\n\ndef task():\n    return good.make(model)\n",
            ["task 'blobs': its model function failed: OSError: weights.pt is gone"],
        ),
    ],
    ids=[
        "nan-weights",
        "nan-metric",
        "metric-shape",
        "control-flow",
        "tuple",
        "no-export",
        "task-fails",
        "model-fails",
    ],
)
def test_task(paretorch, folder, nothing, command, body, told):
    if command == "check" and not told[0].startswith("the un"):
        pytest.skip("the same as search does first")
    done = paretorch(command, "config.yaml", *task_file(folder, body), code=2)
    for text in told:
        assert text in done.text
    nothing(done)


def images(folder, **classes):
    """A small image folder."""
    from PIL import Image

    for name, count in classes.items():
        (folder / "images" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (40 * i % 255, 80, 200)).save(folder / "images" / name / f"{i}.png")


def builtin(folder, weights="null"):
    (folder / "config.yaml").write_text(
        f"name: blobs\ntask:\n  model: squeezenet1_1\n  weights: {weights}\n  data: {{folder: images, size: 32}}\n"
        "measure: {seconds: 0.01, calibration_images: 16}\n"
    )


def test_an_empty_class_folder(paretorch, folder, nothing):
    images(folder, cat=10, dog=0, owl=10)
    builtin(folder)
    done = paretorch("search", "config.yaml", code=2)
    assert (
        f"empty class folder dog in {folder}/images: no .jpg, .png or other image in it; add images or delete "
        "the folder" in done.text
    )
    nothing(done)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_pickle_in_place_of_weights(paretorch, folder, nothing):
    images(folder, cat=10, owl=10)
    builtin(folder, "weights.pth")
    (folder / "weights.pth").write_bytes(pickle.dumps(Evil()))
    done = paretorch("search", "config.yaml", code=2)
    assert f"weights file {folder}/weights.pth" in done.text
    assert "save it again with torch.save(model.state_dict(), ...)" in done.text
    assert not (folder / "evil").exists()
    nothing(done)


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_file_in_place_of_the_output_directory(paretorch, folder):
    (folder / "taken").write_text("mine")
    for output in ("taken", "taken/deeper"):
        done = paretorch("search", "config.yaml", "--output", output, code=2)
        assert f"the study's folder {folder}/{output} cannot be written: " in done.text
        assert "name another one with --output DIR or the key `output`" in done.text
    assert (folder / "taken").read_text() == "mine"
    done = paretorch("init", "taken", code=2)
    assert "taken" in done.text


@pytest.fixture
def read_only(folder):
    """A directory that nobody may write into, not even root."""
    path = folder / "fixed"
    path.mkdir()
    path.chmod(0o555)
    immutable = subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode == 0
    try:
        (path / "x").touch()
    except OSError:
        yield path
    else:
        (path / "x").unlink()
        pytest.skip("this user may write everywhere, and chattr does not work here")
    finally:
        if immutable:
            subprocess.run(["chattr", "-i", path], check=True)
        path.chmod(0o755)


def test_a_read_only_output_directory(paretorch, folder, read_only):
    for output in ("fixed", "fixed/study"):
        done = paretorch("search", "config.yaml", "--output", output, code=2)
        assert f"paretorch: the study's folder {folder}/{output} cannot be written: " in done.stderr
        assert "put that right, or name another one with --output DIR" in done.text
    paretorch("search", "config.yaml", "--trials", "3", "-s", "budget=[]")
    for command in (
        ["export", "studies/blobs", "--to", "fixed/deploy"],
        ["front", "studies/blobs", "--plot", "fixed/plot"],
    ):
        done = paretorch(*command, code=2)
        assert "cannot write (" in done.text
        assert "fixed" in done.text
        assert "choose another folder (--output, --to, --plot)" in done.text
    assert not list(read_only.iterdir())


@pytest.fixture
def small_disk(folder):
    """A disk of its own of a few megabytes."""
    path = folder / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a disk of its own cannot be mounted without being root")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_in_the_middle(paretorch, start, folder, small_disk, look):
    command = ("search", "config.yaml", "--output", "disk/blobs", "--trials", "14")
    study = small_disk / "blobs"
    running = start(*command, "--set", "search.seed=1")
    running.until(lambda: len(look.finished(study)) >= 3)
    with suppress(OSError), (small_disk / "other").open("wb", buffering=0) as stream:
        while stream.write(b"x" * 4096):
            pass
    full = running.wait()
    assert full.code == 2, full.text
    assert "Traceback" not in full.stdout + full.stderr
    assert "the disk is full" in full.text
    assert "free some space" in full.text
    before = look.finished(study)
    assert not look.partial_files(small_disk)
    again = paretorch(*command, "--set", "search.seed=1", code=2)
    assert "No space left" in again.text or "disk is full" in again.text
    assert look.finished(study) == before
    (small_disk / "other").unlink()
    paretorch(*command, "--set", "search.seed=1")
    after = look.finished(study)
    assert sorted(after) == list(range(14))
    assert {n: after[n] for n in before} == before


@pytest.mark.parametrize(
    ("limit", "told"), [(1000, "the disk is full (File too large"), (9000, "MLflow store sqlite:///")]
)
def test_files_that_may_not_grow(paretorch, folder, look, limit, told):
    """`ulimit -f`: before the study is there, and in MLflow's database."""
    done = paretorch("search", "config.yaml", "--trials", "9", code=2, file_bytes=limit)
    assert told in done.text
    study = folder / "studies" / "blobs"
    assert study.exists() == (limit > 1000)
    assert not look.partial_files(folder)
    paretorch("search", "config.yaml", "--trials", "9")
    assert sorted(look.finished(study)) == list(range(9))
