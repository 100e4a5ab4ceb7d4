"""Recovery: a damaged network gets better, the same way every time, and says so when it breaks."""

import copy
import multiprocessing
import os
import signal

import onnx
import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from paretorch.errors import Diverged, TrialError
from paretorch.runners.compression.compress import chunks, compress
from paretorch.runners.compression.freeze import freeze
from paretorch.runners.compression.trace import trace
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.operators.quantize import FakeQuantize
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.task import Task
from paretorch.runners.training import finetune as recover
from paretorch.runners.training.finetune import State, finetune, trainable
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify


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


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    ("train", "changed"),
    [
        (
            "all",
            {
                "0.bias",
                "0.parametrizations.weight.original",
                "0.parametrizations.weight.0.scale",
                "1.weight",
                "1.bias",
                "3.bias",
                "3.parametrizations.weight.original",
                "3.parametrizations.weight.0.scale",
            },
        ),
        ("last", {"3.bias", "3.parametrizations.weight.original", "3.parametrizations.weight.0.scale"}),
        (
            "scales",
            {
                "0.bias",
                "0.parametrizations.weight.0.scale",
                "1.weight",
                "1.bias",
                "3.bias",
                "3.parametrizations.weight.0.scale",
            },
        ),
    ],
)
def test_only_what_is_named_is_trained(train, changed, settle):
    model, teacher, task, x = damaged(settle)
    before, loss = weights_of(model), loss_of(model, teacher, x, True)
    finetune(model, teacher, Recover("finetune", 5, 0.05, train=train), task, seed=0)
    after = weights_of(model)
    # The bias in front of a BatchNorm has no gradient, and decays.
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed
    assert loss_of(model, teacher, x, True) < 0.9 * loss


def test_nothing_runs_backward_through_what_is_not_trained(network):
    model, x = network("residual")
    needed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, a, output, name=name: needed.__setitem__(name, output.requires_grad) if m.training else None
            )
    data = TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    student = copy.deepcopy(model)
    finetune(student, model, Recover("finetune", 0.2, train="last"), Task("t", lambda: model, data, data), seed=0)
    # 15 modules with parameters, in the order in which they run; those of the last five are trained.
    assert [name for name, wanted in needed.items() if wanted] == ["layer2.0.conv1", "layer2.0.conv2", "fc"]


def test_the_last_layers_are_the_last_to_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body, self.stem = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(self.body(self.stem(x)))

    assert set(trainable(Backwards(), "last", torch.randn(2, 3))) == {"head.weight", "head.bias"}


def test_nothing_to_train_is_a_result():
    bare = nn.Sequential(nn.Linear(8, 4, bias=False))
    data = TensorDataset(torch.randn(8, 8), torch.zeros(8, dtype=torch.long))
    with pytest.raises(TrialError, match=r"train: scales finds nothing .* choose train: all"):
        finetune(bare, bare, Recover("finetune", 1, train="scales"), Task("t", lambda: bare, data, data), seed=0)


