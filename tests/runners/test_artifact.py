"""What ships: written whole or not at all, checked when it is read, and the network that was measured."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest
import torch
import yaml

from paretorch.errors import ArtifactError
from paretorch.runners import artifact, packing
from paretorch.runners.artifact import card, load, verify, write
from paretorch.runners.onnx_export import export_float, session
from paretorch.spaces.recipe import Quantize, Recipe

FILES = ("model.onnx", "weights.safetensors", "recipe.yaml", "measurements.json", "README.md", "artifact.json")
RECIPE = Recipe((Quantize("1", 8, 8),))


@pytest.fixture(scope="module")
def packed(network):
    model, x = network("perceptron")
    return packing.pack(export_float(model, x[:2]))


@pytest.fixture
def written(packed, tmp_path):
    rows = [("accuracy", "97.1%", "97.3%")]
    return write(tmp_path / "best", packed, RECIPE, {"size_bytes": len(packed)}, card("best", RECIPE, rows, "a CPU"))


def test_an_artifact_holds_all_that_is_needed(written, packed):
    assert sorted(path.name for path in written.iterdir()) == sorted(FILES)
    contents = verify(written)
    assert contents["weights.safetensors"] == packed
    assert contents["model.onnx"] == packing.unpack(packed).SerializeToString(deterministic=True)
    assert Recipe.from_dict(yaml.safe_load(contents["recipe.yaml"])) == RECIPE
    assert json.loads(contents["measurements.json"]) == {"size_bytes": len(packed)}
    assert "| accuracy | 97.1% | 97.3% |" in contents["README.md"].decode()
    assert list(written.parent.iterdir()) == [written]


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
    ["[]", "1", "{}", '{"format": "other", "version": 1}', '{"format": "paretorch.artifact", "version": 2}',
     '{"format": "paretorch.artifact", "version": "1", "sha256": {}}',
     '{"format": "paretorch.artifact", "version": 1, "sha256": 1}',
     json.dumps({"format": "paretorch.artifact", "version": 1, "sha256": list(FILES[:-1])})],
)  # fmt: skip
def test_a_listing_that_is_none_is_refused(listing, written):
    (written / "artifact.json").write_text(listing)
    with pytest.raises(ArtifactError):
        verify(written)


def test_an_artifact_replaces_an_older_one(written, packed):
    other = Recipe((Quantize("4", 3),))
    write(written, packed, other, {}, "new")
    assert verify(written)["README.md"] == b"new"
    assert list(written.parent.iterdir()) == [written]


def test_an_empty_directory_is_used_and_parents_are_made(packed, tmp_path):
    (tmp_path / "empty").mkdir()
    verify(write(tmp_path / "empty", packed, RECIPE, {}, ""))
    verify(write(tmp_path / "a" / "b", packed, RECIPE, {}, ""))


@pytest.mark.parametrize("names", [("notes.txt",), ("artifact.json", "thesis.tex"), ("model.onnx",)])
def test_what_is_not_ours_is_never_replaced(names, packed, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("precious")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        write(folder, packed, RECIPE, {}, "")
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(names, "precious")
    single = tmp_path / "file"
    single.write_text("precious")
    with pytest.raises(ArtifactError):
        write(single, packed, RECIPE, {}, "")
    assert single.read_text() == "precious"


@pytest.mark.parametrize("number", range(6))
def test_a_full_disk_leaves_the_old_artifact_and_nothing_else(number, written, packed, monkeypatch):
    before = verify(written)
    original, calls = artifact.write_atomic, []

    def full(path, data):
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        calls.append(path)
        original(path, data)

    monkeypatch.setattr(artifact, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        write(written, packed, Recipe(), {}, "new")
    assert verify(written) == before
    assert list(written.parent.iterdir()) == [written]
    with pytest.raises(OSError, match="No space"):
        write(written.parent / "fresh", packed, Recipe(), {}, "new")
    assert list(written.parent.iterdir()) == [written]


def test_a_failed_move_brings_the_old_artifact_back(written, packed, monkeypatch):
    before = verify(written)
    original = artifact.Path.rename

    def rename(path, target):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return original(path, target)

    monkeypatch.setattr(artifact.Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        write(written, packed, Recipe(), {}, "new")
    assert verify(written) == before
    assert list(written.parent.iterdir()) == [written]


def test_a_partly_written_file_never_shows(tmp_path, monkeypatch):
    path = tmp_path / "file"
    artifact.write_atomic(path, "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        artifact.write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
