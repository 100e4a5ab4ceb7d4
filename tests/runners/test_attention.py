"""Attention with its projections as layers computes what torch's does, and is compressed like everything else."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from paretorch.runners import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.onnx_export import operators, session
from paretorch.runners.operators.attention import open_attention
from paretorch.runners.simulate import agreement
from paretorch.runners.target import as_target
from paretorch.runners.task import Task
from paretorch.spaces.recipe import Quantize, Recipe


class Holder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.mix = nn.MultiheadAttention(24, 3, **options)
        if self.mix.in_proj_bias is not None:
            nn.init.normal_(self.mix.in_proj_bias)
        nn.init.normal_(self.mix.out_proj.weight)

    def forward(self, *inputs, **options):
        return self.mix(*inputs, **options)


def masks(kind, n, targets, sources):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(n, sources, generator=generator) < 0.3
    hidden[:, 0] = False
    causal = torch.ones(targets, sources, dtype=torch.bool).triu(1)
    added = torch.randn(3 * n, targets, sources, generator=generator)
    return {"none": {}, "padding": {"key_padding_mask": hidden}, "bool": {"attn_mask": causal}, "float": {"attn_mask": added}}[kind]  # fmt: skip


@pytest.mark.parametrize("mask", ["none", "padding", "bool", "float"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 10, "vdim": 14, "batch_first": True}], ids=str
)
def test_it_computes_what_torch_does(options, mask):
    torch.manual_seed(0)
    theirs = Holder(**options).eval()
    ours = open_attention(copy.deepcopy(theirs))
    assert not any(isinstance(part, nn.MultiheadAttention) for part in ours.modules())
    n, targets, sources = 4, 5, 7
    shapes = [(n, targets, 24), (n, sources, options.get("kdim", 24)), (n, sources, options.get("vdim", 24))]
    inputs = [torch.randn(shape) for shape in shapes]
    if not options.get("batch_first"):
        inputs = [x.transpose(0, 1) for x in inputs]
    for average in (True, False):
        more = masks(mask, n, targets, sources) | {"average_attn_weights": average}
        for found, expected in zip(ours(*inputs, **more), theirs(*inputs, **more), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert ours(*inputs, need_weights=False)[1] is None


def test_a_single_sequence():
    theirs = Holder().eval()
    x = torch.randn(6, 24)
    for found, expected in zip(open_attention(copy.deepcopy(theirs))(x, x, x), theirs(x, x, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_takes_it(norm_first):
    """Its fused path reads the weights of the attention itself and must not be taken."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True, norm_first=norm_first)
    theirs = nn.TransformerEncoder(layer, 2).eval()
    ours = open_attention(copy.deepcopy(theirs))
    x = torch.randn(3, 6, 24)
    hidden = torch.arange(6) >= torch.tensor([[6], [4], [3]])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        found, expected = ours(x, src_key_padding_mask=hidden), theirs(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(found[~hidden], expected[~hidden], rtol=1e-4, atol=1e-5)


def test_what_it_cannot_replace_stays():
    class Own(nn.MultiheadAttention):
        pass

    kept = nn.ModuleList([nn.MultiheadAttention(8, 2, add_zero_attn=True), nn.MultiheadAttention(8, 2, add_bias_kv=True), Own(8, 2)])  # fmt: skip
    assert [type(part) for part in open_attention(copy.deepcopy(kept))] == [type(part) for part in kept]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(12, 48)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True), 2)
        self.head = nn.Linear(48, 5)

    def forward(self, x):
        return self.head(self.body(self.embed(x)).mean(1))


def test_the_file_of_an_encoder_is_smaller_and_the_same_network(tmp_path):
    torch.manual_seed(0)
    model, x = Classifier().eval(), torch.randn(256, 6, 12)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    data = TensorDataset(x, expected.argmax(1))
    runner = LocalRunner(Task("encoder", lambda: model, data, data), tmp_path)
    names = [layer.name for layer in runner.structure.layers]
    assert sum("self_attn" in name for name in names) == 8
    whole = runner.build(Recipe())
    found = session(packing.unpack(whole)).run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
    small = runner.build(Recipe(tuple(Quantize(name, 8, 8) for name in names)))
    assert len(small) < 0.36 * len(whole)
    quantized = session(packing.unpack(small)).run(None, {"input": x.numpy()})[0]
    assert (torch.from_numpy(quantized).argmax(1) == expected.argmax(1)).float().mean() > 0.95


@pytest.mark.parametrize(("left_float", "products"), [("", 4), ("q_proj", 2), ("v_proj", 3), ("out_proj", 4)])
def test_its_products_run_in_int8_where_the_target_is_faster_so(left_float, products, tmp_path):
    """Two attentions of two products each; what is left float is in the first. Both products hang on queries and keys."""
    torch.manual_seed(0)
    model, x = Classifier().eval(), torch.randn(256, 6, 12)
    data = TensorDataset(x, model(x).argmax(1))
    task = Task("encoder", lambda: model, data, data)
    there = replace(as_target("onnxruntime"), name="there", int8_products=True)
    runner, here = LocalRunner(task, tmp_path, target=there), LocalRunner(task, tmp_path)
    names = [layer.name for layer in runner.structure.layers if layer.name != f"body.layers.0.self_attn.{left_float}"]
    recipe = Recipe(tuple(Quantize(name, 8, 8) for name in names))
    packed = runner.build(recipe)
    counts = [operators(packing.unpack(file)) for file in (packed, here.build(recipe))]
    kinds = ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat")
    assert [sum(count.get(kind, 0) for kind in kinds) for count in counts] == [len(names) + products, len(names)]
    same, _, outputs = agreement(packed, [x])
    assert same.agree >= 0.995
    assert same.mean_difference < 1e-4
    assert (outputs.argmax(1) == model(x).argmax(1)).float().mean() > 0.95
