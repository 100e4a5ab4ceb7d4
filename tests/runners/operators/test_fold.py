"""BatchNorm folded and re-estimated, against its own forward pass and against averages by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paretorch.runners.operators.fold import calibration_bias, fold_batchnorms, reestimate_batchnorms

PAIRS = {
    "conv2d": (lambda bias: nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d, (3, 8, 8)),
    "depthwise": (lambda bias: nn.Conv2d(6, 6, 3, groups=6, bias=bias), nn.BatchNorm2d, (6, 8, 8)),
    "conv1d": (lambda bias: nn.Conv1d(3, 6, 3, bias=bias), nn.BatchNorm1d, (3, 8)),
    "linear": (lambda bias: nn.Linear(5, 6, bias=bias), nn.BatchNorm1d, (5,)),
}


@settings(deadline=None)
@given(st.sampled_from(list(PAIRS)), st.booleans(), st.booleans(), st.integers(0, 999))
def test_folding_changes_nothing_in_evaluation_mode(kind, bias, affine, seed):
    torch.manual_seed(seed)
    make, norm, shape = PAIRS[kind]
    model = nn.Sequential(make(bias), norm(6, affine=affine)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.01, 4)
    if affine:
        nn.init.normal_(model[1].weight)  # also negative ...
        model[1].weight.data[0] = 0  # ... and zero
        nn.init.normal_(model[1].bias)
    x = torch.randn(4, *shape)
    before = copy.deepcopy(model)
    factors = fold_batchnorms(model, [("0", "1")])
    assert isinstance(model[1], nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)
    expected = before[0].weight * factors["0"].view(-1, *[1] * (before[0].weight.ndim - 1))
    torch.testing.assert_close(model[0].weight, expected)


def test_a_pair_in_a_block_that_was_left_out_is_skipped():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Identity())
    assert fold_batchnorms(model, [("0", "9"), ("9.conv", "1")]) == {}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_the_averages_over_the_batches(momentum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Dropout(0.9), nn.Flatten())
    model = nn.Sequential(model, nn.Linear(4 * 36, 5), nn.BatchNorm1d(5, momentum=momentum)).train()
    batches = [torch.randn(n, 3, 8, 8) * 3 + 1 for n in (16, 16, 16)]
    reestimate_batchnorms(model, batches)

    with torch.no_grad():
        maps = [model[0][0](x) for x in batches]
        norm = model[0][1]
        torch.testing.assert_close(norm.running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0))
        # The second layer saw what the first gave in training mode, without dropout.
        normed = [
            (m - m.mean((0, 2, 3), keepdim=True)) / (m.var((0, 2, 3), keepdim=True, correction=0) + norm.eps).sqrt()
            for m in maps
        ]
        deep = [model[1](m.flatten(1)) for m in normed]
        torch.testing.assert_close(
            model[2].running_mean, torch.stack([d.mean(0) for d in deep]).mean(0), rtol=1e-4, atol=1e-5
        )
    assert norm.momentum == model[2].momentum == momentum
    assert not any(module.training for module in model.modules())


def test_a_network_without_statistics_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    reestimate_batchnorms(model, [torch.randn(2, 3, 8, 8)])
    assert model[1].running_mean is None


def test_an_untouched_network_keeps_its_statistics_whatever_the_calibration_images(settle):
    """The calibration set's own bias is taken out: only what compression changed may move."""
    torch.manual_seed(0)
    model, _ = settle(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)),
        (3, 8, 8),
        64,
    )
    other = [1.7 * torch.randn(16, 3, 8, 8) + 0.4 for _ in range(3)]  # nothing like what it was settled on
    bias = calibration_bias(model, other)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate_batchnorms(model, other, bias)
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        torch.testing.assert_close(model.state_dict()[name], before[name], rtol=1e-4, atol=1e-5)
    reestimate_batchnorms(model, other)
    assert not torch.allclose(model.state_dict()["4.running_var"], before["4.running_var"], rtol=0.1)


def test_variances_behind_one_scale_move_together(settle):
    """The means of all channels are re-estimated, the variances by the geometric mean of their changes; untouched ones
    stay.
    """
    torch.manual_seed(0)
    model, _ = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (3, 8, 8), 64)
    other = [1.7 * torch.randn(16, 3, 8, 8) + 0.4 for _ in range(3)]
    bias, before = calibration_bias(model, other), copy.deepcopy(model[1])
    reestimate_batchnorms(model, other, bias, one_factor={"1"})
    torch.testing.assert_close(model[1].running_var, before.running_var, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model[0].weight *= torch.linspace(0.8, 1.4, 8).view(-1, 1, 1, 1)
    free = copy.deepcopy(model)
    reestimate_batchnorms(free, other, bias)
    reestimate_batchnorms(model, other, bias, one_factor={"1"})
    torch.testing.assert_close(model[1].running_mean, free[1].running_mean)
    change = (model[1].running_var + 1e-5) / (before.running_var + 1e-5)
    mean = float(torch.linspace(0.8, 1.4, 8).square().log().mean().exp())
    torch.testing.assert_close(change, torch.full((8,), mean), rtol=1e-3, atol=0)


def test_a_shifted_layer_is_repaired_by_exactly_its_shift(settle):
    torch.manual_seed(0)
    model, x = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (3, 8, 8), 64)
    other = [1.7 * torch.randn(16, 3, 8, 8) + 0.4 for _ in range(3)]
    bias, expected = calibration_bias(model, other), model(x).detach()
    with torch.no_grad():
        model[0].bias += 3.0
    reestimate_batchnorms(model, other, bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
