"""A recipe has one form, survives JSON, and refuses what no network can be given."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretorch.errors import RecipeError
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.cluster import Cluster
from paretorch.spaces.techniques.ensemble import Ensemble
from paretorch.spaces.techniques.equalize import EQUALIZATIONS, Equalize
from paretorch.spaces.techniques.lowrank import LowRank
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import RANGES, ROUNDINGS, Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import CRITERIA, Sparsify
from paretorch.spaces.techniques.student import Student
from paretorch.spaces.techniques.table import rank_of

NAMES = ("stem", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc")
quantize = st.integers(2, 8).flatmap(
    lambda bits: st.builds(
        Quantize,
        st.sampled_from(NAMES),
        st.just(bits),
        st.sampled_from((8, 32)),
        st.sampled_from(ROUNDINGS),
        st.sampled_from(RANGES),
    )
) | st.builds(Quantize, st.sampled_from(NAMES), st.just(16))
sparsify = st.builds(
    Sparsify, st.sampled_from(NAMES), st.floats(0, 1, exclude_min=True, exclude_max=True), st.sampled_from(CRITERIA)
) | st.builds(
    Sparsify, st.sampled_from(NAMES), st.just(0.5), st.sampled_from(CRITERIA), st.sampled_from(("2:4", "4:8"))
)
prune = st.builds(Prune, st.sampled_from(NAMES), st.integers(1, 512))
student = st.builds(Student, st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(tuple))
recover = st.sampled_from((Recover("batchnorm"), Recover("statistics"))) | st.builds(
    Recover,
    st.just("finetune"),
    st.floats(0.01, 20) | st.integers(1, 20),
    st.floats(1e-5, 1),
    st.floats(0, 1),
    train=st.sampled_from(("all", "last", "scales")),
    temperature_schedule=st.sampled_from(("constant", "warmup", "anneal")),
    features=st.floats(0, 10) | st.integers(0, 3),
    patience=st.integers(0, 9),
)


def identity(step):
    return type(step), getattr(step, "layer", getattr(step, "group", None))


def one_kind_of_weights(found):
    """No layer that is both clustered and quantized, no features that are compared with equalised ones."""
    taken = {step.layer for step in found if isinstance(step, Cluster)}
    features = any(isinstance(step, Recover) and step.features for step in found)
    return [
        step
        for step in found
        if not (isinstance(step, Quantize) and step.layer in taken) and not (isinstance(step, Equalize) and features)
    ]


low_rank = st.builds(LowRank, st.sampled_from(NAMES), st.integers(1, 512))
cluster = st.builds(Cluster, st.sampled_from(NAMES), st.integers(2, 8))
equalize = st.builds(Equalize, st.sampled_from(EQUALIZATIONS))
every = quantize | sparsify | prune | student | recover | low_rank | cluster | equalize
steps = st.lists(every, max_size=12, unique_by=identity).map(one_kind_of_weights)


@settings(deadline=None, max_examples=60)
@given(steps, st.randoms())
def test_the_order_of_steps_does_not_matter(found, random):
    recipe = Recipe(tuple(found))
    shuffled = list(found)
    random.shuffle(shuffled)
    other = Recipe(tuple(shuffled))
    assert other == recipe
    assert other.key == recipe.key
    assert hash(other) == hash(recipe)
    kinds = [rank_of(type(step)) for step in recipe.steps]
    assert kinds == sorted(kinds)


@settings(deadline=None, max_examples=60)
@given(steps)
def test_json_gives_the_same_recipe_back(found):
    recipe = Recipe(tuple(found))
    again = Recipe.from_dict(json.loads(recipe.to_json()))
    assert again == recipe
    assert again.to_json() == recipe.to_json()
    assert recipe.diff(again) == ""


@settings(deadline=None, max_examples=60)
@given(steps, steps)
def test_keys_are_equal_just_when_recipes_are(first, second):
    one, two = Recipe(tuple(first)), Recipe(tuple(second))
    assert (one.key == two.key) == (one == two)
    assert len(one.key) == 16
    assert set(one.key) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Recover("finetune", epochs=1), Recover("finetune", epochs=1.0)),
        (Recover("finetune", epochs=np.float32(0.5), distill=1), Recover("finetune", epochs=0.5, distill=1.0)),
        (Quantize("fc", np.int64(4)), Quantize("fc", 4)),
        (Student(("b", "a", "b")), Student(("a", "b"))),
    ],
)
def test_equal_numbers_of_other_types_give_one_key(one, two):
    """YAML says 1, Python says 1.0, a sampler says numpy's 1: the same recipe must not run twice."""
    assert Recipe((one,)) == Recipe((two,))
    assert Recipe((one,)).key == Recipe((two,)).key


