"""What ships: written whole or not at all, checked when it is read, and the network that was measured."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paretorch.errors import ArtifactError
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.runners import artifact
from paretorch.runners.artifact import card, inspect, load, verify, write
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.files import packing
from paretorch.runners.files.atomic import write_atomic
from paretorch.runners.graphs.float_graph import export_float
from paretorch.runners.graphs.simulate import Simulation
from paretorch.runners.local import LocalRunner
from paretorch.runners.record import Record, rows
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.runtime import session
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.lowrank import LowRank
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify

FILES = (
    "model.onnx",
    "weights.safetensors",
    "recipe.yaml",
    "measurements.json",
    "README.md",
    "environment.json",
    "artifact.json",
)
VERSION_1 = Path(__file__).with_name("artifact_v1")
HERE = {"processor": "a CPU", "onnxruntime": "1.22"}
RECIPE = Recipe((Quantize("1", 8, 8),))


@pytest.fixture(scope="module")
def packed(network):
    model, x = network("perceptron")
    return packing.pack(export_float(model, x[:2]))


def written_to(directory, packed):
    exact = {"size_bytes": Estimate.exact(len(packed)), "onnx_bytes": Estimate.exact(packing.unpack(packed).ByteSize())}
    found = Measurement({**exact, "latency_ms": Estimate(2.0, 1.9, 2.1, 50), "accuracy": Estimate.rate(971, 1000)})
    base = Measurement(
        {
            "size_bytes": Estimate.exact(1e5),
            "latency_ms": Estimate(4.0, 3.9, 4.1, 50),
            "accuracy": Estimate.rate(973, 1000),
        }
    )
    record = Record(
        "best",
        "mine",
        rows(found, base, MeasurementSettings(threads=2, seconds=0.25)),
        MeasurementSettings(threads=2, seconds=0.25),
    )
    return write(directory, packed, RECIPE, record.to_dict(), card(RECIPE, record, HERE), HERE)


@pytest.fixture
def written(packed, tmp_path):
    return written_to(tmp_path / "best", packed)


def test_an_artifact_holds_all_that_is_needed(written, packed):
    assert sorted(path.name for path in written.iterdir()) == sorted(FILES)
    contents = verify(written)
    assert contents["weights.safetensors"] == packed
    assert contents["model.onnx"] == packing.unpack(packed).SerializeToString(deterministic=True)
    assert Recipe.from_dict(yaml.safe_load(contents["recipe.yaml"])) == RECIPE
    assert json.loads(contents["environment.json"]) == HERE
    measured = {entry["metric"]: entry for entry in json.loads(contents["measurements.json"])["metrics"]}
    assert measured["size_bytes"]["value"] == measured["size_bytes"]["high"] == len(packed)
    assert measured["size_bytes"]["split"] is None
    assert measured["accuracy"] | {"baseline": 0, "protocol": 0} == {
        "metric": "accuracy",
        "split": "validation",
        "baseline": 0,
        "protocol": 0,
    } | vars(Estimate.rate(971, 1000))
    assert "1000 samples of the validation split" in measured["accuracy"]["protocol"]
    for text in ("one input", "2 threads", "in turns with the untouched network", "0.25 s", "4 ms"):
        assert text in measured["latency_ms"]["protocol"]
    text = contents["README.md"].decode()
    assert "| accuracy, validation | 97.10% ±1.05 | 97.30% ±1.02 | -0.20 points |" in text
    assert "2.00x faster" in text
    assert "a CPU (onnxruntime 1.22)" in text
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.parametrize("activations", [8, 32])
def test_affine_weights_ship_whatever_else_was_done(activations, network, task_of, tmp_path):
    """Few channels, low rank, zeros, GPTQ, training: read back it is the same network, of one scale for each layer."""
    model, x = network("residual")
    runner = LocalRunner(
        task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64), library=LayerLibrary(limit=0)
    )
    names = [layer.name for layer in runner.structure.layers]
    steps = [Quantize(name, 4, activations, "gptq", scheme="affine") for name in names]
    steps += [Sparsify(name, 0.5) for name in names[::2]]
    steps += [LowRank("layer1.1.conv1", 8), Prune(runner.structure.groups[-1].name, 24)]
    packed = runner.build(Recipe((*steps, Recover("finetune", 0.5, 0.01))))
    shipped = packing.unpack(packed)
    scales = [t for t in shipped.graph.initializer if t.name.endswith(".weight_s")]
    assert len(scales) == len(names) + 1
    assert {int(np.prod(t.dims)) for t in scales} == {1}
    module = load(written_to(tmp_path / "affine", packed))
    expected = session(shipped).run(None, {"input": x.numpy()})[0]
    np.testing.assert_array_equal(module(x).numpy(), expected)
    simulated = Simulation(shipped)(x).numpy()
    assert np.abs(simulated - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_loaded_artifact_computes_what_was_measured(written, packed, network):
    _, x = network("perceptron")
    module = load(written)
    measured = session(packing.unpack(packed)).run(None, {"input": x.numpy()})[0]
    assert np.array_equal(module(x).numpy(), measured)
    assert torch.equal(module(x[:1]), module(x[:1].requires_grad_()))
    plain = ort.InferenceSession(str(written / "model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(plain.run(None, {"input": x.numpy()})[0], measured, rtol=1e-4, atol=1e-5)


def test_an_artifact_loads_in_a_fresh_process(written, network, tmp_path):
    _, x = network("perceptron")
    np.save(tmp_path / "x.npy", x[:3].numpy())
    code = (
        "import sys, numpy, torch, paretorch; "
        "numpy.save(sys.argv[3], paretorch.load(sys.argv[1])(torch.from_numpy(numpy.load(sys.argv[2]))).numpy())"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(written), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")], check=True
    )
    assert np.array_equal(np.load(tmp_path / "y.npy"), load(written)(x[:3]).numpy())


@pytest.mark.parametrize("name", FILES)
def test_any_change_of_any_file_is_noticed(name, written):
    path = written / name
    intact = path.read_bytes()
    for position in {0, 1, len(intact) // 2, len(intact) - 1, *range(0, len(intact), max(1, len(intact) // 50))}:
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        with pytest.raises(ArtifactError):
            verify(written)
    for changed in (b"", intact[:-1], intact + b" "):
        path.write_bytes(changed)
        with pytest.raises(ArtifactError):
            load(written)
    path.unlink()
    with pytest.raises(ArtifactError, match="not a paretorch artifact"):
        verify(written)


@pytest.mark.parametrize(
    "listing",
    [
        "[]",
        "1",
        "{}",
        '{"format": "other", "version": 1}',
        '{"format": "paretorch.artifact", "version": 3}',
        '{"format": "paretorch.artifact", "version": "1", "sha256": {}}',
        '{"format": "paretorch.artifact", "version": 1, "sha256": 1}',
        json.dumps({"format": "paretorch.artifact", "version": 1, "sha256": list(FILES[:-1])}),
    ],
)
def test_a_listing_that_is_none_is_refused(listing, written):
    (written / "artifact.json").write_text(listing)
    with pytest.raises(ArtifactError):
        verify(written)


def test_an_artifact_replaces_an_older_one(written, packed):
    other = Recipe((Quantize("4", 3),))
    write(written, packed, other, {}, "new", {})
    assert verify(written)["README.md"] == b"new"
    assert list(written.parent.iterdir()) == [written]


def test_an_empty_directory_is_used_and_parents_are_made(packed, tmp_path):
    (tmp_path / "empty").mkdir()
    verify(write(tmp_path / "empty", packed, RECIPE, {}, "", {}))
    verify(write(tmp_path / "a" / "b", packed, RECIPE, {}, "", {}))


@pytest.mark.parametrize("names", [("notes.txt",), ("artifact.json", "thesis.tex"), ("model.onnx",)])
def test_what_is_not_ours_is_never_replaced(names, packed, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("precious")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        write(folder, packed, RECIPE, {}, "", {})
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(names, "precious")
    single = tmp_path / "file"
    single.write_text("precious")
    with pytest.raises(ArtifactError):
        write(single, packed, RECIPE, {}, "", {})
    assert single.read_text() == "precious"


# These simulate the operating system: a disk that is full or fails in the middle, which no argument could say.


@pytest.mark.parametrize("number", range(7))
def test_a_full_disk_leaves_the_old_artifact_and_nothing_else(number, written, packed, monkeypatch):
    before = verify(written)
    fsync, calls = os.fsync, []

    def full(descriptor):
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        calls.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(written, packed, Recipe(), {}, "new", {})
    assert len(calls) == number
    assert verify(written) == before
    assert list(written.parent.iterdir()) == [written]
    with pytest.raises(OSError, match="No space"):
        write(written.parent / "fresh", packed, Recipe(), {}, "new", {})
    assert list(written.parent.iterdir()) == [written]


def test_a_failed_move_brings_the_old_artifact_back(written, packed, monkeypatch):
    before = verify(written)
    original = Path.rename

    def rename(path, target):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        write(written, packed, Recipe(), {}, "new", {})
    assert verify(written) == before
    assert list(written.parent.iterdir()) == [written]


def test_a_partly_written_file_never_shows(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- whatever happens to a file ---------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@cache
def small(folder):
    """An artifact of a network of two layers, whose files are short enough to be damaged everywhere."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    return written_to(folder / "small", packing.pack(export_float(net, torch.zeros(2, 4))))


