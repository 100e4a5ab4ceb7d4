"""Measured numbers: intervals that hold the value, differences that are there, and what is no number at all."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paretorch.errors import Diverged, ExportFailed
from paretorch.runners.evaluate import evaluate, predictions
from paretorch.runners.graphs.float_graph import export_float
from paretorch.runners.targets.catalog import as_target
from paretorch.runners.targets.latency import latency, median


def loaded(graph):
    return as_target("onnxruntime").load(graph.SerializeToString(), 1)


def linear_stack(width, depth=3):
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(depth)]
    return nn.Sequential(*layers).eval(), torch.randn(4, width)


def running(width):
    model, x = linear_stack(width)
    return loaded(export_float(model, x)), x.numpy()


def test_a_network_is_as_fast_as_itself():
    runner, x = running(192)
    found, ratio = latency(runner, runner, x, seconds=0.2)
    assert ratio.low <= ratio.value <= ratio.high
    assert found.low <= found.value <= found.high
    assert ratio.n >= 10
    assert 0.5 < ratio.value < 2


@pytest.mark.parametrize("clock", [time.thread_time_ns, time.perf_counter_ns])
def test_a_ten_times_larger_network_is_slower(clock):
    """The same shapes in and out, so that both run on one batch."""
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16)).eval()
    large = nn.Sequential(nn.Linear(16, 640), nn.Linear(640, 640), nn.Linear(640, 16)).eval()
    x = torch.randn(2, 16)
    candidate, baseline = loaded(export_float(large, x)), loaded(export_float(small, x))
    _, ratio = latency(candidate, baseline, x.numpy(), seconds=0.2, clock=clock)
    assert ratio.low > 1
    _, reverse = latency(baseline, candidate, x.numpy(), seconds=0.2, clock=clock)
    assert reverse.high < 1


def test_milliseconds_are_the_ratio_times_the_baseline():
    runner, x = running(64)
    found, ratio = latency(runner, runner, x, baseline_ms=8.0, seconds=0.05)
    for part in ("value", "low", "high"):
        assert getattr(found, part) == pytest.approx(8 * getattr(ratio, part))


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=300))
def test_a_median_lies_in_its_interval(values):
    found = median(np.array(values))
    assert found.value == np.median(values)
    assert min(values) <= found.low <= found.value <= found.high <= max(values)
    assert found.n == len(values)


def test_the_interval_of_a_median_covers_it_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    for n in (10, 30, 200):
        metrics = [median(rng.exponential(size=n)) for _ in range(2000)]
        covered = np.mean([m.low <= np.log(2) <= m.high for m in metrics])
        assert 0.94 <= covered <= 0.995


def test_quality_is_what_numpy_counts(network, task_of):
    model, x = network("perceptron")
    task = task_of(model, x)
    labels = np.random.default_rng(0).integers(0, 10, len(x))
    runner = loaded(export_float(model, x[:2]))
    found = evaluate(runner, task, zip(x.split(50), torch.tensor(labels).split(50), strict=True))
    with torch.no_grad():
        hits = model(x).numpy().argmax(1) == labels
    np.testing.assert_array_equal(found, hits)


def test_outputs_of_nan_are_no_class(network, task_of):
    model, x = network("perceptron")
    task = task_of(model, x)
    with torch.no_grad():
        model[7].bias[3] = float("nan")
    with pytest.raises(Diverged, match="NaN"):
        evaluate(loaded(export_float(model, x[:2])), task, [(x, torch.zeros(len(x)))])


def test_inputs_that_the_file_does_not_take_are_an_export_error(network):
    model, x = network("perceptron")
    runner = loaded(export_float(model, x[:2]))
    with pytest.raises(ExportFailed, match="does not run"):
        next(predictions(runner, [(x[:2, :1], x[:2])]))
