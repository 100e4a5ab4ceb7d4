"""paretorch searches bits x sparsity x architecture of a trained PyTorch network under a real budget.

    import paretorch
    front = paretorch.Study(task, budget=["size_bytes <= 25%"]).run(trials=40)
    front.export("knee", "deploy/")
    module = paretorch.load("deploy/")

Names are imported when they are first used, so that `import paretorch` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paretorch.configs.accelerator import load_target
    from paretorch.errors import ArtifactError, ConfigError, ParetorchError, TrialError
    from paretorch.objectives.measurement import Estimate, Measurement
    from paretorch.objectives.objective import Budget, Objective
    from paretorch.results.candidate import Candidate
    from paretorch.results.front import Front
    from paretorch.runners.artifact import load
    from paretorch.runners.check_target import check_target
    from paretorch.runners.targets.target import Target
    from paretorch.runners.task import Task, accuracy
    from paretorch.search.study import Study
    from paretorch.spaces.recipe import Recipe
    from paretorch.spaces.rules import Rule
    from paretorch.spaces.space import Space
    from paretorch.spaces.techniques.cluster import Cluster
    from paretorch.spaces.techniques.equalize import Equalize
    from paretorch.spaces.techniques.lowrank import LowRank
    from paretorch.spaces.techniques.prune import Prune
    from paretorch.spaces.techniques.quantize import Quantize
    from paretorch.spaces.techniques.recover import Recover
    from paretorch.spaces.techniques.sparsify import Sparsify
    from paretorch.spaces.techniques.student import Student

__version__ = "0.1.0"

_HOME = {
    "ArtifactError": "errors",
    "Budget": "objectives.objective",
    "Candidate": "results.candidate",
    "Cluster": "spaces.techniques.cluster",
    "ConfigError": "errors",
    "Equalize": "spaces.techniques.equalize",
    "Front": "results.front",
    "LowRank": "spaces.techniques.lowrank",
    "Measurement": "objectives.measurement",
    "Estimate": "objectives.measurement",
    "Objective": "objectives.objective",
    "ParetorchError": "errors",
    "Prune": "spaces.techniques.prune",
    "Quantize": "spaces.techniques.quantize",
    "Recipe": "spaces.recipe",
    "Recover": "spaces.techniques.recover",
    "Rule": "spaces.rules",
    "Space": "spaces.space",
    "Sparsify": "spaces.techniques.sparsify",
    "Student": "spaces.techniques.student",
    "Study": "search.study",
    "Target": "runners.targets.target",
    "Task": "runners.task",
    "TrialError": "errors",
    "accuracy": "runners.task",
    "check_target": "runners.check_target",
    "load": "runners.artifact",
    "load_target": "configs.accelerator",
}
__all__ = [
    "ArtifactError",
    "Budget",
    "Candidate",
    "Cluster",
    "ConfigError",
    "Equalize",
    "Estimate",
    "Front",
    "LowRank",
    "Measurement",
    "Objective",
    "ParetorchError",
    "Prune",
    "Quantize",
    "Recipe",
    "Recover",
    "Rule",
    "Space",
    "Sparsify",
    "Student",
    "Study",
    "Target",
    "Task",
    "TrialError",
    "accuracy",
    "check_target",
    "load",
    "load_target",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'paretorch' has no attribute {name!r}")
    value = getattr(import_module(f"paretorch.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