def refuses(directory):
    for check in (verify, load, inspect):
        with pytest.raises(ArtifactError):
            check(directory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture
def evil_watch(tmp_path, monkeypatch):
    """Nothing that is unpickled may run: it would leave a file here."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.glob("evil"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_damage_of_any_file_is_found(folder, evil_watch, data):
    """A byte changed, bytes cut out, put in or moved, another file's contents, a pickle: at any place of any file."""
    directory = small(folder)
    path = directory / data.draw(st.sampled_from(FILES))
    intact = path.read_bytes()
    place = data.draw(st.integers(0, len(intact) - 1))
    kind = data.draw(st.sampled_from(["byte", "truncated", "cut", "inserted", "appended", "foreign", "pickle"]))
    damaged = {
        "byte": lambda: intact[:place] + bytes([intact[place] ^ data.draw(st.integers(1, 255))]) + intact[place + 1 :],
        "truncated": lambda: intact[:place],
        "cut": lambda: intact[:place] + intact[place + data.draw(st.integers(1, 64)) :],
        "inserted": lambda: intact[:place] + data.draw(st.binary(min_size=1, max_size=16)) + intact[place:],
        "appended": lambda: intact + data.draw(st.binary(min_size=1, max_size=16)),
        "foreign": lambda: (directory / data.draw(st.sampled_from([n for n in FILES if n != path.name]))).read_bytes(),
        "pickle": lambda: pickle.dumps(Evil(), data.draw(st.integers(0, 5))),
    }[kind]()
    if damaged == intact:  # such as a space put in beside a space
        return
    path.write_bytes(damaged)
    try:
        refuses(directory)
    finally:
        path.write_bytes(intact)
    if kind == "byte":
        load(directory)


@pytest.mark.parametrize("name", FILES)
def test_every_single_byte_counts(name, folder):
    """All positions of all files, one after the other; `load` checks as `verify` does, before it reads anything."""
    directory = small(folder)
    path = directory / name
    intact = path.read_bytes()
    try:
        for place in range(len(intact)):
            path.write_bytes(intact[:place] + bytes([intact[place] ^ 0x20]) + intact[place + 1 :])
            with pytest.raises(ArtifactError):
                verify(directory)
    finally:
        path.write_bytes(intact)


def relist(directory):
    """What somebody does who knows the format: the digests fit again."""
    contents = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "artifact.json"}
    (directory / "artifact.json").write_bytes(artifact._listing(contents, artifact.VERSION))


