"""Names and texts in the form that MLflow accepts."""

from __future__ import annotations

from paretorch.results.tracking.names import accepted, description


def test_names_become_acceptable_and_stay_different() -> None:
    names = ["a[0]", "a,0,", "/x//y/", "..", "", "x" * 400, "Größe", "layer1.conv [bits]"]
    assert list(accepted(dict.fromkeys(names))) == [
        "a_0_",
        "a_0__2",
        "__x__y_",
        "_..",
        "_",
        "x" * 250,
        "Gr__e",
        "layer1.conv _bits_",
    ]


def test_a_description_has_no_picture_and_ends_between_two_lines() -> None:
    assert description("# digits\n\n![front](front.png)\n\nText.") == "# digits\n\nText."
    text = description("```\n" + "x" * 90 + ("\n" + "y" * 90) * 100 + "\n```\n")
    assert 7800 < len(text) <= 8000
    assert text.endswith("y\n```\n\n(The rest is in report.md.)")
