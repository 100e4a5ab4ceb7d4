"""Targets: what is promised of them, and that `check_target` finds each promise that is broken."""

from dataclasses import replace

import numpy as np
import pytest

from paretorch.errors import ExportFailed, TargetError
from paretorch.runners import check_target as check
from paretorch.runners.check_target import check_target
from paretorch.runners.environment import environment
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.catalog import as_target
from paretorch.runners.targets.roofline import Profile, analytic
from paretorch.runners.targets.runtime import session
from paretorch.runners.targets.target import Target
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.sparsify import Sparsify

NPU = analytic(Profile("npu", {"8x8": 2e12, "16x32": 1e11, "32x32": 1e11}, 1e10, 1e11))
try:
    import openvino  # noqa: F401

    HAS_OPENVINO = True
except ImportError:
    HAS_OPENVINO = False
needs_openvino = pytest.mark.skipif(
    not HAS_OPENVINO, reason="OpenVINO is not installed: pip install 'paretorch[openvino]'"
)
INT8 = Recipe(tuple(Quantize(name, 8, 8) for name in ("stem", "layer1.0.conv1", "layer1.0.conv2", "fc")))


@pytest.fixture(scope="module")
def files(network, task_of, tmp_path_factory):
    """The ONNX files of a network with skips: untouched, 4-bit weights alone, int8 in part."""
    model, x = network("residual")
    runner = LocalRunner(
        task_of(model, x), tmp_path_factory.mktemp("files"), MeasurementSettings(calibration_images=64)
    )
    weights = Recipe(tuple(Quantize(layer.name, 4) for layer in runner.structure.layers))
    recipes = {"untouched": Recipe(), "4-bit": weights, "int8": INT8}
    return {name: packing.onnx_bytes(runner.build(r)) for name, r in recipes.items()}, x.numpy()


@pytest.mark.parametrize(
    "target",
    ["onnxruntime", "torch", NPU, pytest.param("openvino", marks=needs_openvino)],
    ids=lambda target: target if isinstance(target, str) else target.name,
)
def test_each_target_keeps_its_promises(target):
    check_target(as_target(target))


def test_onnxruntime_computes_what_a_session_does(files):
    models, x = files
    target = as_target("onnxruntime")
    assert target.supports(Quantize("fc", 2, 8)) is None
    for model in models.values():
        np.testing.assert_array_equal(target.load(model, 1)(x), session(model).run(None, {"input": x})[0])
    assert target.environment["onnxruntime"] == environment()["onnxruntime"]


@needs_openvino
def test_openvino_computes_floats_where_the_file_says_floats(files):
    """Left to itself it takes bfloat16 for all of it, and 8-bit activations for linear layers of packed weights."""
    models, x = files
    for name, tolerance in (("untouched", 1e-5), ("4-bit", 1e-5), ("int8", 0.05)):
        found, expected = (as_target(target).load(models[name], 1)(x) for target in ("openvino", "onnxruntime"))
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max(), name


@needs_openvino
def test_openvino_refuses_a_file_as_a_candidate_fails(files):
    target = as_target("openvino")
    with pytest.raises(ExportFailed, match="OpenVINO cannot load"):
        target.load(b"no ONNX file", 1)
    with pytest.raises(ExportFailed, match="does not run in OpenVINO"):
        target.load(files[0]["untouched"], 1)(files[1][:, :1])


def test_torch_says_beforehand_what_it_cannot_run():
    supports = as_target("torch").supports
    assert "8-bit activations" in supports(Quantize("fc", 4, 8))
    assert [
        supports(step) for step in (Quantize("fc", 4), Quantize("fc", 16), Sparsify("fc", 0.5), Prune("fc", 3))
    ] == [None] * 4


