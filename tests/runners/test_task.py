"""A task: what is the user's is checked with messages for the user, and data come as they were promised."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from paretorch.errors import Diverged, TaskError
from paretorch.objectives.measurement import Estimate
from paretorch.runners.task import Task, accuracy, batches, dataset, example_input, inputs, loss, score


def numbered(n=20):
    """Sample `i` is the vector `[i, -i]` with the target `i`."""
    values = torch.arange(n, dtype=torch.float32)
    return TensorDataset(torch.stack([values, -values], 1), torch.arange(n))


class Noisy(Dataset):
    """Augmented: each look at a sample draws from torch's global generator, as torchvision's transforms do."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.rand(3) + index, index


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(2), 0)])

    def __len__(self):
        return 1


def task(train=None, validation=None, **more):
    return Task("tiny", lambda: nn.Linear(2, 3), train or numbered(), validation or numbered(), **more)


def order(found):
    return torch.cat([targets for _, targets in found]).tolist()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"model": nn.Linear(2, 3)}, "model must be a function that returns the network, not Linear"),
        ({"model": "resnet18"}, "model must be a function .* not str"),
        ({"metric": "accuracy"}, "metric must be a function of \\(outputs, targets\\), not 'accuracy'"),
        ({"loss": "mse"}, "loss must be a function of \\(outputs, targets\\), not 'mse'"),
        ({"metric_name": "top-1"}, "metric_name = 'top-1'"),
        ({"metric_name": "size_bytes"}, "none of size_bytes, latency_ms, macs"),
        ({"batch_size": 0}, "batch_size = 0; it must be at least 1"),
    ],
)
def test_the_constructor_refuses(more, complaint):
    fields = {"model": lambda: nn.Linear(2, 3), "train": numbered(), "validation": numbered()} | more
    with pytest.raises(TaskError, match=f"task 'tiny': .*{complaint}"):
        Task("tiny", **fields)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (numbered(0), "the train data is empty"),
        ([], "the train data is empty"),
        (Stream(), "the train data has no length"),
        (DataLoader(Stream()), "the train data has no length"),
        (iter([]), "the train data has no length"),
        (DataLoader(numbered(), batch_size=None), "batch_sampler or batch_size=None"),
        (DataLoader(numbered(), batch_sampler=BatchSampler(SequentialSampler(range(4)), 2, False)), "batch_sampler"),
        (DataLoader(numbered(), sampler=WeightedRandomSampler([1.0] * 20, 20)), "has a WeightedRandomSampler"),
    ],
    ids=["dataset", "list", "stream", "loaded stream", "iterator", "no batches", "batch sampler", "weights"],
)
def test_data_that_cannot_be_used(data, complaint):
    bad = Task("tiny", lambda: nn.Linear(2, 3), data, numbered())
    with pytest.raises(TaskError, match=f"task 'tiny'.*{complaint}"):
        dataset(bad, "train")


def test_a_split_may_be_absent():
    with pytest.raises(TaskError, match="task 'tiny' has no test data"):
        dataset(task(), "test")


def test_two_loaders_may_split_one_dataset_by_their_samplers():
    """The usual idiom; to take the dataset alone would select on the training samples."""
    whole = numbered()
    found = task(
        DataLoader(whole, batch_size=4, sampler=SubsetRandomSampler(range(15))),
        DataLoader(whole, batch_size=4, sampler=SubsetRandomSampler([15, 16, 17, 18, 19])),
    )
    assert order(batches(found, "train")) == list(range(15))
    assert order(batches(found, "validation")) == [15, 16, 17, 18, 19]
    assert order(batches(found, "validation", limit=100, shuffle=3)) != [15, 16, 17, 18, 19]
    assert sorted(order(batches(found, "validation", limit=100, shuffle=3))) == [15, 16, 17, 18, 19]


def test_batches_come_in_order_and_whole():
    found = list(batches(task(batch_size=8), "train"))
    assert [len(x) for x, _ in found] == [8, 8, 4]
    assert order(found) == list(range(20))
    assert all(torch.equal(x[:, 0], targets.float()) for x, targets in found)
    assert [len(x) for x, _ in batches(task(), "train", batch_size=10)] == [10, 10]


def test_a_loader_that_shuffles_is_read_in_order():
    """Which images are seen must depend on nothing but the task and the seed."""
    assert order(batches(task(DataLoader(numbered(), batch_size=4, shuffle=True)), "train")) == list(range(20))


def test_shuffling_is_a_permutation_drawn_from_the_seed():
    first = order(batches(task(), "train", shuffle=1))
    assert sorted(first) == list(range(20))
    assert first == order(batches(task(), "train", shuffle=1))
    assert first != order(batches(task(), "train", shuffle=2))
    assert order(batches(task(), "train", shuffle=0)) != list(range(20)), "0 is a seed too"


def test_a_limit_takes_a_mixture_and_not_the_first():
    """Datasets come sorted by class, and calibration on one class is worthless."""
    few = order(batches(task(), "train", limit=5))
    assert len(set(few)) == 5
    assert few != list(range(5))
    assert few == order(batches(task(), "train", limit=5))
    assert order(batches(task(), "train", limit=5, shuffle=7)) == order(batches(task(), "train", shuffle=7))[:5]
    assert sorted(order(batches(task(), "train", limit=100))) == list(range(20))


