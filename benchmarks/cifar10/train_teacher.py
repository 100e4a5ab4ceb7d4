"""Trains the ResNet-20 teacher of the CIFAR-10 benchmarks and writes `resnet20.safetensors` beside this file.

    python benchmarks/cifar10/train_teacher.py

SGD with Nesterov momentum, weight decay 5e-4, batch 128, random crops and flips, 45,000 training images, bfloat16
autocast, channels last, in four cycles: 24 epochs to a learning rate of 0.15, 16 to 0.1, and twice more, 30 and 24 to
0.2, that are also distilled from the result of the cycle before (born-again networks, Furlanello et al. 2018) and
averaged over their last epochs (an exponential moving average of the weights; BatchNorm re-estimated). The crops of the
last cycle are filled by reflection: black borders are nothing that the network will ever see. The last epoch's average
is kept: nothing is selected on the test images. It prints one line per epoch and takes about a minute per epoch on two
CPU cores. The weights are written after each cycle; `--cycle 4` goes on from those of the third.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from task import HERE, MEAN, STD, ResNet, arrays

from paretorch.runners.operators.fold import reestimate_batchnorms

# Epochs, the highest learning rate, how crops are filled, whether the cycle distils from the one before and averages.
CYCLES = (
    (24, 0.15, "constant", False),
    (16, 0.1, "constant", False),
    (30, 0.2, "constant", True),
    (24, 0.2, "reflect", True),
)
TEMPERATURE = 2.0  # of the distillation
HORIZON = 4  # epochs over which the weights are averaged


def batch_of(images: Tensor) -> Tensor:
    return ((images.float() / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, generator: torch.Generator, fill: str) -> Tensor:
    """Crops of the padded images, half of them flipped (`uint8 [n, 3, 32, 32]`, as it came)."""
    n = len(images)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode=fill).byte()
    offsets = torch.randint(0, 9, (2, n, 1), generator=generator)
    rows = (offsets[0] + torch.arange(32)).view(n, 1, 32, 1)
    columns = (offsets[1] + torch.arange(32)).view(n, 1, 1, 32)
    flip = torch.rand(n, generator=generator).view(n, 1, 1, 1) < 0.5
    columns = torch.where(flip, columns.flip(-1), columns)
    return padded[torch.arange(n).view(n, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1), rows, columns]


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(batch_of(images[i : i + 500])).argmax(1) == labels[i : i + 500]).sum())
        for i in range(0, len(images), 500)
    )
    model.train()
    return hits / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycle", type=int, default=1, choices=[1, 2, 3, 4], help="where to begin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "resnet20.safetensors")
    arguments = parser.parse_args()

    data = {name: torch.from_numpy(array) for name, array in arrays().items()}
    model: nn.Module = ResNet()
    if arguments.cycle > 1:
        model.load_state_dict(load_file(arguments.out))
    for cycle, (epochs, peak, fill, again) in enumerate(CYCLES, 1):
        if cycle < arguments.cycle:
            continue
        seed = arguments.seed + 2 * (cycle - 1)
        torch.manual_seed(seed)
        if cycle == 1:
            model = ResNet()
        model = model.to(memory_format=torch.channels_last)
        model = train(model, data, epochs, peak, fill, again, torch.Generator().manual_seed(seed))
        partial = arguments.out.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
        partial.replace(arguments.out)
    print(f"test {accuracy(model, data['test_x'], data['test_y']):.4f}  written to {arguments.out}")


def train(
    model: nn.Module,
    data: dict[str, Tensor],
    epochs: int,
    peak: float,
    fill: str,
    again: bool,
    generator: torch.Generator,
) -> nn.Module:
    """One cycle; `again` distils from the given weights and returns the average of the new ones."""
    images, labels = data["train_x"], data["train_y"]
    steps = len(images) // 128
    before = copy.deepcopy(model).eval()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(1 - 1 / (HORIZON * steps))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak, total_steps=epochs * steps, pct_start=0.05 if again else 0.2, anneal_strategy="cos"
    )
    start = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for step in range(steps):
            index = order[step * 128 : (step + 1) * 128]
            x, y = batch_of(augmented(images[index], generator, fill)), labels[index]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x).float()
            loss = F.cross_entropy(logits, y)
            if again:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    soft = (before(x).float() / TEMPERATURE).softmax(1)
                loss = (loss + TEMPERATURE**2 * F.cross_entropy(logits / TEMPERATURE, soft)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if again:
                average.update_parameters(model)
            total += float(loss.detach())
        result = model
        if again:
            result = copy.deepcopy(average.module)
            chosen = (torch.randint(len(images), (500,), generator=generator) for _ in range(40))
            reestimate_batchnorms(result, (batch_of(augmented(images[index], generator, fill)) for index in chosen))
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total / steps:.3f}"
            f"  validation {accuracy(result, data['validation_x'], data['validation_y']):.4f}"
            f"  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        model.train()
    return result


if __name__ == "__main__":
    main()