def test_the_key_is_stable_across_versions_of_this_code():
    """Stored studies find their recipes by it."""
    assert Recipe().to_json() == '{"steps":[],"version":1}'
    assert Recipe().key == "a5dd3ce7993c63ad"
    recipe = Recipe((Prune("stem", 8), Quantize("fc", 4, 8), Student(("layer1.0",)), Sparsify("fc", 0.5)))
    assert recipe.key == "1c002597b9a2cbf1"
    recipe = Recipe((Recover("finetune", 1),))
    assert recipe.to_json() == (
        '{"steps":[{"distill":0.9,"epochs":1.0,"learning_rate":0.01,"method":"finetune","step":"recover",'
        '"temperature":2.0}],'
        '"version":1}'
    )
    assert Recipe((Recover("finetune", 1, train="last"),)).to_dict()["steps"][0]["train"] == "last"


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        (Prune("stem", 0), "at least 1 channel"),
        (Prune("stem", 8.0), "keep = 8.0; it must be a whole number"),
        (Prune("stem", True), "keep = True"),
        (Prune(3, 8), "group = 3; it must be a name"),
        (Sparsify("fc", 0.0), "between 0 and 1"),
        (Sparsify("fc", 1.0), "between 0 and 1"),
        (Sparsify("fc", float("nan")), "a finite number"),
        (Sparsify("fc", "half"), "'half'"),
        (LowRank("fc", 0), "rank = 0; at least 1"),
        (LowRank("fc", 0.5), "rank = 0.5; it must be a whole number"),
        (Cluster("fc", 1), "bits = 1; choose from 2..8"),
        (Cluster("fc", 16), "bits = 16; choose from 2..8"),
        (Equalize("rows"), "by = 'rows'; choose from weights, activations"),
        (Quantize("fc", 0), "choose from 1..8, 16"),
        (Quantize("fc", 1, ranges="minmax"), "the scale of signs is their mean magnitude, leave ranges out"),
        (Quantize("fc", 32), "leave the step out for 32"),
        (Quantize("fc", 12), "weight_bits = 12"),
        (Quantize("fc", 8, 5), "activation_bits = 5"),
        (Quantize("fc", 16, 4), "activation_bits = 4 with weight_bits = 16"),
        (Quantize("fc", 8, 16, activations="dynamic"), "activation_bits = 16; .* dynamic with 8 only"),
        (Quantize("fc", 16, 8), "activation_bits = 8 with weight_bits = 16"),
        (Quantize("fc", 8, 8, activations="late"), "activations = 'late' .* choose from static, dynamic"),
        (Quantize("fc", 8, 32, activations="dynamic"), "activation_bits = 32; .* dynamic with 8 only"),
        (Quantize("fc", 4, group_size=20), "group_size = 20 .* choose from 0, 16, 32, 64, 128, 256"),
        (Quantize("fc", 4, 8, group_size=32), "activation_bits = 8; .* float activations"),
        (Quantize("fc", 16, group_size=32), "weight_bits = 16"),
        (Quantize("fc", 8, scheme="asymmetric"), "scheme = 'asymmetric' .* choose from symmetric, affine"),
        (Quantize("fc", 1, scheme="affine"), "weight_bits = 1; .* affine with 2 to 8 bits only: a sign"),
        (Quantize("fc", 16, scheme="affine"), "weight_bits = 16; .* affine with 2 to 8 bits only"),
        (Quantize("fc", 4, group_size=32, scheme="affine"), "group_size = 32, .* one scale for the whole weight"),
        (
            Quantize("fc", 4, ranges="entropy", scheme="affine"),
            "ranges = 'entropy'; .* choose .* mse, minmax or percentile",
        ),
        (Recover("pray"), "choose batchnorm .* or finetune"),
        (Recover("finetune"), "finetune with epochs > 0"),
        (Recover("finetune", -1), "epochs > 0"),
        (Recover("finetune", float("nan")), "epochs = nan"),
        (Recover("finetune", float("inf")), "epochs = inf"),
        (Recover("batchnorm", 2), "choose batchnorm or statistics without epochs"),
        (Recover("finetune", 1, learning_rate=0), "learning_rate > 0"),
        (Recover("finetune", 1, distill=1.5), "distill in 0..1"),
        (Recover("finetune", 1, temperature=0), "temperature > 0"),
        (Recover("finetune", 1, train="first"), "choose train from all, last, scales"),
        (Recover("finetune", 1, temperature_schedule="cosine"), "temperature_schedule from constant, warmup, anneal"),
        (Recover("finetune", 1, features=-1), "both must be 0 or more"),
        (Recover("finetune", 1, patience=-1), "both must be 0 or more"),
        (Recover("finetune", 1, patience=1.5), "a whole number"),
        (Recover("statistics", 1), "statistics without epochs"),
        (Recover("statistics", patience=2), "statistics does not train"),
        (Recover("batchnorm", train="last"), "batchnorm does not train"),
        (Recover("batchnorm", gradual=True), "batchnorm does not train"),
        (Recover("finetune", 1, gradual=1), "gradual = 1; it must be true or false"),
        (Student(()), "leaves out no block"),
        (Student("layer3.2"), "a tuple of names"),
        ("quantize fc", "is not a step"),
    ],
    ids=repr,
)
def test_impossible_numbers_are_refused(step, complaint):
    with pytest.raises(RecipeError, match=complaint):
        Recipe((step,))


