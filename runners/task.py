"""A task: everything that the user provides, which is the network, the data and the metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from ..errors import Diverged, TaskError
from ..objectives.measurement import Estimate
from ..objectives.objective import COSTS
from ..spaces.techniques.sparsify import CRITERIA, known_criterion
from ..spaces.techniques.student import STUDENT

Data = Dataset[Any] | DataLoader[Any]
Split = Literal["train", "validation", "test"]
# From a weight, and a tensor of the same shape with the norms of the weight's inputs on the calibration images (None
# for layers of more than 8192 inputs), to the importance of each number in it.
Criterion = Callable[[Tensor, Tensor | None], Tensor]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the largest output of each sample is its target: `[n, classes]`, `[n]` -> `[n]` of 0 and 1."""
    return (outputs.argmax(1) == targets).float()


@dataclass(frozen=True)
class Task:
    """What is compressed, and how its quality is measured.

    Args:
        name: The name of the task.
        model: A function without arguments that returns the *trained* network, a new object at each call. The network
            maps one input tensor to one output tensor.
        train: A dataset or DataLoader of `(input, target)` on which the search trains and calibrates. Of a DataLoader
            the samples, the collate function and the workers are used; order and `batch_size` are the task's.
        validation: The same for the samples on which the search selects.
        test: The same for the samples on which the finalists are measured once.
        metric: `metric(outputs, targets)` returns one score per sample, higher is better. The mean is the metric; its
            interval comes from the number of samples.
        metric_name: The name of the metric in objectives and budgets.
        loss: `loss(outputs, targets)` that recovery minimises; cross-entropy when None.
        batch_size: Samples per batch in training and evaluation.
        criteria: Functions that choose which weights become zero, by their name in `Sparsify.criterion`, such as
            "rules.py:score". Each gets a weight `[output, input, ...]` and the norms of its inputs on the calibration
            images (of the same shape; None where a layer has more than 8192 inputs), and returns a score for each
            number of the weight. The lowest scores become zero.
        students: Functions without arguments that return other networks for the same inputs and outputs, by their name
            in `Student.factory`. Recovery trains those that are untrained.

    Raises:
        TaskError: A field has a value that cannot be used.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
        >>> task = Task("tiny", lambda: nn.Linear(4, 2), train=data, validation=data)
        >>> tuple(example_input(task).shape)
        (2, 4)
    """

    name: str
    model: Callable[[], nn.Module]
    train: Data
    validation: Data
    test: Data | None = None
    metric: Callable[[Tensor, Tensor], Tensor] = accuracy
    metric_name: str = "accuracy"
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    batch_size: int = 128
    criteria: Mapping[str, Criterion] = field(default_factory=dict)
    students: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.model) or isinstance(self.model, nn.Module):
            raise TaskError(
                f"task {self.name!r}: model must be a function that returns the network, not "
                f"{type(self.model).__name__}; "
                "write model=lambda: load_my_network()"
            )
        if not callable(self.metric):
            raise TaskError(f"task {self.name!r}: metric must be a function of (outputs, targets), not {self.metric!r}")
        if self.loss is not None and not callable(self.loss):
            raise TaskError(f"task {self.name!r}: loss must be a function of (outputs, targets), not {self.loss!r}")
        if not self.metric_name.isidentifier() or self.metric_name in COSTS:
            raise TaskError(
                f"task {self.name!r}: metric_name = {self.metric_name!r}; objectives and budgets call the "
                "metric by it: "
                f"write a word such as 'f1', none of {', '.join(COSTS)}"
            )
        if self.batch_size < 1:
            raise TaskError(f"task {self.name!r}: batch_size = {self.batch_size}; it must be at least 1")
        for name, factory in self.students.items():
            if (
                not STUDENT.fullmatch(name)
                or name == "teacher"
                or not callable(factory)
                or isinstance(factory, nn.Module)
            ):
                raise TaskError(
                    f"task {self.name!r}: students = {{{name!r}: {type(factory).__name__}}}; write a name "
                    "(letters, digits and "
                    "-_. only, not 'teacher', which is the network itself) and a function that returns the network"
                )
        for name, function in self.criteria.items():
            if name in CRITERIA or not known_criterion(name) or not callable(function):
                raise TaskError(
                    f"task {self.name!r}: criteria = {{{name!r}: {function!r}}}; write a function of (weight, "
                    "norms), and its "
                    "name as FILE.py:FUNCTION"
                )


def dataset(task: Task, split: Split) -> Dataset[Any]:
    """The samples of a split.

    Raises:
        TaskError: The task has no such split, or it is empty or has no length.
    """
    data = getattr(task, split)
    if data is None:
        raise TaskError(f"task {task.name!r} has no {split} data")
    samples = _loaded(task, split, data) if isinstance(data, DataLoader) else data
    if not hasattr(samples, "__len__") or isinstance(samples, IterableDataset):
        raise TaskError(
            f"task {task.name!r}: the {split} data has no length; use a dataset with __len__ and __getitem__"
        )
    if not len(samples):
        raise TaskError(f"task {task.name!r}: the {split} data is empty")
    return samples


