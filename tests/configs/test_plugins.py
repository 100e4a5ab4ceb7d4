"""The user's function: found, called, and every mistake told with its place."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paretorch import Task
from paretorch.configs.load import parse
from paretorch.configs.plugins import load_task
from paretorch.errors import ConfigError, TaskError

GOOD = """
import torch
from torch.utils.data import Dataset
from paretorch import Task

class Points(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return torch.full((4,), float(index)), index % 2

def task():
    return Task("tiny", lambda: torch.nn.Linear(4, 2), train=Points(), validation=Points())
"""


@pytest.fixture(autouse=True)
def _same_path(monkeypatch):
    """What `load_task` adds to sys.path is taken off again."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def from_file(folder: Path, code: str, task: str = "my_task.py:task") -> Task:
    (folder / "my_task.py").write_text(code)
    return load_task(parse({"task": task}, folder / "study.yaml"))


def refused(folder: Path, code: str, task: str = "my_task.py:task") -> TaskError:
    with pytest.raises(TaskError) as caught:
        from_file(folder, code, task)
    return caught.value


def test_a_function_in_a_file(tmp_path):
    assert from_file(tmp_path, GOOD).name == "tiny"


def test_a_file_is_imported_once_until_it_changes(tmp_path):
    first = type(from_file(tmp_path, GOOD).train)
    assert type(from_file(tmp_path, GOOD).train) is first
    assert type(from_file(tmp_path, GOOD + "\n# edited").train) is not first


def test_two_files_of_one_name_do_not_meet(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert from_file(tmp_path / "a", GOOD).name == "tiny"
    assert from_file(tmp_path / "b", GOOD.replace('"tiny"', '"other"')).name == "other"


def test_what_it_defines_can_be_pickled(tmp_path):
    data = from_file(tmp_path, GOOD).train
    assert len(pickle.loads(pickle.dumps(data))) == 8


def test_it_works_with_loader_workers(tmp_path):
    from torch.utils.data import DataLoader

    batches = list(DataLoader(from_file(tmp_path, GOOD).train, batch_size=4, num_workers=1))
    assert [tuple(x.shape) for x, _ in batches] == [(4, 4), (4, 4)]


def test_it_imports_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_my_task.py").write_text("NAME = 'from next door'")
    code = GOOD.replace("def task():", "def task():\n    from neighbour_of_my_task import NAME").replace(
        '"tiny"', "NAME"
    )
    assert from_file(tmp_path, code).name == "from next door"


def test_a_function_in_a_module(tmp_path):
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "tasks.py").write_text(GOOD)
    assert load_task(parse({"task": "package_of_mine.tasks:task"}, tmp_path / "study.yaml")).name == "tiny"


def test_a_file_that_does_not_exist(tmp_path):
    message = str(refused(tmp_path, GOOD, "my_tsk.py:task"))
    assert f"{tmp_path / 'my_tsk.py'} does not exist; did you mean my_task.py?" in message
    message = str(refused(tmp_path, GOOD, "elsewhere/x.py:task"))
    assert "Python files there: none" in message


def test_a_function_that_does_not_exist(tmp_path):
    error = refused(tmp_path, GOOD + "\ndef _hidden(): pass\ndef other(): pass\n", "my_task.py:tsk")
    assert "my_task.py has no function 'tsk'; did you mean 'task'? functions there: task, other" in str(error)


def test_a_module_that_does_not_exist(tmp_path):
    error = refused(tmp_path, GOOD, "no_such_package.tasks:task")
    assert "task module 'no_such_package.tasks' is not found" in str(error)


def test_a_module_that_imports_something_missing(tmp_path):
    (tmp_path / "broken_module_of_mine.py").write_text("\nimport not_installed_here")
    error = refused(tmp_path, GOOD, "broken_module_of_mine:task")
    assert "broken_module_of_mine cannot be imported: ModuleNotFoundError: No module named 'not_installed_here'" in str(
        error
    )
    assert "broken_module_of_mine.py, line 2" in str(error)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os\nx = 1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero"),
        ("import os\ndef f(:\n", "cannot be imported: SyntaxError: invalid syntax"),
        ("import os\nimport not_installed_here\n", "ModuleNotFoundError: No module named 'not_installed_here'"),
        ("import sys\nsys.exit('stop')\n", "cannot be imported: SystemExit: stop"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path, code, message):
    error = refused(tmp_path, code)
    assert message in str(error)
    assert "my_task.py, line 2" in str(error)
    assert error.__cause__ is not None
    assert not [
        name
        for name in sys.modules
        if name.startswith("paretorch_task_")
        and "my_task" in name
        and getattr(sys.modules[name], "__file__", "").startswith(str(tmp_path))
    ]


def test_an_exception_in_the_function(tmp_path):
    code = "import json\n\ndef task():\n    return json.loads('{')\n"
    error = refused(tmp_path, code)
    assert "task() failed: JSONDecodeError: Expecting property name" in str(error)
    assert f"{tmp_path / 'my_task.py'}, line 4, in task" in str(error), "the user's line, not json's"
    assert isinstance(error.__cause__, ValueError)


def test_paretorchs_own_errors_pass_through(tmp_path):
    error = refused(tmp_path, GOOD.replace("lambda: torch.nn.Linear(4, 2)", "torch.nn.Linear(4, 2)"))
    assert "model must be a function that returns the network" in str(error)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def task(): pass", "task() returned None; it must return a paretorch.Task"),
        ("def task(): return {}", "task() returned a dict; it must return a paretorch.Task"),
        ("task = 3", "task is a int, not a function; define `def task():`"),
        ("def task(path): pass", "task is called without arguments, but missing a required argument: 'path'"),
    ],
)
def test_a_function_that_is_no_task_function(tmp_path, code, message):
    assert message in str(refused(tmp_path, code))


def test_reading_a_configuration_imports_nothing_heavy():
    code = (
        "import sys, paretorch.configs.load, paretorch.configs.plugins, paretorch.configs.init;"
        "print([m for m in ('torch', 'torchvision', 'optuna', 'mlflow', 'numpy', 'sklearn') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


RULES = """
def score(weight, norms):
    return weight.abs()

def of_one(weight):
    return weight
"""


def with_criterion(tmp_path, criterion):
    (tmp_path / "my_task.py").write_text(GOOD)
    (tmp_path / "rules.py").write_text(RULES)
    data = {"task": "my_task.py:task", "space": {"sparsity": [0.5], "criterion": ["magnitude", criterion]}}
    return load_task(parse(data, tmp_path / "study.yaml"))


def test_a_criterion_of_the_users_comes_with_the_task(tmp_path):
    found = with_criterion(tmp_path, "rules.py:score").criteria
    assert list(found) == ["rules.py:score"]
    assert found["rules.py:score"](torch.tensor([-2.0]), None) == 2


def test_a_criterion_that_cannot_be_called_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"of_one is called with \(weight, norms\), but too many positional arguments"):
        with_criterion(tmp_path, "rules.py:of_one")
    with pytest.raises(TaskError, match="has no function 'scor'; did you mean 'score'"):
        with_criterion(tmp_path, "rules.py:scor")
    with pytest.raises(ConfigError, match=r"write FILE\.py:FUNCTION"):
        with_criterion(tmp_path, "rules.py:")
    with pytest.raises(ConfigError, match="did you mean 'taylor'"):
        with_criterion(tmp_path, "tailor")