@pytest.mark.parametrize(
    ("twice", "named"),
    [
        ((Quantize("fc", 8), Quantize("fc", 4)), "quantize fc"),
        ((Prune("stem", 8), Prune("stem", 8)), "prune stem"),
        ((LowRank("fc", 8), LowRank("fc", 4)), "lowrank fc"),
        ((Cluster("fc", 8), Cluster("fc", 4)), "cluster fc"),
        ((Recover("batchnorm"), Recover("batchnorm")), "recover"),
        ((Recover("batchnorm"), Recover("statistics")), "recover"),
        ((Student(("a",)), Student(("b",))), "student"),
    ],
)
def test_two_steps_for_one_target_are_refused(twice, named):
    with pytest.raises(RecipeError, match=f"same target: {named}$"):
        Recipe(twice)


def test_training_goes_on_in_the_order_that_it_is_written_in():
    short, long = Recover("finetune", 2), Recover("finetune", 1)
    recipe = Recipe((short, Quantize("fc", 4), long))
    assert recipe.of(Recover) == [short, long]
    assert recipe != Recipe((long, Quantize("fc", 4), short))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.describe() == "weights 4 bit, 2 + 1 epochs of recovery"
    assert len(Recipe((short, short)).steps) == 2
    with pytest.raises(RecipeError, match="batchnorm or statistics beside finetune"):
        Recipe((Recover("batchnorm"), short))


def test_a_layer_is_clustered_or_quantized():
    with pytest.raises(RecipeError, match=r"cluster and quantize for the same layer: fc, stem; .* leave out one"):
        Recipe((Cluster("stem", 4), Cluster("a", 4), Cluster("fc", 4), Quantize("fc", 8), Quantize("stem", 16)))


def test_features_are_not_compared_with_equalised_ones():
    with pytest.raises(RecipeError, match="features beside equalize"):
        Recipe((Equalize(), Recover("finetune", 1, features=1.0)))


def test_two_kinds_for_one_target_are_not():
    assert len(Recipe((Cluster("fc", 8), Sparsify("fc", 0.5), LowRank("fc", 5))).steps) == 3
    assert len(Recipe((Quantize("fc", 8), Sparsify("fc", 0.5), Prune("fc", 5))).steps) == 3


