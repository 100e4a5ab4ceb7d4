"""The shape of the package: who may import whom, what an import costs, and that every public name exists."""

import ast
import doctest
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import paretorch

ROOT = Path(paretorch.__file__).parent
# Left to right: a module imports only from its own folder or from folders to its left. What is for people comes last.
ORDER = ("errors", "spaces", "objectives", "runners", "results", "search", "configs", "people")
PEOPLE = ("cli", "__init__")
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
ONLY_IN = {
    "optuna": ("paretorch.search.",),
    "mlflow": ("paretorch.results.tracking.", "paretorch.results.registered_model."),
}


def folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in folder(package).glob("*.py"):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


MODULES = modules()
# A ready task beside its YAML file is written as a user would write it: on the facade alone.
EXAMPLES = {
    name for name, path in MODULES.items() if path.parent.name == "configs" and path.with_suffix(".yaml").exists()
}


def rank(module: str) -> int:
    home = [*module.split("."), "__init__"][1]
    return ORDER.index("people" if home in PEOPLE else home)


def imports(module: str, *, at_import_time: bool = False) -> list[tuple[str, bool]]:
    """`(absolute name, whether written relatively)` of all that a module imports; a name from a package is resolved."""
    path = MODULES[module]
    return imports_of(path.read_text(), module, set(MODULES), path.stem == "__init__", at_import_time=at_import_time)


def imports_of(
    source: str, module: str, known: set[str], package: bool = False, *, at_import_time: bool = False
) -> list[tuple[str, bool]]:
    """The same for a text; lazy imports and those for type checkers count, unless `at_import_time`."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST) -> None:
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                base = module if package else module.rpartition(".")[0]
                for _ in range(node.level - 1):
                    base = base.rpartition(".")[0]
                home = f"{base}.{home}".rstrip(".")
            for alias in node.names:
                whole = f"{home}.{alias.name}"
                found.append((whole if whole in known else home, bool(node.level)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty when there is no circle."""
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in done:
            for target in sorted(graph[name]):
                if there := walk(target, (*trail, name)):
                    return there
            done.add(name)
        return []

    return next((there for name in sorted(graph) if (there := walk(name, ()))), [])


def test_a_relative_import_is_resolved():
    """The checks below stand on this reading of imports."""
    assert ("paretorch.errors", True) in imports("paretorch.spaces.recipe")
    assert ("paretorch.objectives.pareto", True) in imports("paretorch.results.front")
    lazy = {name for name, _ in imports("paretorch.results.front")}
    assert "pandas" in lazy
    assert "pandas" not in {name for name, _ in imports("paretorch.results.front", at_import_time=True)}


@pytest.mark.parametrize("module", sorted(set(MODULES) - EXAMPLES))
def test_a_module_imports_only_from_its_left(module):
    wrong = [name for name, _ in imports(module) if name.split(".")[0] == "paretorch" and rank(name) > rank(module)]
    assert not wrong, f"{module} imports from its right: {wrong}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - EXAMPLES - {"paretorch"}))
def test_only_the_facade_imports_absolutely(module):
    wrong = [name for name, relative in imports(module) if name.split(".")[0] == "paretorch" and not relative]
    assert not wrong, f"{module} imports {wrong} absolutely"


@pytest.mark.parametrize("module", sorted(EXAMPLES))
def test_an_example_stands_on_the_facade_alone(module):
    assert {name for name, _ in imports(module) if name.split(".")[0] == "paretorch"} == {"paretorch"}
    assert not [name for name in MODULES if module in {target for target, _ in imports(name)}]


def test_no_modules_import_each_other_in_a_circle():
    """Not even lazily or for a type checker: two modules that need each other are one module, or lack a third."""
    graph = {name: {target for target, _ in imports(name) if target in MODULES} - {name} for name in MODULES}
    del graph["paretorch"]  # the facade names everything, and nothing inside imports it
    there = circle({name: targets & set(graph) for name, targets in graph.items()})
    assert not there, f"imports in a circle: {' -> '.join(there)}"


