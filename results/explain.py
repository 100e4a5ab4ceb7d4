"""Ablation of a recipe: how much each decision contributes to the loss, and what to try instead.

A decision is a layer's bits, its sparsity, the width of its activations, a group's channels, or a dropped block. Each
one is ablated alone: the other decisions stay, and the network is built from stored layers and evaluated again. The
difference is the decision's contribution in the presence of all others. `sensitivity` measures a decision with nothing
else compressed; the two differ where errors compound.

Nothing is trained, because trained weights fit only the recipe they were trained for. A recipe with training is
compared before its training, which is the state that training starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..errors import RecipeError, TrialError
from ..objectives import cost
from ..objectives.measurement import Z95, Estimate
from ..objectives.objective import Budget
from ..objectives.paired import difference
from ..runners.runner import EvaluateSample, Inspect, Runner
from ..runners.sensitivity import divergence
from ..spaces.recipe import Recipe
from ..spaces.steps import Step
from ..spaces.structure import Structure, kept_channels
from ..spaces.techniques.ensemble import Ensemble
from ..spaces.techniques.equalize import Equalize
from ..spaces.techniques.prune import Prune
from ..spaces.techniques.quantize import Quantize
from ..spaces.techniques.recover import Recover
from ..spaces.techniques.sparsify import Sparsify
from ..spaces.techniques.student import Student

Progress = Callable[[int, int, str], None]
_TRIED = 5  # milder decisions that are measured for the suggestion


@dataclass(frozen=True)
class Decision:
    """One decision of a recipe that can be ablated.

    Args:
        what: The decision, for people.
        without: The recipe without it.
        milder: The recipe with a milder decision in its place; None where there is none.
        milder_what: The milder decision, for people.
    """

    what: str
    without: Recipe
    milder: Recipe | None = None
    milder_what: str = ""


@dataclass(frozen=True)
class Cost:
    """The contribution of a decision: the recipe without it (or with the milder one) less the recipe with it.

    Args:
        what: The decision, for people.
        recipe: The recipe without it, or with the milder one.
        metric: The gain in the task's metric, with a paired 95% interval.
        divergence: By how much the outputs come closer to the baseline's (see `runners.sensitivity.divergence`).
        size_bytes: The bytes that the change adds to the file.
    """

    what: str
    recipe: Recipe
    metric: Estimate
    divergence: float
    size_bytes: int


@dataclass(frozen=True)
class Explanation:
    """The contributions of all decisions of a recipe.

    Args:
        costs: The contributions, the most expensive first.
        metric: The metric of the whole recipe, before training.
        divergence: The divergence of its outputs from the baseline's, before training.
        size_bytes: The bytes of its file.
        images: How many validation images were evaluated.
        suggestion: The milder decision with the largest drop in divergence per byte, None where there is none. Its
            recipe contains the training of the explained one.
        keeps: Whether the limits on bytes and MACs hold with the suggestion.
    """

    costs: tuple[Cost, ...]
    metric: Estimate
    divergence: float
    size_bytes: int
    images: int
    suggestion: Cost | None
    keeps: bool


def untrained(recipe: Recipe) -> Recipe:
    """The recipe without its training; BatchNorm statistics are still re-estimated."""
    kept = [step for step in recipe.steps if not (isinstance(step, Recover) and step.epochs)]
    trained = len(kept) < len(recipe.steps)
    untold = trained and not any(isinstance(step, Recover) for step in kept)
    return Recipe((*kept, Recover("batchnorm")) if untold else tuple(kept))


def decisions(recipe: Recipe, structure: Structure) -> list[Decision]:
    """Every decision of a recipe that can be ablated alone; all activations below 32 bits count as one decision.

    >>> layers = Structure((), (), (), ())
    >>> [d.what for d in decisions(Recipe((Quantize("fc", 3), Sparsify("fc", 0.5))), layers)]
    ['fc: 50% zeros', 'fc: weights of 3 bits']
    """

    def changed(old: Step, new: Step | None) -> Recipe:
        return Recipe(tuple(s for s in (*(x for x in recipe.steps if x is not old), new) if s is not None))

    ablations: list[Decision] = []
    for step in recipe.steps:
        match step:
            case Student(drop):
                for block in drop:
                    left = tuple(name for name in drop if name != block)
                    ablations.append(
                        Decision(
                            f"{block}: left out",
                            changed(step, replace(step, drop=left) if left or step.factory else None),
                        )
                    )
            case Prune(group, keep):
                whole = structure.group(group)
                wider = kept_channels(whole.channels, (keep + whole.channels) / 2 / whole.channels, whole.round_to)
                milder = changed(step, Prune(group, wider)) if keep < wider < whole.channels else None
                ablations.append(
                    Decision(
                        f"{group}: {keep} of {whole.channels} channels",
                        changed(step, None),
                        milder,
                        f"{wider} channels of {group} instead of {keep}",
                    )
                )
            case Equalize(by):
                ablations.append(Decision(f"ranges equalised (by {by})", changed(step, None)))
            case Sparsify(layer, ratio):
                half = f"{50 * ratio:g}% zeros in {layer} instead of {100 * ratio:g}%"
                ablations.append(
                    Decision(
                        f"{layer}: {100 * ratio:g}% zeros",
                        changed(step, None),
                        changed(step, replace(step, ratio=ratio / 2)),
                        half,
                    )
                )
            case Quantize(layer, bits, activations) if bits < 8 or activations == 32:
                plain = replace(step, weight_bits=8) if activations < 32 else None
                milder = changed(step, replace(step, weight_bits=bits + 1)) if bits < 8 else None
                ablations.append(
                    Decision(
                        f"{layer}: weights of {bits} bit{'s' * (bits > 1)}",
                        changed(step, plain),
                        milder,
                        f"{bits + 1} bits in {layer} instead of {bits}",
                    )
                )
            case _:
                pass
    if rounded := {step.activation_bits for step in recipe.of(Quantize) if step.activation_bits < 32}:
        floats = (
            replace(s, activation_bits=32, activations="static") if isinstance(s, Quantize) else s for s in recipe.steps
        )
        ablations.append(Decision(f"activations of {', '.join(map(str, sorted(rounded)))} bits", Recipe(tuple(floats))))
    return ablations


def explain(
    runner: Runner, recipe: Recipe, budget: Budget, baseline: Mapping[str, float], images: int, progress: Progress
) -> Explanation:
    """Ablate every decision of a recipe alone.

    Args:
        runner: Builds and evaluates the networks.
        recipe: The recipe to explain.
        budget: The limits, to judge the suggestion.
        baseline: The baseline's numbers, which limits are relative to.
        images: How many validation images to evaluate.
        progress: Called before each step.

    Raises:
        RecipeError: The recipe does not fit the network, or is an ensemble.
    """
    if recipe.of(Ensemble):
        raise RecipeError(f"{recipe.describe()}: an ensemble has no decisions of its own; explain one of its networks")
    structure = runner.submit(Inspect()).result().structure
    dense = torch.from_numpy(runner.submit(EvaluateSample(None, images)).result().outputs)
    training = recipe.of(Recover)
    recipe = untrained(recipe)
    listed = decisions(recipe, structure.of(recipe))
    total = len(listed) + 1 + min(_TRIED, sum(d.milder is not None for d in listed))
    progress(0, total, "the recipe as it is")
    whole = runner.submit(EvaluateSample(recipe, images)).result()
    away, size = divergence(dense, torch.from_numpy(whole.outputs)), whole.size_bytes

    def compared(what: str, other: Recipe) -> Cost:
        sample = runner.submit(EvaluateSample(other, images)).result()
        gain = difference(sample.scores, whole.scores)
        half = Z95 * gain.error
        metric = Estimate(gain.value, gain.value - half, gain.value + half, gain.n)
        near = divergence(dense, torch.from_numpy(sample.outputs))
        return Cost(what, other, metric, away - near, sample.size_bytes - size)

    measured: list[tuple[Decision, Cost]] = []
    for position, decision in enumerate(listed, 1):
        progress(position, total, decision.what)
        try:
            measured.append((decision, compared(decision.what, decision.without)))
        except TrialError:  # the rest does not work without this decision: no contribution to report
            continue
    measured.sort(key=lambda pair: -pair[1].divergence)
    suggestion, keeps = None, False
    tried: list[tuple[bool, float, Cost]] = []
    for position, (decision, _) in enumerate([pair for pair in measured if pair[0].milder][:_TRIED], len(listed) + 1):
        assert decision.milder is not None
        progress(position, total, decision.milder_what)
        milder = compared(decision.milder_what, decision.milder)
        if milder.divergence > 0:
            fits = _keeps(budget, baseline, size + milder.size_bytes, cost.macs(structure, decision.milder))
            tried.append((fits, milder.divergence / max(milder.size_bytes, 1), milder))
    if tried:
        keeps, _, best = max(tried, key=lambda entry: entry[:2])
        others = [step for step in best.recipe.steps if not isinstance(step, Recover)]
        suggestion = replace(best, recipe=Recipe((*others, *training)))
    costs = tuple(contribution for _, contribution in measured)
    return Explanation(costs, Estimate.of(whole.scores), away, size, len(whole.scores), suggestion, keeps)


def _keeps(budget: Budget, baseline: Mapping[str, float], size: float, macs: float) -> bool:
    return all(excess <= 0 for excess in budget.excess({"size_bytes": size, "macs": macs}, baseline).values())
