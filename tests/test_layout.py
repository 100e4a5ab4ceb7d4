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
SEARCH_ONLY = {"optuna", "mlflow"}


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
                base = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
                for _ in range(node.level - 1):
                    base = base.rpartition(".")[0]
                home = f"{base}.{home}".rstrip(".")
            for alias in node.names:
                whole = f"{home}.{alias.name}"
                found.append((whole if whole in MODULES else home, bool(node.level)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[module].read_text()))
    return found


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


def test_there_is_no_cycle_of_imports():
    graph = {
        name: {target for target, _ in imports(name, at_import_time=True) if target in MODULES} - {name}
        for name in MODULES
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"imports in a circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_search_imports_optuna_and_mlflow(module):
    if not module.startswith("paretorch.search"):
        assert not SEARCH_ONLY & {name.split(".")[0] for name, _ in imports(module)}


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
