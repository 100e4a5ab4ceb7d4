"""What is written down of a network against what the live network does: shapes, MACs, groups, blocks, refusals."""

import copy

import pytest
import torch
import torch_pruning
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from paretorch.errors import ExportFailed, RecipeError, TaskError
from paretorch.objectives.cost import macs
from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.trace import trace
from paretorch.runners.operators.prune import channel_groups, importance, prune_channels
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.shapes import shapes
from paretorch.spaces.structure import Structure, inside
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.student import Student

GROUPED = ("residual", "mobile", "perceptron", "gated", "sound", "tokens", "branches", "convolutional")


def counted(model, structure, x):
    """By layer of the structure that is there: real `(outputs, inputs)` and multiply-adds for one sample, by hooks."""
    sizes, costs, hooks = {}, {}, []
    for layer in structure.layers:
        try:
            module = model.get_submodule(layer.name)
        except AttributeError:
            continue  # in a block that was left out

        def hook(module, args, out, name=layer.name):
            features = 1 if isinstance(module, nn.Linear) else 0
            positions = out[0].numel() // (out.shape[-1] if features else out.shape[1])
            costs[name] = positions * module.weight.numel()
            sizes[name] = tuple(module.weight.shape[:2])

        hooks.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return sizes, sum(costs.values())


@pytest.mark.parametrize("name", GROUPED)
def test_every_layer_is_found_with_its_real_costs(name, network):
    model, x = network(name)
    structure = trace(model, x[:66])
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)}
    assert {layer.name for layer in structure.layers} == set(modules)
    assert all(layer.weight_shape == tuple(modules[layer.name].weight.shape) for layer in structure.layers)
    sizes, total = counted(model, structure, x[:1])
    assert shapes(structure, Recipe()) == sizes
    assert macs(structure, Recipe()) == total
    assert structure.input_shape == tuple(x.shape[1:])
    norms = sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    assert len(structure.folds) == norms  # in these networks each follows a layer


TRACED = {}


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(GROUPED), data=st.data())
def test_a_pruned_network_has_the_shapes_and_costs_that_were_foretold(name, data, network):
    if name not in TRACED:
        model, x = network(name)
        TRACED[name] = (model, x, trace(model, x[:66]))
    model, x, structure = TRACED[name]
    assert structure.groups
    drop = tuple(block for block in structure.blocks if data.draw(st.booleans()))
    made = {layer.output for layer in structure.layers if not inside(layer.name, drop)}
    steps = [Student(drop)] if drop else []
    steps += [Prune(g.name, data.draw(st.integers(1, g.channels))) for g in structure.groups if g.name in made]
    recipe = Recipe(tuple(steps))
    live = compress(copy.deepcopy(model), recipe, structure, x[:2])
    sizes, total = counted(live, structure, x[:1])
    assert sizes == shapes(structure, recipe)
    assert total == macs(structure, recipe)
    with torch.no_grad():
        assert live(x[:3]).shape == (3, *model(x[:1]).shape[1:])


def test_removed_channels_are_the_least_important_and_the_rest_is_kept(network):
    model, x = network("perceptron")
    structure = trace(model, x[:66])
    scores = {g.makers[0]: importance(g.group) for g in channel_groups(model, x[:2])}["1"]
    live = compress(copy.deepcopy(model), Recipe((Prune("1", 40),)), structure, x[:2])
    kept = scores.argsort(stable=True)[24:].sort().values
    assert torch.equal(live[1].weight, model[1].weight[kept])
    assert torch.equal(live[4].weight, model[4].weight[:, kept])
    assert torch.equal(live[2].running_mean, model[2].running_mean[kept])


def test_channels_without_effect_are_removed_without_effect(network):
    model, x = network("residual")
    structure = trace(model, x[:66])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("layer1.0.conv1", "layer1.0.bn1")):
                parameter[:6] = 0
        model.layer1[0].bn1.running_mean[:6] = 0
        model.layer1[0].conv2.weight[:, :6] = 0
        before = model(x)
        live = compress(copy.deepcopy(model), Recipe((Prune("layer1.0.conv1", 10),)), structure, x[:2])
        torch.testing.assert_close(live(x), before, rtol=1e-4, atol=1e-5)
    assert live.layer1[0].conv2.weight.shape[1] == 10


def test_a_group_that_is_not_there_is_refused(network):
    model, x = network("residual")
    with pytest.raises(RecipeError, match="nowhere"):
        prune_channels(model, {"nowhere": 4}, {}, x[:2])


