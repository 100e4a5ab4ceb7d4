"""CIFAR-10 and a ResNet-20 (He et al. 2016) with 1x1-convolution shortcuts: the task of the benchmarks.

The images come from `cifar10-jpeg.tar.xz` (CIFAR-10 re-encoded as JPEG, image-folder layout) in the folder named by
the environment variable `PARETORCH_DATA`, or in `../shared/data` beside the repository. They are decoded once into
`.cache/cifar10.npz` beside this file.

Splits: *validation* is every training image whose number ends in 9 (5,000 images; the teacher never sees them),
*train* the other 45,000, *test* the test folder.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from paretorch import Task

HERE = Path(__file__).resolve().parent
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (a 1x1 convolution where the shape changes)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A CIFAR ResNet of depth `6 * blocks + 2`."""

    def __init__(self, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.fc = nn.Linear(64, classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(channels_in, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Images(Dataset[tuple[Tensor, int]]):
    """uint8 images `[n, 3, 32, 32]`, normalised on the way out; `augment` crops (4 reflected pixels around) and
    flips.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, augment: bool = False) -> None:
        self.images, self.labels, self.augment = torch.from_numpy(images), labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.augment:
            left, top, flip = [*torch.randint(0, 9, (2,)).tolist(), int(torch.rand(()) < 0.5)]
            image = F.pad(image.float(), (4, 4, 4, 4), mode="reflect")[:, top : top + 32, left : left + 32]
            image = image.flip(-1) if flip else image
        return (image.float() / 255 - MEAN) / STD, int(self.labels[index])


def data_dir() -> Path:
    """The folder that holds `cifar10-jpeg.tar.xz`; raises `FileNotFoundError` with what to do when there is none."""
    folder = Path(os.environ.get("PARETORCH_DATA") or HERE.parents[2] / "shared" / "data")
    if not (folder / "cifar10-jpeg.tar.xz").is_file():
        raise FileNotFoundError(
            f"cifar10-jpeg.tar.xz is not in {folder}; set PARETORCH_DATA to the folder that holds it"
        )
    return folder


def arrays() -> dict[str, np.ndarray]:
    """The three splits as uint8 arrays (`train_x [45000, 3, 32, 32]`, `train_y`, `validation_x`, ... `test_y`)."""
    cache = HERE / ".cache" / "cifar10.npz"
    if not cache.exists():
        from PIL import Image

        parts: dict[str, list[tuple[str, np.ndarray, int]]] = {"train": [], "validation": [], "test": []}
        with tarfile.open(data_dir() / "cifar10-jpeg.tar.xz", "r:xz") as archive:
            members = [m for m in archive if m.isfile() and m.name.endswith(".jpg")]
            classes = sorted({m.name.split("/")[-2] for m in members})
            for member in members:
                split, label, name = member.name.split("/")[-3:]
                if split == "train" and name.removesuffix(".jpg").endswith("9"):
                    split = "validation"
                stream = archive.extractfile(member)
                assert stream is not None
                pixels = np.asarray(Image.open(io.BytesIO(stream.read())).convert("RGB")).transpose(2, 0, 1)
                parts[split].append((f"{label}/{name}", pixels, classes.index(label)))
        out: dict[str, np.ndarray] = {}
        for split, items in parts.items():
            items.sort(key=lambda item: item[0])  # the archive's order is not part of the data
            out[f"{split}_x"] = np.stack([pixels for _, pixels, _ in items])
            out[f"{split}_y"] = np.array([label for _, _, label in items], dtype=np.int64)
        cache.parent.mkdir(exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **out)  # type: ignore[arg-type]
        partial.replace(cache)
    with np.load(cache, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def teacher() -> nn.Module:
    """The trained ResNet-20 of `train_teacher.py`."""
    from safetensors.torch import load_file

    model = ResNet()
    model.load_state_dict(load_file(HERE / "resnet20.safetensors"))
    return model.eval()


def task() -> Task:
    """The task of `configs/cifar10_resnet20.yaml`."""
    data = arrays()
    return Task(
        name="cifar10_resnet20",
        model=teacher,
        train=Images(data["train_x"], data["train_y"], augment=True),
        validation=Images(data["validation_x"], data["validation_y"]),
        test=Images(data["test_x"], data["test_y"]),
        batch_size=128,
    )
