"""The profile of an accelerator: the ready one, and every mistake in another."""

from pathlib import Path

import pytest

import paretorch
from paretorch.configs.accelerator import load_target
from paretorch.configs.load import parse
from paretorch.errors import ConfigError, TargetError
from paretorch.runners.targets.catalog import TARGETS
from paretorch.spaces.techniques.quantize import Quantize

READY = Path(paretorch.__file__).parent / "configs" / "accelerators" / "edge_npu.yaml"


def test_the_ready_profile_is_what_its_comments_say():
    target = load_target(str(READY))
    assert target.name == "edge-npu"
    assert target.profile == {
        "name": "edge-npu",
        "operations": {"4x8": 8e12, "8x8": 4e12, "16x32": 2.5e11, "32x32": 2.5e11},
        "weight_bytes": 8e9,
        "activation_bytes": 6.4e10,
        "shared": False,
        "layer_seconds": 2e-6,
    }
    assert target.supports(Quantize("fc", 4, 8)) is None
    assert "it has 4x8, 8x8, 16x32, 32x32" in target.supports(Quantize("fc", 3, 8))


def test_one_memory_is_shared_and_numbers_may_be_written_shortly(tmp_path):
    (tmp_path / "p.yaml").write_text("name: p\noperations_per_second: {32x32: 1e9}\nbytes_per_second: 2e9\n")
    profile = load_target("p.yaml", tmp_path).profile
    assert (profile["shared"], profile["weight_bytes"], profile["activation_bytes"]) == (True, 2e9, 2e9)
    assert profile["operations"] == {"32x32": 1e9}


def test_all_mistakes_are_told_at_once(tmp_path):
    text = (
        "name: a b\noperations_per_second: {8x8: -1, 32x32: fast}\nbytes_per_second: {weights: yes, activation: 3}\n"
        "second_per_layer: 1\n"
    )
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_target("bad.yaml", tmp_path)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 7, told
    for part in (
        "name: name 'a b': use letters",
        "operations_per_second.8x8 = -1: must be greater than 0",
        "operations_per_second.32x32 = 'fast': must be a number",
        "bytes_per_second.weights = True: must be a number",
        "bytes_per_second.activations: is required",
        "did you mean 'activations'?",
        "did you mean 'seconds_per_layer'?",
    ):
        assert part in told, told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("operations_per_second: {8x8: 1}\nbytes_per_second: 1", "the pair 32x32 is missing"),
        ("operations_per_second: {eight: 1, 32x32: 1}\nbytes_per_second: 1", "'eight': write pairs of widths"),
        ("operations_per_second: {32x32: 1}\nbytes_per_second: much", "bytes_per_second = 'much': must be a number"),
        ("operations_per_second: {32x32: 1}\nbytes_per_second: .inf", "must be a finite number"),
        ("operations_per_second: !!python/object/apply:os.system [true]\nbytes_per_second: 1", "is not valid YAML"),
        (
            "name: torch\noperations_per_second: {32x32: 1}\nbytes_per_second: 1",
            "a target of that name is there already",
        ),
    ],
)
def test_a_mistake_is_told(text, told, tmp_path):
    (tmp_path / "p.yaml").write_text(text if text.startswith("name") else f"name: p\n{text}")
    with pytest.raises(ConfigError, match=told):
        load_target("p.yaml", tmp_path)


def test_a_profile_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file; .*edge_npu.yaml is an example"):
        load_target("nowhere.yaml", tmp_path)
    with pytest.raises(TargetError, match="did you mean 'openvino'"):
        load_target("openvno")


def test_the_configuration_knows_the_targets():
    for name in TARGETS:
        assert parse({"task": "t.py:task", "measure": {"target": name}}).measure.target == name
    assert parse({"task": "t.py:task", "measure": {"target": "mine.yaml"}}).measure.target == "mine.yaml"
    with pytest.raises(ConfigError, match=r"measure.target: target 'openvno': choose from .*; did you mean 'openvino'"):
        parse({"task": "t.py:task", "measure": {"target": "openvno"}})
