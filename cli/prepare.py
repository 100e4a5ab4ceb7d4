"""The objects that commands work with, constructed from their options: the console, a study, a task, a runner."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ..configs.schema import Config
    from ..runners.local import LocalRunner
    from ..runners.record import Record
    from ..runners.settings import MeasurementSettings
    from ..runners.task import Task
    from ..search.study import Study
    from .watcher import Watcher


def make_console() -> Console:
    """The console for standard output. A pipe or a log file has no width; there it is 80 columns."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(width=None if terminal else 80, soft_wrap=not terminal, highlight=False)


def short(path: Path) -> str:
    """A path as given or relative to the working directory, whichever is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def make_study(config: Config, listener: Watcher) -> Study:
    """The study that a configuration describes."""
    from ..configs.accelerator import load_target
    from ..configs.load import config_dict
    from ..configs.plugins import load_task
    from ..search.study import Study

    target = load_target(config.measure.target, config.folder)

    listener.phase("loading the task")
    task = load_task(config)
    text = config.source.read_text() if config.source else ""
    return Study(
        task,
        config.to_space(),
        objectives=config.objectives,
        budget=config.budget,
        directory=config.directory,
        sampler=config.search.sampler,
        rungs=config.search.rungs,
        ensembles=config.search.ensembles,
        seed=config.search.seed,
        threads=config.measure.threads,
        batch=config.measure.batch,
        seconds=config.measure.seconds,
        calibration_images=config.measure.calibration_images,
        target=target,
        mlflow=config.mlflow.uri,
        experiment=config.mlflow.experiment,
        listener=listener,
        config=config_dict(config),
        config_text=text,
        config_file=config.source.absolute() if config.source else None,
    )


def read_task(task: str | None, config: Path | None, recorded: Record | None) -> tuple[Task, MeasurementSettings]:
    """The task that the options name, and its measurement settings: the configuration's, or the recorded ones."""
    from ..configs.accelerator import load_target
    from ..configs.load import load, parse
    from ..configs.plugins import load_task
    from ..errors import ConfigError
    from ..runners.settings import MeasurementSettings

    if task and config:
        raise ConfigError("--task and --config both name a task; write one of them", "options")
    if config:
        loaded = load(config)
        settings = loaded.measure.model_dump() | {"target": load_target(loaded.measure.target, loaded.folder).spec}
        return load_task(loaded), MeasurementSettings(**settings, seed=loaded.search.seed)
    before = recorded.protocol if recorded else None
    return load_task(parse({"task": task})), before or MeasurementSettings()


@contextmanager
def open_runner(
    console: Console, task: Task, settings: MeasurementSettings, **more: Any
) -> Iterator[tuple[LocalRunner, Watcher]]:
    """A runner whose files are removed at the end of the block, and the watcher that shows its progress.

    Args:
        console: Where progress is shown.
        task: The task.
        settings: The measurement settings.
        **more: Further arguments of the runner.
    """
    import tempfile

    from ..runners.local import LocalRunner
    from .watcher import Watcher

    watcher = Watcher(console)
    with tempfile.TemporaryDirectory() as folder, watcher.watching():
        watcher.phase("loading the network and the data, tracing")
        yield LocalRunner(task, Path(folder), settings, **more), watcher
