"""How numbers are shown to people: the one place that knows what a metric looks like.

The name says it. Rates are percentages and their differences are points; a unit at the end of the name (`_bytes`,
`_ms`, and `macs`) is written with a prefix; any other number has four significant digits. `NAME_difference` is the
difference of two values of NAME and has a sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .measurement import Estimate

_DIFFERENCE = "_difference"
# Names of metrics that lie between 0 and 1 by definition. Loss, PSNR, BLEU, Cohen's kappa and Matthews' correlation do
# not, and a word error rate may exceed 1.
_RATES = frozenset({
    "accuracy", "acc", "top1", "top5", "top_1", "top_5", "agreement",
    "error_rate", "top1_error", "top5_error",
    "f1", "precision", "recall", "sensitivity", "specificity",
    "auc", "auroc", "auprc", "average_precision", "ap", "ap50", "ap75", "map", "map50", "map75", "map50_95",
    "iou", "miou", "dice", "jaccard",
})  # fmt: skip  # a line per kind of metric
# What scikit-learn puts behind a metric's name: `f1_macro`, `f1_score`, `roc_auc_ovr`.
_ENDINGS = ("_score", "_macro", "_micro", "_weighted", "_samples", "_ovr", "_ovo")
_PREFIXES = {"macs": ("", "k", "M", "G", "T"), "bytes": ("B", "kB", "MB", "GB", "TB")}


def is_rate(metric: str) -> bool:
    """Whether a metric lies between 0 and 1 and is shown as a percentage, by its name or by how its name ends.

    >>> [is_rate(name) for name in ("accuracy", "val_f1", "mIoU", "roc_auc_ovr", "parity_agreement")]
    [True, True, True, True, True]
    >>> [is_rate(name) for name in ("loss", "psnr", "size_bytes", "accuracy_difference", "latency_ratio")]
    [False, False, False, False, False]
    """
    name = metric.lower()
    while name.endswith(_ENDINGS):
        name = name.rpartition("_")[0]
    words = name.split("_")
    return any("_".join(words[start:]) in _RATES for start in range(len(words)))


def show(metric: str, value: float) -> str:
    """A value in its unit.

    Args:
        metric: The name, which says what kind of number it is.
        value: The number in the unit of the name: bytes, milliseconds, a share of 1.

    Returns:
        The number with its unit, and `-` for NaN.

    >>> show("size_bytes", 41234), show("latency_ms", 0.1234), show("accuracy", 0.9731), show("macs", 40_560_000)
    ('41.2 kB', '0.123 ms', '97.31%', '40.6 M')
    >>> show("val_f1", 0.8), show("loss", 0.123456), show("f1_difference", -0.004), show("loss_difference", 0.02)
    ('80.00%', '0.1235', '-0.40 points', '+0.02')
    """
    if value != value:
        return "-"
    if metric.endswith(_DIFFERENCE):
        name = metric.removesuffix(_DIFFERENCE)
        return signed(name, value) + (" points" if is_rate(name) else "")
    if is_rate(metric):
        return f"{100 * value:.2f}%"
    if metric.endswith("_ms"):
        return f"{value:.3g} ms" if abs(value) < 999.5 else f"{value:.0f} ms"
    units = _PREFIXES.get(metric.rpartition("_")[2])
    if units is None:
        return f"{value:.4g}"
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {units[step]}".rstrip()


def signed(metric: str, value: float) -> str:
    """A difference of two values of `metric` with its sign, and in points without the word where it is a rate.

    >>> signed("accuracy", -0.0041), signed("loss", 0.012), signed("size_bytes", -2500)
    ('-0.41', '+0.012', '-2.5 kB')
    """
    if is_rate(metric):
        return f"{100 * value:+.2f}"
    return f"{'-' if value < 0 else '+'}{show(metric, abs(value))}"


def half_interval(metric: str, estimate: Estimate) -> str:
    """Half the 95% interval of a value or a difference, in the unit in which `show` gives the value.

    >>> from .measurement import Estimate
    >>> half_interval("accuracy", Estimate(0.9, 0.89, 0.92)), half_interval("loss", Estimate(1.0, 0.9, 1.1))
    ('±1.50', '±0.1')
    """
    half = (estimate.high - estimate.low) / 2
    return f"±{100 * half:.2f}" if is_rate(metric.removesuffix(_DIFFERENCE)) else f"±{half:.2g}"


def spread(metric: str, estimate: Estimate) -> str:
    """As `half_interval`, and nothing for an exact number."""
    return "" if estimate.low == estimate.high else half_interval(metric, estimate)


def speed(latency: Estimate, base: Estimate) -> str:
    """What the intervals of two latencies tell: `faster`, `slower`, or `same speed` where they overlap."""
    return "faster" if latency.high < base.low else "slower" if latency.low > base.high else "same speed"


def against(metric: str, estimate: Estimate, base: Estimate) -> str:
    """A number compared with the baseline's: `14% of baseline`, `2.10x faster`, `-0.41 points`, `+0.012`.

    >>> from .measurement import Estimate
    >>> against("size_bytes", Estimate.exact(14), Estimate.exact(100))
    '14% of baseline'
    >>> against("val_f1", Estimate.exact(0.75), Estimate.exact(0.8))
    '-5.00 points'
    """
    if metric in ("latency_ms", "latency_ratio"):
        verdict = speed(estimate, base)
        if verdict == "same speed":
            return verdict
        times = base.value / estimate.value if verdict == "faster" else estimate.value / base.value
        return f"{times:.2f}x {verdict}"
    if metric.rpartition("_")[2] in _PREFIXES:
        return f"{100 * estimate.value / base.value:.3g}% of baseline" if base.value else ""
    return show(metric + _DIFFERENCE, estimate.value - base.value)


def duration(seconds: float, exact: bool = False) -> str:
    """Seconds in the units of a clock.

    Args:
        seconds: The time.
        exact: Show tenths of a second below ten seconds.

    >>> duration(45.2), duration(125), duration(7260), duration(2.34, exact=True)
    ('45s', '2m05s', '2h01m', '2.3s')
    """
    if exact and seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
