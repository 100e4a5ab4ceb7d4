"""Weights that are set to zero, anywhere in a layer or in a pattern N:M."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import RecipeError
from ..plain import later
from ..rules import Axis
from ..steps import LayerStep, Step, Steps, counted, in_brackets, span, unusual
from ..structure import Layer, Structure
from ..values import Either, Number, OneOf, Text, possible
from .cluster import Cluster
from .quantize import Quantize
from .technique import Encoding, Key, RuleWords, Technique, needs_hessian, refusals

CRITERIA = ("magnitude", "taylor", "activation", "obs", "random")
_FUNCTION = re.compile(r"[^:]+:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Sparsify(LayerStep):
    """Set the share `ratio` of a layer's weights to zero, those that the `criterion` finds least important.

    magnitude: the smallest. taylor: those with the least effect on the outputs by their gradients (Molchanov et al.
    2019). activation: the least products with the norm of their input (Wanda, Sun et al. 2024). obs: those that cost
    least after the others were adjusted, which they then are (SparseGPT, Frantar & Alistarh 2023). random: a draw.
    FILE.py:FUNCTION: what a function of the user's says, which the task holds under this name (`Task.criteria`).
    pattern: "" (anywhere), or N:M such as 2:4: N of every M neighbouring input channels stay; then ratio is 1 - N/M.
    """

    rounds: ClassVar[bool] = True

    ratio: float
    criterion: str = later("magnitude")
    pattern: str = later("")


def pattern_of(text: str) -> tuple[int, int]:
    """N and M of a pattern `N:M`: N of every M neighbouring weights stay; raises `RecipeError` for any other text.

    >>> pattern_of("2:4")
    (2, 4)
    """
    keep, _, of = text.partition(":")
    if not (keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of) <= 32):
        raise RecipeError(
            f"pattern {text!r}: write N:M, such as 2:4 or 4:8, for N of every M (at most 32) weights that stay"
        )
    return int(keep), int(of)


def zeros_of(choice: float | str) -> float:
    """The share of zeros that a choice of sparsity means: itself, or that of a pattern.

    >>> zeros_of(0.3), zeros_of("2:8")
    (0.3, 0.75)
    """
    if isinstance(choice, str):
        keep, of = pattern_of(choice)
        return 1 - keep / of
    return choice


def known_criterion(name: str) -> bool:
    """Whether it is one of `CRITERIA`, or the name of a function of the user's, FILE.py:FUNCTION.

    >>> known_criterion("obs"), known_criterion("rules.py:score"), known_criterion("obss")
    (True, True, False)
    """
    return name in CRITERIA or bool(_FUNCTION.fullmatch(name))


def _function(text: str) -> None:
    if not _FUNCTION.fullmatch(text):
        raise RecipeError(
            f"criterion {text!r}: write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, such as rules.py:score"
        )


def _check(step: Sparsify) -> None:
    if not 0 < step.ratio < 1:
        raise RecipeError(f"sparsify {step.layer}: ratio = {step.ratio}; it must lie between 0 and 1, both excluded")
    if not known_criterion(step.criterion):
        raise RecipeError(
            f"sparsify {step.layer}: criterion = {step.criterion!r}; choose from {', '.join(CRITERIA)}, or name "
            "a function "
            "of yours, FILE.py:FUNCTION"
        )
    if step.pattern and step.ratio != zeros_of(step.pattern):
        raise RecipeError(
            f"sparsify {step.layer}: ratio = {step.ratio} with pattern {step.pattern}; it must be "
            f"{zeros_of(step.pattern):g}, or leave one out"
        )


def _problems(recipe: Steps) -> None:
    signs = {step.layer for step in recipe.of(Quantize) if step.weight_bits == 1}
    if both := sorted(signs & {step.layer for step in recipe.of(Sparsify)}):
        raise RecipeError(
            f"sparsify and quantize to 1 bit for the same layer: {', '.join(both)}; a sign is never zero, choose "
            "weight_bits = 2, which are -1, 0 and 1, or leave out one of the steps"
        )


def _describe(steps: Sequence[Sparsify]) -> list[str]:
    words = unusual((step.pattern for step in steps), "") + unusual((step.criterion for step in steps), "magnitude")
    share = span([round(100 * step.ratio) for step in steps])
    return [f"{counted(steps, 'layer')} {share}% sparse" + in_brackets(words)]


def _pattern_refusal(layer: Layer, choice: Any) -> str:
    if not isinstance(choice, str) or not possible(SPARSITY.value, choice):
        return ""
    channels, of = layer.weight_shape[1], pattern_of(choice)[1]
    if channels >= of:
        return ""
    return f"pattern {choice} needs {of} input channels of one group, it has {channels}; choose a share of zeros"


def _fits(step: Sparsify, recipe: Steps, structure: Structure) -> list[str]:
    return refusals(step, structure, {"criterion": CRITERION.refuse, "pattern": _pattern_refusal})


def sparsify(layer: str, zeros: float | str, methods: Mapping[str, Any]) -> Sparsify:
    """The step for a choice of sparsity, with the criterion that was chosen."""
    pattern = zeros if isinstance(zeros, str) else ""
    return Sparsify(layer, zeros_of(zeros), methods.get("criterion", CRITERIA[0]), pattern)


def _step(layer: Layer, chosen: Mapping[str, Any], shape: tuple[int, int], stored: Step | None) -> Step | None:
    zeros = chosen.get("sparsity", 0.0)
    if not zeros or (isinstance(stored, Quantize) and stored.weight_bits == 1):  # a sign is never zero
        return None
    # Zeros that grow are the smallest weights, nothing else will do.
    grows = chosen.get("gradual") and not isinstance(stored, Cluster)
    return sparsify(layer.name, zeros, {} if grows else chosen)


def _chosen(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    sparse = {step.layer: step.pattern or step.ratio for step in of.recipe.of(Sparsify)}
    signs = {step.layer for step in of.recipe.of(Quantize) if step.weight_bits == 1}
    return {sparse.get(name, 0.0) for name in targets if name not in signs}


def _chosen_criterion(axis: Axis, targets: Sequence[str], of: Encoding) -> set[Any]:
    """Without zeros any choice will do, and where they grow."""
    sparse = of.by_layer(Sparsify)
    return {sparse[name].criterion for name in targets if name in sparse and name not in of.grown}


SPARSITY = Key(
    "sparsity",
    Either(Number(least=0, below=1), Text(pattern_of), lambda value: isinstance(value, str)),
    "Shares of a layer's weights that are set to zero, 0 <= x < 1, or patterns such as '2:4' (in quotes): 2 of "
    "every 4\n"
    "neighbouring input channels stay. Choices or rules.",
    _chosen,
    of="layer",
    rule=RuleWords(
        "SparsityRule",
        "Shares of the selected layers' weights that may be set to zero.",
        "Shares, 0 <= x < 1, and patterns such as '2:4' (in quotes), in ascending or descending order. Required.",
    ),
    allowed="shares from 0, below 1, patterns such as '2:4'",
    refuse=_pattern_refusal,
)
CRITERION = Key(
    "criterion",
    Either(OneOf(CRITERIA), Text(_function), lambda value: isinstance(value, str) and ":" in value),
    "Which weights are set to zero: magnitude, taylor (by gradients), activation (by the inputs' norms), obs (by what "
    "they\ncost after the others are adjusted, which they then are), random, or FILE.py:FUNCTION, a function of yours: "
    "from a weight\nand the norms of its inputs, as large as the weight or None, it gives a score for each weight; the "
    "lowest become zero.\nChoices (one for all layers) or rules. Default: magnitude.",
    _chosen_criterion,
    of="layer",
    rule=RuleWords(
        "CriterionRule",
        "Which weights of the selected layers are set to zero.",
        "magnitude, taylor, activation, obs, random, or a function of yours as FILE.py:FUNCTION. Required.",
    ),
    share=True,
    allowed=f"{', '.join(CRITERIA)}, or a function of yours, FILE.py:FUNCTION",
    refuse=needs_hessian("criterion", ("activation", "obs"), CRITERIA[0]),
)
TECHNIQUE = Technique(
    Sparsify,
    check=_check,
    problems=_problems,
    describe=_describe,
    fits=_fits,
    keys=(SPARSITY, CRITERION),
    layer_step=_step,
    form=lambda step: {"zeros": step.pattern or step.ratio},
)
