"""Every command, as it is typed."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def searched(warm, store, tmp_path_factory):
    """A folder with a finished study, which the tests only look at."""
    from types import SimpleNamespace

    path = tmp_path_factory.mktemp("searched")
    return SimpleNamespace(path=path, done=None)


@pytest.fixture
def study(searched, paretorch, folder, store):
    if searched.done is None:
        for name in ("task.py", "config.yaml"):
            (searched.path / name).write_bytes((folder / name).read_bytes())
        searched.done = paretorch("search", "config.yaml", "--trials", "12", cwd=searched.path)
    return searched.path / "studies" / "blobs"


def test_what_a_search_prints(searched, study, look, store):
    lines = searched.done.stdout.splitlines()
    assert lines[0] == "network   2 layers, 1 channel groups, 0 removable blocks; 6 decisions"
    assert lines[1].startswith("baseline  accuracy 100.00% ±")
    assert lines[3].startswith("budget    size_bytes <= 60%  (= 1.8")
    assert lines[5].startswith("evaluates ")
    assert lines[6].startswith("plan      about 12 candidates (")
    assert [line.split()[:2] for line in lines[7:19]] == [[f"#{n}", f"{n + 1}/12"] for n in range(12)]
    assert "paretorch export studies/blobs --pick recommended --to deploy" in searched.done.text
    assert not searched.done.stderr
    assert look.runs(store, study)[0] == ["FINISHED"]
    assert len(look.runs(store, study)[1]) == 12
    assert not look.partial_files(study)


def test_python_gives_the_same_front(study, folder, monkeypatch):
    """`Study(...).run()` with what the configuration says."""
    import paretorch
    from paretorch.configs.load import load
    from paretorch.configs.plugins import load_task

    config = load(folder / "config.yaml")
    found = paretorch.Study(
        load_task(config),
        config.to_space(),
        budget=config.budget,
        seconds=0.002,
        calibration_images=32,
        directory=folder / "mine",
        mlflow=False,
    ).run(trials=12)
    from paretorch.results.front import open_front

    theirs = open_front(study)
    assert [c.recipe for c in found.candidates] == [c.recipe for c in theirs.candidates]
    for mine, other in zip(found.candidates, theirs.candidates, strict=True):
        for metric in ("accuracy", "size_bytes"):
            assert mine.measurement.value(metric) == other.measurement.value(metric)
    assert [c.number for c in found.members] == [c.number for c in theirs.members]


def test_front(paretorch, study, searched, folder):
    shown = paretorch("front", study)
    assert shown.stdout.split("Next:")[0].strip() in searched.done.stdout
    rows = list(csv.DictReader(io.StringIO(paretorch("front", study, "--csv").stdout)))
    assert [row["number"] for row in rows] == [str(n) for n in range(12)]
    assert {"state", "front", "accuracy", "accuracy_low", "size_bytes", "latency_ms", "recipe"} <= set(rows[0])
    done = paretorch("front", study, "--plot", "plot")
    assert "wrote plot/front.html, front.png" in done.text
    assert {p.name for p in (folder / "plot").iterdir()} == {
        "front.html",
        "front.png",
        "front.csv",
        "front.json",
        "report.md",
    }


@pytest.mark.parametrize(
    "pick",
    [
        "knee",
        "recommended",
        "accuracy",
        "size_bytes",
        "2",
        "0",
        "size_bytes <= 50%",
        "size_bytes <= 1.7kB and accuracy >= 0.5",
    ],
)
def test_export(paretorch, study, folder, pick):
    done = paretorch("export", study, "--pick", pick, "--to", "deploy")
    assert "wrote candidate" in done.text
    files = {path.name for path in (folder / "deploy").iterdir()}
    assert {
        "model.onnx",
        "weights.safetensors",
        "recipe.yaml",
        "measurements.json",
        "README.md",
        "environment.json",
        "artifact.json",
    } == files
    rows = json.loads((folder / "deploy" / "measurements.json").read_text())["metrics"]
    measured = {(row["metric"], row["split"]): row for row in rows}
    size = (folder / "deploy" / "weights.safetensors").stat().st_size
    assert measured["size_bytes", None]["value"] == size
    assert measured["accuracy", "validation"]["low"] <= measured["accuracy", "validation"]["value"]
    assert all(row["protocol"] and row["baseline"] for row in rows if row["split"] != "test")
    assert json.loads((folder / "deploy" / "environment.json").read_text())["onnxruntime"]
    assert ("note: it is over the budget: size_bytes " in done.stderr) == (pick == "0")

    import torch

    import paretorch as package

    module = package.load(folder / "deploy")
    assert module(torch.zeros(3, 1, 6, 6)).shape == (3, 4)


def test_a_file_that_is_not_what_was_simulated_leaves_by_force_alone(paretorch, study, folder, look):
    from paretorch import Recipe

    mine = folder / "mine"
    shutil.copytree(study, mine)
    known = json.loads((mine / "finalists.json").read_text())
    number = json.loads((mine / "report" / "front.json").read_text())["knee"]
    key = Recipe.from_dict(look.finished(mine)[number]["recipe"]).key
    assert known[key]["parity_agreement"]["value"] >= 0.995
    known[key]["parity_agreement"] |= {"value": 0.9, "low": 0.82, "high": 0.95}
    (mine / "finalists.json").write_text(json.dumps(known))
    told = (
        f"candidate {number}: its file does not compute what was simulated: 90.00% of 100 answers are the "
        "simulation's (at "
        "least 99.5% are asked); pick another one, or take it all the same with --force"
    )
    assert told in paretorch("export", mine, "--pick", "knee", "--to", "deploy", code=2).text
    assert told in paretorch("register", mine, "--pick", "knee", "--name", "blobs", code=2).text
    assert not (folder / "deploy").exists()
    paretorch("export", mine, "--pick", "knee", "--to", "deploy", "--force")
    (row,) = [
        row
        for row in json.loads((folder / "deploy" / "measurements.json").read_text())["metrics"]
        if row["metric"] == "parity_agreement"
    ]
    assert (row["value"], row["split"]) == (0.9, "test")
    shown = paretorch("front", mine)
    assert f"#{number} is not what was simulated: 90.00% of 100 answers" in shown.text
    assert "(knee, not what was simulated)" in shown.text


@pytest.mark.parametrize(
    ("pick", "told"),
    [
        (
            "best",
            "--pick 'best': write knee, recommended, a candidate's number, an objective (accuracy, size_bytes) "
            "or a limit",
        ),
        ("99", "there is no candidate 99; the front has"),
        ("size_bytes <= 1B", "no member of the front keeps it"),
        ("speed <= 1", "unknown metric 'speed'"),
        ("accuracy >= 90%", "90% of what?"),
    ],
)
def test_bad_picks(paretorch, study, folder, pick, told):
    done = paretorch("export", study, "--pick", pick, "--to", "deploy", code=2)
    assert told in done.text
    assert done.stderr.startswith("paretorch: ")
    assert not (folder / "deploy").exists()


def test_a_candidate_whose_file_was_not_kept(paretorch, study, look):
    from paretorch.results.front import open_front

    found = open_front(study)
    kept = {path.stem for path in (study / "candidates").iterdir()}
    gone = [c for c in found.candidates if c.measurement and c.recipe.key not in kept]
    if not gone:
        pytest.skip("all of them are kept in so short a search")
    done = paretorch("export", study, "--pick", gone[0].number, "--to", "deploy", code=2)
    assert f"the file of candidate {gone[0].number} was not kept, because others beat it; kept: " in done.text


def test_a_folder_without_a_study(paretorch, folder):
    for command in (
        ["front", "."],
        ["export", ".", "--to", "deploy"],
        ["register", ".", "--name", "deploy"],
        ["ui", "."],
        ["front", "nowhere"],
        ["ui", "nowhere"],
    ):
        done = paretorch(*command, code=2)
        assert "study" in done.text
        assert done.stderr.startswith("paretorch: ")


def test_no_recipe_inside_the_budget(paretorch, folder, store, look):
    """The nearest ones are shown with the limits that they would keep, and can be used."""
    done = paretorch(
        "search", "config.yaml", "--trials", "11", "-s", "budget=[size_bytes <= 45%, latency_ms <= 0.0001]", code=3
    )
    assert "No candidate kept the budget. The nearest ones, and the limits they would keep:" in done.text
    assert "latency_ms <= " in done.text
    number = done.stdout.partition("--pick ")[2].split()[0]
    assert number.isdecimal()
    assert "export studies/blobs --pick" in done.text
    study = folder / "studies" / "blobs"
    assert look.runs(store, study)[0] == ["FINISHED"]
    assert (study / "report" / "front.html").exists()
    exported = paretorch("export", "studies/blobs", "--pick", number, "--to", "deploy")
    assert "note: it is over the budget: " in exported.stderr
    assert (folder / "deploy" / "model.onnx").exists()
    knee = paretorch("export", "studies/blobs", "--to", "other", code=2)
    assert "the front is empty: no candidate kept the budget" in knee.text
    paretorch("front", "studies/blobs")


def test_options_of_search(paretorch, folder):
    options = [
        "--output",
        "else/where",
        "--trials",
        "500",
        "--time",
        "1s",
        "-s",
        "search.seed=4",
        "--set",
        "name=other",
    ]
    done = paretorch("search", "config.yaml", *options, code=None)
    assert "the time is used up after" in done.text
    about = json.loads((folder / "else" / "where" / "study.json").read_text())
    assert about["snapshot"]["seed"] == 4
    assert about["config"]["name"] == "other", "what was asked for is kept, options included"
    assert about["config"]["search"]["time"] == "1.0s"
    assert not (folder / "studies" / "blobs").exists()


def test_methods_and_patterns_are_searched(paretorch, folder, look):
    """Rounding, criterion and 2:4 in one configuration: through check, search and export."""
    text = (
        (folder / "config.yaml")
        .read_text()
        .replace(
            "sparsity: [0.0, 0.5]",
            "sparsity: [{choices: [0.0, 0.5]}, {layers: last, choices: [0.0, '2:4']}]\n"
            "  rounding: [nearest, gptq, adaround]\n  criterion: [magnitude, taylor, obs]\n  ranges: [mse, entropy]",
        )
    )
    (folder / "config.yaml").write_text(text)
    checked = paretorch("check", "config.yaml")
    assert "sparsity 0 2:4" in checked.text
    assert "rounding: nearest gptq adaround (one for 2 layers)" in checked.text
    paretorch("search", "config.yaml", "--trials", "12")
    study = folder / "studies" / "blobs"
    found = look.finished(study)
    assert len(found) == 12
    steps = [step for candidate in found.values() for step in candidate["recipe"]["steps"]]
    assert {"gptq", "adaround"} & {step.get("rounding") for step in steps}
    assert {"obs", "taylor"} & {step.get("criterion") for step in steps}
    chosen = next(
        n
        for n, c in found.items()
        if any(s.get("rounding") or s.get("criterion") for s in c["recipe"]["steps"])
        and c["state"] in ("front", "ok", "done")
    )
    paretorch("export", "studies/blobs", "--pick", chosen, "--to", "out")
    shipped = (folder / "out" / "recipe.yaml").read_text()
    assert "rounding: " in shipped or "criterion: " in shipped


def test_check(paretorch, folder):
    done = paretorch("check", "config.yaml")
    for text in (
        "network 2 layers",
        "baseline accuracy",
        "smallest 9",
        "what may be done",
        "bits 3 4 6 8",
        "The search can start: paretorch search config.yaml",
    ):
        assert text in done.text
    assert sorted(p.name for p in folder.iterdir() if p.suffix) == ["config.yaml", "task.py"]
    assert not (folder / "studies" / "blobs").exists()


def test_low_rank_and_codebooks_are_searched_from_the_same_configuration(paretorch, folder, look):
    only = ["-s", "space={rank: [1.0, 0.5], cluster_bits: [2, 4], recovery: [batchnorm]}", "-s", "budget=[macs <= 90%]"]
    checked = paretorch("check", "config.yaml", *only)
    assert "codebook bits 2 4" in checked.text
    assert "rank 1 0.5" in checked.text
    paretorch("search", "config.yaml", *only, "--trials", "12")
    good = [one for one in look.finished(folder / "studies" / "blobs").values() if one["state"] == "ok"]
    steps = [{step["step"] for step in one["recipe"]["steps"]} for one in good]
    assert {"lowrank", "cluster", "recover"} in steps, "only what is of low rank keeps this budget"
    paretorch(
        "export",
        "studies/blobs",
        "--pick",
        good[steps.index({"lowrank", "cluster", "recover"})]["number"],
        "--to",
        "thin",
    )
    paretorch("verify", "thin")


def test_schema(paretorch):
    schema = json.loads(paretorch("schema").stdout)
    assert {"task", "budget", "space", "search"} <= set(schema["properties"])


def test_init_and_search(paretorch, folder, look):
    done = paretorch("init", "new")
    assert "paretorch search new/config.yaml" in done.text
    again = paretorch("init", "new", code=2)
    assert "new" in again.text
    paretorch("search", "new/config.yaml", "--trials", "3", "-s", "measure.seconds=0.01", code=None)
    assert sorted(look.finished(folder / "studies" / "my-study")) == [0, 1, 2]


# --- help, which must be quick ----------------------------------------------------------------------------------------


def typed(*arguments):
    environment = os.environ | {"COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "paretorch.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["search"],
        ["check"],
        ["schema"],
        ["init"],
        ["front"],
        ["export"],
        ["verify"],
        ["apply"],
        ["register"],
        ["measure"],
        ["ui"],
    ],
)
def test_help_fits_80_columns(paretorch, command):
    done = paretorch(*command, "--help")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not [line for line in done.stdout.splitlines() if line.endswith("...") and "Usage" not in line], "cut off"


def test_help_imports_nothing_heavy():
    code = (
        "import sys, paretorch.cli as c\ntry:\n    c.app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'optuna', 'mlflow', 'onnxruntime', 'rich.live', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_installed_command():
    assert typed("--version").stdout.strip()
    nothing = typed()
    assert "Usage: " in nothing.stdout + nothing.stderr
    wrong = typed("serch")
    assert wrong.returncode == 2
    assert "serch" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_sensitivity(paretorch, folder):
    done = paretorch("sensitivity", "config.yaml", "--images", "48")
    assert done.stdout.startswith("KL divergence of the softmax in nats, each layer alone, 48 images\n")
    lines = done.stdout.splitlines()
    assert lines[2].split() == ["bits", "8", "6", "4", "3", "32", "8", "6", "4", "3"]
    assert [line.split()[0] for line in lines[4:6]] == ["0", "4"]
    assert all(len(line.split()) == 10 for line in lines[4:6])
    assert max(map(len, lines)) <= 80
    assert "wrote sensitivity.json, sensitivity.csv, sensitivity.png to studies/blobs" in done.text
    assert "Next: paretorch search config.yaml" in done.text
    assert not done.stderr
    study = folder / "studies" / "blobs"
    assert {path.name for path in study.iterdir()} == {"sensitivity.json", "sensitivity.csv", "sensitivity.png"}
    assert (study / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((study / "sensitivity.csv").open()))
    assert len(rows) == 18

    from paretorch.runners.sensitivity import Sensitivity

    found = Sensitivity.from_json((study / "sensitivity.json").read_text())
    assert [float(row["divergence"]) for row in rows] == [row.divergence for row in found.rows]
    assert found.divergence("0", 3) > found.divergence("0", 8)
    again = paretorch("sensitivity", "config.yaml", "--images", "48", "--output", "mine", "-s", "space.sparsity=[0.0]")
    assert "to mine" in again.text
    other = Sensitivity.from_json((folder / "mine" / "sensitivity.json").read_text())
    assert [row for row in found.rows if not row.sparsity] == list(other.rows)
    paretorch(
        "search", "config.yaml", "--trials", "2", "-s", "budget=[]"
    )  # what lies in the study's folder is not in its way
    assert (study / "sensitivity.json").exists()


def mirrored(study):
    """The sensitivity files among the artifacts of a study's MLflow run."""
    run = json.loads((study / "mlflow_run.json").read_text())["run_id"]
    return {path.name: path.read_bytes() for path in study.glob(f"mlartifacts/{run}/artifacts/sensitivity/*")}


