"""The teacher's answers and features: against plain references, and never reused where they would be wrong."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.trace import trace
from paretorch.runners.task import Task
from paretorch.runners.training.distill import (
    feature_loss,
    pairs,
    recorded,
    repeatable,
    soft_loss,
    teacher_logits,
    temperature,
)
from paretorch.runners.training.finetune import finetune
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.student import Student


@settings(deadline=None, max_examples=60)
@given(st.floats(0.1, 20), st.floats(0, 1), st.floats(0, 1))
def test_a_temperature_moves_in_a_straight_line_between_one_and_its_value(top, first, second):
    constant, warm, annealed = (
        Recover("finetune", 1, temperature=top, temperature_schedule=s) for s in ("constant", "warmup", "anneal")
    )
    assert temperature(constant, first) == top
    assert (temperature(warm, 0), temperature(annealed, 0)) == (1, top)
    assert temperature(warm, 1) == pytest.approx(top)
    assert temperature(annealed, 1) == pytest.approx(1)
    assert temperature(warm, first) + temperature(annealed, first) == pytest.approx(1 + top)
    assert (temperature(warm, first) - temperature(warm, second)) * (first - second) * (top - 1) >= 0


def test_the_soft_loss_is_hintons():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    expected = 0.0
    for own, other in zip((student / 3).softmax(1), (teacher / 3).softmax(1), strict=True):
        expected += 9 / 6 * sum(float(q * math.log(q / p)) for p, q in zip(own, other, strict=True))
    assert float(soft_loss(student, teacher, 3.0)) == pytest.approx(expected)
    assert float(soft_loss(teacher, teacher, 3.0)) == pytest.approx(0)


def test_features_are_compared_by_direction():
    torch.manual_seed(0)
    teacher = {"a": torch.randn(5, 3, 2, 2), "b": torch.randn(5, 7)}
    assert float(feature_loss({name: 3 * value for name, value in teacher.items()}, teacher)) == pytest.approx(
        0, abs=1e-6
    )
    assert float(feature_loss({name: -value for name, value in teacher.items()}, teacher)) == pytest.approx(4)
    student = {name: torch.randn_like(value) for name, value in teacher.items()}
    cosines = torch.stack(
        [nn.functional.cosine_similarity(student[n].flatten(1), teacher[n].flatten(1)).mean() for n in teacher]
    )
    assert float(feature_loss(student, teacher)) == pytest.approx(float((2 - 2 * cosines).mean()))


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ((), {"layer1", "layer2"}),
        ((Quantize("stem", 4), Student(("layer1.1",))), {"layer1", "layer2"}),
        ((Prune("layer1.0.conv1", 8),), {"layer1", "layer2"}),  # inside a block: its end keeps its shape
        ((Prune("stem", 8),), {"layer1.1.bn1", "layer2"}),  # the stream is narrower, the inner layers are not
        (
            (*(Prune(f"layer{n}.conv1", 8) for n in ("1.0", "1.1", "2.0")), Prune("stem", 8), Prune("down", 16)),
            set(),
        ),
    ],
)
def test_pairs_are_the_ends_of_stages_that_kept_their_shape(steps, found, network):
    model, x = network("residual")
    student = compress(copy.deepcopy(model), Recipe(steps), trace(model, x), x[:2])
    assert set(pairs(student, model, x[:2])) == found
    assert not student.training
    finetune(student, model, Recover("finetune", 0.5, features=1.0), task_for(model, x), seed=0)  # whatever the pairs


def task_for(model, x, data=None, **more):
    with torch.no_grad():
        labels = model(x).argmax(1)
    data = data or TensorDataset(x, labels)
    return Task("own", lambda: model, data, data, batch_size=32, **more)


def test_features_that_are_taught_are_nearer(network):
    model, x = network("residual")
    steps = (*(Quantize(f"layer1.{i}.conv{j}", 2) for i in (0, 1) for j in (1, 2)), Quantize("stem", 2))
    distances = []
    for weight in (0.0, 5.0):
        student = compress(copy.deepcopy(model), Recipe(steps), trace(model, x), x[:2])
        finetune(student, model, Recover("finetune", 2, 0.05, features=weight), task_for(model, x), seed=0)
        names = pairs(student, model, x[:2])
        with torch.no_grad(), recorded(student, names) as own, recorded(model, names) as theirs:
            student(x), model(x)
        distances.append(float(feature_loss(own, theirs)))
    assert distances[1] < 0.9 * distances[0]
    assert not model._forward_hooks
    assert not any(module._forward_hooks for module in [*student.modules(), *model.modules()])


class Augmented(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        return (x.flip(-1) if torch.rand(()) < 0.3 else x), self.y[index]


def test_augmentation_is_noticed_also_in_workers_and_in_collating(network):
    model, x = network("residual")
    y = torch.zeros(len(x), dtype=torch.long)
    assert repeatable(task_for(model, x))
    state = torch.get_rng_state()
    assert not repeatable(task_for(model, x, Augmented(x, y)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not repeatable(task_for(model, x, DataLoader(Augmented(x, y), num_workers=1)))

    def noisy(samples):
        images, labels = default_collate(samples)
        return images + 0.1 * torch.randn_like(images), labels

    assert not repeatable(task_for(model, x, DataLoader(TensorDataset(x, y), collate_fn=noisy)))
    assert teacher_logits(task_for(model, x, Augmented(x, y)), model) is None


def test_answers_are_the_teachers_or_none(network, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # without bfloat16
    model, x = network("residual")
    found = teacher_logits(task_for(model, x), model)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-4)
    assert teacher_logits(task_for(model, x), model, limit=found.nbytes) is not None
    assert teacher_logits(task_for(model, x), model, limit=found.nbytes - 1) is None
    half = DataLoader(TensorDataset(x, torch.zeros(len(x))), collate_fn=lambda samples: default_collate(samples[::2]))
    assert teacher_logits(task_for(model, x, half), model) is None, "rows would be those of other samples"
    maps = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert teacher_logits(task_for(model, x), maps) is None


def test_training_on_stored_answers_is_training_on_the_teacher(network):
    """Of the right rows: on those of shuffled samples it would be something else altogether."""
    model, x = network("residual")
    task = task_for(model, x)
    stored = teacher_logits(task, model)
    results = []
    for taught in (None, stored, stored.clone(), stored.roll(1, 0)):
        student = compress(copy.deepcopy(model), Recipe((Quantize("stem", 2),)), trace(model, x), x[:2])
        finetune(student, model, Recover("finetune", 1.5, 0.02), task, seed=0, teacher_logits=taught)
        results.append(student.state_dict())
    live, first, second, wrong = results
    assert all(torch.equal(first[name], second[name]) for name in first)
    errors = [float((found["fc.weight"] - live["fc.weight"]).abs().max()) for found in (first, wrong)]
    assert 10 * errors[0] < errors[1], errors
