"""Studies on other targets, and a front that is measured again on one: real files of a network of two layers."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paretorch.errors import ConfigError, StudyError
from paretorch.objectives.measurement import Estimate
from paretorch.results.front import open_front
from paretorch.results.retarget import retarget, table_rows
from paretorch.results.tracking.tracker import add_targets
from paretorch.runners.targets.catalog import as_target
from paretorch.runners.targets.roofline import Profile, analytic
from paretorch.runners.task import Task
from paretorch.search.listener import Quiet
from paretorch.search.study import Study
from paretorch.search.support import check_supported, within
from paretorch.spaces.defaults import default_space
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.structure import Layer, Structure
from paretorch.spaces.techniques.quantize import Quantize

SPACE = Space(weight_bits=(Rule((4, 8)),), activation_bits=(Rule((8, 32), share=True),), channels=(Rule((0.0, 0.5)),))
NPU = analytic(Profile("npu", {"4x8": 8e9, "8x8": 4e9, "32x32": 1e9}, 1e8, 1e9, layer_seconds=1e-6))
STRUCTURE = Structure(tuple(Layer(name, "conv", (8, 8, 3, 3), 1000) for name in ("a", "b", "c", "d", "e")))


def task():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 1, 6, 6, generator=generator)
    labels = torch.randint(0, 4, (200,), generator=generator)
    x = centres[labels] + torch.randn(200, 1, 6, 6, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(net(x[:100]), labels[:100]).backward()
            optimizer.step()
    data = TensorDataset(x, labels)
    return Task("blobs", net.eval, train=data, validation=data)


class Listener(Quiet):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def search(directory, trials=8, **more):
    settings = {"seconds": 0.002, "calibration_images": 32, "mlflow": False} | more
    return Study(task(), directory=directory, **settings).run(trials=trials)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A study that ONNX Runtime measured; the tests only read it."""
    folder = tmp_path_factory.mktemp("searched") / "blobs"
    search(folder, space=SPACE, objectives=["accuracy", "size_bytes", "latency_ms"])
    return folder


# ------------------------------------------------------------------------------------------------ studies on a target


def test_a_choice_that_cannot_run_is_refused_with_its_layers_and_the_reason(tmp_path):
    with pytest.raises(ConfigError) as caught:
        search(tmp_path / "s", space=SPACE, target="torch")
    assert caught.value.source == "space, on the target torch"
    assert [p.split(":")[0] for p in caught.value.problems] == [
        "weights 4 bit, activations 8 bit on 0, 3",
        "weights 8 bit, activations 8 bit on 0, 3",
    ]
    assert "no kernels for 8-bit activations" in caught.value.problems[0]
    assert not (tmp_path / "s").exists()


def test_only_some_pairs_of_widths_are_refused():
    space = Space(weight_bits=(Rule((4, 8, 32)), Rule((3, 8), ("b",))), activation_bits=(Rule((8, 32)),))
    with pytest.raises(ConfigError) as caught:
        check_supported(space, STRUCTURE, NPU)
    assert [p.split(": npu has no unit")[0] for p in caught.value.problems] == [
        "weights 3 bit on b",
        "weights 3 bit, activations 8 bit on b",
        "weights 4 bit on a, c, d and 1 more",
        "weights 8 bit on a, b, c and 2 more",
    ]
    check_supported(replace(space, weight_bits=(Rule((4, 8, 32)),), activation_bits=(Rule((8,)),)), STRUCTURE, NPU)


def test_a_target_is_asked_about_affine_weights_at_the_widths_that_have_them():
    """The first width of a space, at which the others are tried, has none here."""

    def supports(step):
        return "no zero points" if isinstance(step, Quantize) and step.scheme == "affine" else None

    space = Space(weight_bits=(Rule((32, 1, 4)),), scheme=(Rule(("symmetric", "affine"), share=True),))
    target = replace(as_target("onnxruntime"), name="old", supports=supports)
    with pytest.raises(
        ConfigError, match=r"weights 4 bit \(affine\) on a, b, c and 2 more: no zero points; leave that out"
    ):
        check_supported(space, STRUCTURE, target)
    check_supported(replace(space, weight_bits=(Rule((32, 1, 16)),)), STRUCTURE, target)