def test_sensitivity_in_mlflow(paretorch, folder):
    """Before the search, after it, and when the store is gone."""
    study = folder / "studies" / "blobs"
    files = ["sensitivity.csv", "sensitivity.json", "sensitivity.png"]
    before = paretorch("sensitivity", "config.yaml", "--images", "32", own_store=True)
    assert "MLflow" not in before.text
    paretorch("search", "config.yaml", "--trials", "2", "-s", "budget=[]", own_store=True)
    first = mirrored(study)
    assert sorted(first) == [*files, "sensitivity_table.json"]
    assert "](../sensitivity.png)" in (study / "report" / "report.md").read_text()

    after = paretorch("sensitivity", "config.yaml", "--images", "48", own_store=True)
    assert "the study's MLflow run shows them, too: paretorch ui studies/blobs" in after.text
    assert not after.stderr
    second = mirrored(study)
    assert all(second[name] == (study / name).read_bytes() for name in files)
    assert second["sensitivity.json"] != first["sensitivity.json"]

    elsewhere = paretorch("sensitivity", "config.yaml", "--images", "32", "--output", "mine", own_store=True)
    assert "MLflow" not in elsewhere.text
    assert mirrored(study) == second

    (study / "mlflow.db").write_text("no database, and long enough to be sure of it " * 50)
    broken = paretorch("sensitivity", "config.yaml", "--images", "32", own_store=True)
    assert (
        "wrote sensitivity.json, sensitivity.csv, sensitivity.png to studies/blobs warning: MLflow store "
        in broken.text
    )
    assert "not a database" in broken.text
    assert json.loads((study / "sensitivity.json").read_text())["images"] == 32
    assert mirrored(study) == second


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["-s", "task=tusk.py:task"], "tusk.py does not exist; did you mean task.py?"),
        (["-s", "space={width: [1.0, 0.5]}"], "no layer has a choice of weight_bits below 32 or of sparsity above 0"),
        (["-s", "space.weight_bits=[{choices: [4], layers: 'conv9*'}]"], "pattern 'conv9*' selects no layer"),
        (["--images", "3"], "Invalid value for '--images'"),
        (["--output", "taken"], "choose another folder (--output"),
    ],
)
def test_bad_sensitivity(paretorch, folder, options, told):
    (folder / "taken").write_text("mine")
    done = paretorch("sensitivity", "config.yaml", *options, code=2)
    assert told in done.text
    assert not (folder / "studies" / "blobs").exists()
    assert (folder / "taken").read_text() == "mine"


