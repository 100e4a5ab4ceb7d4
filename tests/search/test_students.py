"""A search that chooses between networks: students are taught once, before the trials, and never again."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from paretorch.errors import StudyError, TaskError
from paretorch.objectives import cost
from paretorch.runners.task import Task
from paretorch.search.listener import Quiet
from paretorch.search.study import Study
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.student import Student

SPACE = Space(
    weight_bits=(Rule((2, 4, 8)),),
    recovery=(Recover("batchnorm"),),
    students=(None, Student(factory="small", epochs=4)),
)


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 4, (count,), generator=generator)
    return TensorDataset(centres[labels] + 0.5 * torch.randn(count, 1, 6, 6, generator=generator), labels)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
        x, y = blobs(256, 1).tensors
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(15):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def small(seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


def task(student=small):
    return Task(
        "blobs", network, blobs(256, 1), blobs(100, 2), blobs(100, 3), batch_size=32, students={"small": student}
    )


class Heard(Quiet):
    """Keeps the phases."""

    def __init__(self):
        self.phases = []

    def phase(self, text):
        self.phases.append(text)

    @property
    def trainings(self):
        """How often the training of a student was begun."""
        steps = [text for text in self.phases if text.startswith("student small: fine-tuning")]
        return steps.count(min(steps, key=len)) if steps else 0


def study_of(folder, listener=None, **more):
    settings = {"seconds": 0.005, "calibration_images": 32, "mlflow": False}
    return Study(task(**more), SPACE, directory=folder, listener=listener, **settings)


def test_students_are_taught_once_and_are_on_the_front(tmp_path):
    heard = Heard()
    front = study_of(tmp_path / "whole", heard).run(trials=14)
    assert heard.trainings == 1
    student = Student(factory="small", epochs=4)
    of_student = [c for c in front.candidates if student in c.recipe.steps]
    assert {c.label for c in of_student} >= {"student small", "student small, 8-bit"}
    alone = next(c for c in of_student if c.label == "student small")
    assert alone.measurement.value("accuracy") > 0.8, "it was not taught"
    assert alone.measurement.value("size_bytes") < 0.5 * front.baseline.value("size_bytes")
    assert any(student in member.recipe.steps for member in front.members)
    assert any(student not in c.recipe.steps and not c.label for c in front.candidates), "only students were tried"
    about = json.loads((tmp_path / "whole" / "study.json").read_text())
    assert about["snapshot"]["space"]["students"][1]["factory"] == "small"


def test_an_interrupted_study_goes_on_with_the_same_student(tmp_path):
    first, second = Heard(), Heard()
    whole = study_of(tmp_path / "whole").run(trials=14)
    study_of(tmp_path / "parts", first).run(trials=9)
    again = study_of(tmp_path / "parts", second).run(trials=14)
    assert (first.trainings, second.trainings) == (1, 0)
    assert [c.recipe for c in again.candidates] == [c.recipe for c in whole.candidates]
    for one, other in zip(again.candidates, whole.candidates, strict=True):
        assert one.measurement.value("accuracy") == other.measurement.value("accuracy")


def test_foretold_bytes_are_those_of_the_trained_students_file(tmp_path):
    study = study_of(tmp_path / "study")
    front = study.run(trials=14)
    for candidate in front.candidates:
        foretold = study.judge.predicted(candidate.recipe)["size_bytes"]
        assert foretold == pytest.approx(candidate.measurement.value("size_bytes"), rel=0.01, abs=300)
        assert cost.macs(study.facts.structure, candidate.recipe) == candidate.measurement.value("macs")


def test_a_student_that_cannot_be_taught_is_told(tmp_path):
    space = replace(SPACE, students=(None, Student(factory="small", epochs=4, learning_rate=1e9)))
    study = Study(task(), space, directory=tmp_path / "s", seconds=0.005, calibration_images=32, mlflow=False)
    with pytest.raises(TaskError, match=r"student 'small' cannot be taught: .*lower learning_rate than 1e\+09"):
        study.run(trials=8)


def test_another_checkpoint_of_a_student_is_another_study(tmp_path):
    study_of(tmp_path / "study", student=lambda: small(1)).run(trials=8)
    with pytest.raises(StudyError, match="students"):
        study_of(tmp_path / "study", student=lambda: small(2)).run(trials=9)


def test_a_recipe_with_a_trained_student_gives_the_studys_file_anywhere(tmp_path):
    study = study_of(tmp_path / "study")
    front = study.run(trials=10)
    candidate = next(c for c in front.members if c.recipe.of(Student))
    packed = study.folder.candidates.packed(candidate.recipe).read_bytes()
    from paretorch.runners.local import LocalRunner
    from paretorch.runners.settings import MeasurementSettings

    elsewhere = LocalRunner(task(), tmp_path, MeasurementSettings(calibration_images=32))
    assert elsewhere.build(candidate.recipe) == packed
    assert len(elsewhere.build(Recipe((Student(factory="small", epochs=9),)), recovery=False)) > 0
    assert not elsewhere.files.trained(Recipe((Student(factory="small", epochs=9),))).exists(), "a preview trained"
