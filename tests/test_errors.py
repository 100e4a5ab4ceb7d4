"""The tree of errors, and what each carries."""

import copy
import inspect
import pickle
import re

import pytest

from paretorch import errors
from paretorch.errors import ConfigError, Diverged, ExportFailed, OverBudget, ParetorchError, StudyError, TrialError


def test_the_drawn_tree_is_the_real_one():
    """Indentation and `|-` in the module's docstring give the parent of each class."""
    drawn = {}
    branch: dict[int, str] = {}
    for line in errors.__doc__.splitlines():
        name = re.match(r"[ |`-]*([A-Z]\w+)", line)
        if name and hasattr(errors, name[1]):
            branch = {depth: above for depth, above in branch.items() if depth < name.start(1)}
            drawn[name[1]] = branch[max(branch)] if branch else "Exception"
            branch[name.start(1)] = name[1]
    real = {
        name: value.__bases__[0].__name__
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert drawn == real


def test_a_config_error_lists_all_problems():
    error = ConfigError(["search.trials: -1", "space.dpeth: unknown key"], "study.yaml")
    assert str(error) == "study.yaml: 2 problems\n  - search.trials: -1\n  - space.dpeth: unknown key"
    assert str(ConfigError("task: missing")) == "configuration: 1 problem\n  - task: missing"
    assert ConfigError("task: missing").problems == ["task: missing"]


@pytest.mark.parametrize(
    "error",
    [
        ConfigError(["one", "two"], "study.yaml"),
        OverBudget("too large", {"size_bytes <= 25%": 0.5}),
        Diverged("loss is nan"),
        ExportFailed("no operator"),
        StudyError("locked"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    "duplicate", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"]
)
def test_an_error_survives_the_way_out_of_a_process(error, duplicate):
    other = duplicate(error)
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)


def test_over_budget_owns_its_excess():
    excess = {"size_bytes <= 25%": 0.5}
    error = OverBudget("too large", excess)
    excess.clear()
    assert error.excess == {"size_bytes <= 25%": 0.5}
    assert issubclass(OverBudget, TrialError)
    assert issubclass(TrialError, ParetorchError)
