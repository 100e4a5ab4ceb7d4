"""Integers, zeros and their gradients against the formulas they come from."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import MinMaxObserver

from paretorch.errors import RecipeError
from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.freeze import freeze, one_factor
from paretorch.runners.operators.fold import fold_batchnorms, fold_factors, reestimate_batchnorms
from paretorch.runners.operators.quantize import FakeQuantize, affine_grid, codes, weight_scales
from paretorch.runners.operators.sparsify import magnitude_mask
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.structure import Layer, Structure
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student

BITS = st.integers(1, 8)


@st.composite
def weights(draw):
    shape = draw(st.sampled_from([(1, 1), (3, 7), (4, 2, 3), (5, 3, 3, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-6, 4))
    if draw(st.booleans()):
        weight[0] = 0  # a dead channel
    if draw(st.booleans()):
        weight[-1].view(-1)[0] *= 100  # an outlier
    return weight


@settings(deadline=None)
@given(weights(), BITS)
def test_scales_are_never_worse_than_min_max_and_codes_are_in_range(weight, bits):
    top = max(1, 2 ** (bits - 1) - 1)
    scale = weight_scales(weight, bits)
    assert bool((scale > 0).all())
    assert scale.shape == (len(weight),)
    plain = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / top

    def error(s):
        q = codes(weight, s, bits)
        assert float(q.abs().max()) <= top
        assert torch.equal(q, q.round())
        return (q * s.view(-1, *[1] * (weight.ndim - 1)) - weight).square().flatten(1).double().sum(1)

    assert bool((error(scale) <= error(plain) * (1 + 1e-5)).all())


def test_scales_come_close_to_the_best_of_a_fine_search():
    weight = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        top = 2 ** (bits - 1) - 1
        for row, scale in zip(weight.numpy(), weight_scales(weight, bits).numpy(), strict=True):
            grid = np.linspace(0.15, 1, 3000) * np.abs(row).max() / top
            q = np.clip(np.rint(row / grid[:, None]), -top, top)
            best = ((q * grid[:, None] - row) ** 2).sum(1).min()
            ours = ((np.clip(np.rint(row / scale), -top, top) * scale - row) ** 2).sum()
            assert ours <= best * 1.01


def test_codes_are_rounded_half_to_even():
    values = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 2.4, 9.0, -9.0]])
    assert codes(values, torch.ones(1), 4).tolist() == [[0, 2, 2, 0, -2, 2, 7, -7]]


def test_signs_are_those_of_xnor_net():
    """Rastegari et al. 2016, equations 4 to 6: sign(W), and the mean of |W| over each output channel, of all pairs the
    best.
    """
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    weight[2, 0] = 0
    scale = weight_scales(weight, 1)
    torch.testing.assert_close(scale, weight.abs().sum(1) / 8)
    found = codes(weight, scale, 1)
    assert torch.equal(found, torch.where(weight >= 0, 1.0, -1.0))
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
    for row, sign, one in zip(weight, found, scale, strict=True):
        best = (every @ row / 8).clamp_min(0)  # of each pattern of signs the best scale
        errors = (every * best[:, None] - row).square().sum(1)
        assert float((sign * one - row).square().sum()) <= float(errors.min()) * (1 + 1e-5)


@settings(deadline=None)
@given(st.integers(0, 999), BITS)
def test_gradients_are_those_of_lsq(seed, bits):
    """Esser et al. 2020, equations 2, 3 and 5, with one scale per output channel and a factor of our own.

    The factor makes the step of a scale the one that the weights would take along it: scale^2 / |weights|^2. A sign
    does not depend on the scale, and lets every gradient through.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, 2, generator=generator).requires_grad_()
    fake = FakeQuantize(weight.detach(), bits, None)
    with torch.no_grad():
        fake.scale.mul_(torch.tensor([0.37, 0.93, 1.71]))  # so that some weights lie outside
    upstream = torch.randn(3, 4, 2, generator=generator)
    (fake(weight) * upstream).sum().backward()

    top = max(1, 2 ** (bits - 1) - 1)
    v = (weight / fake.scale.view(3, 1, 1)).detach().double()
    inside = (v.abs() < top) | (bits == 1)
    by_scale = torch.where(inside, v.round() - v, v.sign() * top) if bits > 1 else v.sign()
    factor = fake.scale.detach().double().square() / weight.detach().double().square().sum((1, 2))
    expected = (by_scale * upstream).sum((1, 2)) * factor
    torch.testing.assert_close(fake.scale.grad.double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(weight.grad, upstream * inside, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.sampled_from([4, 16, 64]), BITS, st.sampled_from(["mse", "minmax"]), st.integers(0, 99))
def test_a_group_of_a_row_is_quantized_and_trained_as_a_weight_of_its_own(inputs, size, bits, ranges, seed):
    """The last group is what is left of the row."""
    generator = torch.Generator().manual_seed(seed)
    weight, upstream = (torch.randn(3, inputs, generator=generator) for _ in range(2))
    whole = FakeQuantize(weight, bits, None, weight_scales(weight, bits, ranges, size), group_size=size)
    trained = weight.clone().requires_grad_()
    shown = whole(trained)
    (shown * upstream).sum().backward()
    assert whole.scale.shape == (3, -(-inputs // size))
    for number, first in enumerate(range(0, inputs, size)):
        part = weight[:, first : first + size]
        if ranges == "minmax" and bits > 1:
            top = 2 ** (bits - 1) - 1
            np.testing.assert_allclose(whole.scale[:, number].detach(), np.abs(part.numpy()).max(1) / top, rtol=1e-6)
        alone = FakeQuantize(part, bits, None, weight_scales(part, bits, ranges))
        own = part.clone().requires_grad_()
        assert torch.equal(alone(own), shown[:, first : first + size])
        (alone(own) * upstream[:, first : first + size]).sum().backward()
        assert torch.equal(own.grad, trained.grad[:, first : first + size])
        torch.testing.assert_close(alone.scale.grad, whole.scale.grad[:, number], rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=80)
@given(weights(), st.integers(2, 8), st.sampled_from(["minmax", "mse", "percentile"]))
def test_affine_weights_lie_within_half_a_step_and_zero_is_exact(weight, bits, ranges):
    top = 2**bits - 1
    scale, zero = affine_grid(weight, bits, ranges)
    assert scale.shape == (1,)
    assert 0 <= zero <= top
    found = codes(weight, scale, bits, zero)
    assert torch.equal(found, found.round())
    assert -zero <= float(found.min())
    assert float(found.max()) <= top - zero
    away = (found * scale - weight).double().abs() / scale
    inside = (found > -zero) & (found < top - zero) if ranges != "minmax" else torch.ones_like(found, dtype=torch.bool)
    assert not inside.any() or float(away[inside].max()) <= 0.5 + 1e-3
    assert bool((codes(torch.zeros(5), scale, bits, zero) == 0).all())  # times any scale it is zero
    least = affine_grid(weight, bits, "minmax")
    error = (codes(weight, *least[:1], bits, least[1]) * least[0] - weight).double().square().sum()
    assert ranges != "mse" or float((found * scale - weight).double().square().sum()) <= float(error) * (1 + 1e-5)


@settings(deadline=None, max_examples=60)
@given(weights().filter(lambda weight: weight.abs().max() > 1e-3), st.integers(2, 8))
def test_the_affine_grid_of_minima_and_maxima_is_that_of_torch(weight, bits):
    observer = MinMaxObserver(torch.quint8, torch.per_tensor_affine, quant_min=0, quant_max=2**bits - 1, eps=1e-30)
    expected_scale, expected_zero = observer(weight) is weight and observer.calculate_qparams()
    scale, zero = affine_grid(weight, bits, "minmax")
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert zero == int(expected_zero)
    theirs = torch.fake_quantize_per_tensor_affine(weight, float(scale), zero, 0, 2**bits - 1)
    ours = codes(weight, scale, bits, zero) * scale
    # torch multiplies by the reciprocal, and what lies between two codes may fall to the other side.
    border = ((weight / scale) % 1 - 0.5).abs() < 1e-3
    torch.testing.assert_close(ours[~border], theirs[~border], rtol=1e-6, atol=0)
    assert float((ours - theirs).abs().max()) <= float(scale) * 1.001


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_the_affine_grid_of_least_error_comes_close_to_the_best(shift):
    weight = torch.randn(2000, generator=torch.Generator().manual_seed(0)) + shift
    for bits in (2, 3, 4):
        scale, zero = affine_grid(weight, bits)
        ours = float((codes(weight, scale, bits, zero) * scale - weight).square().sum())
        every = [
            ((codes(weight, step, bits, z) * step - weight).square().sum(), float(step), z)
            for z in range(2**bits)
            for step in torch.linspace(0.02, 3, 300)[:, None]
        ]
        assert ours <= float(min(every)[0]) * 1.1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.integers(2, 8))
def test_gradients_of_affine_weights_are_those_of_lsq(seed, bits):
    """As above with one scale for all, other limits, and a channel's step divided by its BatchNorm's factor; the zero
    point is fixed.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, upstream = (torch.randn(3, 4, 2, generator=generator) for _ in range(2))
    norm = nn.BatchNorm1d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.3, -0.4, 2.0]))
    factor = (norm.weight / (1 + norm.eps) ** 0.5).detach()
    scale, zero = affine_grid(weight * factor.view(3, 1, 1), bits, "minmax")
    fake = FakeQuantize(weight, bits, None, 0.6 * scale, zero=zero, norm=norm)  # so that some weights lie outside
    assert [name for name, _ in fake.named_parameters()] == ["scale"], "the BatchNorm is the network's"
    trained = weight.clone().requires_grad_()
    (fake(trained) * upstream).sum().backward()

    v = (weight * factor.view(3, 1, 1) / fake.scale.detach()).double()
    low, high = -zero, 2**bits - 1 - zero
    inside = (v > low) & (v < high)
    by_scale = torch.where(inside, v.round() - v, v.clamp(low, high)) / factor.view(3, 1, 1)
    expected = (by_scale * upstream).sum() * fake.scale.detach().double().square() / weight.square().sum()
    torch.testing.assert_close(fake.scale.grad.double(), expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(trained.grad, upstream * inside, rtol=1e-4, atol=1e-6)
    assert norm.weight.grad is None


def structure_of(model):
    found = [(name, m) for name, m in model.named_modules() if hasattr(m, "weight")]
    return Structure(tuple(Layer(name, "linear", tuple(m.weight.shape), m.weight.numel()) for name, m in found))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5))


@settings(deadline=None, max_examples=30)
@given(BITS, st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_what_is_frozen_is_codes_times_scale(bits, ratio):
    model, ratio = small(), ratio if bits > 1 else 0.0
    steps = [Quantize("0", bits, 8)] + ([Sparsify("0", ratio)] if ratio else [])
    recipe = Recipe(tuple(steps))
    compress(model, recipe, structure_of(model), torch.zeros(2, 9))
    shown = model[0].weight.detach().clone()
    frozen = freeze(model, recipe)["0"]
    assert (frozen.weight_bits, frozen.activation_bits) == (bits, 8)
    torch.testing.assert_close(shown, model[0].weight, rtol=1e-6, atol=0)  # the straight-through sum may round
    assert torch.equal(model[0].weight, frozen.codes * frozen.scale[:, None])
    assert not hasattr(model[0], "parametrizations")
    assert int((frozen.codes == 0).sum()) >= round(63 * ratio)
    assert bits > 1 or bool((frozen.codes.abs() == 1).all())


@pytest.mark.parametrize("epochs", [0, 3])
def test_what_is_folded_is_one_scale_times_codes(epochs, settle):
    """Factors of both signs, one of zero, re-estimated statistics, and training that moves all of them."""
    torch.manual_seed(0)
    model, x = settle(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)), (3, 8, 8), 64
    )
    with torch.no_grad():
        model[1].weight[1:3] = torch.tensor([-0.7, 0.0])
    layers = tuple(Layer(n, "conv", tuple(model[int(n)].weight.shape), model[int(n)].weight.numel()) for n in "03")
    structure = Structure(layers, folds=(("0", "1"),))
    recipe = Recipe((Quantize("0", 4, scheme="affine"), Quantize("3", 3, scheme="affine"), Sparsify("0", 0.4)))
    compress(model, recipe, structure, x[:2])
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(epochs):
        optimizer.zero_grad()
        (model.train()(x) - 1).square().mean().backward()
        optimizer.step()
    model.eval()
    shown, factor = model[0].weight.detach().clone(), fold_factors(model[1])[0]
    frozen = freeze(model, recipe)
    torch.testing.assert_close(shown, model[0].weight, rtol=1e-5, atol=1e-7)
    together = one_factor(frozen, model, structure)
    assert together == {"0", "1", "3"}
    reestimate_batchnorms(model, [x * 1.5], one_factor=together)
    change = fold_factors(model[1])[0] / factor
    torch.testing.assert_close(change[[0, 1, 3, 4, 5]], change[:1].expand(5))
    factors = fold_batchnorms(model, structure.folds)
    weight, scale = frozen["0"], frozen["0"].scale * change[0]
    for channel in (0, 1, 3, 4, 5):
        torch.testing.assert_close(model[0].weight[channel], weight.codes[channel] * scale, rtol=1e-4, atol=1e-6)
    assert not model[0].weight[2].any()
    assert float(weight.codes.min()) >= -weight.zero
    assert float(weight.codes.max()) <= 15 - weight.zero
    assert int((weight.codes == 0).sum()) >= round(0.4 * weight.codes.numel())
    assert float(factors["0"][1]) < 0
    assert torch.equal(model[3].weight, frozen["3"].codes * frozen["3"].scale)


def test_signs_have_no_zeros():
    with pytest.raises(RecipeError, match="same layer: a; a sign is never zero, choose weight_bits = 2"):
        Recipe((Quantize("a", 1), Sparsify("a", 0.5), Quantize("b", 1), Sparsify("c", 0.5)))


def test_training_flips_signs_and_moves_their_scales():
    """With the weights and scales of another such layer as the target, most of its signs are found."""
    torch.manual_seed(0)
    x, weight = torch.randn(512, 12), torch.randn(12, 12)
    scale = weight_scales(weight, 1)
    target = x @ (codes(weight, scale, 1) * scale[:, None]).T
    layer = nn.Linear(12, 12, bias=False)
    recipe = Recipe((Quantize("0", 1),))
    model = compress(nn.Sequential(layer), recipe, structure_of(nn.Sequential(layer)), torch.zeros(2, 12)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    frozen = freeze(model, recipe)["0"]
    assert float((frozen.codes == codes(weight, scale, 1)).float().mean()) > 0.9
    assert losses[-1] < 0.3 * losses[0]


def test_sixteen_bits_are_half_precision():
    model, before = small(), small()[0].weight.detach().numpy()
    recipe = Recipe((Quantize("0", 16),))
    frozen = freeze(compress(model, recipe, structure_of(model), torch.zeros(2, 9)), recipe)
    assert frozen["0"].codes is None
    assert np.array_equal(model[0].weight.detach().numpy(), before.astype(np.float16).astype(np.float32))
    assert torch.equal(model[2].weight, small()[2].weight)


@given(st.integers(1, 60), st.floats(0.001, 0.999), st.integers(0, 99), st.booleans())
def test_exactly_the_share_of_least_magnitude_goes(count, ratio, seed, ties):
    weight = torch.randn(1, count, generator=torch.Generator().manual_seed(seed))
    weight = weight.round() if ties else weight
    mask = magnitude_mask(weight, ratio)
    assert int((mask == 0).sum()) == round(count * ratio)
    gone, stay = weight[mask == 0].abs(), weight[mask == 1].abs()
    assert not len(gone) or not len(stay) or float(gone.max()) <= float(stay.min())
    if ties and len(gone):  # of equal ones the first go
        edge = weight[0].abs() == gone.max()
        kept = mask[0][edge]
        assert torch.equal(kept, kept.sort().values)


def test_a_recipe_of_another_network_is_refused_with_every_problem():
    model = small()
    before = copy.deepcopy(model.state_dict())
    recipe = Recipe((Student(("b",)), Prune("g", 3), Sparsify("1", 0.5), Quantize("x", 8)))
    with pytest.raises(RecipeError) as raised:
        compress(model, recipe, structure_of(model), torch.zeros(2, 9))
    for name in ("'b'", "'g'", "'1'", "'x'"):
        assert name in str(raised.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