def test_a_derived_space_leaves_out_what_cannot_run():
    derived = default_space(STRUCTURE, 1000)
    kept, gone = within(derived, STRUCTURE, NPU)
    assert [rule.choices for rule in kept.weight_bits + kept.activation_bits] == [(4, 8), (8,), (8,)]
    assert gone == ["weights 3, 6 bit", "activations 32 bit"]
    kept, gone = within(derived, STRUCTURE, as_target("torch"))
    assert (kept.weight_bits, gone) == (derived.weight_bits, ["activations 8 bit"])
    assert within(derived, STRUCTURE, as_target("onnxruntime")) == (derived, [])
    weight_only = analytic(Profile("w", {"8x8": 1, "4x32": 1, "32x32": 1}, 1, 1))
    kept, _ = within(derived, STRUCTURE, weight_only)
    check_supported(kept, STRUCTURE, weight_only)
    nothing = analytic(Profile("n", {"32x32": 1}, 1, 1))
    kept, _ = within(derived, STRUCTURE, nothing)
    assert kept.weight_bits == ()
    check_supported(kept, STRUCTURE, nothing)


def test_a_study_on_a_profile_is_exact_and_goes_on(tmp_path):
    heard = Listener()
    front = search(tmp_path / "s", target=NPU, objectives=["accuracy", "latency_ms"], listener=heard)
    assert "target    npu cannot run the trivial baselines fp16, uniform 6-bit" in heard.said
    for candidate in front.candidates:
        latency = candidate.measurement.metrics["latency_ms"]
        assert latency == Estimate.exact(latency.value)
        assert not any(map(NPU.supports, candidate.recipe.steps))
    stored = json.loads((tmp_path / "s" / "study.json").read_text())
    assert stored["snapshot"]["measure"]["target"] == NPU.profile
    longer = search(tmp_path / "s", 9, target=NPU, objectives=["accuracy", "latency_ms"])
    assert longer.candidates[:8] == front.candidates
    assert len(longer.candidates) == 9
    faster = analytic(Profile("npu", {"4x8": 9e9, "8x8": 4e9, "32x32": 1e9}, 1e8, 1e9, layer_seconds=1e-6))
    with pytest.raises(StudyError, match="another configuration"):
        search(tmp_path / "s", 9, target=faster, objectives=["accuracy", "latency_ms"])


def test_a_study_of_onnx_runtime_is_written_as_before_there_were_targets(searched):
    stored = json.loads((searched / "study.json").read_text())
    assert stored["snapshot"]["measure"] == {"threads": 1, "batch": 1, "seconds": 0.002, "calibration_images": 32}
    with pytest.raises(StudyError, match=r"measure: .*then, \{\"target\": \"torch\""):
        search(searched, space=replace(SPACE, activation_bits=()), target="torch")


# --------------------------------------------------------------------------------------------------------- retarget


def test_the_front_on_the_same_runtime_is_the_same_network(searched):
    found = retarget(searched, as_target("onnxruntime"))
    front = open_front(searched)
    assert [m.number for m in found.members] == [c.number for c in front.members]
    for member in found.members:
        assert member.ratio.low <= member.ratio.value <= member.ratio.high
        assert member.latency_ms.value == pytest.approx(member.ratio.value * found.baseline_ms.value)
        assert (member.agreement.inputs, member.agreement.top1, member.agreement.difference) == (256, 1.0, 0.0)
    assert any(member.on_front for member in found.members)
    assert found.inputs == "256 made-up inputs (normal)"


def test_what_cannot_run_there_is_told_and_not_on_the_front(searched):
    found = retarget(searched, as_target("torch"))
    assert {m.number for m in found.members} == {c.number for c in open_front(searched).members}
    for member, candidate in zip(found.members, open_front(searched).members, strict=True):
        int8 = any(step.activation_bits == 8 for step in candidate.recipe.of(Quantize))
        assert (member.ratio is None) == int8
        assert not (int8 and member.on_front)
        assert ("no kernels" in member.reason) == int8
        if not int8:
            assert member.agreement.top1 == 1.0
            assert member.agreement.difference < 1e-4


