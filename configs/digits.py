"""The quickstart: a small CNN trained on the spot on scikit-learn's bundled handwritten digits (no download).

1,797 grey images of 8x8 pixels; 60% train, 20% validation, 20% test, class by class. Training takes a few seconds on
one core and is seeded, so every process on a machine gets the same weights. The file is written as a user would write
it: it imports `paretorch` and nothing from inside it.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from paretorch import Task

SEED = 0
EPOCHS = 14
BATCH = 64


class Block(nn.Module):
    """A residual block: two 3x3 convolutions around a shortcut, so that the search can leave it out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(out)))


class DigitsNet(nn.Module):
    """Seven convolutions and one linear layer, 52 thousand parameters: `[n, 1, 8, 8] -> [n, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16))  # a block in a sequence can be left out by the search
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.layer2 = nn.Sequential(Block(32))
        self.conv3 = nn.Conv2d(32, 80, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(80)
        self.fc = nn.Linear(80, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        x = self.layer2(F.relu(self.bn2(self.conv2(x))))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]  # torch's modules give Any


class Digits(Dataset[tuple[Tensor, int]]):
    """Images `[1, 8, 8]` with their labels; `shift` moves each by up to one pixel in both directions."""

    def __init__(self, images: Tensor, labels: Tensor, shift: bool = False) -> None:
        self.images, self.labels, self.shift = images, labels.tolist(), shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.shift:
            top, left = torch.randint(0, 3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1), value=float(image.min()))[:, top : top + 8, left : left + 8]
        return image, self.labels[index]


@cache
def splits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of train, validation and test: 1,078, 359 and 360 images."""
    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) - 4.9) / 6.0  # about mean 0, deviation 1
    labels = torch.tensor(digits.target)
    train, rest = train_test_split(range(len(labels)), test_size=0.4, stratify=labels, random_state=SEED)
    validation, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=SEED)
    parts = {"train": train, "validation": validation, "test": test}
    return {name: (images[indices], labels[indices]) for name, indices in parts.items()}


@cache
def trained() -> nn.Module:
    """The trained network; once per process, with the same weights in every process.

    One thread, because the order of a sum over several threads depends on how many there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            net = DigitsNet()
            loader = DataLoader(Digits(*splits()["train"], shift=True), batch_size=BATCH, shuffle=True, drop_last=True)
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=EPOCHS * len(loader))
            for _ in range(EPOCHS):
                for x, y in loader:
                    optimizer.zero_grad()
                    F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]  # torch's stub
                    optimizer.step()
                    schedule.step()
    finally:
        torch.set_num_threads(threads)
    return net.eval()


def model() -> nn.Module:
    """A fresh copy of the trained network."""
    return copy.deepcopy(trained())


def task() -> Task:
    """The task of the quickstart."""
    data = splits()
    return Task(
        name="digits",
        model=model,
        train=Digits(*data["train"], shift=True),
        validation=Digits(*data["validation"]),
        test=Digits(*data["test"]),
        batch_size=128,
    )
