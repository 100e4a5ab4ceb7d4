"""Evaluation in several ways: the same predictions in each, in the data's order, and an end when somebody asks for
it.
"""

import threading

import numpy as np
import pytest
import torch

from paretorch.errors import ExportFailed, Stopped, TaskError
from paretorch.runners.evaluate import EvaluationPlan, evaluate, fastest, obvious, predictions, rebatched
from paretorch.runners.graphs.float_graph import export_float
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.catalog import as_target
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize


def loaded(graph):
    return as_target("onnxruntime").load(graph.SerializeToString(), 1)


def parts(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_outputs_come_in_order_whatever_runs_side_by_side(workers, network):
    model, x = network("perceptron")
    runtime = loaded(export_float(model, x[:2]))
    pairs = list(predictions(runtime, parts(x, torch.arange(len(x)), 7), workers))
    assert torch.equal(torch.cat([y for _, y in pairs]), torch.arange(len(x)))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([out for out, _ in pairs]), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0, 1, 4, 5, 64, 1000])
def test_rebatching_changes_neither_samples_nor_order(size):
    x, y = torch.randn(53, 3), torch.arange(53)
    found = list(rebatched(parts(x, y, 5), size))
    assert torch.equal(torch.cat([a for a, _ in found]), x)
    assert torch.equal(torch.cat([b for _, b in found]), y)
    lengths = [len(a) for a, _ in found]
    assert lengths == ([5] * 10 + [3] if not size else [size] * (53 // size) + [53 % size] * bool(53 % size))


def test_the_watcher_sees_ever_more_and_may_end_it(network, task_of):
    model, x = network("perceptron")
    x = torch.randn(1200, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    task = task_of(model, x)
    runtime = loaded(export_float(model, x[:2]))
    labels = model(x).argmax(1)
    seen = []
    whole = evaluate(
        runtime, task, parts(x, labels, 100), EvaluationPlan(2, 1, 50), lambda scores: seen.append(len(scores))
    )
    assert seen == [300, 550, 1050]  # the first multiples of 50 from 256, 512 and 1024 on
    assert len(whole) == 1200

    def stop(scores):
        np.testing.assert_array_equal(scores, whole[: len(scores)])
        raise Stopped("enough")

    with pytest.raises(Stopped):
        evaluate(runtime, task, parts(x, labels, 100), EvaluationPlan(2, 1, 50), stop)
    with pytest.raises(TaskError, match="no samples"):
        evaluate(runtime, task, [])


def test_a_file_that_does_not_run_says_so_from_a_worker_too(network):
    model, x = network("perceptron")
    runtime = loaded(export_float(model, x[:2]))
    for workers in (1, 2):
        with pytest.raises(ExportFailed, match="does not run"):
            list(predictions(runtime, [(x[:2, :1], x[:2])], workers))


def test_the_fastest_way_gives_the_same_scores(network, task_of, tmp_path):
    model, x = network("residual")
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(seconds=0.02, calibration_images=64))
    files = [runner.build(Recipe()), runner.build(Recipe((Quantize("stem", 4, 8), Quantize("down", 8, 8))))]
    before = [runner.scores(data) for data in files]
    assert runner.plan == obvious()
    _, gain = runner.tune_evaluation(files)
    assert gain >= 1
    for data, scores in zip(files, before, strict=True):
        np.testing.assert_array_equal(runner.scores(data), scores)


@pytest.mark.parametrize("wrong", [True, False])
def test_a_plan_whose_predictions_differ_is_not_taken(network, task_of, tmp_path, wrong):
    """Batches of another size than the task's are twice as fast, by a clock of the test's, but wrong for one image."""
    model, x = network("perceptron")
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64))
    batches = [(x.repeat(10, 1, 1, 1)[i : i + 50], torch.zeros(50, dtype=torch.long)) for i in range(0, 300, 50)]
    lock, now = threading.Lock(), [0.0]

    def load(graph, threads):
        run = runner.target.load(graph, threads)

        def network(images):
            outputs = np.array(run(images))
            usual = len(images) == 50
            if wrong and not usual:
                outputs[3] = np.roll(outputs[3], 1)
            with lock:
                now[0] += len(images) * (2 if usual else 1)
            return outputs

        return network

    data = runner.build(Recipe())
    plan, gain = fastest([data], runner.task, batches, load, seconds=1e9, clock=lambda: now[0])
    assert (plan == obvious()) == wrong, "the outputs decide, not only the time"
    assert gain == (1 if wrong else 2)