def test_batches_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    list(batches(task(), "train", limit=5, shuffle=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_collate_function_of_a_loader_is_used():
    def collate(samples):
        return torch.stack([x for x, _ in samples]) + 100, [y for _, y in samples]

    x, targets = next(batches(task(DataLoader(numbered(), batch_size=4, collate_fn=collate)), "train"))
    assert len(x) == 20, "but its batch size is the task's"
    assert x.min() >= 80
    assert torch.equal(targets, torch.arange(20))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ([torch.zeros(2)] * 4, "must give \\(input, target\\) pairs .* not Tensor"),
        ([(torch.zeros(2), 0, 1)] * 4, "must give \\(input, target\\) pairs"),
        ([({"image": torch.zeros(2)}, 0)] * 4, "must give \\(input, target\\) pairs"),
        ([(torch.zeros(2), "cat")] * 4, "the train targets must be numbers or one tensor per sample"),
        ([(torch.zeros(2), {"box": 1})] * 4, "the train targets must be numbers or one tensor per sample"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_samples_of_another_form(data, complaint):
    with pytest.raises(TaskError, match=f"task 'tiny': .*{complaint}"):
        next(batches(task(data), "train"))


def test_inputs_are_drawn_by_the_seed_and_leave_no_trace():
    noisy = task(Noisy())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = inputs(noisy, "train", 6, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(inputs(noisy, "train", 6, seed=1), first)
    assert not torch.equal(inputs(noisy, "train", 6, seed=2), first)
    assert first.shape == (6, 3)
    assert inputs(noisy, "train", 100, seed=1).shape == (10, 3)


def test_inputs_leave_no_trace_when_the_data_fail():
    state = torch.get_rng_state()
    with pytest.raises(TaskError):
        inputs(task([torch.zeros(2)] * 4), "train", 2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_example_is_the_first_of_validation():
    assert example_input(task()).tolist() == [[0.0, 0.0], [1.0, -1.0]]
    assert len(example_input(task(), 5)) == 5
    with pytest.raises(TaskError, match=r"inputs are torch.int64; paretorch compresses networks of floating-point"):
        example_input(task(validation=TensorDataset(torch.arange(4), torch.arange(4))))


def test_the_loss_is_cross_entropy_unless_said():
    outputs, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert loss(task(), outputs, targets) == F.cross_entropy(outputs, targets)
    assert loss(task(loss=lambda o, t: o.sum() * 0 + 7), outputs, targets) == 7


def test_accuracy_counts_hits():
    outputs = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert accuracy(outputs, torch.tensor([0, 0, 0])).tolist() == [1.0, 0.0, 1.0]


def pairs(*batches_of_scores):
    return iter(
        [(torch.tensor(scores, dtype=torch.float64)[:, None], torch.zeros(len(scores))) for scores in batches_of_scores]
    )


def returned(outputs, targets):
    return outputs[:, 0]


def test_a_score_of_hits_has_the_interval_of_a_rate():
    hits = [1.0] * 90 + [0.0] * 10
    expected = Estimate.rate(90, 100)
    assert score(task(metric=returned), pairs(hits[:64], hits[64:])) == expected
    outputs = F.one_hot(torch.tensor([int(hit) for hit in hits]), 2).float()
    assert score(task(), iter([(outputs, torch.ones(100))])) == expected
    perfect = score(task(metric=lambda o, t: o[:, 0] > 0), pairs([1.0] * 50))
    assert perfect == Estimate.rate(50, 50)
    assert perfect.low < 0.95, "50 of 50 is not certain, whoever counts"


def test_a_score_of_numbers_has_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(0.7, 0.2, 300)
    metric = score(task(metric=returned), pairs(values[:128].tolist(), values[128:].tolist()))
    low, high = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert (metric.value, metric.low, metric.high) == tuple(
        pytest.approx(v, abs=1e-9) for v in (values.mean(), low, high)
    )
    assert metric.n == 300


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_a_result(bad):
    # The network's outputs are sound; the metric is not.
    broken = task(metric=lambda outputs, targets: torch.where(outputs[:, 0] > 1, bad, 0.5), metric_name="f1")
    with pytest.raises(Diverged, match=f"metric 'f1' returned {bad}"):
        score(broken, pairs([0.0, 1.0], [1.0, 2.0]))


def test_a_network_of_nan_has_no_accuracy():
    """Its argmax is a class like any other, and some images are of that class."""
    with pytest.raises(Diverged, match="outputs hold NaN"):
        score(task(), iter([(torch.full((4, 3), math.nan), torch.zeros(4))]))


@pytest.mark.parametrize(
    ("metric", "shape"),
    [
        (lambda o, t: o.mean(), "\\(\\)"),
        (lambda o, t: 0.9, "\\(\\)"),
        (lambda o, t: o, "\\(3, 1\\)"),
        (lambda o, t: o[:2, 0], "\\(2,\\)"),
        (lambda o, t: o[:, 0] == o, "\\(3, 3\\)"),
    ],
)
def test_a_metric_must_give_a_score_per_sample(metric, shape):
    with pytest.raises(TaskError, match=f"metric 'f1' returned the shape {shape} for 3 samples"):
        score(task(metric=metric, metric_name="f1"), pairs([1.0, 0.0, 1.0]))


def test_no_samples_have_no_score():
    with pytest.raises(TaskError, match="there are no samples to score"):
        score(task(), iter([]))


def test_a_score_may_come_from_numpy():
    metric = score(task(metric=lambda o, t: np.full(len(o), 0.25)), pairs([1.0, 0.0]))
    assert metric == Estimate(0.25, 0.25, 0.25, 2)
