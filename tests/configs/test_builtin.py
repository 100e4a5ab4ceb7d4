"""A torchvision network on an image folder, from a configuration alone; and each way in which that can go wrong."""

import logging
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from paretorch import Task
from paretorch.configs.builtin import check_weights, stratified
from paretorch.configs.load import parse
from paretorch.configs.plugins import load_task
from paretorch.errors import TaskError
from paretorch.runners.task import batches

MODEL = "shufflenet_v2_x0_5"  # the smallest that torchvision has
CLASSES = ("cat", "dog")


def paint(folder: Path, count: int, *, classes=CLASSES, size=(20, 14)) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", size, (40 * number, 10 * index % 256, 99)).save(folder / name / f"{index}.png")


@pytest.fixture
def images(tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        paint(tmp_path / "images" / split, count)
    return tmp_path / "images"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return torchvision.models.get_model(MODEL, num_classes=2).state_dict()


def make(home: Path, weights: str | None = None, model: str = MODEL, classes: int | None = None, **data) -> Task:
    data = {"folder": "images", "size": 16, **data}
    task = {"model": model, "weights": weights, "classes": classes, "data": data}
    return load_task(parse({"task": task}, home / "study.yaml"))


def refused(home: Path, weights: str | None = None, **other) -> str:
    with pytest.raises(TaskError) as caught:
        make(home, weights, **other)
    return str(caught.value)


# --- images -----------------------------------------------------------------------------------------------------------


def test_an_image_folder_with_splits(tmp_path, images, caplog):
    with caplog.at_level(logging.WARNING, "paretorch"):
        task = make(tmp_path)
    assert "task.weights is not given: shufflenet_v2_x0_5 starts from random weights" in caplog.text
    assert task.name == MODEL
    assert task.batch_size == 32
    assert [len(task.train), len(task.validation), len(task.test)] == [8, 4, 6]
    x, y = next(batches(task, "validation"))
    assert x.shape == (4, 3, 16, 16)
    assert y.tolist() == [0, 0, 1, 1]
    with torch.no_grad():
        assert task.model()(x).shape == (4, 2)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_every_name_of_the_validation_folder(tmp_path, images, name):
    (images / "val").rename(images / name)
    assert len(make(tmp_path).validation) == 4


def test_evaluation_is_exact_and_training_is_augmented(tmp_path, images):
    noise = torch.randint(0, 256, (14, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for split in ("train", "val"):
        Image.fromarray(noise).save(images / split / "cat" / "0.png")
    task = make(tmp_path)
    assert torch.equal(task.validation[0][0], task.validation[0][0])
    assert not torch.equal(task.train[0][0], task.train[0][0])
    plain = make(tmp_path, augment=False)
    assert torch.equal(plain.train[0][0], plain.validation[0][0])


def test_the_pixels_are_normalised(tmp_path, images):
    task = make(tmp_path, mean=[0.5, 0.0, 0.0], std=[0.5, 1.0, 2.0])
    dog = task.validation[2][0]
    assert torch.allclose(dog[:, 8, 8], torch.tensor([(40 / 255 - 0.5) / 0.5, 0.0, 99 / 255 / 2]), atol=1e-6)


def test_grey_images(tmp_path, images):
    task = make(tmp_path, channels=1)
    x, _ = next(batches(task, "test"))
    assert x.shape == (6, 1, 16, 16)
    with torch.no_grad():
        assert task.model()(x).shape == (6, 2)


def test_class_folders_are_divided_class_by_class(tmp_path):
    paint(tmp_path / "images", 10)
    (tmp_path / "images" / ".hidden").mkdir()
    task = make(tmp_path, split=[0.6, 0.2, 0.2])
    parts = [task.train, task.validation, task.test]
    assert [len(part) for part in parts] == [12, 4, 4]
    assert sorted(index for part in parts for index in part.indices) == list(range(20))
    assert [int(task.validation[i][1]) for i in range(4)] == [0, 0, 1, 1]
    assert make(tmp_path, split=[0.6, 0.2, 0.2]).train.indices == task.train.indices
    assert make(tmp_path, split=[0.6, 0.2, 0.2], split_seed=1).train.indices != task.train.indices
    assert make(tmp_path, split=[0.8, 0.2, 0.0]).test is None


def test_a_missing_validation_folder_is_divided_off_train(tmp_path):
    paint(tmp_path / "images" / "train", 10)
    paint(tmp_path / "images" / "test", 2)
    task = make(tmp_path, split=[0.6, 0.2, 0.2])
    assert [len(task.train), len(task.validation), len(task.test)] == [16, 4, 4]


def test_division_keeps_every_class_in_every_part():
    labels = [0] * 3 + [1] * 100
    for part in stratified(labels, (0.9, 0.05, 0.05), 0, CLASSES):
        assert {labels[index] for index in part} == {0, 1}
    with pytest.raises(TaskError, match="class 'cat' has 2 images; dividing them into 3 parts needs at least 3"):
        stratified([0] * 2 + [1] * 9, (0.8, 0.1, 0.1), 0, CLASSES)


def test_a_missing_folder(tmp_path):
    assert f"image folder {tmp_path / 'images'} does not exist; set task.data.folder" in refused(tmp_path)
    (tmp_path / "images").write_text("")
    assert "is a file, not a folder" in refused(tmp_path)


def test_a_folder_without_class_folders(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    assert "has no class folders; put the images of each class into a folder" in refused(tmp_path)
    (tmp_path / "images" / "train").mkdir()
    assert f"{tmp_path / 'images' / 'train'} has no class folders" in refused(tmp_path)


def test_an_empty_class_folder_is_named(tmp_path, images):
    (images / "val" / "cat" / "notes.txt").write_text("")
    for image in (images / "val" / "cat").glob("*.png"):
        image.unlink()
    message = refused(tmp_path)
    assert f"empty class folder cat in {images / 'val'}: no .jpg, .png or other image in it" in message


def test_folders_without_any_image(tmp_path):
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
    assert "empty class folders cat, dog" in refused(tmp_path)


def test_a_single_class_folder(tmp_path):
    paint(tmp_path / "images", 3, classes=["images"])
    assert "has only the class folder 'images'; at least 2 are needed" in refused(tmp_path)


def test_class_folders_that_differ(tmp_path, images):
    paint(images / "val", 1, classes=["horse"])
    assert f"{images / 'val'} differ from train's: it has horse, which train lacks" in refused(tmp_path)
    (images / "val" / "dog").rename(tmp_path / "dog")
    assert "it lacks dog and has horse, which train lacks" in refused(tmp_path)


def test_split_folders_without_train(tmp_path, images):
    (images / "train").rename(tmp_path / "away")
    assert "has test, val but no train folder; add train/<class>/ folders" in refused(tmp_path)


def test_two_validation_folders(tmp_path, images):
    paint(images / "valid", 1)
    assert "has both val and valid; keep one" in refused(tmp_path)


def test_a_broken_image_is_named(tmp_path, images):
    (images / "val" / "cat" / "0.png").write_bytes(b"not an image")
    task = make(tmp_path)
    with pytest.raises(TaskError, match=r"image .*val/cat/0\.png cannot be read .*; replace or delete it"):
        next(batches(task, "validation"))


def test_fewer_classes_than_the_data_has(tmp_path, images):
    assert "classes: 1, but the data has 2 classes (cat, dog); write classes: 2" in refused(tmp_path, classes=1)


def test_more_classes_than_the_data_has(tmp_path, images, caplog):
    make(tmp_path, classes=5)
    assert "the network has 5 classes and the data 2" in caplog.text


# --- torchvision's datasets -------------------------------------------------------------------------------------------


def write_mnist(root: Path, count: int) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        labels = bytes(index % 10 for index in range(count))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + bytes(count * 784))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)


def test_a_dataset_of_torchvision(tmp_path):
    write_mnist(tmp_path / "mnist", 100)
    task = make(tmp_path, folder=None, dataset="MNIST", root="mnist", split=[0.6, 0.2, 0.2])
    assert [len(task.train), len(task.validation), len(task.test)] == [80, 20, 100]
    x, y = next(batches(task, "validation"))
    assert x.shape == (20, 3, 16, 16)
    assert sorted(y.tolist()) == sorted([*range(10)] * 2)
    assert task.model()(x).shape == (20, 10)


@pytest.mark.parametrize("dataset", ["CIFAR10", "MNIST", "SVHN", "Food101", "STL10"])
def test_a_dataset_that_is_not_there(tmp_path, dataset):
    message = refused(tmp_path, folder=None, dataset=dataset)
    assert f"dataset {dataset} cannot be loaded from {tmp_path / 'data'}" in message
    assert "set task.data.download: true, or put its files there" in message


# --- weights ----------------------------------------------------------------------------------------------------------


def same(task: Task, state: dict) -> bool:
    return all(torch.equal(value, state[key]) for key, value in task.model().state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "best": 0.9},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    ],
)
def test_weights_from_a_state_dict(tmp_path, images, state, wrap):
    torch.save(wrap(state), tmp_path / "weights.pth")
    assert same(make(tmp_path, "weights.pth"), state)


