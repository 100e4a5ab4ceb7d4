"""Recipes outside of a search: apply one to another checkpoint or other data, and measure a file again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from ..errors import ArtifactError, RecipeError, TaskError
from ..objectives.measurement import Estimate, Measurement
from ..objectives.objective import COSTS
from ..spaces.recipe import Recipe
from .artifact import card, check_free, verify, write
from .compression.fits import check_fits
from .files.packing import unpack
from .local import LocalRunner
from .progress import Progress
from .record import Record, RecordRow, rows
from .settings import MeasurementSettings
from .targets.runtime import session


def read_recipe(path: Path) -> tuple[Recipe, Path | None]:
    """Read a recipe from a file or from the directory of an artifact, whose files are then checked.

    Args:
        path: A recipe file, or the directory of an artifact.

    Returns:
        The recipe, and the directory of the artifact; None for a file of its own.

    Raises:
        RecipeError: The file holds no recipe.
        ArtifactError: The artifact was changed.
    """
    path = path / "recipe.yaml" if path.is_dir() else path
    home = path.parent if path.name == "recipe.yaml" and (path.parent / "artifact.json").exists() else None
    try:
        data = verify(home)["recipe.yaml"] if home else path.read_bytes()
        fields = yaml.safe_load(data.decode())
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror or error}; name the recipe.yaml of an artifact"
        ) from error
    except ArtifactError as error:
        raise ArtifactError(f"{error}; to use an edited recipe, copy it out of the artifact") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not a recipe: it is not YAML text: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} is not a recipe: it holds {type(fields).__name__}, not the fields version and steps")
    try:
        return Recipe.from_dict(fields), home
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def apply_recipe(
    runner: LocalRunner, recipe: Recipe, protocol: MeasurementSettings, to: Path, name: str, progress: Progress
) -> Record:
    """Apply a recipe to the runner's network, measure the file on all splits, and write it as an artifact.

    Args:
        runner: The runner of the task.
        recipe: The recipe.
        protocol: The measurement settings, for the record.
        to: The directory of the artifact.
        name: The name of the file in the record.
        progress: Called with a description of what is being done.

    Returns:
        The record that was written.

    Raises:
        ArtifactError: Something else lies in `to`.
        RecipeError: The recipe does not fit the network; nothing was built.
        TrialError: The result does not compute.
    """
    check_free(to)
    check_fits(recipe, runner.structure)
    progress("measuring the untouched network")
    base, base_file = runner.baseline()
    measurement = runner.run(recipe, progress)
    packed = runner.path(recipe).read_bytes()
    test, test_base = _on_test(runner, packed, base_file, progress)
    table = rows(measurement, base, protocol, test=test, test_base=test_base)
    record = Record(name, runner.task.name, table, protocol)
    progress("writing")
    environment = measurement.environment
    write(to, packed, recipe, record.to_dict(), card(recipe, record, environment), environment)
    return record


def measure_again(
    runner: LocalRunner, packed: bytes, recorded: Record, protocol: MeasurementSettings, progress: Progress
) -> tuple[RecordRow, ...]:
    """Measure a file that ships beside the runner's baseline.

    Args:
        runner: The runner of the task that the file was made for.
        packed: The packed file.
        recorded: The record of the file.
        protocol: The measurement settings.
        progress: Called with a description of what is being done.

    Returns:
        The rows of the file.

    Raises:
        TaskError: The file was made for another task: the metric or the shape of the inputs differs.
    """
    metric = runner.task.metric_name
    timed = (*COSTS, "latency_ratio")
    known = [row.metric for row in recorded.rows if row.split and row.baseline and row.metric not in timed]
    if known and metric not in known:
        raise TaskError(
            f"task {runner.task.name!r} measures {metric}, but {', '.join(dict.fromkeys(known))} is recorded; "
            "name the task that the artifact was made for"
        )
    wanted, given = session(unpack(packed)).get_inputs()[0].shape[1:], list(runner.builder.example.shape[1:])
    if wanted != given:
        raise TaskError(
            f"task {runner.task.name!r} gives inputs of shape {given}, but the artifact takes {wanted}; "
            "name the task that the artifact was made for"
        )
    progress("measuring the untouched network")
    base, base_file = runner.baseline()
    progress("measuring the artifact")
    estimates = runner.measure_again(packed, "validation")
    sizes = {"size_bytes": Estimate.exact(len(packed)), "onnx_bytes": Estimate.exact(unpack(packed).ByteSize())}
    test, test_base = _on_test(runner, packed, base_file, progress)
    latency = _joined(estimates["latency_ms"], test.get("latency_ms"))
    measured = Measurement({metric: estimates[metric], **sizes, "latency_ms": latency})
    return rows(
        measured,
        base,
        protocol,
        test={name: value for name, value in test.items() if name != "latency_ms"},
        test_base=test_base,
        box=4 * protocol.seconds,
    )


def _joined(first: Estimate, second: Estimate | None) -> Estimate:
    """The mean of timings in two sessions; the interval covers both, and so what sessions differ by."""
    if second is None:
        return first
    value = (first.value + second.value) / 2
    return replace(
        first, value=value, low=min(first.low, second.low), high=max(first.high, second.high), n=first.n + second.n
    )


def _on_test(
    runner: LocalRunner, packed: bytes, base: bytes, progress: Progress
) -> tuple[Mapping[str, Estimate], Estimate | None]:
    """The file's numbers and the baseline's metric on the test split, where there is one."""
    if runner.task.test is None:
        return {}, None
    progress("evaluating on the test split")
    return runner.measure_again(packed), Estimate.of(runner.scores(base, "test"))
