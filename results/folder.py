"""The folder of a study: its files and what they hold. The layout is defined here and nowhere else.

study.json        what was asked, the baseline, the environment (written once)
trials.jsonl      one line per finished trial: the source of truth (`results.journal`)
baseline.safetensors   the packed original model, which latencies are relative to
candidates/       packed files and scores of the front, the nearest misses and the reference recipes (`CandidateFiles`)
ensembles.json    the networks of which ensembles were tried, where that was requested
finalists.json    the front on the test split, and finalists/ with the score of every sample
report/           front.html, front.png, front.csv, front.json, report.md
targets/          NAME.json for each other target that the front was measured on
explain/          N.yaml, the recipe suggested in place of candidate N's
mlflow.db, ...    the MLflow mirror, unless another store is named
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StudyError
from ..objectives.measurement import Estimate
from ..runners.files.atomic import read_scores, write_atomic, write_scores
from ..runners.files.candidates import CandidateFiles

VERSION = 1  # of study.json
BASELINE = "baseline"  # the name of the original model among the finalists


@dataclass(frozen=True)
class StudyFolder:
    """The paths of a study's files, and functions that read and write them.

    >>> StudyFolder(Path("studies/digits")).journal
    PosixPath('studies/digits/trials.jsonl')
    """

    root: Path

    @property
    def about(self) -> Path:
        return self.root / "study.json"

    @property
    def journal(self) -> Path:
        return self.root / "trials.jsonl"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def baseline(self) -> Path:
        return self.root / "baseline.safetensors"

    @property
    def candidates(self) -> CandidateFiles:
        return CandidateFiles(self.root / "candidates")

    @property
    def ensembles(self) -> Path:
        return self.root / "ensembles.json"

    @property
    def finalists(self) -> Path:
        return self.root / "finalists.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def targets(self) -> Path:
        return self.root / "targets"

    def target(self, name: str) -> Path:
        return self.targets / f"{name}.json"

    def suggestion(self, number: int) -> Path:
        return self.root / "explain" / f"{number}.yaml"

    def finalist_scores(self, key: str) -> Path:
        """The file with a finalist's metric on every test sample; `key` is its recipe's key, or `BASELINE`."""
        return self.root / "finalists" / f"{key}.npy"

    @property
    def written_into(self) -> tuple[Path, ...]:
        """The folders in which a killed process may leave a partial file."""
        return self.root, self.candidates.directory, self.root / "finalists", self.report

    # ------------------------------------------------------------------------------------------- what they hold

    def read_about(self) -> dict[str, Any]:
        """Read `study.json`.

        Raises:
            StudyError: It is missing, damaged or of a newer version.
        """
        try:
            stored = read_json(self.about)
            if stored["version"] > VERSION:
                raise StudyError(f"{self.about}: written by a newer paretorch (version {stored['version']}); upgrade")
            return stored
        except FileNotFoundError as error:
            raise StudyError(
                f"there is no study in {self.root}: it has no study.json; name the folder that a search has written, "
                "such as studies/NAME"
            ) from error
        except (OSError, KeyError, TypeError) as error:
            raise StudyError(f"{self.root} is not a study of paretorch: {error}") from error

    def read_baseline(self) -> bytes:
        """Read the packed original model.

        Raises:
            StudyError: It is missing.
        """
        try:
            return self.baseline.read_bytes()
        except FileNotFoundError as error:
            raise StudyError(
                f"{self.baseline} is missing, and every latency is relative to it; restore the file, or search anew "
                "under another name or --output"
            ) from error

    def read_finalists(self) -> dict[str, dict[str, Estimate]]:
        """Read the finalists' numbers by recipe key, and the baseline's by `BASELINE`.

        Raises:
            StudyError: The file is damaged.
        """
        if not self.finalists.exists():
            return {}
        try:
            stored: dict[str, Any] = json.loads(self.finalists.read_text())
            return {
                key: {name: Estimate(**entry) for name, entry in numbers.items()} for key, numbers in stored.items()
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise StudyError(
                f"{self.finalists} is damaged ({error}); delete it, and the same search measures the finalists again"
            ) from error

    def write_finalists(self, finalists: Mapping[str, Mapping[str, Estimate]]) -> None:
        """Write the finalists' numbers; the counterpart of `read_finalists`."""
        plain = {key: {name: vars(e) for name, e in entry.items()} for key, entry in finalists.items()}
        write_atomic(self.finalists, json.dumps(plain, indent=1))

    def read_finalist_scores(self, key: str) -> NDArray[np.floating] | None:
        """Read a finalist's metric on every test sample; None where it was not stored."""
        return read_scores(self.finalist_scores(key))

    def write_finalist_scores(self, key: str, scores: NDArray[np.float64]) -> None:
        path = self.finalist_scores(key)
        path.parent.mkdir(exist_ok=True)
        write_scores(path, scores)


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        StudyError: The content is not a JSON object.
        OSError: The file cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return content
    except ValueError as error:
        raise StudyError(
            f"{path} is damaged ({error}); restore it from a backup, or move the study's folder away and start anew"
        ) from error