def test_training_is_what_its_docstring_says(monkeypatch):
    """Against a loop in plain torch: order of samples, learning rate, temperature, loss, clipping."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # without bfloat16
    torch.manual_seed(0)
    teacher = nn.Linear(5, 3)
    student = nn.Linear(5, 3)
    reference = copy.deepcopy(student)
    x, y = 9 * torch.randn(48, 5), torch.randint(0, 3, (48,))
    data = TensorDataset(x, y)
    step = Recover("finetune", 2, 0.1, 0.7, 4.0, temperature_schedule="warmup")
    finetune(student, teacher, step, Task("t", lambda: teacher, data, data, batch_size=16), seed=5)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    order = torch.cat([torch.randperm(48, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    clipped = 0
    for number, rows in enumerate(order.split(16)):
        t = 1 + 3 * number / 5
        outputs, taught = reference(x[rows]), teacher(x[rows]).detach()
        q, p = (taught / t).softmax(1), (outputs / t).softmax(1)
        soft = t**2 * (q * (q.log() - p.log())).sum(1).mean()
        value = 0.7 * soft + 0.3 * F.cross_entropy(outputs, y[rows])
        optimizer.zero_grad()
        value.backward()
        clipped += nn.utils.clip_grad_norm_(reference.parameters(), 5.0) > 5
        optimizer.step()
        schedule.step()
    assert 0 < clipped < 6
    torch.testing.assert_close(student.weight, reference.weight, atol=1e-5, rtol=1e-4)


class Watched(Dataset):
    """Remembers which samples were read while the network trained."""

    def __init__(self, x, y):
        self.x, self.y, self.read = x, y, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.read.append(index)
        return self.x[index], self.y[index]


def test_patience_ends_training_and_keeps_the_best_weights(settle, monkeypatch):
    """Labels are random, so what is learnt by heart does not help on what is held out."""
    monkeypatch.setattr(recover, "KEEP_EVERY", 0.0)
    _, teacher, _, x = damaged(settle)
    torch.manual_seed(1)
    data = Watched(x, torch.randint(0, 4, (len(x),)))
    task = Task("noise", lambda: teacher, train=data, validation=TensorDataset(x, data.y), batch_size=32)
    model = copy.deepcopy(teacher)
    losses, states = [], []

    def held_out_loss():
        rows = torch.tensor(sorted(held))
        with torch.no_grad():
            return float(F.cross_entropy(model.eval()(x[rows]), data.y[rows]))

    def keep(state):
        states.append(state.waited)
        losses.append(held_out_loss())
        model.train()

    held = set(recover._samples(task, 2)[1])
    finetune(model, teacher, Recover("finetune", 30, 0.3, distill=0, patience=2), task, seed=0, keep=keep)
    assert len(losses) < 30
    assert states[-2:] == [1, 2]
    assert held_out_loss() == pytest.approx(min(losses), rel=0.02)  # bfloat16 aside
    assert held_out_loss() < losses[-1]
    # Each sample is read once an epoch: what is held out, and that is a tenth, to evaluate and not to train.
    assert len(held) == 26
    assert torch.bincount(torch.tensor(data.read)).tolist() == [len(losses)] * len(x)


def test_patience_needs_samples_to_hold_out():
    data = TensorDataset(torch.randn(3, 2), torch.zeros(3, dtype=torch.long))
    net = nn.Linear(2, 2)
    with pytest.raises(TrialError, match="patience = 2 needs training samples"):
        finetune(net, net, Recover("finetune", 1, patience=2), Task("t", lambda: net, data, data), seed=0)


STEPS = [
    Recover("finetune", 4, 0.05),
    Recover("finetune", 6, 0.05, gradual=True, patience=3),
    Recover("finetune", 3.5, 0.05, train="last", temperature_schedule="anneal"),
    Recover("finetune", 6, 0.5, distill=0.2, patience=1, features=1.0),
]


@pytest.mark.parametrize("step", STEPS, ids=["all", "gradual", "last", "patience"])
def test_training_that_goes_on_from_any_epoch_ends_with_the_same_weights(step, settle, monkeypatch, tmp_path):
    monkeypatch.setattr(recover, "KEEP_EVERY", 0.0)

    def fresh():
        model, teacher, task, _ = damaged(settle)
        return (
            nn.Sequential(*model[:2], nn.Dropout(0.2), *model[2:]),
            nn.Sequential(*teacher[:2], nn.Dropout(0.2), *teacher[2:]),
            task,
        )

    def keep(state):
        path = tmp_path / f"{len(paths)}"
        path.write_bytes(state.to_bytes())
        paths.append(path)

    paths = []
    whole, teacher, task = fresh()
    finetune(whole, teacher, step, task, seed=7, keep=keep)
    assert len(paths) >= 3
    for path in paths:
        torch.manual_seed(len(path.name))
        model, teacher, task = fresh()
        state = State.read(path, model)
        finetune(model, teacher, step, task, seed=7, state=state)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (path.name, name)


def test_a_state_that_cannot_be_read_or_is_anothers_is_none(tmp_path):
    path = tmp_path / "state"
    model = nn.Linear(2, 2)
    assert State.read(path, model) is None
    good = State(3, model=model.state_dict()).to_bytes()
    for data in (b"", b"damaged", good[:-9], save({"random": torch.zeros(1)})):
        path.write_bytes(data)
        assert State.read(path, model) is None
    path.write_bytes(good)
    assert State.read(path, model).steps == 3
    assert State.read(path, nn.Linear(2, 3)) is None
    assert State.read(path, nn.Sequential(model)) is None


def test_a_killed_training_goes_on_and_gives_the_same_file(network, task_of, tmp_path, monkeypatch):
    """Killed in the second of two steps: the first one is not trained again."""
    monkeypatch.setattr(recover, "KEEP_EVERY", 0.0)
    model, x = network("perceptron")
    steps = Recover("finetune", 2, 0.05), Recover("finetune", 3, 0.02)
    recipe = Recipe((*(Quantize(name, 3) for name in ("1", "4", "7")), *steps))

    def build(folder, kill=""):
        folder.mkdir(exist_ok=True)
        heard = []

        def report(phase):
            heard.append(phase)
            if phase == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        runner = LocalRunner(task_of(model, x, batch_size=16), folder, MeasurementSettings(calibration_images=64))
        return runner.build(recipe, report), [phase for phase in heard if "tuning" in phase]

    whole, heard = build(tmp_path / "whole")
    assert heard[-5:] == [f"fine-tuning {n}/48" for n in (0, 10, 20, 30, 40)]
    process = multiprocessing.get_context("fork").Process(target=build, args=(tmp_path / "killed", "fine-tuning 20/48"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again, heard = build(tmp_path / "killed")
    assert heard == [f"fine-tuning {n}/48" for n in (20, 30, 40)]
    assert again == whole


def zeros_while_training(model, layer, fake):
    """How many zeros the layer's weight has in each training step, and the weights that the mask then left."""
    seen = []
    model.get_submodule(layer).register_forward_hook(
        lambda module, args, out: seen.append(int((fake.mask == 0).sum())) if module.training else None
    )
    return seen