PLANTED = {
    "at the top": "from . import b",
    "lazily": "def f():\n    from .b import g\n    return g",
    "for a type checker": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B",
}


@pytest.mark.parametrize("how", PLANTED)
def test_a_planted_circle_is_found(how):
    known = {"p.a", "p.b", "p.c"}
    sources = {"p.a": PLANTED[how], "p.b": "from .c import x", "p.c": "from .a import y"}
    graph = {name: {target for target, _ in imports_of(text, name, known)} & known for name, text in sources.items()}
    assert circle(graph) == ["p.a", "p.b", "p.c", "p.a"]
    assert not circle(graph | {"p.c": set()})


@pytest.mark.parametrize("module", sorted(MODULES))
def test_optuna_and_mlflow_are_imported_in_one_place_each(module):
    tops = {name.split(".")[0] for name, _ in imports(module)}
    for library, homes in ONLY_IN.items():
        assert library not in tops or f"{module}.".startswith(homes), f"{module} imports {library}"


def test_the_package_list_is_the_folders():
    ours = [ROOT, *(ROOT / name for name in ("spaces", "objectives", "runners", "results", "search", "configs", "cli"))]
    folders = {ROOT} | {path.parent for home in ours[1:] for path in home.rglob("__init__.py")}
    assert {folder(package) for package in PACKAGES} == folders
    bare = (
        {path.parent for home in ours[1:] for path in home.rglob("*.py")} - folders - {ROOT / "configs" / "templates"}
    )
    assert not bare, f"modules in a folder without __init__.py would not be installed: {bare}"


def test_no_name_hides_a_folder_or_a_standard_module():
    folders = {package.rpartition(".")[2] for package in PACKAGES}
    assert not folders & set(paretorch.__all__)
    top = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not top & set(sys.stdlib_module_names)


def test_there_is_no_init_under_tests():
    """With it pytest imports the package a second time, under another name."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(run.stdout.split())


def test_importing_paretorch_is_free():
    assert not loaded_after("import paretorch") & {"torch", "numpy", "optuna", "mlflow", "pandas", "pydantic"}


def test_the_spaces_need_no_tensor_and_no_sampler():
    statement = "import paretorch.spaces.space, paretorch.spaces.recipe, paretorch.spaces.structure"
    assert not loaded_after(statement) & {"torch", "numpy", "optuna", "mlflow"}


def test_a_finished_study_is_opened_without_the_search():
    statement = "import paretorch.results.front, paretorch.results.folder, paretorch.results.candidate"
    assert not loaded_after(statement) & {"torch", "onnx", "onnxruntime", "optuna", "mlflow", "plotly", "matplotlib"}


def test_export_and_report_need_no_sampler():
    assert not loaded_after("import paretorch.results.export, paretorch.results.register") & {"optuna", "mlflow"}


def test_the_facade_lists_each_name_once():
    assert paretorch.__all__ == sorted(set(paretorch.__all__), key=paretorch.__all__.index)
    assert set(paretorch.__all__) == set(paretorch._HOME)
    assert set(paretorch.__all__) <= set(dir(paretorch))
    with pytest.raises(AttributeError, match="no attribute 'Studdy'"):
        _ = paretorch.Studdy


@pytest.mark.parametrize("name", paretorch.__all__)
def test_a_public_name_has_a_home(name):
    home = f"paretorch.{paretorch._HOME[name]}"
    if home not in MODULES:
        pytest.skip(f"{home} is not written yet")
    value = getattr(paretorch, name)
    assert value is getattr(importlib.import_module(home), name)
    assert value.__module__ == home


TESTABLE = [name for name in sorted(MODULES) if name.startswith(("paretorch.spaces", "paretorch.objectives"))]


@pytest.mark.parametrize("name", ["paretorch.errors", "paretorch.runners.task", *TESTABLE])
def test_the_examples_in_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
