"""Recovery: a damaged network gets better, the same way every time, and says so when it breaks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paretorch.errors import Diverged
from paretorch.runners.compress import chunks, compress, freeze
from paretorch.runners.operators.quantize import FakeQuantize
from paretorch.runners.recover import finetune
from paretorch.runners.task import Task
from paretorch.runners.trace import trace
from paretorch.spaces.recipe import Quantize, Recipe, Recover, Sparsify


def damaged(settle, n=256):
    """`(a damaged copy, the teacher, the task, inputs)`: 2-bit weights and half of them zero."""
    torch.manual_seed(0)
    teacher, x = settle(nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)), (8,), n)
    teacher[3].weight.data *= 8  # a trained network is sure of its answers
    data = TensorDataset(x, teacher(x).argmax(1).detach())
    task = Task("tiny", lambda: teacher, train=data, validation=data, batch_size=32)
    recipe = Recipe((Quantize("0", 2), Quantize("3", 3), Sparsify("0", 0.5)))
    model = compress(copy.deepcopy(teacher), recipe, trace(teacher, x), x[:2])
    return model, teacher, task, x


def loss_of(model, teacher, x, soft):
    """The cross-entropy with the teacher's answers, or the divergence from its probabilities."""
    with torch.no_grad():
        outputs, taught = model.eval()(x), teacher(x)
        if soft:
            return float(
                F.kl_div(outputs.log_softmax(1), taught.log_softmax(1), reduction="batchmean", log_target=True)
            )
        return float(F.cross_entropy(outputs, taught.argmax(1)))


@pytest.mark.parametrize("distill", [0.0, 0.9, 1.0])
def test_fine_tuning_wins_back_what_was_lost(distill, settle):
    model, teacher, task, x = damaged(settle)
    before = loss_of(model, teacher, x, distill > 0)
    finetune(model, teacher, Recover("finetune", 5, 0.05, distill), task, seed=0)
    assert loss_of(model, teacher, x, distill > 0) < 0.6 * before
    assert not any(module.training for module in model.modules())


def trained(settle, seed, noise=0):
    model, teacher, task, _ = damaged(settle)
    torch.manual_seed(noise)  # what happened before in this process must not matter
    finetune(model, teacher, Recover("finetune", 1, 0.05), task, seed)
    return model.state_dict()


def test_the_same_seed_gives_the_same_weights(settle):
    first, second, other = trained(settle, 3, 1), trained(settle, 3, 2), trained(settle, 4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_randomness_outside_is_left_alone(settle):
    model, teacher, task, _ = damaged(settle)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(model, teacher, Recover("finetune", 0.5, 0.05), task, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_zeros_stay_zero_and_steps_are_learnt(settle):
    model, teacher, task, _ = damaged(settle)
    fake = model[0].parametrizations["weight"][0]
    assert isinstance(fake, FakeQuantize)
    mask, scale = fake.mask.clone(), fake.scale.detach().clone()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    finetune(model, teacher, Recover("finetune", 2, 0.05), task, seed=0)
    frozen = freeze(model, Recipe((Quantize("0", 2), Quantize("3", 3), Sparsify("0", 0.5))))
    assert not frozen["0"].codes[mask == 0].any()
    assert not model[0].weight[mask == 0].any()
    assert not torch.equal(frozen["0"].scale, scale)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_a_loss_that_explodes_is_a_result(settle):
    model, teacher, task, _ = damaged(settle)
    with pytest.raises(Diverged, match="learning_rate below 1e\\+06"):
        finetune(model, teacher, Recover("finetune", 20, 1e6), task, seed=0)


@pytest.mark.parametrize(("epochs", "images", "steps"), [(0.5, 256, 4), (0.01, 256, 1), (1, 256, 8), (2.5, 256, 20)])
def test_an_epoch_may_be_a_fraction(epochs, images, steps, settle):
    model, teacher, task, _ = damaged(settle, images)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(len(args[0])) if module.training else None)
    finetune(model, teacher, Recover("finetune", epochs, 0.01), task, seed=0)
    assert seen == [32] * steps


def test_a_last_batch_of_one_image_is_left_out(settle):
    """BatchNorm raises for a single value per channel."""
    model, teacher, task, _ = damaged(settle, 33)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(len(args[0])) if module.training else None)
    finetune(model, teacher, Recover("finetune", 2, 0.01), task, seed=0)
    assert seen == [32, 32]
    assert [len(part) for part in chunks(torch.zeros(257, 2), 128)] == [128, 129]
    assert [len(part) for part in chunks(torch.zeros(1, 2), 128)] == [1]


def test_outputs_that_are_no_classes_are_trained_without_distillation(settle):
    torch.manual_seed(0)
    teacher, x = settle(nn.Sequential(nn.Conv1d(3, 4, 1)), (3, 5), 64)
    data = TensorDataset(x, torch.zeros(64, 4, 5))
    task = Task("maps", lambda: teacher, data, data, loss=F.mse_loss, metric=lambda o, t: -o.square().mean((1, 2)))
    model = copy.deepcopy(teacher)
    finetune(model, teacher, Recover("finetune", 40, 0.1, distill=1.0), task, seed=0)
    with torch.no_grad():
        assert float(model(x).square().mean()) < 0.5 * float(teacher(x).square().mean())