@pytest.mark.parametrize(("ratio", "pattern"), [(0.7, ""), (0.5, "2:4"), (0.75, "2:8")])
def test_zeros_grow_by_the_cubic_schedule_and_end_exactly(ratio, pattern, settle):
    """Zhu & Gupta 2017, equation 1: s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, with s_i = 0."""
    _, teacher, task, x = damaged(settle)
    recipe = Recipe(
        (Quantize("0", 4), Sparsify("0", ratio, pattern=pattern), Recover("finetune", 10, 0.05, gradual=True))
    )
    model = compress(copy.deepcopy(teacher), recipe, trace(teacher, x), x[:2])
    fake = model[0].parametrizations["weight"][0]
    first, count = fake.mask.clone(), int((fake.mask == 0).sum())
    seen = zeros_while_training(model, "0", fake)
    finetune(model, teacher, recipe.of(Recover)[0], task, seed=0)
    assert len(seen) == 80
    assert sorted(seen) == seen
    # 40 steps of the ramp, 32 updates: the n-th stands at step round(40 n / 32).
    for update in range(33):
        expected = count + (0 - count) * (1 - update / 32) ** 3
        assert seen[round(40 * update / 32)] == round(expected), update
    assert seen[40:] == [count] * 40
    weight = model[0].weight.detach()
    assert int((fake.mask == 0).sum()) == count == (round(ratio * weight.numel()))
    assert not weight[fake.mask == 0].any()
    assert not torch.equal(fake.mask, first), "the weights that training made small are others"
    if pattern:
        keep, of = map(int, pattern.split(":"))
        assert (fake.mask.view(len(weight), -1, of).sum(-1) == keep).all()
    frozen = freeze(model, recipe)
    assert not frozen["0"].codes[fake.mask == 0].any()


@pytest.mark.parametrize("total", [1, 2, 3, 5, 31, 64, 1000])
def test_the_schedule_begins_dense_and_is_whole_before_training_ends(total):
    found = recover._schedule(total)
    assert len(found) <= 33
    assert all(0 <= step < total for step in found)
    assert list(found.values()) == sorted(found.values())
    if total > 1:
        assert found[0] == 0.0
        assert list(found.items())[-1] == (total // 2, 1.0)


def test_of_a_single_step_the_zeros_are_there_at_once(settle):
    one, two = (damaged(settle)[0] for _ in range(2))
    _, teacher, task, _ = damaged(settle)
    finetune(one, teacher, Recover("finetune", 0.01, 0.05), task, seed=0)
    finetune(two, teacher, Recover("finetune", 0.01, 0.05, gradual=True), task, seed=0)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_best_weights_of_patience_have_all_zeros(settle):
    """With labels that are learnt by heart the held-out loss is least early, when few weights are zero."""
    _, teacher, task, x = damaged(settle)
    torch.manual_seed(1)
    data = TensorDataset(x, torch.randint(0, 4, (len(x),)))
    task = Task("noise", lambda: teacher, train=data, validation=data, batch_size=32)
    model, *_ = damaged(settle)
    fake = model[0].parametrizations["weight"][0]
    count = int((fake.mask == 0).sum())
    seen = zeros_while_training(model, "0", fake)
    finetune(model, teacher, Recover("finetune", 20, 0.3, distill=0, patience=1, gradual=True), task, seed=0)
    assert len(seen) < 20 * 8, "patience did not end it"
    assert int((fake.mask == 0).sum()) == count


def test_without_gradual_masks_stay_as_they_are(settle):
    model, teacher, task, _ = damaged(settle)
    fake = model[0].parametrizations["weight"][0]
    mask = fake.mask
    before = mask.clone()
    finetune(model, teacher, Recover("finetune", 2, 0.05), task, seed=0)
    assert fake.mask is mask
    assert torch.equal(mask, before)


def test_a_candidate_whose_zeros_grew_ships_with_them(network, task_of, tmp_path):
    model, x = network("residual")
    steps = tuple(Sparsify(name, 0.8) for name in ("stem", "layer1.0.conv1"))
    recipe = Recipe((*steps, Recover("finetune", 2, 0.05, gradual=True), Recover("finetune", 1, 0.02)))
    runner = LocalRunner(task_of(model, x, batch_size=16), tmp_path, MeasurementSettings(calibration_images=64))
    data = runner.build(recipe)
    assert data == runner.build(recipe)
    arrays = [onnx.numpy_helper.to_array(entry) for entry in packing.unpack(data).graph.initializer]
    zeros = {array.shape: int((array == 0).sum()) for array in arrays if (array == 0).any() and array.ndim == 4}
    assert zeros == {(16, 3, 3, 3): round(0.8 * 432), (16, 16, 3, 3): round(0.8 * 2304)}
