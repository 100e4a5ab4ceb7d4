"""Numbers as people read them: any rate looks like accuracy, any cost has its unit, any other number its digits."""

import math

import pytest

from paretorch.objectives.display import against, duration, half_interval, is_rate, show, signed, speed, spread
from paretorch.objectives.measurement import Estimate


@pytest.mark.parametrize(
    "name",
    ["accuracy", "val_accuracy", "balanced_accuracy", "top1", "top_5", "f1", "F1", "macro_f1", "f1_macro", "f1_score",
     "precision", "recall_weighted", "auc", "roc_auc", "roc_auc_ovr", "mIoU", "mean_iou", "mAP", "mAP50_95", "dice",
     "average_precision_score", "parity_agreement", "error_rate"],
)  # fmt: skip  # a list of names
def test_a_rate_is_known_by_its_name(name):
    assert is_rate(name)
    assert show(name, 0.9731) == "97.31%"
    assert show(f"{name}_difference", -0.0041) == "-0.41 points"


@pytest.mark.parametrize(
    "name",
    ["loss", "val_loss", "accuracy_loss", "psnr", "bleu", "kappa", "r2_score", "rmse", "wer", "latency_ratio",
     "size_bytes", "macs", "latency_ms", "accuracy_difference", "heatmap", "", "score"],
)  # fmt: skip  # a list of names
def test_other_numbers_are_no_rates(name):
    assert not is_rate(name)


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("size_bytes", 0, "0 B"),
        ("size_bytes", 999, "999 B"),
        ("size_bytes", 999.6, "1 kB"),
        ("size_bytes", 1e6, "1 MB"),
        ("size_bytes", 2.5e13, "25 TB"),
        ("size_bytes", 2.5e16, "2.5e+04 TB"),
        ("peak_bytes", 2500, "2.5 kB"),
        ("macs", 12, "12"),
        ("macs", 40_560_000, "40.6 M"),
        ("latency_ms", 0.01234, "0.0123 ms"),
        ("latency_ms", 1234.5, "1234 ms"),
        ("first_token_ms", 12.34, "12.3 ms"),
        ("accuracy", 1.0, "100.00%"),
        ("accuracy_difference", -0.0041, "-0.41 points"),
        ("f1", 0.123456, "12.35%"),
        ("loss", 0.123456, "0.1235"),
        ("loss", 1234.56, "1235"),
        ("loss_difference", 0.0123456, "+0.01235"),
        ("latency_ratio", 1.25, "1.25"),
        ("accuracy", math.nan, "-"),
        ("loss_difference", math.nan, "-"),
    ],
)
def test_show(metric, value, text):
    assert show(metric, value) == text


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [("accuracy", 0.0, "+0.00"), ("mIoU", 0.012, "+1.20"), ("loss", -0.5, "-0.5"), ("loss", 0.0, "+0"),
     ("size_bytes", -2500, "-2.5 kB")],
)  # fmt: skip  # a table of cases
def test_a_difference_has_a_sign(metric, value, text):
    assert signed(metric, value) == text


def test_a_spread_has_the_unit_of_its_value():
    around = Estimate(0.9, 0.89, 0.91, 100)
    assert [spread(name, around) for name in ("accuracy", "accuracy_difference", "loss")] == ["±1.00", "±1.00", "±0.01"]
    assert spread("accuracy", Estimate.exact(0.9)) == ""
    assert half_interval("accuracy", Estimate.exact(0.9)) == "±0.00"


@pytest.mark.parametrize(
    ("metric", "value", "base", "text"),
    [
        ("accuracy", 0.9, 0.9041, "-0.41 points"),
        ("top5", 0.95, 0.9, "+5.00 points"),
        ("loss", 0.5, 0.4, "+0.1"),
        ("size_bytes", 14, 100, "14% of baseline"),
        ("macs", 1, 3, "33.3% of baseline"),
        ("size_bytes", 14, 0, ""),
        ("latency_ms", 0.5, 1.0, "2.00x faster"),
        ("latency_ratio", 1.5, 1.0, "1.50x slower"),
    ],
)
def test_against(metric, value, base, text):
    assert against(metric, Estimate.exact(value), Estimate.exact(base)) == text


def test_latencies_whose_intervals_overlap_have_the_same_speed():
    one, other = Estimate(1.0, 0.9, 1.1), Estimate(1.05, 1.0, 1.2)
    assert speed(one, other) == against("latency_ms", one, other) == "same speed"
    assert speed(Estimate.exact(0.8), one) == "faster"
    assert speed(other, Estimate.exact(0.8)) == "slower"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (3600, "1h00m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_an_exact_duration_has_tenths_while_it_is_short():
    assert (duration(2.34, exact=True), duration(9.96, exact=True)) == ("2.3s", "10s")
