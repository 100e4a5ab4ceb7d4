"""What paretorch compresses: your network, your data, your metric. It runs as it is; change the three marked places.

As it stands it trains a small CNN on scikit-learn's handwritten digits, in a few seconds and with a fixed seed.
"""

import copy
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from paretorch import Task


# --- EDIT HERE (1): your data ---------------------------------------------------------------------------------------
# Three datasets (or DataLoaders) of (input, target) pairs: the search trains and calibrates on train, chooses on
# validation, and looks at test once, at the end.
@cache
def data() -> dict[str, TensorDataset]:
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    train, rest = train_test_split(range(len(y)), test_size=0.4, stratify=y, random_state=0)
    validation, test = train_test_split(rest, test_size=0.5, stratify=y[rest], random_state=0)
    parts = {"train": train, "validation": validation, "test": test}
    return {name: TensorDataset(x[indices], y[indices]) for name, indices in parts.items()}


# --- EDIT HERE (2): your network --------------------------------------------------------------------------------------
# Build it and load its trained weights, for instance
#     net = MyNetwork()
#     net.load_state_dict(torch.load("weights.pth", weights_only=True))
@cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for such a small network one thread is fastest, and always gives the same weights
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(10):
        for x, y in DataLoader(data()["train"], batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return net.eval()


# --- EDIT HERE (3): your metric ---------------------------------------------------------------------------------------
# One score per sample, higher is better; its mean is the metric. metric_name is what config.yaml calls it.
def metric(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) == targets).float()


def task() -> Task:
    return Task(
        name="my-task",
        model=lambda: copy.deepcopy(trained()),  # a new, trained network at each call
        train=data()["train"],
        validation=data()["validation"],
        test=data()["test"],
        metric=metric,
        metric_name="accuracy",
        # loss=...,  # of (outputs, targets), for recovery by training; default: cross-entropy
    )
