"""The picture for a README."""

import struct
import sys

from paretorch.results.report.plots import plots_of
from paretorch.results.report.png import png_bytes
from paretorch.results.report.view import view_of


def test_there_is_a_picture_of_every_front(front):
    data = png_bytes(view_of(front, name="a $study$"), plots_of(front))
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000, "nothing was drawn"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == ((1740, 735) if "latency_ms" in front.baseline.metrics else (1140, 735))


def test_settings_of_the_whole_process_are_left_alone(fronts):
    """Pyplot has a backend and styles for the process; the user may have chosen others."""
    before = "matplotlib.pyplot" in sys.modules
    png_bytes(view_of(fronts["whole"]), plots_of(fronts["whole"]))
    assert ("matplotlib.pyplot" in sys.modules) == before
