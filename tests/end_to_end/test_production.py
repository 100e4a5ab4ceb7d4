"""`export`, `verify` and `apply` as they are typed: what ships is checked, measured again, and made anew.

`verify` starts a clean process, which imports torch anew; most tests take what it starts there, `verify-here`.
"""

import hashlib
import json
import os
import pickle
import shutil

import pytest

NEWER = '''
import torch

import task as first


def network():
    """A newer checkpoint: the same layers, other numbers."""
    net = first.network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return net


def task():
    return first.make(network)


def other():
    """Another network: the recipe's last layer has another name."""
    return first.make(lambda: torch.nn.Sequential(*first.network()[:4], torch.nn.Sequential(first.network()[4])).eval())


def wide():
    from torch.utils.data import TensorDataset
    from torch import nn

    data = TensorDataset(torch.randn(32, 1, 8, 8), torch.zeros(32, dtype=torch.long))
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 4)).eval()
    return first.Task("wide", lambda: net, train=data, validation=data)


def f1():
    return first.make(metric_name="f1")


def worse():
    """The data has changed: half of the labels are wrong."""
    from torch.utils.data import TensorDataset

    x, y = first.blobs(100, 2).tensors
    broken = TensorDataset(x, torch.where(torch.arange(100) % 2 == 0, (y + 1) % 4, y))
    return first.Task("blobs", first.network, train=first.blobs(128, 1), validation=broken, test=broken)
'''


