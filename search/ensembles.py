"""Ensembles of candidates: which ones to build, predicted from the outputs of each network alone.

The networks to choose from are the first two nondominated fronts of the measured candidates, whatever their metric: two
networks that are not accurate enough alone may be so together. Each network is evaluated once on the validation inputs.
Outputs are then averaged here, so hundreds of combinations take seconds: all pairs, and triples only where the pair is
better than both its networks. MACs and latency are sums. Of the packed bytes, different tensors add up, and a further
graph adds only a part of its bytes, because graphs are similar. Only combinations that would increase the front's
hypervolume are built, exported and measured like any other candidate, those with the largest increase first.

The best of so many combinations is selected on the validation split, so its metric there is biased more than that of a
single trial. The test split, on which every member of the front is measured once, gives the unbiased value.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..objectives.pareto import hypervolume, nondominated
from ..results.candidate import OK, OVER_BUDGET, Candidate
from ..results.front import Front
from ..runners.files.packing import payload_size, tensor_bytes
from ..spaces.recipe import Recipe
from ..spaces.techniques.ensemble import Ensemble

TRIED = 8  # the maximum number of ensembles that are measured
LARGEST = 3  # the maximum number of networks in an ensemble
MEMORY = 1 << 30  # the maximum bytes of outputs in memory
_LAYERS, _NETWORKS = 2, 32
# Returns the metric of the mean outputs of some ensembles, each given by the positions of its networks.
Score = Callable[[Sequence[tuple[int, ...]]], Sequence[float]]
_ALIKE = 0.4  # the share of its bytes that a second graph adds, deflated after the first: 0.2 to 0.57 in five networks


@dataclass(frozen=True)
class Network:
    """A candidate that an ensemble may contain.

    Args:
        candidate: The candidate.
        tensors: The bytes of each tensor in its file, by the tensor's content.
        rest: The remaining bytes of the file (the graph).
    """

    candidate: Candidate
    tensors: Mapping[bytes, int]
    rest: int

    @classmethod
    def of(cls, candidate: Candidate, packed: bytes) -> Network:
        tensors = tensor_bytes(packed)
        return cls(candidate, tensors, len(packed) - payload_size(packed))


@dataclass(frozen=True)
class Combination:
    """Some networks, and the predicted value of each metric for their ensemble."""

    networks: tuple[Network, ...]
    values: dict[str, float]

    @property
    def recipe(self) -> Recipe:
        return Recipe((Ensemble(tuple(n.candidate.recipe.to_json() for n in self.networks)),))


def eligible(front: Front) -> list[Candidate]:
    """The candidates that an ensemble may contain, the best in the metric first."""
    left = [c for c in front.candidates if c.measurement and c.state in (OK, OVER_BUDGET) and not c.recipe.of(Ensemble)]
    members: list[Candidate] = []
    for _ in range(_LAYERS):
        kept = nondominated([front.losses(c) for c in left])
        members += [c for c, best in zip(left, kept, strict=True) if best]
        left = [c for c, best in zip(left, kept, strict=True) if not best]
    sign = -1 if front.maximizes(front.quality) else 1
    return sorted(members, key=lambda c: (sign * _value(c, front.quality), c.number))


def chosen(front: Front, networks: Sequence[Network]) -> list[Network]:
    """The networks that keep the limits on costs together with another one, at most 32 to keep the pairs few."""
    fit = [n for n in networks if any(_keeps(front, _costs(front, (n, other))) for other in networks if other is not n)]
    return fit[:_NETWORKS]


def combinations(front: Front, networks: Sequence[Network], score: Score) -> list[Combination]:
    """All pairs of networks and the larger ensembles that build on them, with their predicted metrics.

    Args:
        front: The front so far.
        networks: The networks to choose from.
        score: Returns the metric of the mean outputs of some ensembles, each given by the positions of its networks.
    """
    quality, sign = front.quality, 1 if front.maximizes(front.quality) else -1
    combinations: list[Combination] = []
    level: list[tuple[int, ...]] = [(place,) for place in range(len(networks))]
    for _ in range(LARGEST - 1):
        wanted: list[tuple[tuple[int, ...], dict[str, float]]] = []
        for places in _grown(level, len(networks)):
            values = _costs(front, [networks[place] for place in places])
            if _keeps(front, values):
                wanted.append((places, values))
        scores = score([places for places, _ in wanted])
        level = []
        for (places, values), metric in zip(wanted, scores, strict=True):
            members = tuple(networks[place] for place in places)
            combinations.append(Combination(members, values | {quality: metric}))
            if all(sign * metric > sign * _value(n.candidate, quality) for n in members):
                level.append(places)
    return combinations


def best(front: Front, candidates: Sequence[Combination], known: Collection[str]) -> Combination | None:
    """The combination within all limits that increases the front's hypervolume the most.

    Args:
        front: The front so far.
        candidates: The combinations to choose from.
        known: The keys of recipes that were tried already.

    Returns:
        None where no combination increases the hypervolume.
    """
    points = [tuple(front.losses(member)) for member in front.members]
    reference = [1.0] * len(front.objectives)
    now = hypervolume(points, reference) if points else 0.0
    base = front.baseline.values
    gains = []
    for combination in candidates:
        if not _keeps(front, combination.values):
            continue
        point = tuple(o.loss(combination.values[o.metric], base[o.metric]) for o in front.objectives)
        if not points or not (np.array(points) <= point).all(1).any():
            gains.append((hypervolume([*points, point], reference) - now, combination))
    for gain, combination in sorted(gains, key=lambda pair: -pair[0]):
        if gain > 0 and combination.recipe.key not in known:
            return combination
    return None


def _grown(level: Sequence[tuple[int, ...]], count: int) -> Iterator[tuple[int, ...]]:
    """Every set that extends one of the given sets by one element, each once."""
    seen: set[tuple[int, ...]] = set()
    for places, place in itertools.product(level, range(count)):
        grown = tuple(sorted({*places, place}))
        if len(grown) > len(places) and grown not in seen:
            seen.add(grown)
            yield grown


def _costs(front: Front, networks: Sequence[Network]) -> dict[str, float]:
    sums = {name: sum(_value(n.candidate, name) for n in networks) for name in _metrics(front) if name != front.quality}
    tensors = dict(itertools.chain.from_iterable(n.tensors.items() for n in networks))  # equal ones are stored once
    rest = sorted(n.rest for n in networks)
    return sums | {"size_bytes": sum(tensors.values()) + rest[-1] + _ALIKE * sum(rest[:-1])}


def _metrics(front: Front) -> list[str]:
    """The metrics of the objectives and limits."""
    return list(dict.fromkeys([o.metric for o in front.objectives] + [limit.metric for limit in front.budget.limits]))


def _keeps(front: Front, values: dict[str, float]) -> bool:
    base = front.baseline.values
    return all(excess <= 0 for excess in front.budget.excess(values, base).values())


def _value(candidate: Candidate, metric: str) -> float:
    assert candidate.measurement is not None
    return candidate.measurement.value(metric)
