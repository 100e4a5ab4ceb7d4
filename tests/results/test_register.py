"""The model registry, in real SQLite stores; end_to_end/test_register.py loads a model without paretorch."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from paretorch.errors import ConfigError, StudyError
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.results.candidate import Candidate
from paretorch.results.front import Front
from paretorch.results.register import CODE, register
from paretorch.results.registered_model import _session
from paretorch.results.tracking.store import local_store
from paretorch.results.tracking.tracker import Tracker
from paretorch.runners.files import packing
from paretorch.runners.graphs.float_graph import export_float
from paretorch.runners.targets.runtime import DISABLED_OPTIMIZERS, session
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_UV_AUTO_DETECT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def packed() -> bytes:
    torch.manual_seed(0)
    return packing.pack(export_float(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.zeros(2, 1, 3, 4)))


def measured(accuracy: int, size: float) -> Measurement:
    return Measurement(
        {
            "accuracy": Estimate.rate(accuracy, 200),
            "size_bytes": Estimate.exact(size),
            "latency_ms": Estimate(0.5, 0.4, 0.6, 9),
        }
    )


@pytest.fixture
def study(directory: Path, packed: bytes) -> SimpleNamespace:
    """A study with two candidates, of which one has a file, in the store of its own folder."""
    folder = directory / "blobs"
    (folder / "candidates").mkdir(parents=True)
    for path in directory.glob("mlflow.db*"):
        path.rename(folder / path.name)
    best = Candidate(
        1,
        Recipe((Quantize("1", 4),)),
        "ok",
        "",
        measured(189, len(packed)),
        {},
        {"1": 0},
        "",
        {"accuracy": Estimate.rate(930, 1000)},
    )
    (folder / "candidates" / f"{best.recipe.key}.safetensors").write_bytes(packed)
    gone = Candidate(2, Recipe((Quantize("1", 3),)), "ok", "", measured(100, 9999), {}, {"1": 1})
    measure = {"threads": 1, "batch": 1, "seconds": 0.5, "calibration_images": 512}
    objectives = tuple(Objective.parse(text) for text in ("accuracy", "size_bytes"))
    front = Front((best, gone), objectives, Budget.parse([]), measured(190, 4000), folder)
    about = {
        "version": 1,
        "snapshot": {"task": "blobs", "seed": 0, "measure": measure, "budget": []},
        "objectives": [vars(objective) for objective in objectives],
        "baseline": front.baseline.to_dict(),
    }
    (folder / "study.json").write_text(json.dumps(about))

    def log() -> Tracker:
        tracker = Tracker("blobs", folder)
        tracker.start({}, {}, {})
        for candidate in front.candidates:
            tracker.log(candidate, 0.5, candidate is best, {})
        tracker.finish(front, folder / "report", "note")
        return tracker

    uri = local_store(folder)[0]
    return SimpleNamespace(
        folder=folder, front=front, best=best, gone=gone, log=log, uri=uri, client=mlflow.MlflowClient(uri, uri)
    )


def logged_models(study: SimpleNamespace) -> list[object]:
    experiments = [e.experiment_id for e in study.client.search_experiments()]
    return list(study.client.search_logged_models(experiments))


def test_a_version_says_what_it_is_and_where_it_is_from(study: SimpleNamespace, packed: bytes) -> None:
    tracker = study.log()
    run_id = tracker._children[1].run_id
    before = {
        name: len(study.client.get_metric_history(run_id, name)) for name in study.client.get_run(run_id).data.metrics
    }
    registered = register(study.front, study.best, "small", "champion")
    assert (registered.uri, registered.version, registered.moved_from) == ("models:/small@champion", "1", None)
    assert registered.shape == ("batch", 1, 3, 4)
    assert registered.store == study.uri

    version = study.client.get_model_version_by_alias("small", "champion")
    assert version.run_id == run_id
    assert version.tags == {
        "paretorch.study": "blobs",
        "paretorch.number": "1",
        "paretorch.state": "ok",
        "paretorch.recipe_key": study.best.recipe.key,
        "paretorch.what": "weights 4 bit",
        "accuracy": "0.945",
        "size_bytes": str(len(packed)),
        "latency_ms": "0.5",
        "test_accuracy": "0.93",
    }
    assert version.description.startswith("weights 4 bit. Candidate 1 of the study blobs, measured on ")
    assert "| accuracy | 94.50% (test: 93.00%) | 95.00% |" in version.description

    (model,) = logged_models(study)
    assert version.source == f"models:/{model.model_id}"
    assert (model.source_run_id, str(model.status)) == (run_id, "READY")
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "small", "version": "1"}]
    assert {m.key: m.value for m in model.metrics} == study.client.get_run(run_id).data.metrics
    run = study.client.get_run(run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert {name: len(study.client.get_metric_history(run_id, name)) for name in run.data.metrics} == before
    assert run.info.status == "FINISHED"

    info = mlflow.models.Model.load(str(registered.files))
    assert info.flavors["python_function"]["config"] == {"threads": 1, "disabled_optimizers": DISABLED_OPTIMIZERS}
    assert str(info.signature.inputs) == "[Tensor('float32', (-1, 1, 3, 4))]"
    assert str(info.signature.outputs) == "[Tensor('float32', (-1, 3))]"
    assert json.loads((registered.files / "serving_input_example.json").read_text()) == {
        "inputs": np.zeros((1, 1, 3, 4)).tolist()
    }
    needs = (registered.files / "requirements.txt").read_text().split()
    assert [need.partition("==")[0] for need in needs] == ["mlflow", "numpy", "onnxruntime"]
    assert all(need.partition("==")[2] for need in needs)
    assert {path.name for path in (registered.files / "artifacts" / "exported").iterdir()} == {
        "model.onnx",
        "weights.safetensors",
        "recipe.yaml",
        "measurements.json",
        "environment.json",
        "README.md",
        "artifact.json",
    }
    assert not [path for path in registered.files.rglob("*") if path.suffix in (".pkl", ".pickle", ".pyc")]


def test_it_computes_what_was_measured(study: SimpleNamespace, packed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    study.log()
    registered = register(study.front, study.best, "small")
    assert registered.uri == "models:/small/1"
    loaded = mlflow.pyfunc.load_model(str(registered.files))
    x = np.random.default_rng(0).normal(size=(5, 1, 3, 4)).astype(np.float32)
    assert np.array_equal(loaded.predict(x), session(packing.unpack(packed)).run(None, {"input": x})[0])
    with pytest.raises(mlflow.MlflowException, match="does not match expected shape"):
        loaded.predict(x[:, :, :2])

    file = registered.files / "artifacts" / "exported" / "model.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="was changed after it was exported"):
        mlflow.pyfunc.load_model(str(registered.files))


def test_an_alias_moves_to_the_newer_version(study: SimpleNamespace) -> None:
    study.log()
    for alias in ("champion", None, "champion"):
        registered = register(study.front, study.best, "small model", alias)
    assert (registered.version, registered.moved_from) == ("3", "1")
    assert study.client.get_registered_model("small model").aliases == {"champion": 3}
    assert len(logged_models(study)) == 3


def test_a_study_without_mlflow_gets_a_store(study: SimpleNamespace) -> None:
    registered = register(study.front, study.best, "small", "champion")
    assert registered.store == study.uri
    assert registered.files.is_relative_to(study.folder)
    assert study.client.get_model_version_by_alias("small", "champion").run_id in (None, "")
    assert [e.name for e in study.client.search_experiments()] == ["paretorch/blobs", "Default"]


def test_another_store(study: SimpleNamespace, fresh: Path, tmp_path: Path) -> None:
    study.log()
    (tmp_path / "team").mkdir()
    (tmp_path / "team" / "mlflow.db").write_bytes((fresh / "mlflow.db").read_bytes())
    uri = local_store(tmp_path / "team")[0]
    registered = register(study.front, study.best, "small", "champion", uri)
    assert registered.store == uri
    assert registered.files.is_relative_to(tmp_path / "team")
    assert mlflow.MlflowClient(uri, uri).get_model_version_by_alias("small", "champion").version == 1
    assert not study.client.search_registered_models()
    assert register(study.front, study.best, "small", "champion", study.uri).store == study.uri
    assert study.client.get_model_version("small", 1).run_id, "the study's own store, by its address"


FIRST = [
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "create_registered_model",
    "create_model_version",
    "set_logged_model_tags",
    "log_outputs",
    "log_batch",
    "set_registered_model_alias",
]
AGAIN = ["create_model_version", "set_registered_model_alias"]


@pytest.mark.parametrize(("step", "versions"), [*((step, 0) for step in FIRST), *((step, 1) for step in AGAIN)])
def test_nothing_is_half_registered(
    study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, step: str, versions: int
) -> None:
    study.log()
    for _ in range(versions):
        register(study.front, study.best, "small", "champion")

    def fail(*_: object, **__: object) -> None:
        raise mlflow.MlflowException("no room")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, step, fail)
        with pytest.raises(StudyError, match=r"MLflow store .* refused: no room"):
            register(study.front, study.best, "small", "champion")
    assert len(logged_models(study)) == len(study.client.search_model_versions()) == versions
    assert [m.aliases for m in study.client.search_registered_models()] == [{"champion": 1}] * versions
    registered = register(study.front, study.best, "small", "champion")
    assert study.client.get_registered_model("small").aliases == {"champion": int(registered.version)}


@pytest.mark.parametrize(
    ("name", "alias", "told"),
    [
        ("", None, "--name '': write letters"),
        ("a/b", None, "--name 'a/b'"),
        ("a:b@c", None, "--name 'a:b@c'"),
        ("it's", None, "--name"),
        (" a", None, "--name"),
        ("a ", None, "--name"),
        ("..", None, "--name"),
        ("a\n", None, "--name"),
        ("a" * 251, None, "250 at most"),
        ("a", "", "--alias ''"),
        ("a", "the best", "--alias 'the best': write letters"),
        ("a", "Latest", "MLflow keeps 'latest' and 'v' before a number for itself"),
        ("a", "v12", "such as champion"),
        ("a/b", "v12", "2 problems"),
    ],
)
def test_names_that_cannot_be_used(study: SimpleNamespace, name: str, alias: str | None, told: str) -> None:
    with pytest.raises(ConfigError, match="registered model: ") as error:
        register(study.front, study.best, name, alias)
    assert told in str(error.value)
    assert not (study.folder / "mlartifacts").exists()


def test_what_cannot_be_registered(study: SimpleNamespace, tmp_path: Path) -> None:
    study.log()
    with pytest.raises(StudyError, match="file of candidate 2 was not kept, because others beat it; kept: 1"):
        register(study.front, study.gone, "small")
    with pytest.raises(StudyError, match="no MLflow server answers"):
        register(study.front, study.best, "small", uri="http://127.0.0.1:9")
    with pytest.raises(StudyError, match="no file store"):
        register(study.front, study.best, "small", uri="./mlruns")
    moved = study.folder.rename(tmp_path / "moved")
    with pytest.raises(StudyError, match=r"holds no run of the study in .*; the same search brings it there again"):
        register(
            Front(study.front.candidates, study.front.objectives, study.front.budget, study.front.baseline, moved),
            study.best,
            "small",
        )
    uri = local_store(moved)[0]
    assert not mlflow.MlflowClient(uri, uri).search_registered_models()


def test_the_code_that_is_registered_needs_little() -> None:
    tree = ast.parse(CODE.read_text())
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    tops = {alias.name.split(".")[0] for node in named if isinstance(node, ast.Import) for alias in node.names}
    tops |= {(node.module or "").split(".")[0] for node in named if isinstance(node, ast.ImportFrom)}
    assert not any(node.level for node in named if isinstance(node, ast.ImportFrom))
    assert tops - sys.stdlib_module_names == {"mlflow", "numpy", "onnxruntime"}


def sums(layers: int) -> bytes:
    """A network that adds up products of uint8 and int8 in some layers, all with the same weights."""
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.full((64, 16), 127, np.int8), "w")
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 64])
    outputs = [helper.make_tensor_value_info(f"y{n}", TensorProto.INT32, [1, 16]) for n in range(layers)]
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], [f"y{n}"]) for n in range(layers)]
    graph = helper.make_graph(nodes, "sums", [x], outputs, [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


CONFIG = {"threads": 1, "disabled_optimizers": DISABLED_OPTIMIZERS}


def test_the_registered_code_adds_up_8_bit_products_exactly() -> None:
    (total,) = _session(sums(1), CONFIG).run(None, {"x": np.full((1, 64), 255, np.uint8)})
    assert (total == 64 * 255 * 127).all(), "they saturate at 16 bits"


def test_the_registered_code_loads_layers_that_share_weights() -> None:
    """Where it makes products exact (x86 without VNNI), ONNX Runtime refuses two layers with one tensor."""
    first, second = _session(sums(2), CONFIG).run(None, {"x": np.ones((1, 64), np.uint8)})
    assert (first == 64 * 127).all()
    assert (second == 64 * 127).all()


def test_the_registered_code_raises_what_else_onnx_runtime_refuses() -> None:
    with pytest.raises(Exception, match="INVALID_PROTOBUF"):
        _session(b"no network", CONFIG)
