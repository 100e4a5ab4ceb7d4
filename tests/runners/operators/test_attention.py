"""Attention with its projections as layers computes what torch's does, and is compressed like everything else."""

import copy
from dataclasses import replace

import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import VisionTransformer

from paretorch.errors import RecipeError
from paretorch.objectives.cost import macs, size_bytes
from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.overhead import measure_overhead
from paretorch.runners.compression.trace import trace
from paretorch.runners.files import packing
from paretorch.runners.graphs.float_graph import export_float
from paretorch.runners.graphs.simulate import agreement
from paretorch.runners.local import LocalRunner
from paretorch.runners.operators.attention import open_attention
from paretorch.runners.targets.catalog import as_target
from paretorch.runners.targets.runtime import session
from paretorch.runners.task import Task
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.shapes import shapes
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize


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
    return {
        "none": {},
        "padding": {"key_padding_mask": hidden},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": added},
    }[kind]


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

    kept = nn.ModuleList(
        [nn.MultiheadAttention(8, 2, add_zero_attn=True), nn.MultiheadAttention(8, 2, add_bias_kv=True), Own(8, 2)]
    )
    assert [type(part) for part in open_attention(copy.deepcopy(kept))] == [type(part) for part in kept]


class Classifier(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True), 2)
        self.head = nn.Linear(width, 5)

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
    """Two attentions of two products each; what is left float is in the first. Both products hang on queries and
    keys.
    """
    torch.manual_seed(0)
    model, x = Classifier().eval(), torch.randn(256, 6, 12)
    data = TensorDataset(x, model(x).argmax(1))
    task = Task("encoder", lambda: model, data, data)
    there = replace(as_target("onnxruntime"), name="there", int8_products=True)
    runner, here = LocalRunner(task, tmp_path, target=there), LocalRunner(task, tmp_path)
    names = [layer.name for layer in runner.structure.layers if layer.name != f"body.layers.0.self_attn.{left_float}"]
    recipe = Recipe(tuple(Quantize(name, 8, 8) for name in names))
    packed = runner.build(recipe)
    counts = []
    for file in (packed, here.build(recipe)):
        nodes = packing.unpack(file).graph.node
        maker = {name: node.op_type for node in nodes for name in node.output}
        read = [[maker.get(name) for name in node.input[:2]] for node in nodes if node.op_type in ("MatMul", "Gemm")]
        counts.append(sum(kinds == ["DequantizeLinear"] * 2 for kinds in read))
    assert counts == [len(names) + products, len(names)]
    same, _, outputs = agreement(packed, [x])
    assert same.agree >= 0.995
    assert same.mean_difference < 1e-4
    assert (outputs.argmax(1) == model(x).argmax(1)).float().mean() > 0.95


def test_tokens_are_rounded_around_zero_and_ahead_of_moves_where_products_are(tmp_path):
    """The output of attention is moved twice before a layer reads it; what a ReLU makes has no negative half to
    spare.
    """
    torch.manual_seed(0)
    model, x = Classifier().eval(), torch.randn(256, 6, 12)
    data = TensorDataset(x, model(x).argmax(1))
    there = replace(as_target("onnxruntime"), name="there", int8_products=True)
    runner = LocalRunner(Task("encoder", lambda: model, data, data), tmp_path, target=there)
    recipe = Recipe(tuple(Quantize(layer.name, 8, 8) for layer in runner.structure.layers))
    graph = packing.unpack(runner.build(recipe)).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    zeros, behind = {}, {}
    for node in graph.node:
        if node.op_type == "MatMul" and "weight" in node.input[1]:
            layer, before = node.input[1].removesuffix(".weight_dq"), maker[node.input[0]]
            zero = constants[before.input[2]]
            zeros[layer] = (zero.dtype.name, int(zero))
            behind[layer] = []
            while before is not None and before.op_type not in ("MatMul", "Add"):
                behind[layer].append(before.op_type)
                before = maker.get(before.input[0])
    rounding = ["DequantizeLinear", "QuantizeLinear"]
    for layer in (f"body.layers.{number}" for number in range(2)):
        assert behind[f"{layer}.self_attn.out_proj"] == [*rounding, "Reshape", *rounding, "Transpose", *rounding]
        assert zeros[f"{layer}.self_attn.out_proj"] == zeros[f"{layer}.self_attn.q_proj"] == ("int8", 0)
        assert zeros[f"{layer}.linear2"] == ("uint8", 0)


