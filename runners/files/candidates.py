"""The files of candidates in a folder, each named by the key of its recipe. The names are spelled only here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...spaces.recipe import Recipe
from .atomic import read_scores, write_scores

# The files in the folder that belong to paretorch and may be removed; whatever else lies there is the user's.
OWNED_FILES = re.compile(r"[0-9a-f]{16}\.(safetensors|trained|partial-training|npy)")
PARTIAL_TRAINING = ".partial-training"


@dataclass(frozen=True)
class CandidateFiles:
    """The paths of the files of each recipe.

    Args:
        directory: The folder.

    >>> CandidateFiles(Path("candidates")).packed("0123456789abcdef")
    PosixPath('candidates/0123456789abcdef.safetensors')
    """

    directory: Path

    def packed(self, recipe: Recipe | str) -> Path:
        """The packed file that ships; `recipe` is a recipe or its key."""
        return self._path(recipe, ".safetensors")

    def trained(self, recipe: Recipe | str) -> Path:
        """The weights after training, before quantization, from which the training of later rungs continues."""
        return self._path(recipe, ".trained")

    def partial(self, recipe: Recipe | str) -> Path:
        """The state of the last training step between two epochs, to resume from when the process was killed."""
        return self._path(recipe, PARTIAL_TRAINING)

    def scores(self, recipe: Recipe | str) -> Path:
        """The metric on every validation sample."""
        return self._path(recipe, ".npy")

    def read_scores(self, recipe: Recipe | str) -> NDArray[np.floating] | None:
        """The metric on every validation sample, if the file is there and readable."""
        return read_scores(self.scores(recipe))

    def write_scores(self, recipe: Recipe | str, scores: NDArray[np.float64]) -> None:
        write_scores(self.scores(recipe), scores)

    def _path(self, recipe: Recipe | str, suffix: str) -> Path:
        return self.directory / f"{recipe if isinstance(recipe, str) else recipe.key}{suffix}"
