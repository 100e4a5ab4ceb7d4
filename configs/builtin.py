"""The built-in task, without Python code by the user: a torchvision network on an image folder or dataset."""

from __future__ import annotations

import copy
import difflib
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ..errors import TaskError
from ..runners.task import Task
from .schema import BuiltinTask, Data

log = logging.getLogger("paretorch")
_WEIGHT_FILES = (".safetensors", ".pth", ".pt")
_VALIDATION = ("val", "valid", "validation")
_NESTED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # written by DataParallel and by torch.compile
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # training-only outputs of googlenet and inception_v3
# The arguments of torchvision's datasets that select the training and the test images.
_SPLITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{
        name: ({"train": True}, {"train": False}) for name in ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST")
    },
    **{name: ({"split": "train"}, {"split": "test"}) for name in ("Food101", "GTSRB", "STL10", "SVHN")},
    "Imagenette": ({"split": "train"}, {"split": "val"}),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
}


def builtin_task(spec: BuiltinTask, resolve: Callable[[str], Path], seed: int = 0) -> Task:
    """Create the task that a configuration describes.

    Args:
        spec: The task section of the configuration.
        resolve: Makes the paths of the configuration absolute.
        seed: Initializes the weights where none are given.

    Raises:
        TaskError: The network is unknown; its weights are missing, damaged, or for another network; or the images are
            missing or arranged in another way.
    """
    _known_model(spec.model)
    names, train, validation, test = _splits(spec.data, resolve)
    classes = spec.classes or len(names)
    if classes < len(names):
        raise TaskError(
            f"classes: {classes}, but the data has {len(names)} classes ({_first(names)}); write classes: {len(names)}"
        )
    if classes > len(names):
        log.warning(
            "the network has %d classes and the data %d: they count as outputs 0 to %d, in the order %s",
            classes,
            len(names),
            len(names) - 1,
            _first(names),
        )
    network = _network(spec, classes, resolve, seed)
    evaluate, learn = _transforms(spec.data)
    return Task(
        name=spec.model,
        model=partial(copy.deepcopy, network),
        train=_Prepared(*train, learn if spec.data.augment else evaluate),
        validation=_Prepared(*validation, evaluate),
        test=None if test is None else _Prepared(*test, evaluate),
        batch_size=spec.batch_size,
    )


def check_weights(model: nn.Module, source: str) -> None:
    """Check that all weights and statistics of a network are finite.

    Args:
        model: The network.
        source: Where it comes from, for the message.

    Raises:
        TaskError: A value is NaN or infinite; the message names the first such tensor.
    """
    bad = [
        (name, int((~tensor.isfinite()).sum()), tensor.numel())
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if bad:
        name, count, total = bad[0]
        more = f", and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise TaskError(
            f"{source}: {count} of {total} values of {name} are NaN or infinite{more}; "
            "train or save the network again, no compression can mend it"
        )


# --- the network ------------------------------------------------------------------------------------------------------


def _known_model(name: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, 3)
        hint = f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(known)}"
        raise TaskError(f"model {name!r} is not a torchvision classification model; {hint}")


def _network(spec: BuiltinTask, classes: int, resolve: Callable[[str], Path], seed: int) -> nn.Module:
    # Auxiliary outputs only help training from scratch, and a network with them does not return a single tensor.
    extra = (
        {"aux_logits": False, "init_weights": spec.weights is None}
        if spec.model in ("googlenet", "inception_v3")
        else {}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = cast(nn.Module, torchvision.models.get_model(spec.model, weights=None, num_classes=classes, **extra))
        _set_channels(network, spec.data.channels)
    if spec.weights is None:
        log.warning("task.weights is not given: %s starts from random weights, good for a dry run only", spec.model)
    else:
        source, state = _state(spec.model, spec.weights, resolve)
        _fill(network, state, source, classes)
        check_weights(network, source)
        if source == spec.weights and spec.model in ("googlenet", "inception_v3"):
            cast(Any, network).transform_input = True  # as torchvision sets it for its own weights
    return network.eval()


def _set_channels(network: nn.Module, channels: int) -> None:
    """Give the first convolution `channels` inputs; torchvision's networks have three."""
    name, conv = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if conv.in_channels != channels:
        new = nn.Conv2d(
            channels,
            conv.out_channels,
            cast(Any, conv.kernel_size),
            cast(Any, conv.stride),
            cast(Any, conv.padding),
            bias=conv.bias is not None,
        )
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, new)