@pytest.mark.parametrize(
    ("name", "forged", "told"),
    [
        ("weights.safetensors", pickle.dumps(Evil()), "not a packed model"),
        ("model.onnx", pickle.dumps(Evil()), "two different models"),
        ("recipe.yaml", b"!!python/object/apply:os.system ['touch evil']", "could not determine a constructor"),
        ("recipe.yaml", b"steps: []", "not a recipe"),
        ("recipe.yaml", b"\xff", "is whole, but not what paretorch writes"),
        ("measurements.json", b"[1]", "holds no measurements"),
        ("measurements.json", b'{"metrics": [{"metric": 1}]}', "holds no measurements"),
        ("measurements.json", pickle.dumps(Evil()), "is whole, but not what paretorch writes"),
        ("environment.json", b"{", "is whole, but not what paretorch writes"),
    ],
)
def test_a_forgery_whose_digests_fit_is_told(name, forged, told, written, evil_watch):
    (written / name).write_bytes(forged)
    relist(written)
    verify(written)
    with pytest.raises(ArtifactError, match=told):
        inspect(written)


def test_a_model_of_another_artifact_is_told(written, folder):
    shutil.copy(small(folder) / "model.onnx", written / "model.onnx")
    relist(written)
    with pytest.raises(ArtifactError, match="two different models"):
        inspect(written)


def test_what_lies_beside_the_files_is_told_and_never_read(written, evil_watch):
    (written / "notes.pkl").write_bytes(pickle.dumps(Evil()))
    load(written)
    with pytest.raises(ArtifactError, match=r"holds notes\.pkl, which artifact.json does not list"):
        inspect(written)


def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(written):
    (written / "README.md").unlink()
    os.mkfifo(written / "README.md")
    with pytest.raises(ArtifactError, match="is not a file"):
        verify(written)


# --- versions and what is recorded ------------------------------------------------------------------------------------


def test_an_artifact_of_version_1_still_loads(tmp_path):
    assert load(VERSION_1)(torch.zeros(3, 4)).shape == (3, 2)
    sound = inspect(VERSION_1)
    assert sound.recipe == Recipe((Quantize("0", 4), Recover("batchnorm")))
    found = {row.name: row for row in sound.record.rows}
    assert found["accuracy, validation"].estimate.value == 0.9
    assert found["accuracy, test"].estimate.value == 0.88
    assert found["latency_ms"].change() == "1.22x faster"
    assert sound.record.check is None
    assert sound.record.protocol is None
    shutil.copytree(VERSION_1, tmp_path / "old")
    path = tmp_path / "old" / "model.onnx"
    intact = path.read_bytes()
    for place in range(len(intact)):
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
        with pytest.raises(ArtifactError):
            load(tmp_path / "old")
    listing = json.loads((VERSION_1 / "artifact.json").read_text())
    (tmp_path / "old" / "artifact.json").write_text(json.dumps(listing | {"version": 2}, indent=1) + "\n")
    with pytest.raises(ArtifactError, match=r"must list .*environment\.json"):
        verify(tmp_path / "old")


def test_a_record_comes_back(written, packed):
    sound = inspect(written)
    assert sound.packed == packed
    assert Record.from_dict(sound.record.to_dict() | {"check": sound.outputs}) == sound.record
    assert sound.record.check == sound.outputs
    assert sound.environment == HERE