@pytest.fixture(scope="module")
def made(warm, tmp_path_factory):
    """A folder with a finished study and an exported artifact, which the tests copy."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def ready(made, paretorch, folder):
    """The task, the newer one, a study and `deploy`, in the folder of this test."""
    (folder / "newer.py").write_text(NEWER)
    if not (made / "deploy").exists():
        paretorch("search", "config.yaml", "--trials", "8", "-s", "budget=[]")
        front = json.loads((folder / "studies/blobs/report/front.json").read_text())
        assert front
        paretorch("export", "studies/blobs", "--pick", "size_bytes", "--to", "deploy")
        shutil.copytree(folder / "studies", made / "studies")
        shutil.copytree(folder / "deploy", made / "deploy")
    else:
        shutil.copytree(made / "studies", folder / "studies")
        shutil.copytree(made / "deploy", folder / "deploy")
    return folder


def flat(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def relist(directory):
    listing = json.loads((directory / "artifact.json").read_text())
    for name in listing["sha256"]:
        listing["sha256"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    (directory / "artifact.json").write_text(json.dumps(listing, indent=1) + "\n")


def record(directory, change):
    """The artifact with other numbers in its record, and digests that fit."""
    path = directory / "measurements.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=1) + "\n")
    relist(directory)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


# --- verify -----------------------------------------------------------------------------------------------------------


def test_a_sound_artifact(paretorch, ready):
    before = flat(ready / "deploy")
    done = paretorch("verify", "deploy")
    assert done.text.startswith("deploy is sound: every SHA-256 fits, weights.safetensors gives model.onnx bit for bit")
    assert "All that was measured agrees with what was recorded" in done.text
    assert "name the task for that: --task FILE.py:FUNCTION, or --config CONFIG.yaml" in done.text
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not done.stderr
    assert flat(ready / "deploy") == before


def test_a_damaged_artifact_in_a_clean_process(paretorch, ready):
    (ready / "deploy" / "model.onnx").write_bytes(pickle.dumps(Evil()))
    done = paretorch("verify", "deploy", code=2)
    assert done.stderr.startswith("paretorch: deploy/model.onnx was changed after it was exported")
    assert not (ready / "evil").exists()


@pytest.mark.parametrize("option", [("verify", "--task", "task.py:task"), ("verify-here", "--config", "config.yaml")])
def test_measured_again(paretorch, ready, option):
    """Accuracy and bytes are those of the record; the latency of so short a run on a busy machine may be anything."""
    done = paretorch(option[0], "deploy", *option[1:], code=None)
    assert done.code in (0, 4), done.text
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    for name in ("size_bytes", "onnx_bytes", "accuracy, test", "outputs"):
        assert lines[name].endswith("the same" + " " * (len(lines[name]) - len(lines[name].rstrip())))
    assert "latency_ms" in lines
    if done.code:
        assert "The files are intact, but latency_ms differs from what was recorded" in done.text


def test_numbers_that_differ(paretorch, ready):
    done = paretorch("verify-here", "deploy", "--task", "newer.py:worse", code=4)
    assert "DIFFERS by -" in done.text
    assert "The files are intact, but " in done.text
    assert "accuracy, test" in done.text.partition("The files are intact, but")[2]
    record(ready / "deploy", lambda data: data["metrics"][0].update(value=1000.0))
    done = paretorch("verify-here", "deploy", code=4)
    assert "The files are intact, but size_bytes differs from what was recorded" in done.text


def test_outputs_that_differ(paretorch, ready):
    record(ready / "deploy", lambda data: data["check"].update(outputs=[x + 9e3 for x in data["check"]["outputs"]]))
    done = paretorch("verify-here", "deploy", code=4)
    assert "The files are intact, but outputs differ" in done.text


@pytest.mark.parametrize(
    "name",
    [
        "model.onnx",
        "weights.safetensors",
        "recipe.yaml",
        "measurements.json",
        "README.md",
        "environment.json",
        "artifact.json",
    ],
)
def test_a_damaged_artifact(paretorch, ready, name):
    path = ready / "deploy" / name
    intact = path.read_bytes()
    for damaged in (intact[: len(intact) // 2], pickle.dumps(Evil())):
        path.write_bytes(damaged)
        done = paretorch("verify-here", "deploy", code=2)
        assert done.stderr.startswith("paretorch: deploy")
        assert len(done.stderr.splitlines()) == 1
    assert not (ready / "evil").exists()


def test_what_is_no_artifact(paretorch, ready):
    for folder in ("nowhere", ".", "task.py"):
        assert "is not a paretorch artifact" in paretorch("verify-here", folder, code=2).text
    (ready / "deploy" / "notes.txt").write_text("mine")
    done = paretorch("verify-here", "deploy", code=2)
    assert "deploy holds notes.txt, which artifact.json does not list; move that elsewhere" in done.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--task", "newer.py:wide"],
            "gives inputs of shape [1, 8, 8], but the artifact takes [1, 6, 6]; name the task",
        ),
        (["--task", "newer.py:f1"], "task 'blobs' measures f1, but accuracy is recorded; name the task"),
        (["--task", "newer.py:tusk"], "has no function 'tusk'; did you mean 'task'?"),
        (["--task", "tusk.py:task"], "tusk.py does not exist; did you mean task.py?"),
        (
            ["--task", "task.py:task", "--config", "config.yaml"],
            "--task and --config both name a task; write one of them",
        ),
        (["--config", "confg.yaml"], "there is no such file; did you mean config.yaml?"),
    ],
)
def test_another_task(paretorch, ready, options, told):
    done = paretorch("verify-here", "deploy", *options, code=2)
    assert told in done.text
    assert done.stderr.startswith("paretorch: ")


# --- apply ------------------------------------------------------------------------------------------------------------


def test_the_same_checkpoint_gives_the_same_bytes(paretorch, ready):
    done = paretorch("apply", "deploy/recipe.yaml", "--task", "task.py:task", "--to", "again")
    assert "Beside what deploy records (blobs #" in done.text
    assert (ready / "again/weights.safetensors").read_bytes() == (ready / "deploy/weights.safetensors").read_bytes()
    assert "DIFFERS" not in "".join(line for line in done.stdout.splitlines() if not line.startswith("latency"))
    assert "paretorch verify again --task task.py:task" in done.text
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_newer_checkpoint(paretorch, ready):
    done = paretorch("apply", "deploy", "--task", "newer.py:task", "--to", "newer")
    assert "untouched compressed change" in done.text
    assert "wrote newer" in done.text
    first, second = (json.loads((ready / where / "measurements.json").read_text()) for where in ("deploy", "newer"))
    assert second["protocol"] == first["protocol"], "measured and calibrated as it was in the study"
    measured, before = ({(row["metric"], row["split"]) for row in data["metrics"]} for data in (second, first))
    # A study measures more of its finalists.
    assert measured == {
        pair
        for pair in before
        if pair[0] == "accuracy" or not pair[0].startswith(("accuracy", "latency_ratio", "parity"))
    }
    assert {("accuracy_difference", "test"), ("latency_ratio", "validation"), ("parity_agreement", "test")} <= before
    assert (ready / "newer/recipe.yaml").read_bytes() == (ready / "deploy/recipe.yaml").read_bytes()
    assert (ready / "newer/weights.safetensors").read_bytes() != (ready / "deploy/weights.safetensors").read_bytes()
    paretorch("verify-here", "newer")

    shutil.copy(ready / "deploy/recipe.yaml", ready / "mine.yaml")
    alone = paretorch("apply", "mine.yaml", "--config", "config.yaml", "--to", "alone")
    assert "Beside what" not in alone.text
    against = paretorch("apply", "mine.yaml", "--config", "config.yaml", "--to", "alone", "--against", "studies/blobs")
    assert "Beside what studies/blobs records (blobs #" in against.text


def test_a_recipe_with_all_kinds_of_steps(paretorch, ready):
    """Written by hand, as version 1 of recipes was: channels removed, zeros, bits, training."""
    (ready / "mine.yaml").write_text(
        "version: 1\nsteps:\n- {step: prune, group: '0', keep: 6}\n- {step: sparsify, layer: '4', ratio: 0.5}\n"
        "- {step: quantize, layer: '4', weight_bits: 4, activation_bits: 8}\n"
        "- {step: recover, method: finetune, epochs: 1.0, learning_rate: 0.01, distill: 0.9, temperature: 2.0}\n"
    )
    done = paretorch("apply", "mine.yaml", "--config", "config.yaml", "--to", "mine")
    assert "1 group narrowed, 1 layer 50% sparse, weights 4 bit, activations 8 bit, 1 epochs of recovery" in done.text
    paretorch("verify-here", "mine")
    done = paretorch("apply", "mine.yaml", "--config", "config.yaml", "--to", "x", "--against", "studies/blobs", code=2)
    assert "the study in studies/blobs has not measured this recipe" in done.text
    assert not (ready / "x").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "mine.yaml cannot be read: No such file or directory; name the recipe.yaml of an artifact"),
        ("", "mine.yaml is not a recipe: it holds NoneType"),
        ("- 1", "mine.yaml is not a recipe: it holds list"),
        ("a: [", "mine.yaml is not a recipe: it is not YAML text"),
        ("!!python/object/apply:os.system ['touch evil']", "mine.yaml is not a recipe: it is not YAML text"),
        ("steps: []", "mine.yaml: not a recipe: KeyError('version')"),
        ("{version: 99, steps: []}", "recipe version 99 is not one that this paretorch reads (1..1)"),
        (
            "{version: 1, steps: [{step: shrink}]}",
            "unknown step 'shrink'; steps: student, prune, lowrank, equalize, sparsify",
        ),
        (
            "{version: 1, steps: [{step: quantize, layer: '4', weight_bits: 9}]}",
            "quantize 4: weight_bits = 9; choose from 1..8",
        ),
        (
            "{version: 1, steps: [{step: quantize, layer: conv9, weight_bits: 4}]}",
            "the recipe does not fit this network: - no layer 'conv9' that can be compressed layers here: 0, 4 groups",
        ),
        ("{version: 1, steps: [{step: prune, group: '0', keep: 99}]}", "group '0' has 8 channels, 99 cannot be kept"),
    ],
)
def test_a_recipe_that_cannot_be_used(paretorch, ready, text, told):
    if text is not None:
        (ready / "mine.yaml").write_text(text)
    done = paretorch("apply", "mine.yaml", "--config", "config.yaml", "--to", "mine", code=2)
    assert told in done.text
    assert done.stderr.startswith("paretorch: ")
    assert not (ready / "mine").exists()
    assert not (ready / "evil").exists()


def test_apply_refuses_what_it_must_not_replace_and_what_was_changed(paretorch, ready):
    (ready / "taken").mkdir()
    (ready / "taken" / "thesis.tex").write_text("mine")
    done = paretorch("apply", "deploy", "--task", "task.py:task", "--to", "taken", code=2)
    assert "taken exists and is not an artifact" in done.text
    assert (ready / "taken" / "thesis.tex").read_text() == "mine"
    done = paretorch("apply", "deploy", "--to", "mine", code=2)
    assert "name the task with --task FILE.py:FUNCTION, or with --config CONFIG.yaml" in done.text
    done = paretorch("apply", "deploy", "--task", "newer.py:other", "--to", "mine", code=2)
    assert "no layer '4' that can be compressed" in done.text
    recipe = ready / "deploy" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "\n")
    done = paretorch("apply", "deploy/recipe.yaml", "--task", "task.py:task", "--to", "mine", code=2)
    assert "recipe.yaml was changed after it was exported" in done.text
    assert "to use an edited recipe, copy it out of the artifact" in done.text
    assert not (ready / "mine").exists()


# --- explain ----------------------------------------------------------------------------------------------------------


def test_a_candidate_is_explained_and_the_suggestion_can_be_applied(paretorch, ready):
    front = json.loads((ready / "studies/blobs/study.json").read_text())
    assert front["config_file"].endswith("config.yaml")
    about = ready / "studies/blobs/study.json"  # the copy of a study knows where the original's configuration was
    about.write_text(json.dumps(front | {"config_file": str(ready / "config.yaml")}))
    done = paretorch("explain", "studies/blobs", "4")
    assert done.text.startswith("#4: weights 4 bit, BatchNorm re-estimated")
    assert "0: weights of 4 bits" in done.text
    assert "of the divergence" in done.text
    assert "Suggestion: 5 bits in " in done.text
    assert max(map(len, done.stdout.partition("Next:")[0].splitlines())) <= 80
    paretorch("apply", "studies/blobs/explain/4.yaml", "--config", "config.yaml", "--to", "suggested")
    assert "5" in (ready / "suggested/recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("number", "why"), [("0", "it is the untouched network"), ("99", "there is no such candidate")]
)
def test_what_cannot_be_explained(paretorch, ready, number, why):
    done = paretorch("explain", "studies/blobs", number, code=2)
    assert why in done.text


def test_the_explanation_of_another_checkpoint_is_refused(paretorch, ready):
    done = paretorch("explain", "studies/blobs", "4", "--task", "newer.py:task", code=2)
    assert "has not the weights that the study in studies/blobs was made with" in done.text