def test_measure(paretorch, study, folder):
    """What is printed and where it comes from; never how long anything took."""
    paretorch("export", study, "--pick", "2", "--to", "small")
    paretorch("export", study, "--pick", "0", "--to", "plain")
    done = paretorch("measure", "small", "--against", "plain/model.onnx", "--time", "0.1s")
    lines = done.stdout.splitlines()
    assert [line.rpartition("]")[2].strip() for line in lines[:2]] == ["small", "plain/model.onnx"]
    assert all(" ms " in line and "[" in line for line in lines[:2])
    assert re.search(r"of the time: (faster, .*x|slower, .*x|no significant difference)$", lines[2])
    assert re.match(r"\d+ pairs in .* s: ±.*%, (which is not )?within .*the 2% asked for", lines[4])
    assert lines[5].startswith("1 thread, ")
    assert lines[5].endswith("CPU time of the thread; input float32[1, 1, 6, 6]")
    assert not done.stderr

    alone = paretorch("measure", "plain", "--time", "0.1s", "--batch", "3", "--precision", "0.5%").stdout.splitlines()
    assert alone[0].endswith("plain")
    assert "blocks in" in alone[2]
    assert "the 0.5% asked for" in alone[2]
    assert alone[3].endswith("input float32[3, 1, 6, 6]")

    found = json.loads(paretorch("measure", "small", "--against", "small", "--time", "0.1s", "--json").stdout)
    assert found["files"] == ["small", "small"]
    assert found["verdict"] in ("faster", "slower", "no significant difference")
    assert set(found["ratio"]) == {"value", "low", "high", "n"}
    assert len(found["ms"]) == 2
    assert found["pairs"] == found["ratio"]["n"] >= 6
    assert isinstance(found["reached"], bool)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["gone.onnx"], "paretorch: there is no file gone.onnx; name an .onnx file, or a directory that"),
        (["."], "holds no model.onnx; name an .onnx file"),
        (["task.py"], "task.py is no ONNX model that ONNX Runtime can load"),
        (["plain", "--against", "gone"], "there is no file gone"),
        (
            ["plain", "--shape", "input=1,1,7,7"],
            "model.onnx: input 'input' is [batch, 1, 6, 6] in the file, which the shape 1,1,7,7 does not fit",
        ),
        (["plain", "--shape", "image=1,1,6,6"], "--shape 'image': there is no such input; inputs: input"),
        (["plain", "--precision", "0%", "--time", "soon", "--shape", "input"], "measure: 3 problems"),
        (
            ["plain", "--precision", "0"],
            "--precision: '0': write a share of the time above 0% and below 100%, such as 2%",
        ),
        (["plain", "--threads", "0"], "threads = 0: this process may use"),
        (["plain", "--batch", "0"], "batch = 0: a run needs at least one input"),
    ],
)
def test_bad_measure(paretorch, study, folder, options, told):
    if options[0] == "plain":
        paretorch("export", study, "--pick", "0", "--to", "plain")
    done = paretorch("measure", *options, code=2)
    assert told in done.text
    assert done.stderr.startswith("paretorch: ")