@pytest.mark.parametrize("version", [0, -1, 2, "1", 1.0, True, None])
def test_an_unknown_version_is_refused(version):
    with pytest.raises(RecipeError, match="version"):
        Recipe.from_dict({"version": version, "steps": []})


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"version": 1}, "steps"),
        ({"steps": []}, "version"),
        ({"version": 1, "steps": [], "stpes": []}, "no field stpes"),
        (
            {"version": 1, "steps": [{"step": "quantise", "layer": "fc"}]},
            "unknown step 'quantise'; steps: student, prune",
        ),
        ({"version": 1, "steps": [{"layer": "fc"}]}, "not a recipe"),
        ({"version": 1, "steps": [{"step": "quantize", "layer": "fc", "wieght_bits": 4}]}, "no field wieght_bits"),
        ({"version": 1, "steps": [{"step": "quantize", "layer": "fc"}]}, "weight_bits"),
        ({"version": 1, "steps": [{"step": "quantize", "layer": "fc", "weight_bits": "4"}]}, "weight_bits = '4'"),
        ({"version": 1, "steps": [{"step": "student", "drop": "layer3.2"}]}, "a tuple of names"),
        ({"version": 1, "steps": ["quantize"]}, "not a recipe"),
        ({"version": 1, "steps": None}, "not a recipe"),
        ([], "not a recipe"),
        (None, "not a recipe"),
    ],
    ids=repr,
)
def test_foreign_data_is_refused(data, complaint):
    with pytest.raises(RecipeError, match=complaint):
        Recipe.from_dict(data)


def test_diff_names_what_changed():
    before = Recipe((Quantize("fc", 8), Sparsify("fc", 0.5)))
    after = Recipe((Quantize("fc", 4), Sparsify("fc", 0.5)))
    lines = before.diff(after).splitlines()
    assert [line[0] for line in lines] == ["-", "+"]
    assert "weight_bits=8" in lines[0]
    assert "weight_bits=4" in lines[1]


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ((), "untouched"),
        ((Quantize("a", 4, 8), Quantize("b", 8)), "weights 4-8 bit, activations 8 bit in 1 of 2"),
        ((Quantize("a", 4, 8), Quantize("b", 4, 8)), "weights 4 bit, activations 8 bit"),
        ((Sparsify("a", 0.5),), "1 layer 50% sparse"),
        ((Sparsify("a", 0.25), Sparsify("b", 0.5)), "2 layers 25-50% sparse"),
        ((Prune("a", 8), Prune("b", 8)), "2 groups narrowed"),
        ((Cluster("a", 4), LowRank("b", 8), Cluster("b", 2)), "1 layer of low rank, 2 layers in 2-4-bit codebooks"),
        ((Equalize(), Quantize("a", 4)), "ranges equalised (by weights), weights 4 bit"),
        ((Student(("l.1", "l.0")), Recover("batchnorm")), "without l.0 l.1, BatchNorm re-estimated"),
        ((Recover("statistics"),), "BatchNorm re-estimated, biases corrected"),
        ((Recover("finetune", 0.4),), "0.4 epochs of recovery"),
        ((Recover("finetune", 1, train="scales", features=2),), "1 epochs of recovery (scales and biases, features)"),
    ],
)
def test_describe(steps, text):
    assert Recipe(steps).describe() == text


def test_what_came_later_is_written_only_where_it_is_used():
    """So that a recipe which was written before has the key that it had then."""
    old = Recipe((Sparsify("fc", 0.5), Quantize("fc", 4, 8)))
    assert "criterion" not in old.to_json()
    assert "rounding" not in old.to_json()
    assert old == Recipe((Sparsify("fc", 0.5, "magnitude", ""), Quantize("fc", 4, 8, "nearest", "mse")))
    new = Recipe((Sparsify("fc", 0.5, pattern="2:4"), Quantize("fc", 4, 8, "gptq")))
    assert new.to_dict()["steps"] == [
        {"step": "sparsify", "layer": "fc", "ratio": 0.5, "pattern": "2:4"},
        {"step": "quantize", "layer": "fc", "weight_bits": 4, "activation_bits": 8, "rounding": "gptq"},
    ]
    assert new.describe() == "1 layer 50% sparse (2:4), weights 4 bit (gptq), activations 8 bit"


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (Sparsify("fc", 0.5, "size"), "criterion = 'size'; choose from magnitude, taylor"),
        (Sparsify("fc", 0.6, pattern="2:4"), "ratio = 0.6 with pattern 2:4; it must be 0.5"),
        (Sparsify("fc", 0.5, pattern="half"), "pattern 'half': write N:M, such as 2:4"),
        (Sparsify("fc", 0.5, pattern="4:4"), "pattern '4:4': write N:M"),
        (Quantize("fc", 4, 8, "up"), "rounding = 'up'"),
        (
            Quantize("fc", 4, 8, ranges="all"),
            "choose the rounding from nearest, gptq, adaround and the ranges from mse",
        ),
        (Quantize("fc", 16, 32, "gptq"), "float16 has neither"),
    ],
)
def test_an_impossible_method_is_refused(step, problem):
    with pytest.raises(RecipeError) as caught:
        Recipe((step,))
    assert problem in str(caught.value)


