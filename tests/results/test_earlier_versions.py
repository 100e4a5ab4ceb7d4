"""A study and an artifact that an earlier version has written: they open, resume, report, export and verify.

`study_v1` was written before results had a folder of their own, by the task in `small_task.py`, whose numbers are exact
on every machine: 12 trials of `SPACE`, and the artifact of the recommended member.
"""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

import paretorch
from paretorch import Rule, Space, Study
from paretorch.results.export import recorded_in
from paretorch.results.front import open_front
from paretorch.results.report.write import write_report
from paretorch.runners.artifact import inspect, verify
from paretorch.spaces.recipe import Recipe

HOME = Path(__file__).with_name("study_v1")
SPACE = Space(
    weight_bits=(Rule((2, 4, 8)),), activation_bits=(Rule((8, 32), share=True),), sparsity=(Rule((0.0, 0.5)),)
)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(HOME / "study", tmp_path / "study"))


def task():
    spec = importlib.util.spec_from_file_location("small_task", HOME / "small_task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.task()


def test_the_study_opens(folder):
    front = open_front(folder)
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    told = [line["candidate"] for line in lines if "candidate" in line]
    assert [c.recipe.key for c in front.candidates] == [Recipe.from_dict(c["recipe"]).key for c in told]
    assert [m.number for m in front.members] == [9, 11]
    assert front.test_baseline.n == 80
    assert front.optimism() is not None
    assert set(front.clusters) == {9, 11}


def test_its_report_is_written_as_it_was(folder):
    before = list(csv.DictReader((folder / "report" / "front.csv").open()))
    write_report(open_front(folder), folder / "report", name="study")
    assert list(csv.DictReader((folder / "report" / "front.csv").open())) == before


def test_it_goes_on(folder):
    before = open_front(folder).candidates
    settings = {"seconds": 0.002, "calibration_images": 32, "mlflow": False, "rungs": False}
    front = Study(task(), SPACE, budget=["size_bytes <= 90%"], directory=folder, **settings).run(14)
    assert len(front.candidates) == 14
    assert front.candidates[:12] == before
    kept = {path.stem for path in (folder / "candidates").glob("*.safetensors")}
    assert {m.recipe.key for m in front.members} <= kept


def test_its_files_are_built_again_bit_for_bit(folder, tmp_path):
    """A packed file that was lost is made again by this version with the same bytes."""
    member = open_front(folder).members[0]
    path = folder / "candidates" / f"{member.recipe.key}.safetensors"
    from paretorch.runners.local import LocalRunner
    from paretorch.runners.settings import MeasurementSettings

    runner = LocalRunner(task(), tmp_path / "again", MeasurementSettings(seconds=0.002, calibration_images=32))
    assert runner.build(member.recipe) == path.read_bytes()


def test_its_members_are_exported(folder, tmp_path):
    front = open_front(folder)
    deploy = front.export("recommended", tmp_path / "deploy", force=True)
    old, new = verify(HOME / "artifact"), verify(deploy)
    assert {name: new[name] for name in ("weights.safetensors", "model.onnx", "recipe.yaml")} == {
        name: old[name] for name in ("weights.safetensors", "model.onnx", "recipe.yaml")
    }
    record = recorded_in(folder, front.recommended().recipe)
    assert [row.metric for row in record.rows][:1] == ["size_bytes"]


def test_the_artifact_verifies_and_computes():
    artifact = inspect(HOME / "artifact")
    assert artifact.record.task == "small"
    module = paretorch.load(HOME / "artifact")
    x, y = next(iter(torch.utils.data.DataLoader(task().test, batch_size=80)))
    assert float((module(x).argmax(1) == y).float().mean()) > 0.5