def test_weights_from_safetensors(tmp_path, images, state):
    save_file(
        {key: value for key, value in state.items() if "num_batches" not in key}, tmp_path / "weights.safetensors"
    )
    assert same(make(tmp_path, "weights.safetensors"), state)


def test_each_model_is_a_new_one_in_eval_mode(tmp_path, images, state):
    torch.save(state, tmp_path / "weights.pt")
    task = make(tmp_path, "weights.pt")
    first = task.model()
    assert not first.training
    with torch.no_grad():
        first.fc.weight.zero_()
    assert same(task, state)


def test_random_weights_come_from_the_seed(tmp_path, images):
    before = torch.get_rng_state()
    assert same(make(tmp_path), make(tmp_path).model().state_dict())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_model(tmp_path, images):
    message = refused(tmp_path, model="mobilnet_v2")
    assert "model 'mobilnet_v2' is not a torchvision classification model; did you mean mobilenet_v2" in message
    assert "choose from alexnet, " in refused(tmp_path, model="qqqq")
    assert "is not a torchvision" in refused(tmp_path, model="fcn_resnet50"), "not for classification"


def test_missing_weights(tmp_path, images):
    (tmp_path / "other.pth").write_text("")
    message = refused(tmp_path, "weights.pth")
    assert f"weights file {tmp_path / 'weights.pth'} does not exist; weight files in that folder: other.pth" in message


