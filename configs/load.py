"""Turn a YAML file and `key=value` overrides into a `Config`, or into one error with every problem."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import ConfigError
from .schema import Config

# Messages by pydantic's type of error; other types keep pydantic's own message.
_RULES = {
    "missing": "is required",
    "model_type": "must be a mapping (`key: value` lines)",
    "model_attributes_type": "must be a mapping (`key: value` lines)",
    "tuple_type": "must be a list",
    "string_type": "must be a text; put it in quotes",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
}


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration in a YAML file and apply overrides.

    Args:
        path: The YAML file.
        overrides: Texts such as `search.trials=10` or `space.weight_bits.0.choices=[4, 8]`; each sets one key, and its
            value is read as YAML.

    Returns:
        The configuration. Its paths are still relative to the file: `Config.path` resolves them.

    Raises:
        ConfigError: With all problems of the file, the overrides and the keys.

        >>> load(Path("configs/digits.yaml"), ["search.trials=10"]).search.trials  # doctest: +SKIP
        10
    """
    path = Path(path)
    data = read_yaml(
        path,
        "it needs at least `task: my_task.py:task`",
        "start with `task:`",
        "`paretorch init DIR` writes one to start from",
    )
    problems: list[str] = []
    for override in overrides:
        try:
            apply_override(data, override)
        except ConfigError as error:
            problems += error.problems
    try:
        config = parse(data, path)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems, str(path))
    return config


def parse(data: Mapping[str, Any], source: Path | None = None) -> Config:
    """The configuration that a mapping describes.

    Args:
        data: The content of a configuration file.
        source: The file, for relative paths and for the name of the study.

    Raises:
        ConfigError: With all problems.

    >>> parse({"task": "my_task.py:task", "budget": "size_bytes <= 25%"}).budget
    ('size_bytes <= 25%',)
    """
    filled = dict(data)
    if filled.get("name") is None:
        filled.pop("name", None)
        if source is not None:
            filled["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", source.stem).strip("-._")[:100] or "study"
    try:
        config = Config.model_validate(filled)
    except ValidationError as error:
        raise ConfigError(problems_of(error), str(source) if source else None) from error
    config._source = source.resolve() if source else None
    return config


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one key of a mapping in place.

    Args:
        data: The mapping.
        override: A text such as `a.b.0.c=value`; the value is read as YAML.

    Raises:
        ConfigError: The text is not `KEY=VALUE`, or there is no such place.

    >>> data = {"space": {"width": [1.0, 0.5]}}
    >>> apply_override(data, "space.width.1=0.75")
    >>> data
    {'space': {'width': [1.0, 0.75]}}
    """
    key, equals, text = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"--set {override!r}: write KEY=VALUE, such as search.trials=10")
    try:
        value = _parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {_yaml_reason(error)}") from error
    here: Any = data
    for position, name in enumerate(names):
        last = position == len(names) - 1
        where = ".".join(names[:position]) or "the configuration"
        if isinstance(here, list):
            if not name.isdecimal() or int(name) >= len(here):
                entries = f"0 to {len(here) - 1}" if here else "none, it is empty"
                raise ConfigError(f"--set {override!r}: {where} is a list; {name!r} is none of its entries ({entries})")
            index = int(name)
            if last:
                here[index] = value
            here = here[index]
        elif isinstance(here, dict):
            if last:
                here[name] = value
            elif here.get(name) is None:
                here[name] = {}
            here = here[name]
        else:
            raise ConfigError(f"--set {override!r}: {where} is {_short(here)}, which has no key {name!r}")


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for completion and checks in editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def config_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain data for JSON and YAML, with all defaults; `parse` reads it back.

    Paths are as they were written, so that a study which is moved together with its files remains the same study.
    """
    return config.model_dump(mode="json")


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that rejects a repeated key, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader: it constructs plain data only


def read_yaml(path: Path, needs: str, start: str, example: str) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Args:
        path: The file.
        needs: The advice in the message for an empty file.
        start: The advice in the message for a file that does not hold a mapping.
        example: The advice in the message for a missing file.

    Returns:
        The mapping as plain data.

    Raises:
        ConfigError: The file cannot be read, or does not hold a mapping.
    """
    source = str(path)
    if path.is_dir():
        names = sorted(entry.name for entry in path.glob("*.y*ml"))
        raise ConfigError(
            f"is a folder; name one of its files ({', '.join(names) or 'it holds no .yaml file'})", source
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        near = sorted(entry.name for entry in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, 1)
        hint = f"did you mean {path.parent / close[0]}?" if close else example
        raise ConfigError(f"there is no such file; {hint}", source) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}", source) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text (byte {error.start}); save it as UTF-8", source) from error
    try:
        data = _parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"is not valid YAML: {_yaml_reason(error)}", source) from error
    if data is None:
        raise ConfigError(f"is empty; {needs}", source)
    if not isinstance(data, dict):
        raise ConfigError(
            f"must hold `key: value` lines (a mapping) at the top level, not {_short(data)}; {start}", source
        )
    return data


def _yaml_reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        reason = "; ".join(part for part in (error.context, error.problem) if part)
        tab = " (indent with spaces, not tabs)" if "'\\t'" in reason else ""
        return f"line {mark.line + 1}, column {mark.column + 1}: {reason}{tab}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())


def problems_of(error: ValidationError, root: type[BaseModel] = Config) -> list[str]:
    """A message for every mistake that pydantic finds in a mapping for the model `root`."""
    return [_problem(entry, root) for entry in error.errors(include_url=False)]


def _problem(entry: ErrorDetails, root: type[BaseModel]) -> str:
    loc, kind, value = entry["loc"], entry["type"], entry["input"]
    path = ".".join(str(part) for part in loc if not str(part).startswith("<"))
    if kind == "paretorch":
        return f"{path}: {entry['msg']}"
    if kind == "missing":
        return f"{path}: is required"
    if kind == "extra_forbidden":
        keys = list(_fields_at(loc[:-1], root))
        close = difflib.get_close_matches(str(loc[-1]), keys, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{path} = {_short(value)}: unknown key; {hint}keys here: {', '.join(keys)}"
    if kind == "literal_error":
        choices = re.findall(r"'[^']*'|\d+", entry["ctx"]["expected"])
        close = difflib.get_close_matches(str(value), [choice.strip("'") for choice in choices], 1)
        hint = f"; did you mean {close[0]!r}?" if close and isinstance(value, str) else ""
        return f"{path} = {_short(value)}: choose from {', '.join(c.strip(chr(39)) for c in choices)}{hint}"
    rule = _RULES.get(kind) or entry["msg"].replace("Input should", "must").replace("Tuple should", "must")
    return f"{path} = {_short(value)}: {rule}"


def _fields_at(loc: Sequence[int | str], root: type[BaseModel]) -> Sequence[str]:
    """The valid keys at a place in the configuration, which pydantic's error does not contain."""
    annotation: Any = root
    for part in loc:
        for model in _models(annotation):
            if part in model.model_fields:
                annotation = model.model_fields[str(part)].annotation
                break
    return [name for model in _models(annotation)[:1] for name in model.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
