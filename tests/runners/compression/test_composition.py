"""Every composition of steps on one layer or many: it works and is what was foretold, or it is refused with the
reason.
"""

import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from paretorch.errors import RecipeError
from paretorch.objectives import cost
from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.freeze import freeze, one_factor
from paretorch.runners.compression.trace import trace
from paretorch.runners.files import packing
from paretorch.runners.graphs.onnx_export import operators, quantized_graph
from paretorch.runners.operators.fold import fold_batchnorms, reestimate_batchnorms
from paretorch.runners.targets.runtime import session
from paretorch.runners.training.finetune import finetune
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.shapes import largest_rank, shapes, sides
from paretorch.spaces.techniques.cluster import Cluster
from paretorch.spaces.techniques.equalize import Equalize
from paretorch.spaces.techniques.lowrank import LowRank
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student

NETWORKS = ("residual", "mobile", "perceptron", "gated", "sound", "tokens", "branches")


def built(model, x, recipe, structure, task=None):
    """`(the packed file, the torch network with the same weights and float activations)`."""
    live = compress(copy.deepcopy(model), recipe, structure, x[:2])
    for step in recipe.of(Recover):
        if step.epochs:
            finetune(live, model, step, task, seed=0)
    frozen = freeze(live, recipe)
    if recipe.of(Recover):
        together = one_factor(frozen, live, structure)
        reestimate_batchnorms(live, [x[:64], x[64:128]], one_factor=together)
    reference = copy.deepcopy(live)
    graph = quantized_graph(live, x[:2], frozen, fold_batchnorms(live, structure.folds), x[:64].split(32))
    onnx.checker.check_model(graph, full_check=True)
    return packing.pack(graph), reference


@pytest.fixture(scope="module")
def traced(network):
    """Each network once: `(model, inputs, structure, overhead of its files)`."""
    found = {}

    def get(name):
        if name not in found:
            model, x = network(name)
            structure = trace(model, x[:66])
            names = [layer.name for layer in structure.layers]
            base = len(built(model, x, Recipe(), structure)[0]) - cost.layer_bytes(structure, Recipe())
            extra = []
            linear = [layer.name for layer in structure.layers if layer.kind == "linear"]
            for some, activations, how in ((names, 32, "static"), (names, 8, "static"), (linear, 8, "dynamic")):
                recipe = Recipe(tuple(Quantize(name, 8, activations, activations=how) for name in some))
                size = len(built(model, x, recipe, structure)[0]) - cost.layer_bytes(structure, recipe)
                extra.append((size - base) / max(1, len(some)))
            found[name] = model, x, structure, cost.FileOverhead(base, *extra[:2], per_dynamic=extra[2])
        return found[name]

    return get