def test_the_front_there_is_decided_by_the_latency_there(searched):
    """On the profile latency is exact, so that the front can be told by hand."""
    found = retarget(searched, replace(NPU, supports=lambda step: None))
    front, there = open_front(searched), {m.number: m for m in found.members if m.ratio}
    assert len(there) > 1
    assert not found.timed
    assert all(member.agreement is None for member in there.values())
    known = {c.number: c.measurement for c in front.members}

    def point(number):
        return (-known[number].value("accuracy"), known[number].value("size_bytes"), there[number].latency_ms.value)

    for number, member in there.items():
        others = [point(n) for n in there if n != number]
        beaten = any(all(a <= b for a, b in zip(o, point(number), strict=True)) and o != point(number) for o in others)
        assert member.on_front == (not beaten), number
        assert member.ratio == Estimate.exact(member.latency_ms.value / found.baseline_ms.value)
    best = min(there.values(), key=lambda m: m.latency_ms.value).latency_ms.value
    assert any(there[number].latency_ms.value == best for number in found.pareto)


def test_limits_hold_there_too(searched, tmp_path):
    """Nothing is a thousand times as fast as the baseline of that target."""
    copy = tmp_path / "copy"
    import shutil

    shutil.copytree(searched, copy)
    stored = json.loads((copy / "study.json").read_text())
    stored["snapshot"]["budget"] = ["latency_ms <= 0.1%"]
    (copy / "study.json").write_text(json.dumps(stored))
    found = retarget(copy, replace(NPU, supports=lambda step: None))
    assert {m.reason for m in found.members} == {"over latency_ms <= 0.1%"}
    assert not any(m.on_front for m in found.members)
    assert found.judged_by == ("accuracy", "size_bytes", "latency_ms")


def test_with_the_task_the_metric_is_measured_there(searched):
    real = as_target("onnxruntime")
    turned = replace(real, name="turned", load=lambda data, threads: lambda batch: -real.load(data, threads)(batch))
    for target, low, high in ((real, 0.8, 1.0), (turned, 0.0, 0.3)):
        found = retarget(searched, target, task())
        assert all(low <= member.metric.value <= high for member in found.members)
        assert found.inputs == "200 inputs of the validation split"
    assert all(member.agreement.top1 < 0.3 for member in found.members)
    other = Task("other", lambda: None, *[TensorDataset(torch.zeros(8, 3), torch.zeros(8))] * 2)
    with pytest.raises(StudyError, match=r"has inputs of shape \[3\], and the study's files take \[1, 6, 6\]"):
        retarget(searched, real, other)


def test_files_that_are_gone(searched, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(searched, copy)
    member = open_front(copy).members[0]
    (copy / "candidates" / f"{member.recipe.key}.safetensors").unlink()
    found = retarget(copy, as_target("onnxruntime"))
    assert [m.reason for m in found.members if m.ratio is None] == ["its file is not there any more"]
    (copy / "baseline.safetensors").unlink()
    with pytest.raises(StudyError, match=r"baseline.safetensors is missing"):
        retarget(copy, as_target("onnxruntime"))
    with pytest.raises(StudyError, match="there is no study"):
        retarget(tmp_path, as_target("onnxruntime"))


def test_what_was_found_is_written_and_logged(searched, directory):
    import shutil

    home = directory / "blobs"
    shutil.copytree(searched, home)
    search(
        home,
        mlflow=f"sqlite:///{directory / 'mlflow.db'}",
        space=SPACE,
        objectives=["accuracy", "size_bytes", "latency_ms"],
    )
    found = retarget(home, NPU)
    path = found.write(home)
    assert path == home / "targets" / "npu.json"
    data = json.loads(path.read_text())
    assert (data["version"], data["target"], data["found_on"]) == (1, "npu", "onnxruntime")
    assert data["environment"]["profile"].startswith("npu, sha256 ")
    assert len(data["members"]) == len(found.members) == len(table_rows(data))
    assert add_targets(home, f"sqlite:///{directory / 'mlflow.db'}")
    (there,) = directory.glob("mlartifacts/**/targets")
    assert {p.name for p in there.iterdir()} == {"npu.json", "npu_table.json"}
    assert (there / "npu.json").read_text() == path.read_text()
    table = json.loads((there / "npu_table.json").read_text())
    assert table["columns"][:3] == ["number", "on front", "ratio before"]
    assert not add_targets(searched)
