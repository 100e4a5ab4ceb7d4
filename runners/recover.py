"""Accuracy won back by fine-tuning, with the original network as the teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import Diverged
from ..spaces.recipe import Recover
from .operators.quantize import FakeQuantize
from .task import Task, batches, dataset, loss

Progress = Callable[[str], None]


def finetune(
    model: nn.Module, teacher: nn.Module, step: Recover, task: Task, seed: int, progress: Progress = lambda text: None
) -> None:
    """Train for `step.epochs` (a fraction is a part of the training images) with SGD and a cosine schedule.

    The loss is `distill * T^2 * KL(teacher || student)` at temperature T plus `(1 - distill)` times the task's loss
    (Hinton et al. 2015); distillation applies to outputs `[n, classes]` and is left out for other shapes. Everything
    random comes from the seed.
    """
    total = max(1, math.ceil(step.epochs * len(dataset(task, "train")) / task.batch_size))  # type: ignore[arg-type]
    scales = [m.scale for m in model.modules() if isinstance(m, FakeQuantize) and m.scale is not None]
    ids = {id(p) for p in scales}
    weights = [p for p in model.parameters() if id(p) not in ids]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    decayed = {"params": weights, "weight_decay": 1e-4}
    optimizer = torch.optim.SGD(
        [decayed, {"params": scales, "weight_decay": 0.0}], lr=step.learning_rate, momentum=0.9, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    teacher = copy.deepcopy(teacher).eval()
    # Twice as fast where the processor multiplies bfloat16 itself, and several times slower where it does not.
    capabilities = torch.cpu.get_capabilities()
    mixed = torch.autocast(
        "cpu", torch.bfloat16, enabled=any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        for number, (x, y) in enumerate(_stream(task, total, seed)):
            if len(x) < 2:
                continue  # BatchNorm cannot train on a single sample
            if x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            with mixed:
                outputs = model(x).float()
            value = loss(task, outputs, y)
            if step.distill and outputs.ndim == 2:
                with torch.no_grad(), mixed:
                    taught = F.log_softmax(teacher(x).float() / step.temperature, 1)
                learnt = F.log_softmax(outputs / step.temperature, 1)
                soft = F.kl_div(learnt, taught, reduction="batchmean", log_target=True) * step.temperature**2
                value = step.distill * soft + (1 - step.distill) * value
            if not bool(value.isfinite()):
                raise Diverged(f"the loss became {float(value.detach())} in step {number} of {total} of fine-tuning; "
                               f"try a learning_rate below {step.learning_rate:g}")  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 5.0)
            optimizer.step()
            schedule.step()
            if number % 10 == 0:
                progress(f"fine-tuning {number}/{total}")
        model.eval()


def _stream(task: Task, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` training batches, every pass over the images in an order of its own."""
    epoch = 0
    while count > 0:
        for batch in batches(task, "train", shuffle=seed + epoch):
            yield batch
            count -= 1
            if not count:
                return
        epoch += 1
