"""The targets by name: each is made from its line, what is missing is told, and the names cost nothing to import."""

import subprocess
import sys
from importlib import import_module

import pytest

from paretorch.errors import TargetError
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.catalog import DEFAULT, TARGETS, as_target


@pytest.mark.parametrize("name", TARGETS)
def test_each_line_names_a_function_of_a_file(name):
    entry = TARGETS[name]
    assert callable(getattr(import_module(f"paretorch.runners.targets.{entry.module}"), entry.function))


@pytest.mark.parametrize("name", [DEFAULT, "torch"])
def test_a_target_has_the_name_that_it_was_asked_for_by(name):
    target = as_target(name)
    assert target.name == target.spec == name
    assert as_target(target) is target
    assert target.calling_thread == TARGETS[name].on_cpu


@pytest.mark.parametrize("name", TARGETS)
def test_records_call_a_target_by_its_title(name):
    assert MeasurementSettings(target=name).runtime == TARGETS[name].title


def test_a_missing_runtime_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TargetError, match=r"pip install 'paretorch\[openvino\]'"):
        as_target("openvino")


def test_an_unknown_target_names_the_known_ones():
    with pytest.raises(TargetError, match=r"no target 'openvin'; choose from onnxruntime, openvino, torch, "
        r"torch-cuda, .*did you mean 'openvino'"):  # fmt: skip  # the message in one piece
        as_target("openvin")
    with pytest.raises(TargetError, match="not the profile of an accelerator"):
        as_target({"name": "npu", "speed": 3})


def test_the_names_need_no_runtime():
    code = "import sys, paretorch.runners.targets.catalog; print({'numpy', 'torch', 'onnxruntime'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