def test_a_runner_measures_on_its_target(network, task_of, tmp_path):
    """Outputs that are turned around give another accuracy; milliseconds that are made up come back."""
    model, x = network("perceptron")
    real = as_target("onnxruntime")
    turned = replace(real, name="turned", load=lambda data, threads: lambda batch: -real.load(data, threads)(batch))
    made_up = replace(real, name="made-up", milliseconds=lambda data, batch: 7.0 * batch)
    task = task_of(model, x)
    recipe = Recipe((Quantize("1", 8),))
    runner = LocalRunner(task, tmp_path, MeasurementSettings(calibration_images=32, batch=3), target=made_up)
    baseline, _ = runner.baseline()
    assert (baseline.metrics["latency_ms"].low, baseline.metrics["latency_ms"].high) == (21.0, 21.0)
    found = runner.run(recipe)
    assert found.metrics["latency_ms"] == baseline.metrics["latency_ms"]
    assert found.value("accuracy") > 0.9
    runner = LocalRunner(task, tmp_path, MeasurementSettings(calibration_images=32, seconds=0.02), target=turned)
    runner.use_baseline(runner.build(Recipe()))
    assert runner.run(recipe).value("accuracy") < 0.2


def wrap(change):
    """ONNX Runtime with a mistake in what it computes."""
    real = as_target("onnxruntime")
    return lambda model, threads: change(real.load(model, threads))


def overwriting(network):
    held = {}

    def run(batch):
        out = network(batch)
        kept = held.setdefault(out.shape, out)
        kept[:] = out
        return kept

    return run


def forgetful(network):
    state = []

    def run(batch):
        state.append(1)
        return network(batch) + 0.001 * len(state)

    return run


def changing(network):
    def run(batch):
        out = network(batch)
        batch *= 0.5
        return out

    return run


def fixed(network):
    def run(batch):
        if len(batch) == 1:
            raise ValueError("wants five")
        return network(batch)

    return run


BROKEN = {
    "letters, digits": {"name": "my target"},
    "from texts to texts": {"environment": {"version": 3}},
    "plain data that JSON": {"profile": {"x": object()}},
    "must return None or the reason": {"supports": lambda step: step.bits},
    "returned ''; it must": {"supports": lambda step: ""},
    "returned True; it must": {"supports": lambda step: True},
    "raised NotImplementedError": {"load": lambda model, threads: (_ for _ in ()).throw(NotImplementedError("int4"))},
    "not a NumPy array of shape": {"load": wrap(lambda network: lambda batch: network(batch).tolist())},
    "are (5, 9), not": {"load": wrap(lambda network: lambda batch: network(batch)[:, 1:])},
    "the batch size is open": {"load": wrap(fixed)},
    "overwrites the outputs": {"load": wrap(overwriting)},
    "changes its inputs": {"load": wrap(changing)},
    "different outputs": {"load": wrap(forgetful)},
    "differ from ONNX Runtime's by": {"load": wrap(lambda network: lambda batch: 1.1 * network(batch))},
    "it must raise ExportFailed": {"load": lambda model, threads: lambda batch: batch},
    "finite numbers above 0": {"milliseconds": lambda model, batch: float("nan")},
    "milliseconds raised ZeroDivisionError": {"milliseconds": lambda model, batch: 1 / 0},
    "less, 0.125": {"milliseconds": lambda model, batch: 1 / batch},
}


@pytest.mark.parametrize("told", BROKEN)
def test_a_broken_promise_is_told(told):
    with pytest.raises(TargetError) as caught:
        check_target(replace(as_target("onnxruntime"), **BROKEN[told]))
    assert told in str(caught.value)


def test_every_problem_is_told_at_once():
    broken = Target("a b", load=wrap(lambda network: lambda batch: 2 * network(batch)), supports=lambda step: "")
    with pytest.raises(TargetError) as caught:
        check_target(broken)
    assert all(text in str(caught.value) for text in ("name = 'a b'", "returned ''", "more than 0.001"))


def test_work_in_other_threads_is_noticed():
    """A thread of its own does the work, whose time the calling thread's clock does not show."""
    import threading

    def elsewhere(network):
        def run(batch):
            out = []
            worker = threading.Thread(target=lambda: out.append([network(batch) for _ in range(20)]))
            worker.start()
            worker.join()
            return out[0][-1]

        return run

    with pytest.raises(TargetError, match="is the calling thread's; set it to False"):
        check_target(replace(as_target("onnxruntime"), load=wrap(elsewhere)))
    check_target(replace(as_target("onnxruntime"), load=wrap(elsewhere), calling_thread=False))
    assert check._SECONDS < 1
