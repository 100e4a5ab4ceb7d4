"""The front in a terminal of 80 columns."""

from dataclasses import replace

from paretorch.results.report.terminal import front_table, least_violating_table, summary
from paretorch.results.report.view import view_of


def test_the_tables_fit_into_80_columns(front, printed):
    view = view_of(front)
    for table in (front_table(view), least_violating_table(view)):
        assert max(len(line.rstrip()) for line in printed(table).splitlines()) <= 80


def test_text_is_shown_as_it_is(fronts, printed):
    front = fronts["untested"]
    odd = replace(front.candidates[5], label="[bold]x[/bold]")
    text = printed(front_table(view_of(replace(front, candidates=(odd,)))))
    assert "[bold]x[/bold]" in text.replace("\n", "").replace(" ", "") or "[bold]x" in text
    assert "±" in text
    assert "2.22x faster" in text
    assert "(knee)" in text


def test_an_empty_front_shows_what_the_limits_would_have_to_be(fronts, printed):
    assert "size_bytes <= 12%" in printed(least_violating_table(view_of(fronts["empty"])))


def test_finalists_are_shown_with_what_is_known_of_them(finalists, printed):
    shown = printed(front_table(view_of(finalists)))
    assert "1.25x slower" in shown
    assert "-0.40 ±0.60" in shown
    assert "simulated)" in shown


def test_the_summary_counts_every_trial(fronts, finalists):
    first, *rest = [line.plain for line in summary(view_of(fronts["whole"]))]
    assert first == (
        "\n11 trials: 4 on the front, 3 measured over the budget, 1 rejected by predicted cost, 1 failed "
        "(over: 4 by size_bytes <= 50%)"
    )
    assert rest[0] == "  #9 failed: ExportFailed: <b>layer1</b> [red]has[/red] no | shape"
    stopped = replace(fronts["whole"].candidates[5], state="stopped")
    lines = summary(view_of(replace(fronts["whole"], candidates=(stopped,))))
    assert "0 rejected by predicted cost, 1 stopped early, 0 failed" in next(iter(lines)).plain
    lines = [line.plain for line in summary(view_of(finalists))]
    assert any("is recommended over" in line for line in lines)
    assert lines[-1].startswith(f"#{finalists.members[0].number} is not what was simulated: 98.00% of 1000 answers")
