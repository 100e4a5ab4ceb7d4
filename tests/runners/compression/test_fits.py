"""A recipe that does not fit a network is refused with every reason at once."""

import pytest

from paretorch import Cluster, Equalize, LowRank, Prune, Quantize, Recipe, Sparsify, Student
from paretorch.errors import RecipeError
from paretorch.runners.compression.fits import check_fits
from paretorch.spaces.structure import Group, Layer, Structure
from paretorch.spaces.techniques.ensemble import Ensemble

NETWORK = Structure(
    (
        Layer("conv", "conv", (16, 3, 3, 3), 1, output="conv"),
        Layer("block.dw", "depthwise", (16, 1, 3, 3), 1, output="conv", inputs=(("conv", 16),)),
        Layer("wide", "linear", (10, 25088), 1, output="heads"),
        Layer("fc", "linear", (10, 10), 1, inputs=(("heads", 10),)),
    ),
    (Group("conv", 16, 1), Group("heads", 10, 5, 5)),
    ("block",),
)


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        (Student(("conv",)), "block 'conv' cannot be left out here"),
        (Prune("fc", 3), "no dependency group 'fc'"),
        (Prune("conv", 17), "group 'conv' has 16 channels, 17 cannot be kept"),
        (Prune("heads", 4), "group 'heads' is 2 attention heads of 5 channels, .* keep a multiple of 5, not 4"),
        (LowRank("block.dw", 1), "is a depthwise convolution"),
        (LowRank("fc", 5), "rank 5 of a 10 x 10 matrix saves nothing; choose at most 4"),
        (Equalize(), "equalize: no layer's outputs reach only other layers"),
        (Sparsify("conv", 0.5, pattern="2:4"), "pattern 2:4 needs 4 input channels of one group, it has 3"),
        (Sparsify("wide", 0.5, "obs"), "criterion obs needs a Hessian of 25088 x 25088 inputs, .* choose magnitude"),
        (Quantize("wide", 4, rounding="gptq"), "rounding gptq needs a Hessian .* choose nearest"),
        (Quantize("conv", 8, 8, activations="dynamic"), "dynamic activations are for linear layers"),
        (Quantize("conv", 4, group_size=32), "groups of 32 weights with a scale each are for linear layers"),
        (Cluster("fcc", 4), "no layer 'fcc' that can be compressed"),
    ],
    ids=repr,
)
def test_a_step_that_the_network_cannot_have_is_refused(step, complaint):
    with pytest.raises(RecipeError, match=complaint):
        check_fits(Recipe((step,)), NETWORK)


def test_all_reasons_come_at_once_with_what_there_is():
    recipe = Recipe((Student(("block",)), Cluster("block.dw", 4), Quantize("fcc", 4), Prune("no", 2)))
    with pytest.raises(RecipeError) as caught:
        check_fits(recipe, NETWORK)
    assert str(caught.value).splitlines() == [
        "the recipe does not fit this network:",
        "  - no dependency group 'no'",
        "  - layer 'block.dw' is in a block that the recipe leaves out",
        "  - no layer 'fcc' that can be compressed",
        "layers here: block.dw, conv, fc, wide",
        "groups of channels here: conv, heads",
        "blocks here: block",
    ]


def test_a_rank_is_that_of_the_narrowed_layer():
    check_fits(Recipe((LowRank("fc", 4),)), NETWORK)
    with pytest.raises(RecipeError, match="rank 4 of a 10 x 5 matrix saves nothing; choose at most 3"):
        check_fits(Recipe((Prune("heads", 5), LowRank("fc", 4))), NETWORK)


def test_the_networks_of_an_ensemble_are_looked_at_one_by_one():
    good, bad = (Recipe((Quantize(name, 4),)).to_json() for name in ("fc", "gone"))
    with pytest.raises(RecipeError, match="no layer 'gone'"):
        check_fits(Recipe((Ensemble((good, bad)),)), NETWORK)
