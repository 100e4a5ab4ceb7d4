"""The report as text."""

import json
import re
from dataclasses import replace

import pytest

from paretorch.results.report.markdown import markdown
from paretorch.results.report.view import view_of
from paretorch.spaces.recipe import Recipe


def test_the_text_tells_a_colleague_what_was_found(fronts, tmp_path):
    front = replace(fronts["whole"], directory=tmp_path / "my study")
    view = view_of(
        front, name="digits", config_text="trials: 11\n", budget_lines=["size_bytes <= 50%"], notes=["Mind the gap."]
    )
    text = markdown(view, tmp_path)
    knee = front.knee()
    assert text.startswith("# digits: what the search found\n")
    assert f"The knee of the front is **#{knee.number}: accuracy" in text
    assert "| accuracy | 95.00% [93.47%, 96.19%] |" in text
    assert "19 kB, 19% of baseline" in text
    assert "x faster" in text
    assert "beaten by #6" in text
    assert "(within the intervals)" in text
    assert "dominated: 0.420 by the trivial baselines alone, 0.496 with the search" in text
    assert "over size_bytes <= 50%" in text
    assert "1 of them rejected by predicted cost" in text
    assert "- #9: ExportFailed: &lt;b>layer1&lt;/b> [red]has[/red] no | shape line two" in text
    assert "cannot be told apart from the best" in text
    assert "the members lost 0.40 points more than the baseline" in text
    assert f"paretorch export '{tmp_path}/my study' --pick knee --to deploy" in text
    assert 'paretorch.load("deploy")' in text
    assert "Mind the gap." in text
    assert "```yaml\ntrials: 11\n```" in text


def test_the_knees_recipe_can_be_read_back(fronts, tmp_path):
    text = markdown(view_of(fronts["whole"]), tmp_path)
    block = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert block is not None
    assert Recipe.from_dict(json.loads(block[1])) == fronts["whole"].knee().recipe
    assert max(map(len, block[1].splitlines())) < 150


def test_an_empty_front_shows_what_the_limits_would_have_to_be(fronts, tmp_path):
    text = markdown(view_of(fronts["empty"]), tmp_path)
    assert "No candidate kept the budget" in text
    assert "`size_bytes <= 12%`" in text
    assert "--pick 7 " in text or "--pick 6 " in text
    nothing = markdown(view_of(fronts["nothing measured"]), tmp_path)
    assert "`size_bytes <= 62.5%`" in nothing, "the predicted size of a recipe that was never measured"
    assert "--pick NUMBER" in nothing


@pytest.mark.parametrize(
    ("folder", "address"),
    [("report", "../sensitivity.png"), ("a b/plot", "../../sensitivity.png"), (".", "sensitivity.png")],
)
def test_the_sensitivity_is_shown_when_it_was_measured(fronts, tmp_path, folder, address):
    front = replace(fronts["whole"], directory=tmp_path)
    assert "sensitivity." not in markdown(view_of(front), tmp_path / folder)
    (tmp_path / "sensitivity.png").write_bytes(b"\x89PNG and so on")
    assert f"![the sensitivity of each layer]({address})" in markdown(view_of(front), tmp_path / folder)


def test_finalists_are_shown_with_what_is_known_of_them(finalists, tmp_path):
    """The paired difference, the clean process's latency, clusters, slower ones, and files that are another network."""
    first, second, *others = finalists.members
    text = markdown(view_of(finalists), tmp_path)
    assert (
        f"- #{second.number} is recommended over {', '.join(f'#{m.number}' for m in others)}: cheaper, and in accuracy "
        "not told apart on the test split (paired, 5% for each pair)." in text
    )
    slower = ", ".join(f"#{m.number}" for m in finalists.members)
    assert f"- Slower than the original model: {slower}." in text
    assert f"- #{first.number} is not what was simulated: 98.00% of 1000 answers" in text
    assert "-0.40 ±0.60 against the baseline" in text
    assert "--pick recommended" in text
