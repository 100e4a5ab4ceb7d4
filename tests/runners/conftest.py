"""Small networks of many kinds, with BatchNorm statistics of their own, for the tests of the runners."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paretorch.runners.task import Task

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self, c=16, d=32):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.layer1 = nn.Sequential(Block(c), Block(c))
        self.down, self.bnd = nn.Conv2d(c, d, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(d)
        self.layer2 = nn.Sequential(Block(d))
        self.fc = nn.Linear(d, 10)

    def forward(self, x):
        x = self.layer1(F.relu(self.bn(self.stem(x))))
        x = self.layer2(F.relu(self.bnd(self.down(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def conv(i, o, k=3, s=1, groups=1, act=nn.ReLU):
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), act())


class Inverted(nn.Module):
    def __init__(self, c, e):
        super().__init__()
        up, deep = conv(c, e, 1, act=nn.ReLU6), conv(e, e, groups=e, act=nn.ReLU6)
        self.body = nn.Sequential(up, deep, nn.Conv2d(e, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        return x + self.body(x)


def mobile(c=16, e=48):
    d = 2 * c
    return nn.Sequential(
        conv(3, c, 3, 2, act=nn.ReLU6),
        Inverted(c, e),
        conv(c, d, 1, act=nn.ReLU6),
        conv(d, d, 3, 2, d, nn.ReLU6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(d, 10),
    )


def perceptron(a=64, b=48):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, a),
        nn.BatchNorm1d(a),
        nn.ReLU(),
        nn.Linear(a, b, bias=False),
        nn.BatchNorm1d(b),
        nn.ReLU(),
        nn.Linear(b, 10),
    )


class Gated(nn.Module):
    """SiLU, a squeeze-and-excitation gate, and a convolution as the last layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.gate, self.head = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 10, 1)

    def forward(self, x):
        y = F.silu(self.b(F.silu(self.a(x))))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return self.head(F.max_pool2d(y, 2)).mean((2, 3))


def sound():
    return nn.Sequential(
        nn.Conv1d(3, 16, 5, padding=2),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 24, 3, padding=1, bias=False),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


class Tokens(nn.Module):
    """Linear layers over `[n, tokens, features]`."""

    def __init__(self, c=32):
        super().__init__()
        self.embed, self.norm = nn.Linear(12, c), nn.LayerNorm(c)
        self.up, self.down, self.head = nn.Linear(c, 2 * c), nn.Linear(2 * c, c), nn.Linear(c, 10)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.down(F.relu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class Branches(nn.Module):
    """Two branches that are concatenated, then flattened maps into a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.b2, self.c = conv(3, 16), conv(16, 8), conv(16, 12, 1), conv(20, 12)
        self.fc = nn.Linear(12 * 16, 10)

    def forward(self, x):
        x = self.a(x)
        x = torch.cat([self.b(x), self.b2(x)], 1)
        return self.fc(F.avg_pool2d(self.c(x), 2).flatten(1))


class FullyConvolutional(nn.Module):
    """The outputs are those of a convolution, nothing behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 16), nn.Conv2d(16, 10, 8)

    def forward(self, x):
        return self.b(self.a(x))


NETWORKS = {
    "residual": (Residual, (3, 8, 8)),
    "mobile": (mobile, (3, 16, 16)),
    "perceptron": (perceptron, (3, 8, 8)),
    "gated": (Gated, (3, 8, 8)),
    "sound": (sound, (3, 32)),
    "tokens": (Tokens, (6, 12)),
    "branches": (Branches, (3, 8, 8)),
    "convolutional": (FullyConvolutional, (3, 8, 8)),
}


def settled(model, shape, n=256, seed=1):
    """The model with BatchNorms of random weights and the statistics of `n` random inputs, and those inputs."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    x = torch.randn(n, *shape)
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(x)
    return model.eval(), x


@pytest.fixture(scope="session")
def network():
    """`network(name, *arguments)` -> a model in evaluation mode and 256 inputs; the same at each call."""

    def make(name, *arguments):
        kind, shape = NETWORKS[name]
        torch.manual_seed(0)
        return settled(kind(*arguments), shape)

    return make


@pytest.fixture(scope="session")
def settle():
    return settled


@pytest.fixture(scope="session")
def task_of():
    """A task of a model that is taught to repeat itself: the targets are the model's own classes."""

    def make(model, x, **more):
        with torch.no_grad():
            y = model(x).flatten(1).argmax(1)
        data = TensorDataset(x, y)
        return Task("own", lambda: model, train=data, validation=data, test=data, **more)

    return make