def _loaded(task: Task, split: Split, loader: DataLoader[Any]) -> Dataset[Any]:
    """The samples that a DataLoader draws: two loaders may share one dataset and differ only in their samplers."""
    if isinstance(loader.dataset, IterableDataset):
        return loader.dataset
    if loader.batch_size is None:
        raise TaskError(
            f"task {task.name!r}: the {split} DataLoader has a batch_sampler or batch_size=None, which paretorch "
            "would ignore, for it draws its own batches; give the dataset itself"
        )
    if isinstance(loader.sampler, SubsetRandomSampler):
        return Subset(loader.dataset, list(loader.sampler.indices))
    if not isinstance(loader.sampler, SequentialSampler | RandomSampler):
        raise TaskError(
            f"task {task.name!r}: the {split} DataLoader has a {type(loader.sampler).__name__}, which paretorch would "
            "ignore, for it draws its own order; give the dataset itself, or a Subset of it"
        )
    return loader.dataset


def batches(
    task: Task,
    split: Split,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    shuffle: int | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the batches `(inputs, targets)` of a split.

    Args:
        task: The task.
        split: The split.
        batch_size: Samples per batch; the task's when None.
        limit: Samples at most. They are drawn at random, because datasets are often sorted by class.
        shuffle: The seed of the order; None keeps the order of the dataset unless there is a limit.
        indices: Take these samples in this order; `shuffle` is then the seed of the workers alone.

    Raises:
        TaskError: The split cannot be used, or does not give `(input, target)` pairs of one input tensor and targets
            that are numbers or tensors.
    """
    samples = dataset(task, split)
    data = getattr(task, split)
    generator = torch.Generator().manual_seed(shuffle or 0)
    if indices is None and (limit is not None or shuffle is not None):
        assert isinstance(samples, Sized)  # `dataset` has checked it
        indices = torch.randperm(len(samples), generator=generator).tolist()[:limit]
    if indices is not None:
        samples = Subset(samples, indices)
    extra: dict[str, Any] = {}
    if isinstance(data, DataLoader):
        extra = {"collate_fn": data.collate_fn, "num_workers": data.num_workers, "worker_init_fn": data.worker_init_fn}
    for batch in DataLoader(samples, batch_size=batch_size or task.batch_size, generator=generator, **extra):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
            raise TaskError(
                f"task {task.name!r}: the {split} data must give (input, target) pairs with one input tensor, "
                f"not {type(batch).__name__}"
            )
        try:
            targets = torch.as_tensor(batch[1])
        except (TypeError, ValueError, RuntimeError) as error:
            raise TaskError(
                f"task {task.name!r}: the {split} targets must be numbers or one tensor per sample: {error}"
            ) from error
        yield batch[0], targets


def inputs(task: Task, split: Split, limit: int, seed: int) -> Tensor:
    """At most `limit` inputs of a split in one tensor, drawn with the seed."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)  # augmentation in the user's dataset draws from the global generator
    try:
        return torch.cat([x for x, _ in batches(task, split, limit=limit, shuffle=seed)])
    finally:
        torch.set_rng_state(state)


def example_input(task: Task, size: int = 2) -> Tensor:
    """The first `size` validation inputs.

    Raises:
        TaskError: They are not floating-point numbers.
    """
    example = next(iter(batches(task, "validation", batch_size=size)))[0]
    if not example.is_floating_point():
        raise TaskError(
            f"task {task.name!r}: inputs are {example.dtype}; paretorch compresses networks of floating-point inputs"
        )
    return example


def loss(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss that recovery minimises."""
    return task.loss(outputs, targets) if task.loss else F.cross_entropy(outputs, targets)


def scores(task: Task, outputs: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """The task's metric of each sample of a batch.

    Raises:
        Diverged: The outputs hold NaN, or a score is not finite.
        TaskError: The metric does not return one score per sample.
    """
    if bool(outputs.isnan().any()):  # argmax would turn it into a class
        raise Diverged("the network's outputs hold NaN")
    per_sample = torch.as_tensor(task.metric(outputs, targets)).double()
    if per_sample.shape != (len(outputs),):
        raise TaskError(
            f"metric {task.metric_name!r} returned the shape {tuple(per_sample.shape)} for {len(outputs)} samples; "
            "it must return one score per sample, as paretorch.accuracy does"
        )
    if not bool(per_sample.isfinite().all()):
        raise Diverged(f"metric {task.metric_name!r} returned {float(per_sample[~per_sample.isfinite()][0])}")
    return per_sample.numpy()


def score(task: Task, pairs: Iterable[tuple[Tensor, Tensor]]) -> Estimate:
    """The task's metric over `(outputs, targets)` pairs.

    Raises:
        Diverged: As `scores`.
        TaskError: As `scores`, and when there are no pairs.
    """
    per_batch = [scores(task, outputs, targets) for outputs, targets in pairs]
    if not per_batch:
        raise TaskError(f"task {task.name!r}: there are no samples to score")
    return Estimate.of(np.concatenate(per_batch))
