"""Every error that paretorch raises on purpose.

    ParetorchError
    |- ConfigError    every problem of a configuration at once, with key paths and the valid choices
    |- TaskError      the user's model, data or metric cannot be used
    |- RecipeError    the recipe does not fit this model (unknown layer, impossible width)
    |- ArtifactError  a missing, corrupted or foreign file; nothing is ever unpickled
    |- StudyError     the study's folder cannot be used (locked, read-only, of another configuration)
    |- TargetError    the runtime is missing or cannot run the file
    `- TrialError     a result, not a bug: the study records it and continues
       |- OverBudget    a limit is exceeded, by prediction or measurement; carries the excess of each limit
       |- Stopped       significantly worse than a candidate that exists already, so its evaluation was stopped early
       |- Diverged      recovery or the metric ended in NaN or infinity
       `- ExportFailed  the compressed network cannot be exported or run

Anything that is not a `TrialError` stops a study, and the study can be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ParetorchError(Exception):
    """The base of all errors raised on purpose."""


class ConfigError(ParetorchError):
    """A configuration is not valid; the error has all its problems at once.

    Args:
        problems: One text per problem: key path, offending value, rule, valid choices.
        source: The file that was read.
    """

    def __init__(self, problems: str | Sequence[str], source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        count = len(self.problems)
        head = f"{source or 'configuration'}: {count} problem{'s' * (count != 1)}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type, tuple[list[str], str | None]]:
        # By default, pickle would pass the message alone to the constructor.
        return type(self), (self.problems, self.source)


class TaskError(ParetorchError):
    """The user's model, data or metric cannot be used."""


class RecipeError(ParetorchError):
    """A recipe does not fit the model it is applied to."""


class ArtifactError(ParetorchError):
    """A file that ships is missing, corrupted, tampered with or foreign."""


class StudyError(ParetorchError):
    """A study's folder cannot be used."""


class TargetError(ParetorchError):
    """The runtime that measures is missing or cannot run the file."""


class TrialError(ParetorchError):
    """The end of one trial; a result that the study records."""


class OverBudget(TrialError):
    """A limit of the budget is exceeded.

    Args:
        message: The limits and the values that exceed them.
        excess: For each limit, by what share of the limit it is exceeded; 0 or less keeps the limit.
    """

    def __init__(self, message: str, excess: Mapping[str, float]) -> None:
        super().__init__(message)
        self.excess = dict(excess)

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, float]]]:
        # As in ConfigError.
        return type(self), (str(self), self.excess)


class Stopped(TrialError):
    """A candidate is significantly worse than another one, or below a limit, so its evaluation was stopped early.

    Args:
        message: What it was compared with.
        estimate: The metric on the samples that were evaluated (an `Estimate`), or None.
    """

    def __init__(self, message: str, estimate: Any = None) -> None:
        super().__init__(message)
        self.estimate = estimate

    def __reduce__(self) -> tuple[type, tuple[str, Any]]:
        # As in ConfigError.
        return type(self), (str(self), self.estimate)


class Diverged(TrialError):
    """Recovery or the metric ended in NaN or infinity."""


class ExportFailed(TrialError):
    """The compressed network cannot be exported, or its file does not run."""
