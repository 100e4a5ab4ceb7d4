"""Fine-tuning of a compressed network, with the original network as the teacher.

Everything random comes from the seed, and the learning rate and the temperature are functions of the step, so that a
training that was killed goes on from its last epoch (`State`) and ends with the same weights to the bit.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import Diverged, TrialError
from ...spaces.techniques.recover import Recover
from ..operators.hooks import run_once
from ..operators.quantize import FakeQuantize
from ..operators.sparsify import cubic, growing_mask
from ..progress import Progress, silent
from ..task import Task, batches, dataset, loss
from .distill import fast_layout, feature_loss, mixed_precision, pairs, recorded, soft_loss, temperature

CLIP = 5.0  # the largest norm of all gradients together (of scales aside); one bad batch must not undo an epoch
_HELD_OUT, _MOST_HELD_OUT = 0.1, 1024  # share of the training samples that patience looks at, and how many at most
_RAMP, _UPDATES = 0.5, 32  # gradual zeros: the share of training during which they grow, and in how many steps at most
KEEP_EVERY = 10.0  # seconds of training that a kill may cost, beside the epoch that it falls into


@dataclass
class State:
    """A training between two epochs.

    Attributes:
        steps: How many steps are done.
        random: The state of torch's generator.
        model: The network's state.
        momentum: By parameter the optimizer's momentum.
        best: The weights of the lowest loss on held-out samples.
        least: That loss.
        waited: Epochs since then.
    """

    steps: int = 0
    random: Tensor = field(default_factory=torch.get_rng_state)
    model: dict[str, Tensor] = field(default_factory=dict)
    momentum: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    least: float = math.inf
    waited: int = 0

    def to_bytes(self) -> bytes:
        numbers = torch.tensor([self.steps, self.least, self.waited], dtype=torch.float64)
        tensors = {"random": self.random, "numbers": numbers}
        for kind in ("model", "momentum", "best"):
            tensors |= {f"{kind}.{name}": value.clone().contiguous() for name, value in getattr(self, kind).items()}
        data: bytes = save(tensors)
        return data

    @classmethod
    def read(cls, path: Path, model: nn.Module) -> State | None:
        """The state in a file, or None where there is none that can be read and belongs to such a model."""
        try:
            tensors = load(path.read_bytes())
            steps, least, waited = tensors["numbers"].tolist()
            random = tensors["random"]
        except (FileNotFoundError, SafetensorError, KeyError, ValueError):
            return None
        parts = {
            kind: {name.removeprefix(f"{kind}."): v for name, v in tensors.items() if name.startswith(f"{kind}.")}
            for kind in ("model", "momentum", "best")
        }
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        if {name: value.shape for name, value in parts["model"].items()} != shapes:
            return None
        return cls(int(steps), random, **parts, least=least, waited=int(waited))


def finetune(
    model: nn.Module,
    teacher: nn.Module,
    step: Recover,
    task: Task,
    seed: int,
    progress: Progress = silent,
    *,
    teacher_logits: Tensor | None = None,
    state: State | None = None,
    keep: Callable[[State], None] | None = None,
) -> None:
    """Train a network in place, with SGD and a cosine schedule.

    The loss is `distill * T^2 * KL(teacher || student)` at temperature T plus `(1 - distill)` times the task's loss
    (Hinton et al. 2015) plus `features` times the distance of features. Distillation of outputs applies to outputs
    `[n, classes]` and is left out for other shapes. Gradual zeros grow from none again, so they are for the first
    training.

    Args:
        model: The student.
        teacher: The original network.
        step: How to train; `step.epochs` may be a fraction, for a part of the training samples.
        task: Where samples and the loss come from.
        seed: The seed of everything random.
        progress: Is given a line every ten steps.
        teacher_logits: The teacher's outputs for all training samples, from `distill.teacher_logits`.
        state: Where to resume.
        keep: Is given the state between epochs, every ten seconds at most.

    Raises:
        Diverged: The loss became NaN or infinity.
        TrialError: There is nothing to train.
    """
    seen, held = _samples(task, step.patience)
    per_epoch = math.ceil(len(seen) / task.batch_size)
    total = max(1, math.ceil(step.epochs * len(seen) / task.batch_size))
    teacher = copy.deepcopy(teacher).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trained, features = _chosen(model, teacher, step, task, seed, seen)
        optimizer = _optimizer(model, trained)
        growing = _masks(model) if step.gradual else {}
        updates = _schedule(total) if growing else {}
        training = _Training(model, teacher, step, task, total, features, teacher_logits, growing, updates)
        state = state or State()
        if state.steps:
            _restore(model, trained, optimizer, state)
        number, kept = state.steps, time.monotonic()
        model.train()
        while number < total and not 0 < step.patience <= state.waited:
            epoch = number // per_epoch
            order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
            samples = _pass(task, [seen[i] for i in order], seed + epoch)
            number = _epoch(training, optimizer, itertools.islice(samples, total - number), number, progress)
            if step.patience and number > max(updates, default=0):  # with fewer zeros it would be another recipe
                _remember_best(training, held, state)
            if keep and time.monotonic() - kept >= KEEP_EVERY:
                _write_state(model, trained, optimizer, number, state)
                keep(state)
                kept = time.monotonic()
        if state.best:
            model.load_state_dict(state.best)
        model.eval()


@dataclass(frozen=True)
class _Training:
    """What stays the same from the first step of a training to the last.

    total: steps in all. features: the modules whose outputs are compared with the teacher's. growing: by layer the mask
    that grows and how many zeros it has in the end. updates: see `_schedule`.
    """

    model: nn.Module
    teacher: nn.Module
    step: Recover
    task: Task
    total: int
    features: Sequence[str]
    teacher_logits: Tensor | None
    growing: Mapping[str, tuple[FakeQuantize, int]]
    updates: Mapping[int, float]


_Samples = Iterable[tuple[Tensor, Tensor, list[int]]]


def _chosen(
    model: nn.Module, teacher: nn.Module, step: Recover, task: Task, seed: int, seen: Sequence[int]
) -> tuple[dict[str, nn.Parameter], Sequence[str]]:
    """`(the parameters that are trained, by name, the modules whose features are compared)`."""
    if not step.features and step.train == "all":
        return dict(model.named_parameters()), ()
    example = fast_layout(next(batches(task, "train", indices=seen[:2], shuffle=seed))[0])
    trained = trainable(model, step.train, example)
    features = pairs(model, teacher, example) if step.features else ()
    torch.manual_seed(seed)  # what was drawn to find them out must not matter
    return trained, features


def _objective(
    training: _Training, x: Tensor, y: Tensor, indices: list[int], done: float, features: Sequence[str]
) -> Tensor:
    """The loss of a batch, `[]`, when the share `done` of training is over; indices: of its training samples."""
    step, teacher, logits = training.step, training.teacher, training.teacher_logits
    with recorded(training.model, features) as own, mixed_precision():
        outputs = training.model(x).float()
    value = loss(training.task, outputs, y)
    soft = bool(step.distill) and outputs.ndim == 2
    if soft or features:
        with torch.no_grad(), recorded(teacher, features) as theirs, mixed_precision():
            taught = teacher(x).float() if logits is None or features else logits[indices]
    if soft:
        value = step.distill * soft_loss(outputs, taught, temperature(step, done)) + (1 - step.distill) * value
    return value + step.features * feature_loss(own, theirs) if features else value


@torch.no_grad()
def _held_out_loss(training: _Training, held: list[int]) -> float:
    """At the last temperature, and augmented in the same way each time, so that epochs can be compared."""
    training.model.eval()
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for x, y, indices in _pass(training.task, held, 0):
            total += float(_objective(training, x, y, indices, 1.0, ())) * len(x)
    training.model.train()
    return total / len(held)


def _epoch(training: _Training, optimizer: torch.optim.SGD, samples: _Samples, number: int, progress: Progress) -> int:
    """One step for each batch, of which the first has this number; returns the number of the step to come."""
    for x, y, indices in samples:
        if number in training.updates:
            _grow(training, training.updates[number])
        if len(x) > 1:  # BatchNorm cannot train on a single sample
            _train_step(training, optimizer, number, x, y, indices)
            if number % 10 == 0:
                progress(f"fine-tuning {number}/{training.total}")
        number += 1
    return number


def _grow(training: _Training, share: float) -> None:
    """Zero this share of the final zeros, the smallest weights of the moment."""
    for layer, (fake, count) in training.growing.items():
        weight = _parametrizations(training.model.get_submodule(layer)).original
        assert isinstance(weight, Tensor)
        fake.mask = growing_mask(weight, count, fake.pattern, share)


def _train_step(
    training: _Training, optimizer: torch.optim.SGD, number: int, x: Tensor, y: Tensor, indices: list[int]
) -> None:
    """Raises `Diverged`."""
    step, total = training.step, training.total
    for group in optimizer.param_groups:
        group["lr"] = step.learning_rate * 0.5 * (1 + math.cos(math.pi * number / total))
    value = _objective(training, x, y, indices, number / max(1, total - 1), training.features)
    if not bool(value.isfinite()):
        raise Diverged(
            f"the loss became {float(value.detach())} in step {number} of {total} of fine-tuning; "
            f"try a learning_rate below {step.learning_rate:g}"
        )
    optimizer.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]  # torch leaves backward() without types
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP)
    optimizer.step()


def _remember_best(training: _Training, held: list[int], state: State) -> None:
    """Note the weights where the loss on held-out samples is the least so far, or else that another epoch went by."""
    value = _held_out_loss(training, held)
    state.waited = 0 if value < state.least else state.waited + 1
    if value < state.least:
        state.least, state.best = value, {name: v.clone() for name, v in training.model.state_dict().items()}


def _restore(model: nn.Module, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.SGD, state: State) -> None:
    """Bring network, optimizer and random numbers to where a training ended."""
    model.load_state_dict(state.model)
    for name, value in state.momentum.items():
        optimizer.state[trained[name]]["momentum_buffer"] = value
    torch.set_rng_state(state.random)


def _write_state(
    model: nn.Module, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.SGD, number: int, state: State
) -> None:
    """The reverse of `_restore`."""
    buffers = {name: optimizer.state[p].get("momentum_buffer") for name, p in trained.items()}
    state.momentum = {name: value for name, value in buffers.items() if value is not None}
    state.steps, state.random, state.model = number, torch.get_rng_state(), model.state_dict()


def _schedule(total: int) -> dict[int, float]:
    """By the number of a step the share of the final zeros that it begins to train with; other steps change nothing.

    >>> [f"{number}: {share:.3f}" for number, share in _schedule(8).items()]
    ['0: 0.000', '1: 0.578', '2: 0.875', '3: 0.984', '4: 1.000']
    """
    ramp = int(_RAMP * total)
    updates = min(ramp, _UPDATES)
    return {round(n * ramp / updates): cubic(n / updates) for n in range(updates + 1)} if ramp else {}


def _parametrizations(layer: nn.Module) -> parametrize.ParametrizationList:
    """What a layer's weight is shown through."""
    by_name = layer.parametrizations
    assert isinstance(by_name, nn.ModuleDict)
    shown = by_name["weight"]
    assert isinstance(shown, parametrize.ParametrizationList)
    return shown