def test_an_unknown_name_of_weights(tmp_path, images):
    message = refused(tmp_path, "IMAGENET1K_V7")
    assert "weights 'IMAGENET1K_V7': neither a .safetensors, .pth, .pt file nor torchvision weights" in message
    assert "IMAGENET1K_V1" in message


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_refused_and_does_not_run(tmp_path, images, save):
    proof = tmp_path / "it-ran"
    attack = {"fc.weight": Malicious(f"touch {proof}")}
    save(attack, tmp_path / "weights.pth")
    message = refused(tmp_path, "weights.pth")
    assert "refused to unpickle code" in message
    assert "save it again with torch.save(model.state_dict(), ...)" in message
    assert not proof.exists()
    pickle.loads(pickle.dumps(attack))
    assert proof.exists(), "the attack itself works, so its absence above means something"


def test_a_pickled_module_is_refused(tmp_path, images):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "weights.pth")
    assert "refused to unpickle code (torch.nn.modules.linear.Linear)" in refused(tmp_path, "weights.pth")


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x02", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_weights(tmp_path, images, name, content):
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path, name)
    assert "it is cut short, damaged or of another format: save it again" in message
    assert len(message) < 600


def test_safetensors_cut_short(tmp_path, images, state):
    save_file({"a": torch.zeros(99)}, tmp_path / "weights.safetensors")
    data = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(data[:-40])
    assert "is not a readable safetensors file" in refused(tmp_path, "weights.safetensors")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), "holds a Tensor, not a state dict"),
        ({}, "holds nothing, not a state dict"),
        (
            {"epoch": 3, "weights": {}},
            "'epoch' holds a int, not a tensor; the state dict may stand at the top or under",
        ),
    ],
)
def test_a_file_of_something_else(tmp_path, images, value, message):
    torch.save(value, tmp_path / "weights.pth")
    assert message in refused(tmp_path, "weights.pth")


def test_weights_of_another_network(tmp_path, images, state):
    other = {key: value for key, value in state.items() if not key.startswith("conv1")} | {
        "extra.weight": torch.zeros(1)
    }
    torch.save(other, tmp_path / "weights.pth")
    message = refused(tmp_path, "weights.pth")
    assert "missing (conv1.0.weight, conv1.1.weight, conv1.1.bias, ...)" in message
    assert "1 unexpected (extra.weight) keys" in message


def test_weights_for_another_number_of_classes(tmp_path, images):
    torch.save(torchvision.models.get_model(MODEL, num_classes=7).state_dict(), tmp_path / "weights.pth")
    message = refused(tmp_path, "weights.pth")
    assert "the classifier fc.weight is [7, 1024] there and [2, 1024] for 2 classes; write classes: 7" in message


def test_weights_of_another_shape(tmp_path, images, state):
    torch.save({**state, "conv1.0.weight": torch.zeros(24, 1, 3, 3)}, tmp_path / "weights.pth")
    message = refused(tmp_path, "weights.pth")
    assert "1 tensors have another shape; conv1.0.weight is [24, 1, 3, 3] there and [24, 3, 3, 3]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, images, state, value):
    bad = {key: tensor.clone() for key, tensor in state.items()}
    bad["fc.weight"][0, :3] = value
    torch.save(bad, tmp_path / "weights.pth")
    message = refused(tmp_path, "weights.pth")
    assert "3 of 2048 values of fc.weight are NaN or infinite" in message
    assert str(tmp_path / "weights.pth") in message


def test_check_weights_looks_at_statistics_too():
    norm = torch.nn.BatchNorm1d(4)
    check_weights(norm, "here")
    norm.running_var[1] = float("inf")
    with pytest.raises(TaskError, match="here: 1 of 4 values of running_var"):
        check_weights(norm, "here")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_auxiliary_outputs_are_left_out(tmp_path, images, model, size):
    whole = torchvision.models.get_model(model, num_classes=2, aux_logits=True, init_weights=False).state_dict()
    assert any(key.startswith(("aux1.", "AuxLogits.")) for key in whole)
    torch.save(whole, tmp_path / "weights.pth")
    task = make(tmp_path, "weights.pth", model=model, size=size)
    x, _ = next(batches(task, "validation"))
    for net in (task.model(), task.model().train()):
        assert task.model()(x).shape == net(x).shape == (4, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["mobilenet_v2", "resnet18", "vgg11", "squeezenet1_1", "efficientnet_b0", "densenet121"]
)
def test_common_networks(tmp_path, images, model):
    for channels in (1, 3):
        task = make(tmp_path, model=model, channels=channels, size=64)
        x, _ = next(batches(task, "validation"))
        with torch.no_grad():
            assert task.model()(x).shape == (4, 2)