class Pair(nn.Module):
    """Attention of a sequence to itself, then to a part of it, whose keys and values are narrower; skips around
    both.
    """

    def __init__(self, batch_first=True, bias=True):
        super().__init__()
        options = {"batch_first": batch_first, "bias": bias}
        self.embed, self.norm, self.turned = nn.Linear(12, 24), nn.LayerNorm(24), not batch_first
        self.alone = nn.MultiheadAttention(24, 4, **options)
        self.beside = nn.MultiheadAttention(24, 3, kdim=12, vdim=12, **options)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = x.transpose(0, 1) if self.turned else x
        y = self.embed(x)
        y = self.norm(y + self.alone(y, y, y, need_weights=False)[0])
        y = y + self.beside(y, x, x, need_weights=False)[0]
        return self.head(y.mean(0 if self.turned else 1))


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}], ids=str)
def test_without_heads_it_is_what_it_was_with_nothing_in_their_place(options):
    torch.manual_seed(0)
    model, x = open_attention(Pair(**options).eval()), torch.randn(32, 7, 12)
    structure = trace(model, x)
    groups = {g.name: (g.channels, g.round_to, g.unit) for g in structure.groups if g.unit > 1}
    assert groups == {"alone.q_proj": (24, 6, 6), "beside.q_proj": (24, 8, 8)}
    recipe = Recipe((Prune("alone.q_proj", 12), Prune("beside.q_proj", 16)))
    pruned = compress(copy.deepcopy(model), recipe, structure, x[:2])
    assert (pruned.alone.num_heads, pruned.beside.num_heads) == (2, 2)
    for attention, lost in ((model.alone, 2), (model.beside, 1)):
        heads = attention.num_heads
        rows = [p.weight.detach().square().sum(1) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        norms = sum([*rows, attention.out_proj.weight.detach().square().sum(0)]).view(heads, -1).sum(1)
        gone = norms.argsort()[:lost]
        attention.out_proj.weight.data.view(-1, heads, attention.head_dim)[:, gone] = 0
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-4, atol=1e-5)
    again = trace(pruned, x)
    assert {layer.name: layer.weight_shape for layer in again.layers} == shapes(structure, recipe)
    assert sum(layer.macs for layer in again.layers) == macs(structure, recipe)


def test_heads_are_gone_from_the_file_and_its_bytes_are_foretold(tmp_path):
    torch.manual_seed(0)
    model, x = Classifier(128).eval(), torch.randn(256, 6, 12)
    data = TensorDataset(x, model(x).argmax(1))
    runner = LocalRunner(Task("encoder", lambda: model, data, data), tmp_path)
    overhead = measure_overhead(runner.builder, len(runner.build(Recipe())))
    heads = tuple(Prune(g.name, 2 * g.unit) for g in runner.structure.groups if g.unit > 1)
    assert len(heads) == 2
    quantized = tuple(Quantize(layer.name, 8, 8) for layer in runner.structure.layers)
    for recipe in (Recipe(heads), Recipe((*heads, *quantized))):
        packed = runner.build(recipe)
        assert len(packed) == pytest.approx(size_bytes(runner.structure, recipe, overhead), rel=0.01)
        network = compress(copy.deepcopy(runner.builder.model), Recipe(heads), runner.structure, x[:2])
        found = torch.from_numpy(session(packing.unpack(packed)).run(None, {"input": x[:7].numpy()})[0])
        torch.testing.assert_close(found, network(x[:7]), rtol=1e-3, atol=0.05 if len(recipe.steps) > 2 else 1e-4)


def test_torchvisions_vit_loses_heads_and_hidden_channels():
    torch.manual_seed(0)
    vit = VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10).eval()
    nn.init.normal_(vit.heads.head.weight)
    model, x = open_attention(vit), torch.randn(8, 3, 32, 32)
    structure = trace(model, x)
    layers = [f"encoder.layers.encoder_layer_{n}" for n in range(2)]
    assert [g.name for g in structure.groups] == [
        f"{name}.{part}" for name in layers for part in ("self_attention.q_proj", "mlp.0")
    ]
    recipe = Recipe(tuple(Prune(g.name, g.channels // 2) for g in structure.groups))
    pruned = compress(copy.deepcopy(model), recipe, structure, x[:2])
    assert [pruned.get_submodule(f"{name}.self_attention").num_heads for name in layers] == [2, 2]
    assert sum(layer.macs for layer in trace(pruned, x).layers) == macs(structure, recipe)
    found = session(export_float(pruned, x[:2])).run(None, {"input": x[:3].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), pruned(x[:3]), rtol=1e-3, atol=1e-4)


def test_parts_of_heads_are_refused():
    model, x = open_attention(Pair().eval()), torch.randn(8, 7, 12)
    with pytest.raises(RecipeError, match=r"'alone.q_proj' is 4 attention heads of 6 channels.*multiple of 6, not 9"):
        compress(model, Recipe((Prune("alone.q_proj", 9),)), trace(model, x), x)


class PerHead(nn.Module):
    """A mask for each head, and beside it an attention of one head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(12, 24), nn.Linear(24, 5)
        self.many, self.one = (nn.MultiheadAttention(24, heads, batch_first=True) for heads in (4, 1))

    def forward(self, x):
        y = self.embed(x)
        mask = torch.zeros(4 * len(x), x.shape[1], x.shape[1])
        y = y + self.many(y, y, y, attn_mask=mask, need_weights=False)[0]
        return self.head((y + self.one(y, y, y, need_weights=False)[0]).mean(1))


def test_heads_that_cannot_go_are_refused_by_name():
    structure = trace(open_attention(PerHead().eval()), torch.randn(8, 7, 12))
    refused = dict(structure.refused)
    assert not any("proj" in group.name for group in structure.groups)
    assert "no longer runs without them" in refused["channels of many.q_proj"]
    assert refused["channels of one.q_proj"] == "they are the only head of their attention"
