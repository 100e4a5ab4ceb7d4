"""Weights rounded and zeroed for the layer's outputs, against brute force and against the papers' own properties."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paretorch.runners.operators import obs as module
from paretorch.runners.operators.adaround import adaround
from paretorch.runners.operators.gptq import gptq
from paretorch.runners.operators.hessian import damped, gram, inverse_factor, output_error
from paretorch.runners.operators.layers import as_matrix, groups_of, patches
from paretorch.runners.operators.obs import obs, order, refit
from paretorch.runners.operators.quantize import affine_grid, codes, largest, spread, weight_scales
from paretorch.runners.operators.sparsify import activation_scores, magnitude_mask, mask_of

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (4, 7)),
    "tokens": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 8, 8)),
    "strided": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (4, 3, 9, 8)),
    "same": (lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="reflect"), (3, 3, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3, bias=False), (4, 6, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (4, 6, 6, 6)),
    "sound": (lambda: nn.Conv1d(4, 6, 5, padding=2, stride=2), (3, 4, 20)),
}


def correlated(inputs, count=400, seed=0):
    """Inputs of which some nearly follow from others, as behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(max(2, inputs // 2), count, generator=generator)
    mixed = torch.randn(inputs, len(base), generator=generator) @ base
    return (mixed + 0.3 * torch.randn(inputs, count, generator=generator)).relu()


def case(outputs, inputs, seed=0, groups=1):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups * outputs, inputs, generator=generator)
    hessian = torch.stack([(x := correlated(inputs, seed=seed + g)) @ x.T for g in range(groups)])
    return weight, hessian


def error(weight, target, hessian):
    return output_error(as_matrix(weight - target, len(hessian)), hessian)


@pytest.mark.parametrize("name", LAYERS)
def test_the_hessian_gives_the_error_of_the_outputs(name):
    """Whatever the layer's padding, stride and groups: d H d^T is what changing the weight does to its outputs."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    change = torch.randn_like(layer.weight)
    with torch.no_grad():
        before = layer(x)
        unfolded = as_matrix(layer.weight, groups_of(layer)) @ patches(layer, x)
        layer.weight += change
        channel = -1 if isinstance(layer, nn.Linear) else 1
        expected = (layer(x) - before).square().movedim(channel, 0).flatten(1).sum(1)
    hessian = gram(layer, x)
    found = output_error(as_matrix(change, len(hessian)), hessian).flatten()
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-3)
    bias = 0 if layer.bias is None else layer.bias.detach()[:, None]
    torch.testing.assert_close(
        unfolded.flatten(0, 1) + bias, before.movedim(channel, 0).flatten(1), rtol=1e-4, atol=1e-4
    )


def test_the_hessian_of_parts_is_that_of_the_whole(monkeypatch):
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(9, 4, 10, 10)
    whole = gram(layer, x)
    monkeypatch.setattr("paretorch.runners.operators.hessian._BLOCK", 1)  # one image at a time
    torch.testing.assert_close(gram(layer, x), whole, rtol=1e-5, atol=1e-4)


def test_the_factor_is_the_one_of_the_paper():
    """Row j is what is left of the inverse once the inputs before j are fixed, over the root of its first number."""
    _, hessian = case(1, 6)
    factor, full = inverse_factor(hessian)[0], damped(hessian)[0]
    for j in range(6):
        inverse = torch.linalg.inv(full[j:, j:])
        torch.testing.assert_close(factor[j, j:], inverse[0] / inverse[0, 0].sqrt())


def greedy(weight, scale, bits, hessian, order):
    """OBQ (Frantar & Alistarh 2022) in a given order, with a new inverse at each step, row by row, in NumPy."""
    full, top = damped(hessian)[0].numpy(), largest(bits)
    found = np.zeros(weight.shape)
    for r, row in enumerate(weight.double().numpy()):
        left, w = list(order), row.copy()
        while left:
            j = left[0]
            inverse = np.linalg.inv(full[np.ix_(left, left)])
            found[r, j] = np.clip(np.rint(w[j] / scale[r]), -top, top) * scale[r]
            w[left] -= (w[j] - found[r, j]) * inverse[0] / inverse[0, 0]
            left = left[1:]
    return torch.tensor(found)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("inputs", [6, 150])  # more than a block of columns
def test_gptq_is_obq_in_its_order(inputs, act_order):
    weight, hessian = case(3, inputs)
    scale = weight_scales(weight, 3)
    order = np.argsort(-hessian[0].diagonal().numpy(), kind="stable") if act_order else np.arange(inputs)
    expected = greedy(weight, scale.double().numpy(), 3, hessian, order)
    near = codes(weight, scale, 3) * scale[:, None]
    keeps = error(near, weight, hessian)[0] <= error(expected.float(), weight, hessian)[0]
    expected = torch.where(keeps[:, None], near.double(), expected)
    found = gptq(weight, scale, 3, hessian, act_order=act_order)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(0, 999), st.sampled_from([1, 3]), st.sampled_from(["", "0.5", "2:4"]))
def test_no_row_is_worse_than_nearest_and_zeros_stay(bits, seed, groups, zeros):
    weight, hessian = case(4, 8, seed, groups)
    zeros = zeros if bits > 1 else ""
    mask = mask_of(weight.abs(), 0.5, zeros if ":" in zeros else "") if zeros else None
    scale = weight_scales(weight if mask is None else weight * mask, bits)
    near = codes(weight, scale, bits) * scale[:, None] * (1 if mask is None else mask)
    for method in (gptq, adaround):
        found = method(weight, scale, bits, hessian, mask)
        assert bool((error(found, weight, hessian) <= error(near, weight, hessian) * (1 + 1e-9)).all())
        assert mask is None or not bool(found[mask == 0].any())
        # Nearest rounding gives back what was chosen: that is what `freeze` does.
        assert torch.equal(codes(found, scale, bits) * scale[:, None], found)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("method", [gptq, adaround])
def test_little_is_left_of_the_error_of_nearest_rounding(method, bits):
    """On inputs that follow from each other, where there is much to gain; the best of all 2^8 or 3^8 roundings as the
    bound.
    """
    weight, hessian = case(6, 8)
    scale = weight_scales(weight, bits)
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0) if bits == 2 else (-1.0, 1.0), repeat=8)))
    best = torch.stack(
        [error(every * s, w.expand_as(every), hessian).min() for w, s in zip(weight, scale, strict=True)]
    )
    near = error(codes(weight, scale, bits) * scale[:, None], weight, hessian)[0]
    found = error(method(weight, scale, bits, hessian), weight, hessian)[0]
    assert bool((found >= best * (1 - 1e-6)).all())
    assert (found.sum() - best.sum()) < (0.35 if bits == 2 else 0.4) * (near.sum() - best.sum())


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(0, 999), st.sampled_from([3, 4, 20]), st.booleans())
def test_groups_are_rounded_for_the_whole_row(bits, seed, size, sparse):
    """Each weight on the grid of its group, no row worse than nearest, and most far better on inputs that follow from
    each other.
    """
    weight, hessian = case(4, 20, seed)
    mask = mask_of(weight.abs(), 0.5) if sparse and bits > 1 else None
    wide = spread(weight_scales(weight if mask is None else weight * mask, bits, group_size=size), weight, size)
    near = codes(weight, wide, bits) * wide * (1 if mask is None else mask)
    for method in (gptq, adaround):
        found = method(weight, wide, bits, hessian, mask)
        assert bool((error(found, weight, hessian) <= error(near, weight, hessian) * (1 + 1e-9)).all())
        assert torch.equal(codes(found, wide, bits) * wide, found)


def affine_case(bits, seed, sparse):
    """`(weight, hessian, mask, factor, scale, zero, the scale as wide as the weight, the weight rounded to the
    nearest)`.
    """
    weight, hessian = case(4, 20, seed)
    factor = torch.tensor([1.0, -0.5, 3.0, -1e-3])
    mask = mask_of(weight.abs(), 0.5) if sparse else torch.ones_like(weight)
    scale, zero = affine_grid(weight * mask * factor[:, None], bits)
    wide = (scale / factor)[:, None].expand_as(weight)
    return weight, hessian, mask, factor, scale, zero, wide, codes(weight, wide, bits, zero) * wide * mask


@pytest.mark.parametrize("method", [gptq, adaround])
def test_affine_weights_lose_less_than_when_rounded_to_the_nearest(method):
    """In most cases; with few bits, now and then, nothing is better than the nearest."""
    better = []
    for bits, seed, sparse in itertools.product((2, 3, 4), range(10), (False, True)):
        weight, hessian, mask, _, _, zero, wide, near = affine_case(bits, seed, sparse)
        found = method(weight, wide, bits, hessian, mask, zero=zero)
        better.append(bool(error(found, weight, hessian).sum() < error(near, weight, hessian).sum()))
    assert sum(better) > 0.9 * len(better)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 4), st.integers(0, 999), st.booleans())
def test_affine_weights_are_rounded_on_the_grid_of_the_folded_weight(bits, seed, sparse):
    """One scale and zero point for what a BatchNorm of factors of both signs makes of the weight; no row worse than
    nearest.
    """
    weight, hessian, mask, factor, scale, zero, wide, near = affine_case(bits, seed, sparse)
    for method in (gptq, adaround):
        found = method(weight, wide, bits, hessian, mask, zero=zero)
        assert bool((error(found, weight, hessian) <= error(near, weight, hessian) * (1 + 1e-9)).all())
        steps = found * factor[:, None] / scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        assert float(steps.min().round()) >= -zero
        assert float(steps.max().round()) <= 2**bits - 1 - zero
        assert bool((found[mask == 0] == 0).all())


def test_adaround_rounds_up_or_down():
    weight, hessian = case(6, 20)
    scale = weight_scales(weight, 4)
    found = adaround(weight, scale, 4, hessian) / scale[:, None]
    quotient = (weight / scale[:, None]).clamp(-7, 7)
    assert bool(((found - quotient).abs() < 1 + 1e-4).all())
    assert torch.equal(adaround(weight, scale, 4, hessian), adaround(weight, scale, 4, hessian))


def least_squares(weight, mask, hessian):
    """Of the weights that stay the best ones, row by row, by solving for them."""
    full = damped(hessian)[0]
    out = torch.zeros_like(weight, dtype=torch.float64)
    for r, row in enumerate(weight.double()):
        stay = mask[r] > 0
        out[r, stay] = torch.linalg.solve(full[stay][:, stay], full[stay] @ row)
    return out


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(0.05, 0.95))
def test_refit_is_least_squares(seed, ratio):
    weight, hessian = case(4, 9, seed)
    mask = mask_of(weight.abs(), ratio)
    found = refit(as_matrix(weight, 1), as_matrix(mask, 1), hessian)[0]
    # Some of these Hessians lose three digits in single precision.
    torch.testing.assert_close(found.double(), least_squares(weight, mask, hessian), rtol=1e-2, atol=1e-3)


def surgeon(weight, hessian, pattern):
    """Exact OBS, row by row, with a new inverse at each zero, in NumPy: the inputs in their order, and what each
    costs.
    """
    full, channels = damped(hessian)[0].numpy(), weight.shape[1]
    positions = weight[0, 0].numel()
    keep, of = map(int, pattern.split(":")) if pattern else (0, channels)
    for row in weight.flatten(1).double().numpy():
        left, w, costs = list(range(len(row))), row.copy(), {}
        while True:
            inverse = np.linalg.inv(full[np.ix_(left, left)])
            price = w[left] ** 2 / inverse.diagonal()
            for i, j in enumerate(left):
                channel, position = divmod(j, positions)
                block = range(channel // of * of, min(channels, channel // of * of + of))
                gone = sum(c * positions + position in costs for c in block)
                if pattern and gone == len(block) - -(-len(block) * keep // of):
                    price[i] = np.inf
            if not np.isfinite(price).any():
                break
            i = int(price.argmin())
            costs[left[i]] = price[i]
            w[left] -= w[left[i]] * inverse[i] / inverse[i, i]
            left = left[:i] + left[i + 1 :]
            if not left:
                break
        yield list(costs), list(costs.values())


@pytest.mark.parametrize("pattern", ["", "2:4"])
@pytest.mark.parametrize("shape", [(6, 40), (3, 10, 2, 2)])
def test_the_order_is_that_of_exact_obs(pattern, shape, monkeypatch):
    """More inputs than are taken out of the inverse at once, and more rows than fit into memory at once."""
    monkeypatch.setattr(module, "_INVERSES", 2 * 40**2)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = correlated(40)
    hessian = (x @ x.T)[None]
    places, expected = order(weight, hessian, pattern).flatten(1), []
    for row, (inputs, costs) in zip(places, surgeon(weight, hessian, pattern), strict=True):
        assert row.argsort()[: len(inputs)].tolist() == inputs
        expected += zip(row[inputs].tolist(), np.maximum.accumulate(costs).tolist(), strict=True)
    assert [place for place, _ in sorted(expected)] == list(range(len(expected))), "what stays comes last"
    merged = [cost for _, cost in sorted(expected)]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(merged)), "rows take turns by what a zero costs"


def test_the_groups_of_a_convolution_are_swept_by_their_own_hessians():
    weight, hessian = case(4, 9, groups=3)
    found = order(weight.view(12, 9), hessian).view(3, 4, 9).argsort(-1)
    for group in range(3):
        alone = order(weight.view(3, 4, 9)[group], hessian[group : group + 1])
        assert torch.equal(found[group], alone.argsort(-1))


def both_ways(weight, hessian, ratio, pattern=""):
    """OBS by a sweep, and as for a layer that is too large for one."""
    return obs(weight, hessian, ratio, pattern, order(weight, hessian, pattern)), obs(weight, hessian, ratio, pattern)


def test_a_sweep_leaves_less_error_than_one_pass():
    for ratio in (0.3, 0.5, 0.7, 0.9):
        weight, hessian = case(16, 72)
        swept, passed = (float(error(found, weight, hessian).sum()) for _, found in both_ways(weight, hessian, ratio))
        assert swept < 0.95 * passed


@pytest.mark.parametrize("zeros", [2, 4, 6])
def test_obs_comes_close_to_the_best_mask_of_all(zeros):
    """All masks of a row, each with its best weights."""
    best = plain = swept = passed = 0.0
    for seed in range(10):
        weight, hessian = case(1, 8, seed)
        masks = [
            torch.zeros(1, 8).index_fill_(1, torch.tensor(stay), 1)
            for stay in itertools.combinations(range(8), 8 - zeros)
        ]
        errors = [float(error(least_squares(weight, mask, hessian), weight.double(), hessian)) for mask in masks]
        found = [float(error(found, weight, hessian)) for _, found in both_ways(weight, hessian, zeros / 8)]
        assert min(found) >= min(errors) * 0.99  # the damping makes the reference a little worse than it could be
        best, swept, passed = best + min(errors), swept + found[0], passed + found[1]
        plain += float(error(weight * magnitude_mask(weight, zeros / 8), weight, hessian))
    assert passed - best < 0.4 * (plain - best)
    assert swept - best < 0.1 * (plain - best)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(0.05, 0.95), st.sampled_from([(8, 12), (6, 4, 3, 3), (6, 1, 3, 3), (4, 150)]))
def test_obs_makes_as_many_zeros_as_asked_and_is_never_worse_than_its_mask(seed, ratio, shape):
    generator = torch.Generator().manual_seed(seed)
    groups = shape[0] if shape[1] == 1 else 1
    weight = torch.randn(shape, generator=generator)
    inputs = weight[0].numel()
    hessian = torch.stack([(x := correlated(inputs, seed=seed + g)) @ x.T for g in range(groups)])
    for mask, found in both_ways(weight, hessian, ratio):
        assert int((mask == 0).sum()) == round(weight.numel() * ratio)
        assert not bool(found[mask == 0].any())
        assert bool((error(found, weight, hessian) <= error(weight * mask, weight, hessian) * (1 + 1e-9)).all())


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:3"])
@pytest.mark.parametrize("shape", [(5, 8), (5, 10), (4, 8, 3, 3), (3, 11, 2, 2)])
def test_patterns_hold_along_the_input_channels(pattern, shape):
    keep, of = map(int, pattern.split(":"))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = correlated(weight[0].numel())
    masks = {"magnitude": mask_of(weight.abs(), 0.5, pattern)}
    swept, passed = both_ways(weight, (x @ x.T)[None], 0.5, pattern)
    for mask in (*masks.values(), swept[0], passed[0]):
        for first in range(0, shape[1], of):
            part = mask[:, first : first + of]
            assert bool((part.sum(1) == -(-part.shape[1] * keep // of)).all())
    kept = torch.where(masks["magnitude"] > 0, weight.abs(), torch.inf)[:, :of].amin(1)
    gone = torch.where(masks["magnitude"] > 0, -torch.inf, weight.abs())[:, :of].amax(1)
    assert bool((kept >= gone).all())


def test_activation_scores_are_those_of_wanda():
    layer, x = nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(5, 4, 6, 6)
    norms = patches(layer, x).norm(dim=-1)  # [groups, inputs]
    expected = layer.weight.detach().abs().view(2, 3, 18) * norms[:, None]
    found = activation_scores(layer.weight.detach(), gram(layer, x))
    torch.testing.assert_close(found, expected.view(6, 2, 3, 3), rtol=1e-4, atol=1e-5)


def test_an_input_that_is_always_zero_does_no_harm():
    weight, hessian = case(3, 6)
    hessian[:, 2], hessian[:, :, 2] = 0, 0
    scale = weight_scales(weight, 3)
    zeroed = [adjusted for _, adjusted in both_ways(weight, hessian, 0.5)]
    for found in (gptq(weight, scale, 3, hessian), adaround(weight, scale, 3, hessian), *zeroed):
        assert bool(found.isfinite().all())
    nothing = torch.zeros_like(hessian)
    assert torch.equal(gptq(weight, scale, 3, nothing), codes(weight, scale, 3) * scale[:, None])
    assert all(bool(adjusted.isfinite().all()) for _, adjusted in both_ways(weight, nothing, 0.5))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ranges(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 500, generator=generator)
    weight[1, 0] = 30  # an outlier
    weight[2] = 0
    top = largest(bits)
    peak = weight.abs().amax(1)
    assert torch.equal(weight_scales(weight, bits, "minmax")[:2], peak[:2] / top)
    expected = np.quantile(weight.abs().numpy(), 0.99, axis=1)[:2] / top
    np.testing.assert_allclose(weight_scales(weight, bits, "percentile")[:2], expected, rtol=1e-5)
    for name in ("mse", "minmax", "percentile", "entropy"):
        scale = weight_scales(weight, bits, name)
        assert bool((scale > 0).all())
        assert bool((scale[:2] * top <= peak[:2] * (1 + 1e-6)).all())


def entropy_reference(row, bits):
    """One channel, said the slow way (Migacz 2017), bins and candidates as there."""
    levels, bins = largest(bits) + 1, 1024
    values = np.abs(row)
    counts = np.bincount(np.minimum((values / values.max() * bins).astype(int), bins - 1), minlength=bins).astype(float)
    counts[0] = 0
    found = []
    for step in range(60):
        width = max(levels, round(bins * (1 - 0.8 * step / 60)))
        p = counts[:width].copy()
        p[-1] += counts[width:].sum()
        q = np.zeros(width)
        code = np.rint((np.arange(width) + 0.5) / width * (levels - 1)).astype(int)
        for level in range(levels):
            there = (code == level) & (counts[:width] > 0)
            if there.any():
                q[there] = counts[:width][there].mean()
        p, q = p / p.sum(), (q + 1e-6) / (q + 1e-6).sum()
        divergence = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        found.append((divergence, width / bins * values.max() / largest(bits)))
    return min(found)[0], found


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_entropy_finds_the_least_divergence(bits):
    weight = torch.randn(3, 300, generator=torch.Generator().manual_seed(bits)).float()
    for row, scale in zip(weight.numpy(), weight_scales(weight, bits, "entropy").numpy(), strict=True):
        least, every = entropy_reference(row, bits)
        ours = min(every, key=lambda entry: abs(entry[1] - scale))
        assert ours[1] == pytest.approx(scale, rel=1e-5)
        assert ours[0] == pytest.approx(least, rel=1e-6)