def test_residual_blocks_may_go_and_their_shortcut_stays(network):
    model, x = network("residual")
    structure = trace(model, x[:66])
    assert sorted(structure.blocks) == ["layer1.0", "layer1.1", "layer2.0"]
    live = compress(copy.deepcopy(model), Recipe((Student(("layer1.0", "layer2.0")),)), structure, x[:2])
    expected = nn.Sequential(model.stem, model.bn, nn.ReLU(), model.layer1[1], model.down, model.bnd, nn.ReLU())
    with torch.no_grad():
        assert torch.equal(live(x[:2]), model.fc(expected(x[:2]).mean((2, 3))))


class Plain(nn.Module):
    """A block without a shortcut: left out, the channels in front of it would meet the layer behind it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv(x))


def test_a_block_whose_absence_would_join_groups_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Plain(), nn.Conv2d(16, 10, 8), nn.Flatten()).eval()
    structure = trace(model, torch.randn(8, 3, 8, 8))
    assert structure.blocks == ()
    assert ("1", "cannot be left out: the channels around it would not fit together") in structure.refused
    assert [g.name for g in structure.groups] == ["0", "1.conv"]


def reasons(model, x):
    structure = trace(model.eval(), x)
    return dict(structure.refused), structure


IMAGES = torch.randn(8, 4, 8, 8)


def test_channels_of_a_grouped_convolution_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 36, 5))
    refused, structure = reasons(model, IMAGES)
    assert structure.groups == ()
    assert any("grouped convolution" in reason for reason in refused.values())
    assert structure.layer("1").kind == "grouped"
    assert macs(structure, Recipe()) == counted(model, structure, IMAGES[:1])[1]


class Twice(nn.Module):
    """One layer is used twice, and reads the channels of another."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.again(F.relu(self.again(F.relu(self.first(x))))))


def test_a_layer_that_is_used_twice_is_refused_and_so_are_the_channels_that_it_reads():
    refused, structure = reasons(Twice(), torch.randn(8, 6))
    assert "used 2 times" in refused["again"]
    assert [layer.name for layer in structure.layers] == ["first", "last"]
    assert structure.groups == ()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_tied_weights_are_refused():
    refused, structure = reasons(Tied(), torch.randn(8, 6))
    assert [layer.name for layer in structure.layers] == ["c"]
    assert "shares its weights" in refused["a"]
    assert "shares its weights" in refused["b"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Linear(12, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.embed(x)
        return self.head((x + self.mix(x, x, x, need_weights=False)[0]).mean(1))


def test_attention_is_refused_by_name_and_keeps_its_channels():
    refused, structure = reasons(Attention(), torch.randn(8, 5, 12))
    assert refused["mix"].startswith("MultiheadAttention is not supported")
    assert [layer.name for layer in structure.layers] == ["embed", "head"]
    assert "MultiheadAttention" in refused["channels of embed"]


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.fc = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x * self.scale)


def test_parameters_outside_layers_are_reported():
    refused, _ = reasons(Bare(), torch.randn(8, 4))
    assert "4 parameters of its own" in refused["(the network)"]


def test_outputs_are_never_pruned(network):
    for name in ("residual", "convolutional", "tokens"):
        model, x = network(name)
        structure = trace(model, x[:66])
        last = structure.layers[-1].name
        assert structure.layer(last).output is None
        assert dict(structure.refused)[f"channels of {last}"] == "they are the network's outputs"


@pytest.mark.parametrize(
    ("model", "folds"),
    [
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.Flatten()), ()),
        (nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.BatchNorm2d(5), nn.Flatten()), ()),
        (nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(5), nn.Flatten()), ()),
        (nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, track_running_stats=False), nn.Flatten()), ()),
        (nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, affine=False), nn.Flatten()), (("0", "1"),)),
    ],
)
def test_only_a_batchnorm_right_behind_a_layer_is_folded(model, folds, settle):
    model, x = settle(model, (4, 8, 8))
    assert trace(model, x[:8]).folds == folds