def _masks(model: nn.Module) -> dict[str, tuple[FakeQuantize, int]]:
    """By layer its parametrization with a mask, and how many zeros the mask has."""
    masks = {}
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            fake = _parametrizations(layer)[0]
            if isinstance(fake, FakeQuantize) and fake.mask is not None:
                masks[name] = fake, int((fake.mask == 0).sum())
    return masks


def _optimizer(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.optim.SGD:
    """SGD for the trained parameters in two groups, scales of quantization last; the others get no gradient."""
    scales = {id(module.scale) for module in model.modules() if isinstance(module, FakeQuantize)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    groups = [
        {"params": [p for p in trained.values() if id(p) not in scales], "weight_decay": 1e-4},
        {"params": [p for p in trained.values() if id(p) in scales], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def trainable(model: nn.Module, what: str, x: Tensor) -> dict[str, nn.Parameter]:
    """The parameters that `Recover.train` names, by name.

    Args:
        model: The network.
        what: `all`, `last` or `scales`.
        x: Any inputs of the network.

    Raises:
        TrialError: There are none.
    """
    parameters = dict(model.named_parameters())
    if what == "scales":
        parameters = {name: parameter for name, parameter in parameters.items() if parameter.ndim <= 1}
    elif what == "last":
        chosen = _last_third(model, list(parameters), x)
        parameters = {name: parameter for name, parameter in parameters.items() if _owner(name) in chosen}
    if not parameters:
        raise TrialError(f"train: {what} finds nothing to train in this network; choose train: all")
    return parameters


def _owner(parameter: str) -> str:
    """The module whose parameter it is; that of a parametrized weight is the layer."""
    layer, parametrized, _ = parameter.partition(".parametrizations.")
    return layer if parametrized else parameter.rpartition(".")[0]


@torch.no_grad()
def _last_third(model: nn.Module, parameters: list[str], x: Tensor) -> set[str]:
    """Of the modules that own parameters the third (rounded up) that is called last."""
    called: dict[str, None] = {}
    owners = dict.fromkeys(map(_owner, parameters))
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name in owners
    ]
    run_once(model, x, handles)
    order = list(called)
    return set(order[-math.ceil(len(order) / 3) :])


def _samples(task: Task, patience: int) -> tuple[list[int], list[int]]:
    """`(trained on, held out)`: indices of training samples; of every recipe the same are held out, if any are."""
    count = len(dataset(task, "train"))  # type: ignore[arg-type]  # torch gives Dataset no length
    if not patience:
        return list(range(count)), []
    if count < 4:
        raise TrialError(
            f"patience = {patience} needs training samples to hold out, and there are {count} in all; leave it out"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * count)))
    return sorted(order[held:]), sorted(order[:held])


def _pass(task: Task, indices: list[int], seed: int) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Batches `(inputs, targets, indices)` of these samples in this order."""
    begin = 0
    for x, y in batches(task, "train", indices=indices, shuffle=seed):
        yield fast_layout(x), y, indices[begin : begin + task.batch_size]
        begin += task.batch_size