def test_a_recipe_cannot_be_changed_behind_its_key():
    recipe = Recipe([Quantize("fc", 8)])
    assert isinstance(recipe.steps, tuple)
    with pytest.raises(AttributeError):
        recipe.steps = ()
    assert replace(recipe, steps=()) == Recipe()


GROWN = Recover("finetune", 2, gradual=True)


def test_gradual_is_written_only_where_it_is_used_and_comes_back():
    assert "gradual" not in Recipe((Sparsify("fc", 0.5), Recover("finetune", 2))).to_json()
    recipe = Recipe((Sparsify("fc", 0.5), GROWN))
    assert '"gradual":true' in recipe.to_json()
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe
    assert recipe.key != Recipe((Sparsify("fc", 0.5), Recover("finetune", 2))).key
    assert recipe.describe().endswith("2 epochs of recovery (zeros grow)")


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ((Sparsify("fc", 0.5, "obs"), GROWN), "gradual with criterion obs, rounding nearest for layer fc"),
        ((Sparsify("fc", 0.5), Quantize("fc", 3, rounding="gptq"), GROWN), "rounding gptq for layer fc"),
        ((Sparsify("fc", 0.5), Recover("finetune", 1), GROWN), "gradual in a training step after the first"),
    ],
)
def test_zeros_that_cannot_grow_are_refused(steps, complaint):
    with pytest.raises(RecipeError, match=complaint):
        Recipe(steps)


def test_where_no_zeros_grow_other_methods_are_free():
    Recipe((Sparsify("fc", 0.5), Quantize("conv", 3, rounding="gptq"), GROWN, Recover("finetune", 1)))
    Recipe((Sparsify("fc", 0.5, "taylor"), Cluster("fc", 4), GROWN))  # a codebook's zeros are there from the start


ensembles = st.lists(steps.map(lambda found: Recipe(tuple(found)).to_json()), min_size=2, max_size=4, unique=True)


@settings(deadline=None, max_examples=30)
@given(ensembles, st.randoms())
def test_an_ensemble_is_the_same_in_any_order_and_form(members, random):
    recipe = Recipe((Ensemble(tuple(members)),))
    again = Recipe.from_dict(json.loads(recipe.to_json()))
    assert again == recipe
    assert again.key == recipe.key
    random.shuffle(members)
    spaced = tuple(json.dumps(json.loads(text), indent=2) for text in members)
    assert Recipe((Ensemble((*spaced, spaced[0])),)).key == recipe.key
    assert [network.to_json() for network in recipe.networks()] == sorted(members)
    assert recipe.describe().startswith(f"{len(members)} networks: ")


@pytest.mark.parametrize(
    ("members", "more", "said"),
    [
        ((), (), "0 different networks; it averages 2 to 4"),
        ((Recipe().to_json(),) * 2, (), "1 different network; it averages 2 to 4"),
        (tuple(Recipe((Quantize("fc", bits),)).to_json() for bits in range(2, 7)), (), "5 different networks"),
        (("{", Recipe().to_json()), (), "is not JSON"),
        (("[]", Recipe().to_json()), (), "holds no steps and version"),
        (('{"steps": [{"step": "melt"}], "version": 1}', Recipe().to_json()), (), "unknown step 'melt'"),
        ((Recipe((Quantize("fc", 4),)).to_json(), Recipe().to_json()), (Recover("batchnorm"),), "stands alone"),
        (
            (
                Recipe((Ensemble((Recipe((Quantize("fc", 4),)).to_json(), Recipe().to_json())),)).to_json(),
                Recipe().to_json(),
            ),
            (),
            "an ensemble itself",
        ),
    ],
)
def test_an_ensemble_of_what_cannot_be_averaged_is_refused(members, more, said):
    with pytest.raises(RecipeError, match=said):
        Recipe((Ensemble(members), *more))


def test_a_network_that_is_no_ensemble_stands_for_itself():
    recipe = Recipe((Quantize("fc", 4),))
    assert recipe.networks() == [recipe]