class Fork(nn.Module):
    """The convolution's output has a second reader, so that the BatchNorm must not be folded into it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x):
        x = self.conv(x)
        return self.norm2(self.conv2(x + self.norm(x)))


def test_a_batchnorm_is_not_folded_into_a_layer_with_another_reader(settle):
    model, x = settle(Fork(), (4, 8, 8))
    assert trace(model, x[:8]).folds == (("conv2", "norm2"),)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x), x


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (Pair(), torch.randn(4, 4), "tuple"),
        (nn.Linear(4, 3), torch.randn(4, 5), r"does not run on its validation inputs of shape \(4, 5\)"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(4, 4), "no layer that can be compressed"),
        (nn.Sequential(nn.ConvTranspose2d(4, 3, 3)), IMAGES, "0: ConvTranspose2d|no layer"),
    ],
)
def test_a_network_that_cannot_be_used_is_explained(model, x, message):
    with pytest.raises(TaskError, match=message):
        trace(model, x)


@pytest.mark.parametrize("name", ["2.weight", "1.running_var"])
def test_weights_that_are_not_finite_are_named(name):
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3), nn.Flatten())
    model.state_dict()[name].view(-1)[1] = float("nan")
    with pytest.raises(TaskError, match=rf"{name} holds NaN or infinity in 1 of"):
        trace(model, IMAGES)


class Steered(nn.Module):
    """Control flow that depends on the data: it runs, so it can be traced."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x)
        return self.b(y if float(y.detach().sum()) > 0 else -y)


def test_control_flow_is_traced_like_anything_that_runs():
    structure = trace(Steered(), torch.randn(8, 4))
    assert [layer.name for layer in structure.layers] == ["a", "b"]


def test_a_network_is_not_changed_by_a_look_at_it(network):
    model, x = network("residual")
    before = copy.deepcopy(model.state_dict())
    model.train()
    flags = [p.requires_grad_(False).requires_grad for p in model.parameters()]
    trace(model, x[:8])
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_dependencies_that_cannot_be_traced_are_export_errors():
    class Weird(nn.Module):
        def forward(self, x):
            raise KeyError("no")

    with pytest.raises(ExportFailed, match="KeyError"):
        channel_groups(Weird(), torch.randn(2, 3))


def elementwise(model, x):
    """Numbers that BatchNorm scales and shifts, that ReLU gives and that pooling reads, each time it is called."""
    found = []

    def count(module, args, output):
        pooling = isinstance(module, nn.MaxPool2d | nn.AdaptiveAvgPool2d)
        found.append(args[0].numel() if pooling else output.numel() * (1 + isinstance(module, nn.BatchNorm2d)))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.ReLU | nn.MaxPool2d | nn.AdaptiveAvgPool2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(x)
    return sum(found)


def test_resnet18_at_half_its_channels_is_the_published_one():
    """Torch-Pruning 1.6's README: resnet18 at a pruning ratio of 0.5 has 3,055,880 parameters and 487,202,536 MACs."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    x = torch.randn(2, 3, 224, 224)
    structure = trace(model, x)
    assert isinstance(structure, Structure)
    recipe = Recipe(tuple(Prune(g.name, g.channels // 2) for g in structure.groups))
    live = compress(model, recipe, structure, x)
    assert sum(p.numel() for p in live.parameters()) == 3_055_880
    published, parameters = torch_pruning.utils.count_ops_and_params(live, x[:1])
    assert (published, parameters) == (487_202_536, 3_055_880)
    ours = macs(structure, recipe)
    assert ours == counted(live, structure, x[:1])[1]
    # Theirs counts BatchNorm (twice), ReLU, pooling and the bias too; ours is what convolutions and the linear layer
    # multiply.
    assert ours == 483_149_824
    assert published - ours == elementwise(live, x[:1]) + live.fc.bias.numel()


def test_the_layers_of_an_encoder_are_blocks_and_not_the_encoder():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)
    model = nn.Sequential(nn.Linear(12, 16), encoder, nn.Flatten(), nn.Linear(80, 4))
    assert set(trace(model, torch.randn(8, 5, 12)).blocks) == {
        "1.layers.1",
        "1.layers.2",
    }  # torch's encoder needs its first


def test_channels_that_reshapes_multiply_without_end_are_refused_and_the_others_found():
    """Shifted windows: Torch-Pruning alone lists 16 times as many indices at every turn, until memory ends."""
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=10).eval()
    x = torch.randn(2, 3, 16, 16)
    refused, structure = reasons(model, x)
    assert "through the reshapes" in refused["channels of features.0.0"]
    assert [group.name for group in structure.groups] == ["features.1.0.mlp.0", "features.1.1.mlp.0"]
    recipe = Recipe(tuple(Prune(group.name, group.channels // 2) for group in structure.groups))
    assert compress(copy.deepcopy(model), recipe, structure, x)(x).shape == (2, 10)
