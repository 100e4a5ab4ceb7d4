"""The recipes that come with the package are for the network that they were made for."""

import importlib.util
from pathlib import Path

import pytest
import torch

from paretorch.objectives.cost import macs
from paretorch.runners.apply import read_recipe
from paretorch.runners.compression.fits import check_fits
from paretorch.runners.compression.trace import trace
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.recover import Recover

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def structure():
    spec = importlib.util.spec_from_file_location("cifar10_task", ROOT / "benchmarks" / "cifar10" / "task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return trace(module.ResNet().eval(), torch.randn(66, 3, 32, 32))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_resnet20_and_keeps_to_its_epochs(path, structure):
    recipe, _ = read_recipe(path)
    check_fits(recipe, structure)
    epochs = sum(step.epochs for step in recipe.of(Recover))
    assert epochs <= (0 if "untrained" in path.stem else 10 if "channels" in path.stem else 15)


def test_fewer_channels_are_fewer_macs(structure):
    recipe, _ = read_recipe(ROOT / "configs" / "recipes" / "cifar10_channels.yaml")
    assert macs(structure, Recipe()) >= 2.1 * macs(structure, recipe)
