"""Load the `Task` that a configuration names: from a function of the user, or a built-in task.

A file is imported under a unique name (`paretorch_task_...`), so that two files called task.py do not collide. Its
folder comes first on `sys.path`, as when Python runs the file, so that it can import the modules beside it. The module
stays in `sys.modules`, so that what it defines can be pickled for forked DataLoader workers.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import ParetorchError, TaskError
from ..spaces.techniques.sparsify import CRITERIA
from .schema import Config

if TYPE_CHECKING:
    from ..runners.task import Task


def load_task(config: Config) -> Task:
    """The task that a configuration names.

    Raises:
        TaskError: The file or function does not exist; the user's code raised an exception (the message has its type,
            text and line, and it is the cause); the result is not a `Task`; or a built-in task is not valid.

        >>> from paretorch.configs.load import load
        >>> load_task(load(Path("configs/digits.yaml"))).name  # doctest: +SKIP
        'digits'
    """
    from ..runners.task import Task

    if not isinstance(config.task, str):
        from .builtin import builtin_task

        return _with_criteria(builtin_task(config.task, config.path, config.search.seed), config)
    function, shown, file = _named(config.task, config, (), "that returns the task")
    name = config.task.rpartition(":")[2]
    try:
        task = function()
    except ParetorchError:
        raise  # its message already says what is wrong
    except (Exception, SystemExit) as error:
        raise TaskError(f"{shown}: {name}() failed: {_described(error, file)}") from error
    if not isinstance(task, Task):
        raise TaskError(
            f"{shown}: {name}() returned {_kind(task)}; it must return a paretorch.Task "
            "(return paretorch.Task(name=..., model=..., train=..., validation=...))"
        )
    return _with_criteria(task, config)


def _with_criteria(task: Task, config: Config) -> Task:
    """The task, with the functions added that the space names as criteria and the task does not define."""
    space = config.to_space()
    chosen = [choice for rule in (space.criterion if space else ()) for choice in rule.choices]
    wanted = [text for text in chosen if text not in CRITERIA and text not in task.criteria]
    own = {
        text: _named(text, config, ("weight", "norms"), "that returns a score for each weight")[0] for text in wanted
    }
    return replace(task, criteria={**task.criteria, **own}) if own else task


def _named(
    text: str, config: Config, arguments: tuple[str, ...], purpose: str
) -> tuple[Callable[..., Any], str, Path | None]:
    """The function that FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION names, its location for messages, and its file."""
    where, _, name = text.rpartition(":")
    is_file = where.endswith(".py") or "/" in where
    module = _import_file(config.path(where)) if is_file else _import_module(where, config.folder)
    shown = str(config.path(where)) if is_file else where
    return (
        _function(module, name, shown, arguments, purpose),
        shown,
        Path(module.__file__) if module.__file__ else None,
    )


def _import_file(path: Path) -> ModuleType:
    try:
        code = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        near = sorted(entry.name for entry in path.parent.glob("*.py")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, 1)
        hint = f"did you mean {close[0]}?" if close else f"Python files there: {', '.join(near) or 'none'}"
        raise TaskError(f"task file {path} does not exist; {hint}") from error
    except OSError as error:
        raise TaskError(f"task file {path} cannot be read: {error.strerror or error}") from error
    # The content is part of the name: an edited file is imported again, an unchanged one is not.
    digest = hashlib.sha256(str(path).encode() + b"\0" + code).hexdigest()
    name = f"paretorch_task_{path.stem}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"task file {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    _importable(path.parent)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (Exception, SystemExit)) and not isinstance(error, ParetorchError):
            raise TaskError(f"{path} cannot be imported: {_described(error, path)}") from error
        raise
    return module


def _import_module(name: str, folder: Path) -> ModuleType:
    _importable(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # If a part of the name itself is missing, the name is wrong; otherwise an import in the user's code failed.
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise TaskError(
                f"task module {name!r} is not found (no module {error.name!r} in this environment or in {folder}); "
                "install it, or write the path of a file such as my_task.py:task"
            ) from error
        raise TaskError(f"{name} cannot be imported: {_described(error, None)}") from error
    except ParetorchError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"{name} cannot be imported: {_described(error, None)}") from error


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _function(
    module: ModuleType, name: str, shown: str, arguments: tuple[str, ...], purpose: str
) -> Callable[..., Any]:
    if not hasattr(module, name):
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
        ]
        close = difflib.get_close_matches(name, own, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise TaskError(f"{shown} has no function {name!r}; {hint}functions there: {', '.join(own) or 'none'}")
    function: Callable[..., Any] = getattr(module, name)
    if not callable(function):
        raise TaskError(
            f"{shown}: {name} is {_kind(function)}, not a function; define `def "
            f"{name}({', '.join(arguments)}):` {purpose}"
        )
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        called = f"with ({', '.join(arguments)})" if arguments else "without arguments"
        raise TaskError(f"{shown}: {name} is called {called}, but {error}; give other arguments defaults") from error
    return function


def _described(error: BaseException, file: Path | None) -> str:
    """Type, message and place of an exception in the user's code."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    # The line in the user's file is more useful than the one in the library that it called.
    own = [frame for frame in frames if file is not None and Path(frame.filename).resolve() == file.resolve()]
    near = [frame for frame in frames if not frame.filename.startswith("<") and frame.filename != __file__]
    frame = (own or near or list(frames))[-1]
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text} ({frame.filename}, line {frame.lineno}, in {frame.name})"


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
