"""The table joins the techniques: what each of them says is complete, and what they say together is one thing."""

from dataclasses import fields

import pytest

from paretorch import Cluster, Quantize, Recipe, Space, Sparsify
from paretorch.runners.compression.compress import PASSES
from paretorch.spaces.steps import LayerStep
from paretorch.spaces.structure import Layer
from paretorch.spaces.techniques.ensemble import Ensemble
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.table import KEYS, METHODS, TECHNIQUES, form_of, layer_steps, stored_twice
from paretorch.spaces.techniques.technique import WeightForm

FC = Layer("fc", "linear", (10, 32), 320)


def test_every_key_is_a_field_of_the_space():
    """All but the ladder, which a study decides about."""
    assert {key.name for key in KEYS} == {field.name for field in fields(Space)} - {"ladder"}
    assert len({key.kind for key in KEYS}) == len(KEYS)


def test_every_technique_is_carried_out_in_its_order():
    """All but training and the merging of files, which come after compression."""
    kinds = [kind for kinds, _ in PASSES for kind in kinds]
    assert kinds == [technique.step for technique in TECHNIQUES if technique.step not in (Recover, Ensemble)]


def test_every_key_by_rules_has_words_for_them():
    assert all((key.rule is not None) == bool(key.of) for key in KEYS)
    assert all((key.default is None) == (bool(key.of) or key.name == "students") for key in KEYS)


def test_a_technique_for_layers_stores_the_weight_or_leaves_that_open():
    storing = [technique for technique in TECHNIQUES if technique.stores]
    assert {"cluster", "quantize"} <= {technique.name for technique in storing}
    assert all(issubclass(technique.step, LayerStep) and technique.layer_step for technique in storing)


def test_the_methods_are_the_keys_whose_choices_are_names():
    assert {"criterion", "rounding", "ranges", "activations", "scheme"} <= set(METHODS)
    assert not {"sparsity", "weight_bits", "group_size", "equalize"} & set(METHODS)


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        ({}, []),
        ({"weight_bits": 4, "sparsity": 0.5}, [Sparsify("fc", 0.5), Quantize("fc", 4)]),
        ({"weight_bits": 4, "cluster_bits": 3}, [Cluster("fc", 3)]),
        ({"weight_bits": 1, "sparsity": 0.5}, [Quantize("fc", 1)]),
        ({"weight_bits": 1, "sparsity": 0.5, "cluster_bits": 3}, [Sparsify("fc", 0.5), Cluster("fc", 3)]),
    ],
)
def test_of_two_ways_to_store_a_weight_the_first_of_the_table_counts(chosen, steps):
    assert layer_steps(FC, chosen, (10, 32)) == steps
    Recipe(tuple(steps))


def test_a_form_is_what_the_steps_together_decide():
    assert form_of([]) == WeightForm()
    assert form_of([Sparsify("fc", 0.5, pattern="2:4"), Cluster("fc", 3)]) == WeightForm(3, True, "2:4", inputs="float")
    dynamic = Quantize("fc", 8, 8, activations="dynamic")
    assert form_of([dynamic]) == WeightForm(8, inputs="dynamic")
    assert form_of([Quantize("fc", 4, group_size=16)]) == WeightForm(4, inputs="float", group_size=16)


def test_layers_that_are_stored_twice_are_named():
    steps = [Cluster("b", 3), Cluster("a", 2), Quantize("a", 4), Quantize("b", 4), Quantize("c", 4)]
    techniques, layers = stored_twice(steps)
    assert [technique.name for technique in techniques] == ["cluster", "quantize"]
    assert layers == ["a", "b"]
    assert stored_twice(steps[:2]) == ([], [])