def _state(model: str, weights: str, resolve: Callable[[str], Path]) -> tuple[str, dict[str, Tensor]]:
    """Where the weights come from, and the weights."""
    if Path(weights).suffix in _WEIGHT_FILES:
        path = resolve(weights)
        return str(path), _named_tensors(_read(path), path)
    named = torchvision.models.get_model_weights(model)
    if weights not in named.__members__:
        names = ", ".join(named.__members__)
        raise TaskError(
            f"weights {weights!r}: neither a {', '.join(_WEIGHT_FILES)} file nor torchvision weights of {model} "
            f"({names})"
        )
    try:
        return weights, named[weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise TaskError(
            f"weights {weights} of {model} cannot be fetched ({error}); fetch {named[weights].url} by hand and "
            "name the file"
        ) from error


def _read(path: Path) -> Any:
    if not path.is_file():
        near = [e.name for e in path.parent.iterdir() if e.suffix in _WEIGHT_FILES] if path.parent.is_dir() else []
        raise TaskError(
            f"weights file {path} does not exist; weight files in that folder: {', '.join(sorted(near)) or 'none'}"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise TaskError(
                f"weights file {path} is not a readable safetensors file ({error}); it is cut short, damaged or of "
                "another format: save it again with safetensors.torch.save_file(model.state_dict(), ...)"
            ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on foreign pickles; the errors below say what to do
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|class|global) ([\w.]+\.\w+)", str(error))
        if code or "Unsupported" in str(error):
            what = f" ({code[1]})" if code else ""
            raise TaskError(
                f"weights file {path}: refused to unpickle code{what}; a weights file must hold tensors only: "
                "save it again with torch.save(model.state_dict(), ...)"
            ) from error
        raise _unreadable(path, error) from error
    except Exception as error:  # a damaged file can make torch.load raise almost anything
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> TaskError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0][:160]}".rstrip(": ")
    return TaskError(
        f"weights file {path} cannot be read as a state dict ({reason}); it is cut short, damaged or of another "
        "format: "
        "save it again with torch.save(model.state_dict(), ...)"
    )


