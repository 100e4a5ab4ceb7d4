"""Distillation from the original network: its soft outputs, and the features of layers that both networks have.

The teacher is always the network that was compressed, so every distillation here is self-distillation (Furlanello et
al. 2018): it costs no second network, and on CIFAR-10 a ResNet-20 learns as much from itself as from a ResNet-110.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...spaces.techniques.recover import Recover
from ..operators.hooks import attached, run_once
from ..task import Task, batches, dataset

TEACHER_LOGITS_BYTES = 256 << 20  # bytes of the teacher's outputs that are kept in memory
# A training of so many epochs uses outputs that were computed for all samples at once. In a shorter one that would take
# longer than it saves, so the teacher is run for each batch.
WORTH = 0.25


def mixed_precision() -> torch.autocast:
    """bfloat16 where the processor multiplies it itself: twice as fast there, and several times slower elsewhere."""
    capabilities = torch.cpu.get_capabilities()
    return torch.autocast(
        "cpu", torch.bfloat16, enabled=any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    )


def fast_layout(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def temperature(step: Recover, done: float) -> float:
    """The temperature when the share `done` (0 to 1) of training is over.

    >>> step = Recover("finetune", 1, temperature=3, temperature_schedule="anneal")
    >>> [temperature(step, done) for done in (0, 0.5, 1)]
    [3, 2.0, 1]
    """
    match step.temperature_schedule:
        case "warmup":
            return 1 + (step.temperature - 1) * done
        case "anneal":
            return step.temperature + (1 - step.temperature) * done
        case _:
            return step.temperature


def soft_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(teacher || student)` of the softmax at temperature T (Hinton et al. 2015).

    Args:
        outputs: The student's, `[n, classes]`.
        taught: The teacher's, `[n, classes]`.
        temperature: T.

    Returns:
        The mean over the samples, `[]`.
    """
    expected = F.log_softmax(taught / temperature, 1)
    learnt = F.log_softmax(outputs / temperature, 1)
    return F.kl_div(learnt, expected, reduction="batchmean", log_target=True) * temperature**2


def repeatable(task: Task, samples: int = 64) -> bool:
    """Whether training samples are the same each time they are read (nothing augments them), tried on some."""
    count = len(dataset(task, "train"))  # type: ignore[arg-type]  # torch gives Dataset no length
    indices = range(0, count, max(1, count // samples))[:samples]
    readings = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            readings.append(list(batches(task, "train", indices=indices, shuffle=seed)))
    pairs = zip(*readings, strict=True)
    return all(torch.equal(x, again) and torch.equal(y, same) for (x, y), (again, same) in pairs)


@torch.no_grad()
def teacher_logits(task: Task, teacher: nn.Module, limit: int = TEACHER_LOGITS_BYTES) -> Tensor | None:
    """The teacher's outputs for all training samples, in their order.

    Args:
        task: The task.
        teacher: The network, in evaluation mode.
        limit: Bytes that they may take.

    Returns:
        `[samples, classes]`, or None where they cannot be reused: samples are augmented or left out of batches,
        outputs are not `[n, classes]`, or they take more than `limit` bytes.
    """
    count = len(dataset(task, "train"))  # type: ignore[arg-type]  # torch gives Dataset no length
    if not repeatable(task):
        return None
    logits: Tensor | None = None
    done = 0
    for x, _ in batches(task, "train", indices=range(count), shuffle=0):
        with mixed_precision():
            outputs = teacher(fast_layout(x)).float()
        if outputs.ndim != 2 or len(outputs) != min(task.batch_size, count - done):
            return None
        if logits is None:
            if count * outputs.shape[1] * outputs.element_size() > limit:
                return None
            logits = torch.empty(count, outputs.shape[1])
        logits[done : done + len(outputs)] = outputs
        done += len(outputs)
    return logits


@contextmanager
def recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record what the modules of these names returned last, by name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, arguments: object, output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with attached(handles):
        yield outputs


@torch.no_grad()
def pairs(student: nn.Module, teacher: nn.Module, x: Tensor) -> list[str]:
    """The modules whose features are compared: for each shape of outputs the last one that both networks have.

    In a network of stages these are the ends of the stages. A module counts when it has parameters, runs once and
    returns the same shape in both, so one that lost channels or was left out has no counterpart. Outputs of the shape
    of the network's own are left to `soft_loss`.
    """
    own, theirs = _shapes(student, x), _shapes(teacher, x)
    last = {shape: name for name, shape in theirs.items() if own.get(name) == shape}
    last.pop(tuple(teacher(x).shape), None)
    return list(last.values())


def _shapes(model: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """By name, the shapes of what modules with parameters return, in the order in which they return."""
    calls: list[tuple[str, tuple[int, ...]]] = []

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.shape[:1] == x.shape[:1]:
                calls.append((name, tuple(output.shape)))

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name and "parametrizations" not in name.split(".") and any(True for _ in module.parameters())
    ]
    run_once(model, x, handles)
    counts = Counter(name for name, _ in calls)
    return {name: shape for name, shape in calls if counts[name] == 1}


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """The mean squared distance of features, each sample's scaled to length 1, over samples and pairs: 0 to 4.

    Hints (Romero et al. 2015) on normalised features (Zagoruyko & Komodakis 2017): quantized layers may have another
    scale, which BatchNorm takes out anyway, but should point in the same direction.

    Args:
        student: By module its features, `[n, ...]`.
        teacher: As `student`.
    """
    distances = [
        (F.normalize(student[name].float().flatten(1)) - F.normalize(teacher[name].float().flatten(1))).square().sum(1)
        for name in teacher
    ]
    return torch.stack(distances).mean()