@st.composite
def recipes(draw, structure):
    """Steps for some of the layers, each layer with a mix of its own, possible or not."""
    steps = [Student(structure.blocks[:1])] if structure.blocks and draw(st.booleans()) else []
    dropped = structure.blocks[:1] if steps else ()
    inside = [layer for layer in structure.layers if any(layer.name.startswith(f"{block}.") for block in dropped)]
    alive = [layer for layer in structure.layers if layer not in inside]
    made = {layer.output for layer in alive}
    for group in structure.groups:
        if group.name in made and draw(st.integers(0, 2)) == 0:
            steps.append(Prune(group.name, draw(st.integers(1, group.channels))))
    if structure.equalizable(dropped) and draw(st.booleans()):
        steps.append(Equalize())
    sizes = shapes(structure, Recipe(tuple(steps)))
    for layer in alive:
        rows, columns = sides(layer, sizes[layer.name])
        if draw(st.booleans()) and layer.factorable:
            most = largest_rank(rows, columns)
            # Rarely a rank that saves nothing.
            steps.append(LowRank(layer.name, draw(st.integers(1, max(1, most + (draw(st.integers(0, 19)) == 0))))))
        if sparse := draw(st.booleans()):
            steps.append(Sparsify(layer.name, draw(st.sampled_from((0.3, 0.5, 0.8)))))
        kind = draw(
            st.sampled_from(("float", "cluster", "weights", "int8", "half", *["dynamic"] * (layer.kind == "linear")))
        )
        if kind == "cluster":
            steps.append(Cluster(layer.name, draw(st.integers(2, 8))))
        elif kind != "float":
            bits = 16 if kind == "half" else draw(st.integers(3, 8) | st.just(3 if sparse else 1))
            how = {"activations": "dynamic"} if kind == "dynamic" else {}
            if kind == "weights" and layer.kind == "linear":
                how = {"group_size": draw(st.sampled_from((0, 16)))}
            if 1 < bits <= 8 and not how.get("group_size") and draw(st.integers(0, 2)) == 0:
                how["scheme"] = "affine"
            steps.append(Quantize(layer.name, bits, 8 if kind in ("int8", "dynamic") else 32, **how))
    recovery = draw(st.sampled_from((None, Recover("batchnorm"), Recover("finetune", 0.25, 0.01))))
    return Recipe((*steps, *([recovery] if recovery else [])))


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NETWORKS), data=st.data())
def test_a_composition_works_or_is_refused(name, data, traced, task_of):
    model, x, structure, overhead = traced(name)
    recipe = data.draw(recipes(structure))
    sizes = shapes(structure, recipe)
    wasted = [
        step.layer
        for step in recipe.of(LowRank)
        if step.rank > largest_rank(*sides(structure.layer(step.layer), sizes[step.layer]))
    ]
    if wasted:
        with pytest.raises(RecipeError, match=f"layer '{wasted[0]}': rank .* saves nothing"):
            built(model, x, recipe, structure)
        return
    packed, reference = built(model, x, recipe, structure, task_of(model, x))
    graph = packing.unpack(packed)

    # What it computes: the torch network with floats, what the specification makes of the file with 8-bit activations.
    found = session(graph).run(None, {"input": x[:32].numpy()})[0]
    with torch.no_grad():
        floats = reference(x[:32]).numpy()
        assert found.shape == model(x[:32]).shape
    if any(step.activation_bits == 8 for step in recipe.of(Quantize)):
        expected = ReferenceEvaluator(graph).run(None, {"input": x[:8].numpy()})[0]
        few = session(graph).run(None, {"input": x[:8].numpy()})[0]  # ranges that are found at run time are a batch's
        assert np.abs(few - expected).mean() <= 0.01 * np.abs(expected).max()
    else:
        tolerance = 4e-3 if any(step.weight_bits == 16 for step in recipe.of(Quantize)) else 1e-4
        np.testing.assert_allclose(found, floats, rtol=tolerance, atol=tolerance * np.abs(floats).max())

    # What it runs as: two nodes for a layer of low rank, and nothing that unpacks weights.
    kinds = operators(graph)
    integer = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
    pairs = {step.layer for step in recipe.of(LowRank)}
    late = {step.layer for step in recipe.of(Quantize) if step.activations == "dynamic"}
    assert kinds.get("DynamicQuantizeMatMul", 0) == len(late) + len(late & pairs)
    int8 = {step.layer for step in recipe.of(Quantize) if step.activation_bits == 8} - late
    assert sum(kinds.get(kind, 0) for kind in integer) == len(int8) + len(int8 & pairs)
    floating = sum(kinds.get(kind, 0) for kind in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"))
    assert floating == len(sizes) + len(pairs) - len(int8 | late) - len((int8 | late) & pairs)
    assert not {"Gather", "Cast"} & set(kinds)

    # What it weighs. Blocks and channels take other tensors and nodes with them, and islands of int8 have shores.
    foretold = cost.size_bytes(structure, recipe, overhead)
    slack = 450 if recipe.of(Student) or recipe.of(Prune) or int8 or late else 150
    assert abs(len(packed) - foretold) <= max(0.01 * len(packed), slack), recipe.describe()


@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_equal_compositions_give_equal_bytes(name, traced):
    model, x, structure, _ = traced(name)
    steps = []
    for number, layer in enumerate(structure.layers):
        rank = largest_rank(*sides(layer, layer.weight_shape[:2]))
        steps += [LowRank(layer.name, max(1, rank // 2))] if layer.factorable and rank > 1 else []
        steps += [Sparsify(layer.name, 0.5)] if number % 3 == 0 else []
        steps.append(Cluster(layer.name, 4) if number % 2 else Quantize(layer.name, 4, 8))
    first, second = (built(model, x, Recipe(tuple(steps)), structure)[0] for _ in range(2))
    assert first == second