def test_retarget(paretorch, study, folder):
    """The front on eager PyTorch, with the task's own inputs, and on an accelerator that is not here."""
    npu = "name: npu\noperations_per_second: {32x32: 1e9, 3x32: 1e9}\nbytes_per_second: 1e8\n"
    (folder / "npu.yaml").write_text(npu)
    done = paretorch("retarget", study, "--target", "torch", "--task", "task.py:task")
    assert (
        "stay on the front there, by accuracy, size_bytes; latency_ms is neither an objective nor limited" in done.text
    )
    assert "on 100 inputs of the validation split: the same class for 100% or more" in done.text
    done = paretorch("retarget", study, "--target", "npu.yaml")
    assert "cannot run there: npu has no unit for " in done.text
    assert "computed from the profile: nothing was timed" in done.text
    assert "the study's MLflow run has it, too: targets/npu.json" in done.text
    found = json.loads((study / "targets" / "torch.json").read_text())
    assert {m["metric"]["n"] for m in found["members"]} == {100}
    assert {p.name for p in (study / "targets").iterdir()} == {"npu.json", "torch.json"}
    (study / "targets" / "npu.json").unlink()

    assert (
        "choose from onnxruntime, openvino, torch, torch-cuda"
        in paretorch("retarget", study, "--target", "tensorrt", code=2).text
    )
    assert "there is no study in" in paretorch("retarget", "nowhere", "--target", "torch", code=2).text
    (folder / "npu.yaml").write_text(npu.replace("1e8", "-1").replace("3x32", "three"))
    assert "2 problems" in paretorch("retarget", study, "--target", "npu.yaml", code=2).text


def test_a_search_on_another_target(paretorch, folder, look):
    refused = paretorch(
        "search", "config.yaml", "-s", "measure.target=torch", "-s", "space.activation_bits=[8]", code=2
    )
    assert (
        "weights 8 bit, activations 8 bit on 0, 4: eager PyTorch has no kernels for 8-bit activations" in refused.text
    )
    assert not (folder / "studies" / "blobs").exists()
    done = paretorch("search", "config.yaml", "-s", "measure.target=torch", "--trials", "4", "-s", "budget=[]")
    assert "target    torch: latency and metric measured there" in done.stdout
    found = look.finished(folder / "studies" / "blobs")
    assert {c["measurement"]["environment"]["torch"] for c in found.values()}
    changed = paretorch("search", "config.yaml", "--trials", "4", "-s", "budget=[]", code=2)
    assert 'measure: {"target": "torch"' in changed.text
    paretorch("export", "studies/blobs", "--pick", "2", "--to", "deploy")
    assert "computed by PyTorch from the packed file" in (folder / "deploy" / "measurements.json").read_text()
    assert "All that was measured agrees" in paretorch("verify", "deploy", "--task", "task.py:task", code=None).text
