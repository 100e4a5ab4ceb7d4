"""Weights as integers with scales (or float16), and inputs of few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...errors import RecipeError
from ..plain import later
from ..rules import Axis
from ..steps import LayerStep, Step, Steps, in_brackets, span, unusual
from ..structure import Layer, Structure
from ..values import OneOf
from .technique import Encoding, Key, RuleWords, Technique, needs_hessian, refusals

ROUNDINGS = ("nearest", "gptq", "adaround")
RANGES = ("mse", "minmax", "percentile", "entropy")
ACTIVATIONS = ("static", "dynamic")
SCHEMES = ("symmetric", "affine")
GROUP_SIZES = (16, 32, 64, 128, 256)
ACTIVATION_BITS = (4, 8, 16, 32)


@dataclass(frozen=True)
class Quantize(LayerStep):
    """Store a layer's weights in `weight_bits` (1..8 integers, 16 float16), its inputs in `activation_bits` (4, 8, 16,
    32).

    activation_bits: 8 is what CPUs have kernels for; 4 and 16 are for accelerators, and ONNX Runtime rounds to them and
    computes in floats.

    rounding: nearest, gptq (Frantar et al. 2023) or adaround (Nagel et al. 2020), which round for the layer's outputs.
    ranges: how the scale of each output channel is found: mse, minmax, percentile, entropy. 2 bits are ternary, -1, 0,
    1; one bit is a sign, -1 or 1, whose scale is the mean magnitude (XNOR-Net, Rastegari et al. 2016), the one of least
    squares. activations: where 8-bit activations have their range from: static, the calibration images; dynamic, at run
    time, the inputs of the call themselves (linear layers only). group_size: 0, or a scale for every so many inputs of
    an output channel (linear layers of float activations only). scheme: symmetric, a scale for each output channel and
    zero as code 0; affine, one scale and one zero point for the whole weight, BatchNorm folded into it before (Jacob et
    al. 2018), 2 to 8 bits.
    """

    rounds: ClassVar[bool] = True

    weight_bits: int
    activation_bits: int = 32
    rounding: str = later("nearest")
    ranges: str = later("mse")
    activations: str = later("static")
    group_size: int = later(0)
    scheme: str = later("symmetric")


def _check(step: Quantize) -> None:
    _check_bits(step)
    _check_methods(step)
    what = f"quantize {step.layer}"
    if step.activations not in ACTIVATIONS or (step.activations == "dynamic" and step.activation_bits != 8):
        raise RecipeError(
            f"{what}: activations = {step.activations!r} with activation_bits = {step.activation_bits}; choose from "
            f"{', '.join(ACTIVATIONS)}, dynamic with 8 only"
        )
    if step.group_size and (step.group_size not in GROUP_SIZES or step.weight_bits > 8 or step.activation_bits != 32):
        raise RecipeError(
            f"{what}: group_size = {step.group_size} with weight_bits = {step.weight_bits}, activation_bits = "
            f"{step.activation_bits}; choose from 0, {', '.join(map(str, GROUP_SIZES))}, with at most 8 bits and float "
            "activations (32)"
        )
    if step.scheme not in SCHEMES or (step.scheme == "affine" and not 2 <= step.weight_bits <= 8):
        raise RecipeError(
            f"{what}: scheme = {step.scheme!r} with weight_bits = {step.weight_bits}; choose from "
            f"{', '.join(SCHEMES)}, "
            "affine with 2 to 8 bits only: a sign and a float16 have no zero point"
        )
    if step.scheme == "affine" and (step.group_size or step.ranges == "entropy"):
        raise RecipeError(
            f"{what}: scheme = 'affine' with group_size = {step.group_size}, ranges = {step.ranges!r}; it has "
            "one scale for "
            "the whole weight, and no ranges by entropy: choose group_size = 0 and mse, minmax or percentile, "
            "or scheme = "
            "'symmetric'"
        )


def _check_bits(step: Quantize) -> None:
    if step.weight_bits not in (*range(1, 9), 16):
        raise RecipeError(
            f"quantize {step.layer}: weight_bits = {step.weight_bits}; choose from 1..8, 16, or leave the step "
            "out for 32"
        )
    if step.activation_bits not in ACTIVATION_BITS or (step.activation_bits < 32 and step.weight_bits > 8):
        raise RecipeError(
            f"quantize {step.layer}: activation_bits = {step.activation_bits} with weight_bits = {step.weight_bits}; "
            "choose 32, or 4, 8, 16 together with weights of at most 8 bits"
        )


def _check_methods(step: Quantize) -> None:
    if step.rounding not in ROUNDINGS or step.ranges not in RANGES:
        raise RecipeError(
            f"quantize {step.layer}: rounding = {step.rounding!r}, ranges = {step.ranges!r}; choose the rounding from "
            f"{', '.join(ROUNDINGS)} and the ranges from {', '.join(RANGES)}"
        )
    if step.weight_bits > 8 and (step.rounding, step.ranges) != ("nearest", "mse"):
        raise RecipeError(
            f"quantize {step.layer}: rounding {step.rounding}, ranges {step.ranges} with weight_bits = "
            f"{step.weight_bits}; float16 has neither, leave them out"
        )
    if step.weight_bits == 1 and step.ranges != "mse":
        raise RecipeError(
            f"quantize {step.layer}: ranges {step.ranges} with weight_bits = 1; the scale of signs is their mean "
            "magnitude, leave ranges out"
        )


def _describe(steps: Sequence[Quantize]) -> list[str]:
    how = unusual((step.rounding for step in steps), "nearest") + unusual((step.ranges for step in steps), "mse")
    how += unusual((step.scheme for step in steps), "symmetric")
    how += [f"groups of {size}" for size in sorted({step.group_size for step in steps} - {0})]
    words = [f"weights {span([step.weight_bits for step in steps])} bit" + in_brackets(how)]
    if rounded := [step.activation_bits for step in steps if step.activation_bits < 32]:
        some = f" in {len(rounded)} of {len(steps)}" if len(rounded) < len(steps) else ""
        dynamic = sum(step.activations == "dynamic" for step in steps)
        late = "" if not dynamic else " (dynamic)" if dynamic == len(rounded) else f" ({dynamic} dynamic)"
        words.append(f"activations {span(rounded)} bit{some}{late}")
    return words


def _linear_groups(layer: Layer, choice: Any) -> str:
    if choice and layer.kind != "linear":
        return f"groups of {choice} weights with a scale each are for linear layers; choose 0"
    return ""


def _linear_dynamic(layer: Layer, choice: Any) -> str:
    if choice == "dynamic" and layer.kind != "linear":
        return (
            "dynamic activations are for linear layers; a convolution runs 6 to 11 times as slowly as in floats, "
            "choose static"
        )
    return ""


def _fits(step: Quantize, recipe: Steps, structure: Structure) -> list[str]:
    asked = {key.name: key.refuse for key in (ROUNDING, ACTIVATION_RANGES, GROUP_SIZE)}
    return refusals(step, structure, asked)


def quantize(layer: str, bits: int, activation_bits: int, methods: Mapping[str, Any]) -> Quantize:
    """The step for a choice of bits below 32, with what was chosen of the other keys.

    What has no effect above 8 bits, on signs, groups, or float activations is left out.
    """
    if bits > 8:
        return Quantize(layer, bits)
    step = Quantize(layer, bits, activation_bits)
    for field, has_effect in _EFFECTIVE.items():
        if field in methods and has_effect(step):
            step = replace(step, **{field: methods[field]})
    return step


# By field where it has an effect, of integers; a group size is known before the scheme.
_EFFECTIVE: dict[str, Callable[[Quantize], bool]] = {
    "rounding": lambda step: True,
    "ranges": lambda step: step.weight_bits > 1,
    "activations": lambda step: step.activation_bits == 8,
    "group_size": lambda step: step.activation_bits == 32,
    "scheme": lambda step: step.weight_bits > 1 and not step.group_size,
}


def _step(layer: Layer, chosen: Mapping[str, Any], shape: tuple[int, int], stored: Step | None) -> Step | None:
    bits = chosen.get("weight_bits", 32)
    if bits == 32:
        return None
    grows = chosen.get("gradual") and chosen.get("sparsity") and bits > 1
    methods = {kind: choice for kind, choice in chosen.items() if not (grows and kind == "rounding")}
    return quantize(layer.name, bits, chosen.get("activation_bits", 32), methods)


def _conflicts(axes: Sequence[Axis], structure: Structure) -> dict[str, list[str]]:
    entropy, affine = (
        {target for axis in axes if choice in axis.choices for target in axis.targets}
        for choice in ("entropy", "affine")
    )
    both = [layer.name for layer in structure.layers if layer.name in entropy & affine]
    problem = "ranges: 'entropy' with scheme: 'affine', which it has no ranges for; leave one of them out"
    return {problem: both} if both else {}


def _chosen_bits(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    quantized = of.by_layer(Quantize)
    return {
        quantized[name].weight_bits if name in quantized else 32 for name in targets if not of.taken(name, Quantize)
    }


def _integers(targets: Iterable[str], of: Encoding) -> list[Quantize]:
    steps = of.by_layer(Quantize)
    return [steps[name] for name in targets if name in steps and steps[name].weight_bits <= 8]


def _chosen_activation_bits(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    """Where weights stay float an activation width has no effect: any choice will do."""
    return {step.activation_bits for step in _integers(targets, of)}


def _chosen_method(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    has_effect = _EFFECTIVE[axis.kind]
    grown = of.grown if axis.kind == "rounding" else ()
    steps = [step for step in _integers(targets, of) if has_effect(step) and step.layer not in grown]
    return {getattr(step, axis.kind) for step in steps}


def _form(step: Quantize) -> dict[str, Any]:
    return {
        "bits": step.weight_bits,
        "inputs": step.activations if step.activation_bits < 32 else "float",
        "group_size": step.group_size,
        "affine": step.scheme == "affine",
    }


WEIGHT_BITS = Key(
    "weight_bits",
    OneOf((1, 2, 3, 4, 5, 6, 7, 8, 16, 32)),
    "Bits of a layer's weights: 1 (signs; they want training), 2..8 (integers), 16 (float16), 32 (untouched). Choices, "
    "or\nrules per layer. Where weights are signs, `sparsity` and `ranges` do not count.",
    _chosen_bits,
    of="layer",
    rule=RuleWords(
        "WeightRule",
        "Bits that the weights of the selected layers may have.",
        "1..8, 16 or 32 bits, in ascending or descending order. Required.",
    ),
    allowed="1..8, 16, 32",
)
ACTIVATION_WIDTH = Key(
    "activation_bits",
    OneOf(ACTIVATION_BITS),
    "Bits of what a layer computes on: 8 (int8 arithmetic) or 32 (float); 4 and 16 for an accelerator whose "
    "profile has "
    "such\nunits (a CPU rounds to them and computes in floats). Below 32 they take effect where the weights "
    "have at most "
    "8. Choices or rules.",
    _chosen_activation_bits,
    of="layer",
    rule=RuleWords(
        "ActivationRule",
        "Bits that the inputs of the selected layers may have.",
        "4, 8, 16 or 32 bits. Required.",
    ),
)
ROUNDING = Key(
    "rounding",
    OneOf(ROUNDINGS),
    "How weights of at most 8 bits are rounded: nearest; gptq or adaround, which round for the layer's outputs on "
    "the\ncalibration images (seconds to minutes, once). Choices (one for all layers) or rules. Default: nearest.",
    _chosen_method,
    of="layer",
    rule=RuleWords(
        "RoundingRule", "How the weights of the selected layers are rounded.", "nearest, gptq, adaround. Required."
    ),
    share=True,
    refuse=needs_hessian("rounding", ("gptq", "adaround"), ROUNDINGS[0]),
)
RANGES_OF_WEIGHTS = Key(
    "ranges",
    OneOf(RANGES),
    "How the range of each output channel's weights is found: mse, minmax, percentile, entropy. Choices (one for "
    "all\nlayers) or rules. Default: mse.",
    _chosen_method,
    of="layer",
    rule=RuleWords(
        "RangesRule",
        "How the ranges of the selected layers' weights are found.",
        "mse, minmax, percentile, entropy. Required.",
    ),
    share=True,
)
ACTIVATION_RANGES = Key(
    "activations",
    OneOf(ACTIVATIONS),
    "Where 8-bit activations have their ranges from: static, the calibration images; dynamic, the inputs of each "
    "call\n(linear layers only, so write a rule: `{layers: linear, choices: [static, dynamic]}`). Default: static.",
    _chosen_method,
    of="layer",
    rule=RuleWords(
        "ActivationsRule",
        "Where the selected layers' 8-bit activations have their ranges from.",
        "static, dynamic (linear layers only). Required.",
    ),
    share=True,
    refuse=_linear_dynamic,
)
GROUP_SIZE = Key(
    "group_size",
    OneOf((0, *GROUP_SIZES)),
    "How many weights of an output channel share a scale: 0 (all of them), 16, 32, 64, 128, 256. Has an effect "
    "where\nactivations are float, and is for linear layers only: `{layers: linear, choices: [0, 64]}`. Default: 0.",
    _chosen_method,
    of="layer",
    rule=RuleWords(
        "GroupRule",
        "How many weights of an output channel share a scale in the selected layers.",
        "0 (all of them), 16, 32, 64, 128, 256; other than 0 for linear layers only. Required.",
    ),
    share=True,
    refuse=_linear_groups,
)
SCHEME = Key(
    "scheme",
    OneOf(SCHEMES),
    "symmetric, a scale for each output channel; affine, one scale and one zero point for the whole weight, BatchNorm "
    "folded into\nit (2 to 8 bits, ranges other than entropy), for devices that know no other. Choices (one for all "
    "layers) or rules. Without\neffect on signs and groups. Default: symmetric.",
    _chosen_method,
    of="layer",
    rule=RuleWords(
        "SchemeRule",
        "Whether the integers of the selected layers' weights have scales for each output channel, or one and "
        "a zero point.",
        "symmetric, affine. Required.",
    ),
    share=True,
)
TECHNIQUE = Technique(
    Quantize,
    check=_check,
    describe=_describe,
    stores="integers with scales",
    fits=_fits,
    keys=(WEIGHT_BITS, ACTIVATION_WIDTH, ROUNDING, RANGES_OF_WEIGHTS, ACTIVATION_RANGES, GROUP_SIZE, SCHEME),
    conflicts=_conflicts,
    layer_step=_step,
    form=_form,
)
