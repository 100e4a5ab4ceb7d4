"""Rules become axes, picks become one canonical recipe, and a recipe finds its picks again."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paretorch.errors import ConfigError
from paretorch.spaces.defaults import default_space, reference_recipes
from paretorch.spaces.plain import plain
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.rules import Rule, matches
from paretorch.spaces.shapes import kept_rank, largest_rank, shapes, sides
from paretorch.spaces.space import Space
from paretorch.spaces.structure import Group, Layer, Structure, inside, kept_channels
from paretorch.spaces.techniques.cluster import Cluster
from paretorch.spaces.techniques.equalize import Equalize
from paretorch.spaces.techniques.lowrank import LowRank
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import ACTIVATION_BITS, Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student


def residual(blocks=2, channels=16, round_to=4, *, grouped=True, droppable=None, depthwise=False, folds=True):
    """A stem, residual blocks of two convolutions (perhaps a depthwise one between) and a linear layer."""
    layers = [Layer("stem", "conv", (channels, 3, 3, 3), 27 * channels * 64, True, "stem")]
    groups = [Group("stem", channels, round_to)]
    for number in range(blocks):
        one, two, deep = f"blocks.{number}.conv1", f"blocks.{number}.conv2", f"blocks.{number}.dw"
        square = (channels, channels, 3, 3)
        cost = 9 * channels * channels * 64
        layers.append(Layer(one, "conv", square, cost, True, one, (("stem", channels),)))
        if depthwise:
            layers.append(
                Layer(deep, "depthwise", (channels, 1, 3, 3), 9 * channels * 64, True, one, ((one, channels),))
            )
        layers.append(Layer(two, "conv", square, cost, True, "stem", ((one, channels),)))
        groups.append(Group(one, channels, round_to))
    layers.append(Layer("fc", "linear", (10, channels), 10 * channels, True, None, (("stem", channels),)))
    if not grouped:
        layers = [Layer(x.name, x.kind, x.weight_shape, x.macs) for x in layers]
        groups = []
    names = tuple(f"blocks.{number}" for number in range(blocks))
    pairs = tuple((layer.name, f"{layer.name}_bn") for layer in layers[:-1]) if folds else ()
    return Structure(tuple(layers), tuple(groups), names if droppable is None else droppable, (), pairs, (3, 8, 8))


@st.composite
def structures(draw):
    blocks = draw(st.integers(0, 3))
    order = draw(st.permutations([f"blocks.{number}" for number in range(blocks)]))
    paired = draw(st.sets(st.integers(0, max(0, blocks - 1)))) if blocks else ()
    made = residual(
        blocks,
        draw(st.sampled_from((1, 3, 8, 10, 16, 36, 64))),
        draw(st.sampled_from((1, 4, 8))),
        grouped=draw(st.booleans()),
        droppable=tuple(order[: draw(st.integers(0, blocks))]),
        depthwise=draw(st.booleans()),
        folds=draw(st.booleans()),
    )
    return replace(made, pairs=tuple((f"blocks.{n}.conv1", (f"blocks.{n}.conv2",)) for n in sorted(paired)))


def some(values):
    return st.lists(st.sampled_from(values), min_size=1, max_size=4, unique=True).map(tuple)


@st.composite
def spaces(draw, structure):
    layers = [layer.name for layer in structure.layers]

    def rules(choices, names):
        patterns = ["*", "first", "last", "conv", "depthwise", "linear", "blocks.*", "*.conv1", *names]
        useful = [p for p in patterns if any(matches(p, name, structure) for name in names)]
        return tuple(
            Rule(draw(some(choices)), draw(some(useful)), draw(st.booleans()))
            for _ in range(draw(st.integers(0, 3)) if useful else 0)
        )

    return Space(
        weight_bits=rules((1, 2, 3, 4, 6, 8, 16, 32), layers),
        activation_bits=rules(ACTIVATION_BITS, layers),
        cluster_bits=rules((2, 4, 8, 32), layers),
        rank=rules((1.0, 0.9, 0.5, 0.3, 0.1), layers),
        sparsity=rules((0.0, 0.3, 0.5, 0.9, "1:2"), [x.name for x in structure.layers if x.weight_shape[1] > 1])
        if min(x.weight_shape[1] for x in structure.layers) > 1
        else rules((0.0, 0.3, 0.5, 0.9), layers),
        criterion=rules(("magnitude", "obs", "random"), layers),
        rounding=rules(("nearest", "gptq", "adaround"), layers),
        ranges=rules(("mse", "minmax"), layers),
        scheme=rules(("symmetric", "affine"), layers),
        group_size=(Rule(draw(some((0, 16, 64))), ("linear",), draw(st.booleans())),) if draw(st.booleans()) else (),
        activations=(Rule(draw(some(("static", "dynamic"))), ("linear",), draw(st.booleans())),)
        if draw(st.booleans())
        else (),
        channels=rules((0.0, 0.25, 0.5, 0.9), [group.name for group in structure.groups]),
        width=draw(some((1.0, 0.75, 0.5, 0.1))),
        depth=draw(some((0, 1, 2, 3))),
        recovery=draw(some((None, Recover("batchnorm"), Recover("finetune", 1), Recover("finetune", 0.5)))),
        equalize=draw(some(("none", "weights", "activations"))) if structure.pairs else ("none",),
    )


@st.composite
def picked(draw):
    structure = draw(structures())
    space = draw(spaces(structure))
    picks = {axis.name: draw(st.integers(0, len(axis.choices) - 1)) for axis in space.axes(structure)}
    return structure, space, picks


@settings(deadline=None, max_examples=200)
@given(picked())
def test_encode_finds_picks_that_lead_to_the_same_recipe(case):
    structure, space, picks = case
    recipe = space.recipe(structure, picks)
    found = space.encode(structure, recipe)
    assert found is not None
    assert set(found) == set(picks)
    assert space.recipe(structure, found) == recipe


@settings(deadline=None, max_examples=100)
@given(picked())
def test_axis_names_are_unique_and_no_target_has_two(case):
    structure, space, _ = case
    axes = space.axes(structure)
    assert len({axis.name for axis in axes}) == len(axes)
    per_target = [
        (axis.kind, target) for axis in axes if axis.kind not in ("width", "depth") for target in axis.targets
    ]
    assert len(set(per_target)) == len(per_target)
    assert all(axis.choices for axis in axes)


@settings(deadline=None, max_examples=100)
@given(picked())
def test_the_last_rule_that_selects_a_layer_wins(case):
    """Said the slow way: the choices of a layer are those of the last rule with a pattern for it."""
    structure, space, _ = case
    found = {(axis.kind, target): axis.choices for axis in space.axes(structure) for target in axis.targets}
    for kind, names in (
        ("weight_bits", [layer.name for layer in structure.layers]),
        ("cluster_bits", [layer.name for layer in structure.layers]),
        ("sparsity", [layer.name for layer in structure.layers]),
        ("channels", [group.name for group in structure.groups]),
    ):
        for name in names:
            owners = [r for r in getattr(space, kind) if any(matches(p, name, structure) for p in r.layers)]
            assert found.get((kind, name)) == (owners[-1].choices if owners else None)


@settings(deadline=None, max_examples=150)
@given(picked())
def test_a_recipe_fits_its_network(case):
    """No step for what a dropped block held, no channels kept that are not there, no step that changes nothing."""
    structure, space, picks = case
    recipe = space.recipe(structure, picks)
    dropped = tuple(name for step in recipe.of(Student) for name in step.drop)
    depth = next(axis for axis in space.axes(structure) if axis.name == "depth")
    assert set(dropped) == set(structure.blocks[: depth.choices[picks["depth"]]])
    for step in (*recipe.of(Quantize), *recipe.of(Sparsify), *recipe.of(Cluster), *recipe.of(LowRank)):
        assert structure.layer(step.layer)
        assert not inside(step.layer, dropped)
    sizes = shapes(structure, recipe)
    for step in recipe.of(LowRank):
        layer = structure.layer(step.layer)
        assert layer.kind != "depthwise"
        assert 1 <= step.rank <= largest_rank(*sides(layer, sizes[step.layer])), "it saves nothing"
    for step in recipe.of(Prune):
        group = structure.group(step.group)
        assert not inside(step.group, dropped)
        assert 1 <= step.keep < group.channels
        assert step.keep % group.round_to == 0
    if not any(recipe.of(kind) for kind in (Student, Prune, LowRank, Sparsify, Cluster, Quantize)):
        assert recipe == Recipe(), "an untouched network has nothing to recover from"


@settings(deadline=None, max_examples=100)
@given(picked())
def test_each_choice_arrives_at_each_target(case):
    """The recipe, read back layer by layer, is what was picked."""
    structure, space, picks = case
    recipe = space.recipe(structure, picks)
    chosen = {
        (axis.kind, target): axis.choices[picks[axis.name]] for axis in space.axes(structure) for target in axis.targets
    }
    depth = next(axis for axis in space.axes(structure) if axis.name == "depth")
    drop = structure.blocks[: depth.choices[picks["depth"]]]
    quantized = {step.layer: step for step in recipe.of(Quantize)}
    sparse = {step.layer: step.pattern or step.ratio for step in recipe.of(Sparsify)}
    kept = {step.group: step.keep for step in recipe.of(Prune)}
    clustered = {step.layer: step.bits for step in recipe.of(Cluster)}
    ranks = {step.layer: step.rank for step in recipe.of(LowRank)}
    sizes = shapes(structure, recipe)
    for layer in structure.layers:
        if inside(layer.name, drop):
            continue
        codebook = chosen.get(("cluster_bits", layer.name), 32)
        assert clustered.get(layer.name, 32) == codebook
        share = chosen.get(("rank", layer.name), 1.0)
        assert ranks.get(layer.name) == (kept_rank(*sides(layer, sizes[layer.name]), share) if share < 1 else None)
        bits = chosen.get(("weight_bits", layer.name), 32) if codebook == 32 else 32
        assert sparse.get(layer.name, 0.0) == (chosen.get(("sparsity", layer.name), 0.0) if bits > 1 else 0.0)
        assert (quantized[layer.name].weight_bits if layer.name in quantized else 32) == bits
        if bits <= 8:
            assert quantized[layer.name].activation_bits == chosen.get(("activation_bits", layer.name), 32)
            how = chosen.get(("activations", layer.name), "static")
            eight = quantized[layer.name].activation_bits == 8
            size = chosen.get(("group_size", layer.name), 0)
            assert quantized[layer.name].group_size == (size if quantized[layer.name].activation_bits == 32 else 0)
            assert quantized[layer.name].activations == (how if eight else "static")
            scheme = chosen.get(("scheme", layer.name), "symmetric")
            assert quantized[layer.name].scheme == (
                "symmetric" if bits == 1 or quantized[layer.name].group_size else scheme
            )
            assert quantized[layer.name].rounding == chosen.get(("rounding", layer.name), "nearest")
            assert quantized[layer.name].ranges == (chosen.get(("ranges", layer.name), "mse") if bits > 1 else "mse")
    for group in structure.groups:
        if not inside(group.name, drop):
            width = chosen[("width", group.name)]
            share = width * (1 - chosen.get(("channels", group.name), 0.0))
            assert kept.get(group.name, group.channels) == kept_channels(group.channels, share, group.round_to)


def test_methods_are_searched_and_written_only_where_they_have_an_effect():
    space = Space(
        weight_bits=(Rule((3, 16, 32), ("fc", "stem")),),
        sparsity=(Rule((0.0, 0.5, "2:4"), ("fc",)),),
        criterion=(Rule(("magnitude", "obs"), share=True),),
        rounding=(Rule(("nearest", "gptq"), share=True),),
    )
    structure = residual()
    both = {"criterion/all": 1, "rounding/all": 1}
    recipe = space.recipe(structure, {**both, "weight_bits/stem": 1, "sparsity/fc": 2})
    assert recipe.steps == (Sparsify("fc", 0.5, "obs", "2:4"), Quantize("fc", 3, 32, "gptq"), Quantize("stem", 16))
    assert space.encode(structure, recipe) == space.encode(structure, recipe) | both | {"sparsity/fc": 2}
    nothing = {"weight_bits/stem": 2, "weight_bits/fc": 2}
    assert space.recipe(structure, {**both, **nothing}) == Recipe()


def test_ranges_are_equalised_only_where_that_has_an_effect():
    structure = replace(residual(), pairs=(("blocks.0.conv1", ("blocks.0.conv2",)),))
    space = Space(
        weight_bits=(Rule((4, 32), ("fc",)),),
        depth=(0, 1, 2),
        equalize=("none", "weights", "activations"),
    )
    picks = {"equalize": 2, "weight_bits/fc": 0}
    assert space.recipe(structure, picks).steps == (Equalize("activations"), Quantize("fc", 4))
    assert space.encode(structure, space.recipe(structure, picks))["equalize"] == 2
    for other in ({"weight_bits/fc": 1}, {"depth": 1}):
        without = space.recipe(structure, picks | other)
        assert not without.of(Equalize), other
        assert without == space.recipe(structure, picks | other | {"equalize": 0})
    with pytest.raises(ConfigError, match=r"equalize: no layer's outputs reach only other layers.* stem: add"):
        space.axes(replace(residual(), unpaired=(("stem", "add reads them"),)))
    with pytest.raises(ConfigError, match="equalize: recovery compares features"):
        replace(space, recovery=(Recover("finetune", 1, features=1),)).axes(structure)


def test_a_space_without_methods_is_written_as_before_there_were_any():
    """What a study compares when it goes on: one of an earlier version must find its space unchanged."""
    space = Space(weight_bits=(Rule((4, 8)),), recovery=(None, Recover("batchnorm")))
    assert plain(space) == {
        "weight_bits": ({"choices": (4, 8), "layers": ("*",), "share": False},),
        "activation_bits": (),
        "sparsity": (),
        "channels": (),
        "width": (1.0,),
        "depth": (0,),
        "ladder": False,
        "recovery": (
            None,
            {"method": "batchnorm", "epochs": 0.0, "learning_rate": 0.01, "distill": 0.9, "temperature": 2.0},
        ),
    }
    assert plain(replace(space, rounding=(Rule(("gptq",), share=True),)))["rounding"][0]["choices"] == ("gptq",)


def test_choices_that_some_layers_cannot_have_are_refused_with_these_layers():
    layers = (
        Layer("stem", "conv", (16, 3, 3, 3), 1),
        Layer("dw", "depthwise", (16, 1, 3, 3), 1),
        Layer("fc", "linear", (10, 25088), 1),
    )
    structure = Structure(layers)
    space = Space(
        sparsity=(Rule((0.0, "2:4")),),
        rounding=(Rule(("nearest", "gptq"), share=True),),
        criterion=(Rule(("obs",)),),
        activations=(Rule(("static", "dynamic"), ("stem", "fc")),),
        group_size=(Rule((0, 64), ("dw", "fc")),),
    )
    with pytest.raises(ConfigError) as caught:
        space.axes(structure)
    pattern, criterion, rounding, dynamic, groups = sorted(
        caught.value.problems, key=lambda text: "sparsity criterion rounding activations group_size".index(text[:8])
    )
    assert "stem: dynamic activations are for linear layers" in dynamic
    assert "dw: groups of 64 weights with a scale each are for linear layers; choose 0" in groups
    assert "stem: pattern 2:4 needs 4 input channels of one group, it has 3" in pattern
    assert "dw: pattern 2:4" in pattern
    assert "fc: criterion obs needs a Hessian of 25088 x 25088" in criterion
    assert "write a rule of its own" in rounding
    both = Space(
        ranges=(Rule(("mse", "entropy"), ("fc", "dw")),), scheme=(Rule(("symmetric", "affine"), ("stem", "dw")),)
    )
    with pytest.raises(
        ConfigError, match=r"ranges: 'entropy' with scheme: 'affine', .* leave one of them out; .* such layers; dw$"
    ):
        both.axes(structure)
    own = Space(
        sparsity=(Rule((0.0, "2:4"), ("fc",)),),
        criterion=(Rule(("obs",), ("conv", "depthwise")),),
        rounding=(Rule(("nearest", "gptq"), share=True), Rule(("nearest",), ("fc",))),
    )
    assert own.axes(structure)


@settings(deadline=None, max_examples=50)
@given(structures(), st.integers(0, 2_000_000), st.data())
def test_the_default_space_holds_the_untouched_network(structure, images, data):
    space = default_space(structure, images)
    axes = space.axes(structure)
    picks = {axis.name: data.draw(st.integers(0, len(axis.choices) - 1)) for axis in axes}
    recipe = space.recipe(structure, picks)
    assert space.recipe(structure, space.encode(structure, recipe)) == recipe
    bits = {step.layer: step.weight_bits for step in recipe.of(Quantize)}
    assert bits.get("stem", 8) >= 6
    assert bits.get("fc", 8) >= 6
    assert space.recovery[0] == Recover("batchnorm" if structure.folds else "statistics")
    assert any(r is not None and r.method == "finetune" for r in space.recovery) == (images > 0)
    assert all(r.epochs * images <= 20_000 * 1.05 for r in space.recovery if r is not None)


@settings(deadline=None, max_examples=50)
@given(structures())
def test_anchors_are_distinct_and_begin_untouched(structure):
    found = reference_recipes(default_space(structure), structure)
    assert found[0] == ("untouched", Recipe())
    names = [name for name, _ in found]
    order = ["untouched", "fp16", "uniform 8-bit", "uniform 6-bit", "uniform 4-bit", "uniform 50% sparse"]
    order += ["uniform 25% pruning", "width 0.5"]
    assert names == [name for name in order if name in names], "a duplicate must not change the order"
    assert len({recipe.key for _, recipe in found}) == len(found)
    recipes = dict(found)
    for bits in (8, 6, 4):
        steps = recipes[f"uniform {bits}-bit"].of(Quantize)
        assert [step.layer for step in steps] == sorted(layer.name for layer in structure.layers)
        assert {(step.weight_bits, step.activation_bits) for step in steps} == {(bits, 8)}
    recovery = [Recover("batchnorm" if structure.folds else "statistics")]
    assert all(recipe.of(Recover) == recovery for name, recipe in found if name not in ("untouched", "fp16"))
    for name, share in (("uniform 25% pruning", 0.75), ("width 0.5", 0.5)):
        for step in recipes.get(name, Recipe()).of(Prune):
            group = structure.group(step.group)
            assert step.keep == kept_channels(group.channels, share, group.round_to)


def test_anchors_follow_the_activations_of_the_space():
    structure = residual()
    for space, bits in (
        (Space(), 32),
        (Space(activation_bits=(Rule((32,)),)), 32),
        (Space(activation_bits=(Rule((8, 32)),)), 8),
    ):
        steps = dict(reference_recipes(space, structure))["uniform 8-bit"].of(Quantize)
        assert {step.activation_bits for step in steps} == {bits}


def test_share_makes_one_choice_for_all():
    structure = residual(2)
    space = Space(weight_bits=(Rule((4, 8), share=True), Rule((6,), ("first", "last"))))
    axes = [axis for axis in space.axes(structure) if axis.kind == "weight_bits"]
    assert [axis.name for axis in axes] == ["weight_bits/all", "weight_bits/stem", "weight_bits/fc"]
    recipe = space.recipe(structure, {"weight_bits/all": 1})
    assert {s.layer: s.weight_bits for s in recipe.of(Quantize)} == {
        "stem": 6,
        "fc": 6,
        **{f"blocks.{b}.conv{c}": 8 for b in (0, 1) for c in (1, 2)},
    }


def test_a_layer_named_like_a_shared_rule_keeps_its_own_axis():
    """Two axes of one name would be one entry in the picks, and one of the choices would be lost."""
    structure = Structure(tuple(Layer(name, "conv", (8, 8, 1, 1), 64) for name in ("conv", "other", "all")))
    space = Space(weight_bits=(Rule((2, 4), ("conv",), share=True), Rule((6, 8), ("co*",))))
    names = [axis.name for axis in space.axes(structure) if axis.kind == "weight_bits"]
    assert names == ["weight_bits/conv (shared)", "weight_bits/conv"]
    space = Space(weight_bits=(Rule((2, 4), share=True), Rule((6, 8), ("all",))))
    names = [axis.name for axis in space.axes(structure) if axis.kind == "weight_bits"]
    assert names == ["weight_bits/all (shared)", "weight_bits/all"]


def test_an_unknown_pattern_names_value_and_choices():
    space = Space(weight_bits=(Rule((4, 8)), Rule((8,), ("blocks.0.conv3",))))
    with pytest.raises(ConfigError) as caught:
        space.axes(residual())
    (problem,) = caught.value.problems
    assert problem.startswith("weight_bits.1.layers: pattern 'blocks.0.conv3' selects no layer")
    assert "blocks.0.conv1" in problem
    assert "first, last" in problem
    assert "depthwise" in problem


def test_all_problems_come_at_once():
    space = Space(
        weight_bits=(Rule((4, 9, "8")), Rule((8,), ("nothing", "fc", "nowhere"))),
        activation_bits=(Rule((12,)),),
        cluster_bits=(Rule((16, 4)),),
        rank=(Rule((0.0, 1.0)), Rule((0.5,), ("nothere",))),
        sparsity=(Rule((0.5, 1.0, "half")), Rule(())),
        rounding=(Rule(("nearest", "up")),),
        channels=(Rule((-0.1,), ("fc",)),),
        width=(0.0, 1.0),
        depth=(0, -1, 0.5),
        recovery=(Recover("pray"),),
        equalize=("none", "all"),
    )
    with pytest.raises(ConfigError) as caught:
        space.axes(residual())
    keys = sorted(
        problem.split(":")[0] + ":" + problem.split(":")[1].split(";")[0] for problem in caught.value.problems
    )
    expected = [
        "weight_bits.0.choices: 9 is not possible",
        "weight_bits.0.choices: '8' is not possible",
        "weight_bits.1.layers: pattern 'nothing' selects no layer",
        "weight_bits.1.layers: pattern 'nowhere' selects no layer",
        "activation_bits.0.choices: 12 is not possible",
        "cluster_bits.0.choices: 16 is not possible",
        "rank.0.choices: 0.0 is not possible",
        "rank.1.layers: pattern 'nothere' selects no layer",
        "sparsity.0.choices: 1.0 is not possible",
        "sparsity.0.choices: 'half' is not possible",
        "rounding.0.choices: 'up' is not possible",
        "sparsity.1.choices: no choice",
        "channels.0.choices: -0.1 is not possible",
        "channels.0.layers: pattern 'fc' selects no group",
        "width: 0.0 is not possible",
        "equalize: 'all' is not possible",
        "equalize: no layer's outputs reach only other layers, through nothing but ReLU, LeakyReLU, PReLU, "
        "pooling and reshapes",
        "depth: -1 is not possible",
        "depth: 0.5 is not possible",
        "recover: method 'pray', epochs 0.0",
    ]
    assert keys == sorted(expected)


@pytest.mark.parametrize("field", ["width", "depth", "recovery", "equalize"])
def test_no_choice_at_all_is_refused(field):
    with pytest.raises(ConfigError, match=f"{field}: no choice"):
        Space(**{field: ()}).axes(residual())


def test_the_first_choice_is_taken_where_nothing_is_picked():
    space = Space(weight_bits=(Rule((4, 8), ("fc",)),), depth=(1, 0), recovery=(Recover("batchnorm"), None))
    expected = Recipe((Student(("blocks.0",)), Quantize("fc", 4), Recover("batchnorm")))
    assert space.recipe(residual(), {}) == expected


@pytest.mark.parametrize("channels", [10, 18, 36])
def test_full_width_narrows_nothing(channels):
    """Where the channels are no multiple of what they are rounded to, too."""
    structure = residual(1, channels, 8)
    assert Space(width=(1.0, 0.5), channels=(Rule((0.0, 0.5)),)).recipe(structure, {}) == Recipe()


def test_blocks_go_least_important_first():
    structure = residual(3, droppable=("blocks.2", "blocks.0"))
    space = Space(depth=(0, 1, 2))
    drops = [space.recipe(structure, {"depth": depth}).of(Student) for depth in range(3)]
    assert drops == [[], [Student(("blocks.2",))], [Student(("blocks.0", "blocks.2"))]]


def test_a_network_without_groups_or_blocks_has_no_axis_for_them():
    structure = residual(0, grouped=False)
    axes = default_space(structure).axes(structure)
    assert not [axis for axis in axes if axis.kind in ("width", "channels")]
    assert [axis.choices for axis in axes if axis.kind == "depth"] == [(0,)]


@settings(deadline=None, max_examples=50)
@given(picked(), st.sampled_from((5, 7)))
def test_what_the_space_does_not_hold_has_no_picks(case, bits):
    structure, space, picks = case
    recipe = space.recipe(structure, picks)
    layer = structure.layers[-1].name
    assume(not any(step.layer == layer for step in (*recipe.of(Quantize), *recipe.of(Cluster))))
    assert space.encode(structure, Recipe((*recipe.steps, Quantize(layer, bits)))) is None
    assert space.encode(structure, Recipe((Student(("nowhere",)),))) is None


def test_a_rank_that_saves_nothing_is_never_offered():
    structure = residual(1, 64, depthwise=True)
    space = Space(rank=(Rule((1.0, 0.95, 0.5, 0.25)),))
    axes = {axis.name: axis.choices for axis in space.axes(structure) if axis.kind == "rank"}
    convolution, stem, fc = (1.0, 0.5, 0.25), (1.0, 0.5, 0.25), (1.0, 0.5, 0.25)
    # 64 x 27: up to 18 of 27; 64 x 576: up to 57 of 64; 10 x 64: up to 8 of 10; a depthwise layer has no such choice.
    assert axes == {
        "rank/stem": stem,
        "rank/blocks.0.conv1": convolution,
        "rank/blocks.0.conv2": convolution,
        "rank/fc": fc,
    }
    assert Space(rank=(Rule((1.0, 0.5), ("depthwise",)),)).axes(structure) == Space().axes(structure)
    # A square matrix saves below half of its rank only.
    square = Structure((Layer("a", "linear", (64, 64), 64 * 64), Layer("b", "linear", (64, 32), 64 * 32)))
    assert [a.choices for a in space.axes(square) if a.kind == "rank"] == [(1.0, 0.25), (1.0, 0.5, 0.25)]
    assert [a.name for a in Space(rank=(Rule((1.0, 0.5)),)).axes(square) if a.kind == "rank"] == ["rank/b"]


def test_the_rank_is_that_of_the_narrowed_layer():
    structure = residual(1, 64, 8)
    space = Space(rank=(Rule((0.5,), ("*.conv2",)),), width=(1.0, 0.5, 0.1))
    found = [space.recipe(structure, {"width": width}).of(LowRank) for width in range(3)]
    assert found == [[LowRank("blocks.0.conv2", rank)] for rank in (32, 16, 4)]


def test_a_codebook_takes_the_place_of_weight_bits():
    structure = residual(1)
    space = Space(weight_bits=(Rule((4, 8)),), cluster_bits=(Rule((32, 3), ("fc", "stem")),))
    recipe = space.recipe(structure, {"cluster_bits/fc": 1, "weight_bits/fc": 1})
    assert recipe.of(Cluster) == [Cluster("fc", 3)]
    assert "fc" not in [step.layer for step in recipe.of(Quantize)]
    assert space.recipe(structure, {"cluster_bits/fc": 1}) == recipe, "weight bits have no effect there"
    assert space.encode(structure, recipe)["cluster_bits/fc"] == 1


def test_zeros_grow_only_where_there_are_any_and_criterion_and_rounding_then_have_no_effect():
    structure = residual(1)
    grown, plain_training = Recover("finetune", 2, gradual=True), Recover("finetune", 2)
    space = Space(
        weight_bits=(Rule((3,), share=True),),
        sparsity=(Rule((0.0, 0.5), share=True),),
        cluster_bits=(Rule((32, 4), share=True),),
        criterion=(Rule(("obs", "taylor"), share=True),),
        rounding=(Rule(("gptq", "nearest"), share=True),),
        recovery=(None, grown, plain_training),
    )
    found: dict[Recipe, list[dict[str, int]]] = {}
    axes = space.axes(structure)
    for combination in itertools.product(*(range(len(axis.choices)) for axis in axes)):
        picks = dict(zip((axis.name for axis in axes), combination, strict=True))
        recipe = space.recipe(structure, picks)
        found.setdefault(recipe, []).append(picks)
        again = space.encode(structure, recipe)
        assert again is not None
        assert space.recipe(structure, again) == recipe
    growing = [recipe for recipe in found if any(step.gradual for step in recipe.of(Recover))]
    assert len(growing) == 1
    assert {step.criterion for step in growing[0].of(Sparsify)} == {"magnitude"}
    assert {step.rounding for step in growing[0].of(Quantize)} == {"nearest"}
    assert len(found[growing[0]]) == 4  # criteria times roundings
    dense = space.recipe(structure, {"sparsity/all": 0, "recovery": 1})
    assert dense.of(Recover) == [plain_training]


def test_on_a_ladder_zeros_grow_in_the_first_training():
    one, two = Recover("finetune", 1, gradual=True), Recover("finetune", 3, gradual=True)
    structure = residual(1)
    space = Space(sparsity=(Rule((0.5,), share=True),), recovery=(Recover("batchnorm"), one, two)).as_ladder()
    assert space.ladder
    recipe = space.recipe(structure, {"recovery": 2})
    assert recipe.of(Recover) == [one, replace(two, gradual=False)]
    assert space.encode(structure, recipe)["recovery"] == 2
    mixed = Space(recovery=(Recover("batchnorm"), Recover("finetune", 1), two))
    assert mixed.as_ladder() is mixed
