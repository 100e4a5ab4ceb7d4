"""Every error that paretorch raises on purpose.

    ParetorchError
    |- ConfigError    every problem of a configuration at once, with key paths and the valid choices
    |- TaskError      the user's model, data or metric cannot be used
    |- RecipeError    the recipe does not fit this model (unknown layer, impossible width)
    |- ArtifactError  a missing, corrupted or foreign file; nothing is ever unpickled
    |- StudyError     the study's folder cannot be used (locked, read-only, of another configuration)
    |- TargetError    the runtime is missing or cannot run the file
    `- TrialError     a result, not a bug: the study records it and goes on
       |- OverBudget    known before or after measuring; carries the excess of each limit
       |- Stopped       beyond doubt worse than what is there already, and given up before its evaluation was over
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
    """A configuration with problems, all of them at once.

    `problems` holds one text per problem: key path, offending value, rule, valid choices.
    """

    def __init__(self, problems: str | Sequence[str], source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        count = len(self.problems)
        head = f"{source or 'configuration'}: {count} problem{'s' * (count != 1)}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type, tuple[list[str], str | None]]:  # by default it is rebuilt from its text
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
    """A limit is exceeded; `excess` holds, per limit, by what share of the limit (<= 0 is inside)."""

    def __init__(self, message: str, excess: Mapping[str, float]) -> None:
        super().__init__(message)
        self.excess = dict(excess)

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, float]]]:  # by default it is rebuilt from its text
        return type(self), (str(self), self.excess)


class Stopped(TrialError):
    """Beyond doubt worse than another candidate, or below a limit; given up before its evaluation was over.

    `estimate` is the metric as far as it is known (a `Estimate`, or None).
    """

    def __init__(self, message: str, estimate: Any = None) -> None:
        super().__init__(message)
        self.estimate = estimate

    def __reduce__(self) -> tuple[type, tuple[str, Any]]:  # by default it is rebuilt from its text
        return type(self), (str(self), self.estimate)


class Diverged(TrialError):
    """Recovery or the metric ended in NaN or infinity."""


class ExportFailed(TrialError):
    """The compressed network cannot be exported, or its file does not run."""