def _named_tensors(checkpoint: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the prefixes of wrappers."""
    for key in _NESTED:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise TaskError(
            f"weights file {path} holds {'nothing' if checkpoint == {} else f'a {type(checkpoint).__name__}'}, "
            "not a state dict; "
            "save it with torch.save(model.state_dict(), ...)"
        )
    other = [(key, value) for key, value in checkpoint.items() if not isinstance(value, Tensor)]
    if other:
        raise TaskError(
            f"weights file {path}: {other[0][0]!r} holds a {type(other[0][1]).__name__}, not a tensor; the "
            "state dict may "
            f"stand at the top or under one of {', '.join(_NESTED)}"
        )
    state = {str(key): value for key, value in checkpoint.items()}
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _fill(network: nn.Module, state: dict[str, Tensor], source: str, classes: int) -> None:
    own = network.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.startswith(_AUXILIARY)}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        parts = [
            f"{len(keys)} {what} ({_first(keys)})"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise TaskError(
            f"weights {source} do not fit {type(network).__name__}: {' and '.join(parts)} keys; "
            "is it the right model, and trained with torchvision's definition of it?"
        )
    other = [key for key in state if state[key].shape != own[key].shape]
    if other:
        key = next((key for key in reversed(other) if key.endswith("weight")), other[-1])
        theirs, ours = list(state[key].shape), list(own[key].shape)
        one_layer = len({key.rpartition(".")[0] for key in other}) == 1
        if one_layer and theirs[1:] == ours[1:] and ours[0] == classes:
            raise TaskError(
                f"weights {source}: the classifier {key} is {theirs} there and {ours} for {classes} classes; write "
                f"classes: {theirs[0]} (and {theirs[0]} class folders), or use weights trained for {classes} classes"
            )
        raise TaskError(
            f"weights {source}: {len(other)} tensors have another shape; {key} is {theirs} there and {ours} in "
            "the model"
        )
    network.load_state_dict(state)


# --- the images -------------------------------------------------------------------------------------------------------

Part = tuple[Dataset[Any], Sequence[int]]  # a dataset of raw images, and the indices of those that belong to the part
Parts = tuple[Sequence[str], Part, Part, Part | None]


def _transforms(data: Data) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """The transforms of an image for evaluation and for training."""
    finish = [
        v2.RGB() if data.channels == 3 else v2.Grayscale(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(data.mean or ()), list(data.std or ())),
    ]
    evaluate = [v2.Resize(round(data.size / data.crop)), v2.CenterCrop(data.size)]
    # Milder than training from scratch (0.08): recovery is short, and calibration sees these images too.
    learn = [v2.RandomResizedCrop(data.size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip()]
    return v2.Compose([*evaluate, *finish]), v2.Compose([*learn, *finish])


class _Prepared(Dataset[tuple[Tensor, int]]):
    """Some images of a dataset, transformed."""

    def __init__(self, images: Dataset[Any], indices: Sequence[int], transform: Callable[[Any], Tensor]) -> None:
        self.images, self.indices, self.transform = images, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[self.indices[index]]
        return self.transform(image), int(label)


def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            # The conversion resolves palettes and transparency; the transforms then make the image RGB or grayscale.
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise TaskError(f"image {path} cannot be read ({error}); replace or delete it") from error


class _Folder(ImageFolder):  # type: ignore[misc]  # torchvision has no types, so the base class is Any
    """torchvision's image folder, with an error that names empty class folders, and without hidden folders."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), loader=_open, allow_empty=True)
        counts = [0] * len(self.classes)
        for label in self.targets:
            counts[label] += 1
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            what = "class folders" if len(empty) > 1 else "class folder"
            raise TaskError(
                f"empty {what} {', '.join(empty)} in {folder}: no .jpg, .png or other image in it; "
                "add images or delete the folder"
            )
        if len(self.classes) < 2:
            raise TaskError(
                f"{folder} has only the class folder {self.classes[0]!r}; at least 2 are needed: name the folder whose "
                "subfolders are the classes"
            )

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = _subfolders(Path(directory))
        if not names:
            raise TaskError(
                f"{directory} has no class folders; put the images of each class into a folder named after the class"
            )
        return names, {name: number for number, name in enumerate(names)}


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise TaskError(f"folder {folder} cannot be read: {error.strerror or error}") from error


def _splits(data: Data, resolve: Callable[[str], Path]) -> Parts:
    """The names of the classes, and the images for training, validation and test (None: no test images)."""
    return _folder_splits(data, resolve(data.folder)) if data.folder else _dataset_splits(data, resolve(data.root))


def _folder_splits(data: Data, folder: Path) -> Parts:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise TaskError(f"image folder {folder} {what}; set task.data.folder")
    inside = _subfolders(folder)
    validation = [name for name in _VALIDATION if name in inside]
    if len(validation) > 1:
        raise TaskError(f"{folder} has both {' and '.join(validation)}; keep one validation folder")
    if "train" not in inside:
        if inside and set(inside) <= {*_VALIDATION, "test"}:
            raise TaskError(f"{folder} has {', '.join(inside)} but no train folder; add train/<class>/ folders")
        whole = _Folder(folder)
        train, held, test = stratified(whole.targets, data.split, data.split_seed, whole.classes)
        return whole.classes, (whole, train), (whole, held), (whole, test) if test else None
    present = ("train", *validation, *(["test"] if "test" in inside else []))
    sets = {name: _Folder(folder / name) for name in present}
    classes = sets["train"].classes
    for name, images in sets.items():
        if images.classes != classes:
            only = sorted(set(images.classes) - set(classes))
            lacks = sorted(set(classes) - set(images.classes))
            parts = [f"lacks {_first(lacks)}"] * bool(lacks) + [f"has {_first(only)}, which train lacks"] * bool(only)
            raise TaskError(f"the class folders of {folder / name} differ from train's: it {' and '.join(parts)}")
    whole = sets["train"]
    indices: Sequence[int] = range(len(whole))
    if validation:
        held_out: Part = (sets[validation[0]], range(len(sets[validation[0]])))
    else:
        indices, held, _ = stratified(whole.targets, _without_test(data), data.split_seed, classes)
        held_out = (whole, held)
    tested = (sets["test"], range(len(sets["test"]))) if "test" in sets else None
    return classes, (whole, indices), held_out, tested


def _dataset_splits(data: Data, root: Path) -> Parts:
    assert data.dataset is not None  # the schema asks for a folder or a dataset
    kind = getattr(torchvision.datasets, data.dataset)
    made = []
    for arguments in _SPLITS[data.dataset]:
        try:
            made.append(kind(str(root), download=data.download, **arguments))
        except (RuntimeError, OSError) as error:
            advice = "set task.data.download: true, or put its files there"
            if data.download:
                advice = "check the connection, or put its files there"
            raise TaskError(f"dataset {data.dataset} cannot be loaded from {root} ({error}); {advice}") from error
    labels = _labels(made[0])
    classes = [str(name) for name in getattr(made[0], "classes", range(max(labels) + 1))]
    train, held, _ = stratified(labels, _without_test(data), data.split_seed, classes)
    return classes, (made[0], train), (made[0], held), (made[1], range(len(made[1])))


def _labels(images: Any) -> list[int]:
    """All labels of a torchvision dataset; which attribute holds them depends on the dataset."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(images, name):
            return [int(label) for label in getattr(images, name)]
    if hasattr(images, "_samples"):
        return [int(label) for _, label in images._samples]
    return [int(label) for _, label in images]


def _without_test(data: Data) -> tuple[float, float, float]:
    train, validation, _ = data.split
    return train / (train + validation), validation / (train + validation), 0.0


def stratified(
    labels: Sequence[int], split: tuple[float, float, float], seed: int, classes: Sequence[str]
) -> tuple[list[int], list[int], list[int]]:
    """Divide images into training, validation and test in the same proportions for every class.

    Args:
        labels: The class of each image.
        split: The shares of training, validation and test, which add up to 1. Every part with a share above 0 gets an
            image of every class.
        seed: Shuffles the images of each class.
        classes: The names of the classes.

    Returns:
        The indices of each part, in ascending order.

    Raises:
        TaskError: A class has too few images.

        >>> [len(part) for part in stratified([0] * 10 + [1] * 20, (0.8, 0.1, 0.1), 0, ["a", "b"])]
        [24, 3, 3]
    """
    generator = torch.Generator().manual_seed(seed)
    members: list[list[int]] = [[] for _ in classes]
    for index, label in enumerate(labels):
        members[label].append(index)
    needed = sum(share > 0 for share in split)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for name, indices in zip(classes, members, strict=True):
        if len(indices) < needed:
            raise TaskError(
                f"class {name!r} has {len(indices)} images; dividing them into {needed} parts needs at least {needed}"
            )
        order = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
        held, tested = (max(1, round(share * len(order))) if share else 0 for share in split[1:])
        while held + tested >= len(order):  # a tiny class: training keeps at least one image
            held, tested = (held - 1, tested) if held >= tested else (held, tested - 1)
        parts[1].extend(order[:held])
        parts[2].extend(order[held : held + tested])
        parts[0].extend(order[held + tested :])
    return sorted(parts[0]), sorted(parts[1]), sorted(parts[2])


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
