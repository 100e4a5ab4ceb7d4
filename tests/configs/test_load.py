"""Reading a file: overrides, paths, and every problem in one error."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import paretorch
from paretorch import ConfigError
from paretorch.configs.load import apply_override, load, parse

CONFIGS = Path(paretorch.__file__).parent / "configs"


def write(folder: Path, text: str, name: str = "study.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert caught.value.source == str(path)
    return caught.value.problems


def problem(path: Path, *overrides: str) -> str:
    found = problems(path, *overrides)
    assert len(found) == 1, found
    return found[0]


def test_the_name_is_that_of_the_file(tmp_path):
    assert load(write(tmp_path, "task: t.py:task", "my first try.yaml")).name == "my-first-try"
    assert load(write(tmp_path, "task: t.py:task\nname: other")).name == "other"
    assert load(write(tmp_path, "task: t.py:task\nname:")).name == "study"


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    write(folder, "task: t.py:task\noutput: ../results")
    config = load(Path("configs/study.yaml"))
    assert config.source == folder / "study.yaml"
    assert config.path("t.py") == folder / "t.py"
    assert config.path("../data") == tmp_path / "data"
    assert config.path("/data") == Path("/data")
    assert config.path("~/data") == Path.home() / "data"
    assert config.directory == tmp_path / "results"
    assert load(Path("configs/study.yaml"), ["output=null"]).directory == tmp_path / "studies" / "study"


@pytest.mark.parametrize("name", ["digits.yaml", "mobilenet_folder.yaml"])
def test_the_ready_configurations_load(name):
    assert load(CONFIGS / name).source == CONFIGS / name


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    assert "there is no such file; `paretorch init DIR`" in problem(tmp_path / "study.yaml")
    write(tmp_path, "task: t.py:task", "studies.yaml")
    assert f"did you mean {tmp_path / 'studies.yaml'}?" in problem(tmp_path / "study.yaml")


def test_a_folder_in_place_of_a_file(tmp_path):
    write(tmp_path, "task: t.py:task")
    assert "is a folder; name one of its files (study.yaml)" in problem(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    # The operating system's refusal: a file's mode would not do where the tests run as root.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "cannot be read: Permission denied" in problem(write(tmp_path, "task: t.py:task"))


def test_another_encoding(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_bytes("name: café".encode("latin-1"))
    assert "is not UTF-8 text (byte 9)" in problem(path)
    path.write_bytes("\ufefftask: t.py:task".encode())
    assert load(path).task == "t.py:task"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [1, 2\nname: x", "is not valid YAML: line 2, column 5"),
        ("task: t.py:task\n\tname: x", "indent with spaces, not tabs"),
        ("name: a\ntask: t.py:task\nname: b", "line 3, column 1: the key 'name' is given twice"),
        ("task: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("a: 1\n---\na: 2", "expected a single document"),
        ("[" * 5000, "nested too deeply"),
        ("task: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("", "is empty; it needs at least `task:"),
        ("# nothing but a comment", "is empty"),
        ("- task", "must hold `key: value` lines (a mapping) at the top level, not ['task']"),
        ("just text", "not 'just text'; start with `task:`"),
    ],
)
def test_a_file_that_holds_no_mapping(tmp_path, text, message):
    assert message in problem(write(tmp_path, text))


# --- the keys ---------------------------------------------------------------------------------------------------------


def test_all_problems_at_once(tmp_path):
    path = write(
        tmp_path,
        """
task: {model: 3, wieghts: x, data: {size: a, mean: [1], split: [0.5, 0.5, 0.5]}}
nme: x
objectives: [accuracy, lowest size_bytes now]
budget: [size_bytes <=, accuracy >= 5%, {size_bytes: 25%}]
space:
  weight_bits: [3, 9]
  activation_bits: [{layers: 3, choices: [8, 12], shre: true}]
  sparsity: [0.5, 1, 2:4, "4:2"]
  rounding: [nearest, gtpq]
  channels: 0.5
  width: [0]
  depth: [yes, -1]
  students: [5, {name: s, epochs: -1}, a b]
  recovery: [bn, {finetune: {epochs: 0, lr: 1}}, 3]
