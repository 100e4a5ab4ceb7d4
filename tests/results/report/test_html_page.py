"""The page to explore."""

import base64
import html
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from paretorch.results.report.html_page import html_page
from paretorch.results.report.plots import plots_of
from paretorch.results.report.view import view_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page_of(front, name="a study"):
    return html_page(view_of(front, name=name), plots_of(front))


def test_the_page_needs_no_other_file(front):
    page = page_of(front)
    assert "Plotly.newPlot" in page
    assert len(page) > 1_000_000, "plotly is not inside the page"
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", page), "the page asks for another file"


def test_names_and_reasons_are_text(fronts):
    page = page_of(fronts["whole"], "<i>digits</i>")
    assert "<i>digits" not in page
    assert "<h1>&lt;i&gt;digits&lt;/i&gt;</h1>" in page
    assert "ExportFailed: &lt;b&gt;layer1&lt;/b&gt; [red]has[/red] no | shape line two" in page


def test_the_picture_of_the_sensitivity_is_inside(fronts, tmp_path):
    (tmp_path / "sensitivity.png").write_bytes(b"\x89PNG and so on")
    page = page_of(replace(fronts["whole"], directory=tmp_path))
    (inside,) = re.findall(r"<img [^>]*src='data:image/png;base64,([^']*)'>", page)
    assert base64.b64decode(inside) == b"\x89PNG and so on"


def test_what_is_known_of_finalists_is_told(finalists):
    page = html.unescape(page_of(finalists))
    _, second, *others = finalists.members
    assert f"<p>#{second.number} is recommended over {', '.join(f'#{m.number}' for m in others)}: cheaper" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
def test_a_browser_without_a_network_draws_the_page(fronts, tmp_path):
    (tmp_path / "front.html").write_text(page_of(fronts["whole"], "digits <study>"))
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1280,1400",
        "--virtual-time-budget=10000",
        "--dump-dom",
        (tmp_path / "front.html").as_uri(),
    ]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert page.count('class="main-svg"') >= 2, "plotly drew nothing"
    assert len(re.findall(r'<path class="point[" ]', page)) >= 2 * len(fronts["whole"].members)
    assert "digits &lt;study&gt;" in page
    assert "original model" in page
    assert "<h2>The front</h2>" in page
