"""Blame: which decision of a recipe cost how much, and what to try instead.

Every decision of a candidate (a layer's bits, its zeros, the width of its activations, a group's channels, a block that
was left out) is taken back alone, the rest stays, and the network is built and evaluated again from stored layers. What
comes back is the decision's cost here, in the company of all others; `sensitivity` measures it alone, and where errors
compound the two differ.

Nothing is trained: trained weights fit the recipe that they were trained for and no other. A recipe that trains is
compared as it was before training, which is where training has to start from.
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
_TRIED = 5  # softer decisions that are measured for the suggestion


@dataclass(frozen=True)
class Decision:
    """One decision of a recipe: the recipe without it, and with a milder one in its place (None: there is none)."""

    what: str
    without: Recipe
    milder: Recipe | None = None
    milder_what: str = ""


@dataclass(frozen=True)
class Cost:
    """What a decision cost: the recipe without it (or with the milder one) less the recipe with it.

    metric: of the task, with its paired 95% interval. divergence: by how much the outputs come nearer to the untouched
    network's (see `runners.sensitivity.divergence`). size_bytes: what it adds to the file.
    """

    what: str
    recipe: Recipe
    metric: Estimate
    divergence: float
    size_bytes: int


@dataclass(frozen=True)
class Explanation:
    """The costs of all decisions, the dearest first; `divergence` and `metric` are the whole recipe's, before training.

    suggestion: the milder decision that brings the outputs nearest to the untouched network's per byte, if there is
    one; its recipe trains as the explained one does. keeps: whether the limits on bytes and MACs hold with it.
    """

    costs: tuple[Cost, ...]
    metric: Estimate
    divergence: float
    size_bytes: int
    images: int
    suggestion: Cost | None
    keeps: bool


def untrained(recipe: Recipe) -> Recipe:
    """The recipe with its training left out; statistics are still re-estimated."""
    kept = [step for step in recipe.steps if not (isinstance(step, Recover) and step.epochs)]
    trained = len(kept) < len(recipe.steps)
    untold = trained and not any(isinstance(step, Recover) for step in kept)
    return Recipe((*kept, Recover("batchnorm")) if untold else tuple(kept))


def decisions(recipe: Recipe, structure: Structure) -> list[Decision]:
    """Every decision of a recipe that can be taken back alone; activations of 8 bits count as one decision.

    >>> layers = Structure((), (), (), ())
    >>> [d.what for d in decisions(Recipe((Quantize("fc", 3), Sparsify("fc", 0.5))), layers)]
    ['fc: 50% zeros', 'fc: weights of 3 bits']
    """

    def changed(old: Step, new: Step | None) -> Recipe:
        return Recipe(tuple(s for s in (*(x for x in recipe.steps if x is not old), new) if s is not None))

    found: list[Decision] = []
    for step in recipe.steps:
        match step:
            case Student(drop):
                for block in drop:
                    left = tuple(name for name in drop if name != block)
                    found.append(
                        Decision(
                            f"{block}: left out",
                            changed(step, replace(step, drop=left) if left or step.factory else None),
                        )
                    )
            case Prune(group, keep):
                whole = structure.group(group)
                wider = kept_channels(whole.channels, (keep + whole.channels) / 2 / whole.channels, whole.round_to)
                milder = changed(step, Prune(group, wider)) if keep < wider < whole.channels else None
                found.append(
                    Decision(
                        f"{group}: {keep} of {whole.channels} channels",
                        changed(step, None),
                        milder,
                        f"{wider} channels of {group} instead of {keep}",
                    )
                )
            case Equalize(by):
                found.append(Decision(f"ranges equalised (by {by})", changed(step, None)))
            case Sparsify(layer, ratio):
                half = f"{50 * ratio:g}% zeros in {layer} instead of {100 * ratio:g}%"
                found.append(
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
                found.append(
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
        found.append(Decision(f"activations of {', '.join(map(str, sorted(rounded)))} bits", Recipe(tuple(floats))))
    return found


def explain(
    runner: Runner, recipe: Recipe, budget: Budget, baseline: Mapping[str, float], images: int, progress: Progress
) -> Explanation:
    """Take every decision of a recipe back alone, on `images` validation images.

    baseline: the untouched network's numbers, which limits are relative to. Raises `RecipeError` when the recipe does
    not fit the network, or is an ensemble.
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
        except TrialError:  # without it the rest does not work: then it is not to blame
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