search: {sampler: tpee, trials: 0, time: 1:30, seed: 1.5}
measure: {threads: many, batch: null, seconds: .nan, calibration_images: 8}
mlflow: sqlite
output: 3
""",
    )
    found = problems(path, "serach.trials=3", "search.seed.x=1")
    for expected in [
        "--set 'search.seed.x=1': search.seed is 1.5, which has no key 'x'",
        "serach = {'trials': 3}: unknown key; did you mean 'search'? keys here: name, task, objectives",
        "nme = 'x': unknown key; did you mean 'name'?",
        "task.model = 3: must be a text; put it in quotes",
        "task.wieghts = 'x': unknown key; did you mean 'weights'? keys here: model, weights, classes, data, batch_size",
        "task.data.size = 'a': must be a whole number",
        "task.data.mean = [1]: must have 3 numbers, one per channel",
        "task.data.split = [0.5, 0.5, 0.5]: must add up to 1",
        "exactly one of `folder: images/` and `dataset: CIFAR10` says where the images are; neither is given",
        "objectives.1: objective 'lowest size_bytes now': write a metric",
        "budget.0: limit 'size_bytes <=': write METRIC <= NUMBER",
        "budget.1: limit 'accuracy >= 5%'",
        "budget.2 = {'size_bytes': '25%'}: must be a text",
        "space.weight_bits.1 = 9: choose from 1, 2, 3, 4, 5, 6, 7, 8, 16, 32",
        "space.activation_bits.0.layers = 3: must be a list",
        "space.activation_bits.0.choices.1 = 12: choose from 4, 8, 16, 32",
        "space.activation_bits.0.shre = True: unknown key; did you mean 'share'? keys here: layers, share, choices",
        "space.sparsity.1 = 1: must be less than 1",
        "space.sparsity.2 = 124: must be less than 1; a pattern needs quotes, '2:4'",
        "space.sparsity.3: pattern '4:2': write N:M, such as 2:4",
        "space.rounding.1 = 'gtpq': choose from nearest, gptq, adaround; did you mean 'gptq'?",
        "space.channels = 0.5: must be a list of choices, or a list of rules {layers: ...",
        "space.width.0 = 0: must be greater than 0",
        "space.depth.0 = True: must be a number; YAML reads yes, no, on and off as true and false",
        "space.depth.1 = -1: must be greater than or equal to 0",
        "space.students.0 = 5: must be teacher, the name of a student, or {name: small, epochs: 8}",
        "space.students.1.epochs = -1: must be greater than or equal to 0",
        "space.students.2: student 'a b': use letters, digits and -_. only, as in Task(students={...})",
        "space.recovery.0 = 'bn': choose from none, batchnorm, statistics, finetune",
        "space.recovery.1.finetune.epochs = 0: must be greater than 0",
        "space.recovery.1.finetune.lr = 1: unknown key; keys here: epochs, learning_rate, distill, temperature, "
        "train, temperature_schedule, features, patience",
        "space.recovery.2 = 3: must be none, batchnorm, statistics or {finetune: {epochs: 1}}",
        "search.sampler = 'tpee': choose from ehvi, tpe, nsga2, nsga3, gp, random, qmc; did you mean 'tpe'?",
        "search.trials = 0: must be greater than or equal to 1",
        "search.time: duration '90'; the unit is missing",
        "search.seed = 1.5: must be a whole number",
        "measure.threads = 'many': must be a whole number",
        "measure.batch = None: must be a whole number",
        "measure.seconds = nan: must be a finite number",
        "measure.calibration_images = 8: must be greater than or equal to 16",
        "mlflow = 'sqlite': must be a mapping (`key: value` lines)",
        "output = 3: must be a text; put it in quotes",
    ]:
        assert any(expected in entry for entry in found), f"{expected!r} is not among\n" + "\n".join(found)
    assert len(found) == 42, "one problem each, and none twice"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "task: is required"),
        ("task: digits.py", "task 'digits.py': write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"),
        ("task: [a]", "must be FILE.py:FUNCTION, or a mapping that starts with model: mobilenet_v2"),
        ("{task: t.py:f, name: ../x}", "name '../x': use letters, digits and -_. only"),
        ("{task: t.py:f, name: no}", "name = False: must be a text; put it in quotes"),
        ("{task: t.py:f, budget: [size_bytes <= 1kB, size_bytes <= 5%]}", "budget: limits 'size_bytes <= 1kB' and"),
        ("{task: t.py:f, objectives: [accuracy, min accuracy]}", "holds 'accuracy' twice"),
        ("{task: t.py:f, objectives: []}", "must have at least one entry"),
        ("{task: t.py:f, space: {weight_bits: [4, 4]}}", "space.weight_bits = [4, 4]: holds 4 twice"),
        ("{task: t.py:f, space: {weight_bits: []}}", "space.weight_bits = []: must have at least one entry"),
        ("{task: t.py:f, space: {sparsity: [{layers: fc}]}}", "space.sparsity.0.choices: is required"),
        ("{task: t.py:f, 1: x}", "1"),
        ("{task: {model: resnet18}}", "task.data: is required"),
        ("{task: {model: resnet18, data: {folder: a, dataset: MNIST}}}", "both are given"),
        ("{task: {model: resnet18, data: {dataset: CIFAR}}}", "did you mean 'CIFAR10'?"),
        ("{task: {model: resnet18, data: {folder: a, std: [1, 1, 0]}}}", "task.data.std.2 = 0: must be greater than 0"),
        ("{task: {model: resnet18, data: {folder: a, augment: maybe}}}", "must be true or false"),
    ],
)
def test_one_problem(tmp_path, text, message):
    assert message in problem(write(tmp_path, text))


def test_a_long_value_is_cut_short():
    with pytest.raises(ConfigError) as caught:
        parse({"task": "t.py:f", "search": {"trials": "x" * 1000}})
    assert len(str(caught.value)) < 200


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_reach_every_place(tmp_path):
    path = write(tmp_path, "task: t.py:f\nspace: {weight_bits: [{choices: [4, 8]}, {choices: [8], layers: first}]}\n")
    config = load(
        path,
        [
            "search.trials=7",
            "space.weight_bits.1.choices=[6, 8]",
            "space.weight_bits.0.choices.0=3",
            "budget=size_bytes <= 25%",
            "measure.seconds=1e-1",
            "search.time=1h30m",
        ],
    )
    assert config.search.trials == 7
    assert [rule.choices for rule in config.to_space().weight_bits] == [(3, 8), (6, 8)]
    assert (config.budget, config.measure.seconds, config.search.time) == (("size_bytes <= 25%",), 0.1, 5400)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.trials", "write KEY=VALUE, such as search.trials=10"),
        ("=3", "write KEY=VALUE"),
        ("search..trials=3", "write KEY=VALUE"),
        ("task.model=x", "task is 't.py:f', which has no key 'model'"),
        ("space.width.2=0.5", "space.width is a list; '2' is none of its entries (0 to 1)"),
        ("space.width.half=0.5", "space.width is a list; 'half' is none of its entries"),
        ("space.width.-1=0.5", "is none of its entries"),
        ("budget.0=x <= 1", "budget is a list; '0' is none of its entries (none, it is empty)"),
        ("space.width=[1", "the value is not valid YAML: line 1"),
    ],
)
def test_an_override_that_leads_nowhere(tmp_path, override, message):
    path = write(tmp_path, "task: t.py:f\nbudget: []\nspace: {width: [1.0, 0.5]}")
    assert message in problem(path, override)


KEYS = st.text("abcdefgh_", min_size=1, max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.text("abc <=%:#'", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(KEYS, min_size=1, max_size=4), VALUES)
def test_an_override_sets_exactly_what_it_says(keys, value):
    data: dict = {}
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    apply_override(data, f"{'.'.join(keys)}={text}")
    for key in keys:
        assert list(data) == [key]
        data = data[key]
    assert data == value
