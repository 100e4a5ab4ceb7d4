"""All files of a report."""

import resource
import subprocess
import sys

import pytest

from paretorch.results.report.write import FILES, write_report


def test_every_study_can_be_reported(front, tmp_path):
    folder = tmp_path / "deep" / "report"
    text = write_report(front, folder, name="a study")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert (folder / "report.md").read_text() == text
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    assert all(path.stat().st_size for path in folder.iterdir())


def test_a_report_that_cannot_be_written_leaves_the_last_one(fronts, tmp_path):
    write_report(fronts["untested"], tmp_path, name="first")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes in a file; every one of the report has more
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(fronts["unlimited"], tmp_path, name="second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("module", ["terminal", "tables", "view", "markdown", "write"])
def test_plotting_libraries_are_imported_only_to_plot(module):
    code = f"import sys, paretorch.results.report.{module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"plotly", "matplotlib", "optuna", "mlflow", "pandas"} & set(run.stdout.split())
