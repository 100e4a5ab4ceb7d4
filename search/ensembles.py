"""Ensembles of candidates: which to build, foretold from what each network alone gives.

The networks to choose from are the first two nondominated layers of what was measured, whatever its metric: two
networks that are not accurate enough alone may be so together. Each answers the validation inputs once, and outputs are
averaged here, so that hundreds of combinations cost seconds: all pairs, and a third network only beside pairs that are
better than both their own. MACs and latency add up; of the packed bytes the tensors that differ do, while a graph much
like another takes part of its bytes. Only what the front would grow by is then built, exported and measured, the
greatest gain first, as a candidate like any other.

The best of so many combinations is chosen on the validation split, so its number there is partly luck, more so than
that of a single trial. The test split, which every member of the front meets once, has the last word.
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

TRIED = 8  # ensembles that are measured at most
LARGEST = 3  # networks in one
MEMORY = 1 << 30  # bytes of outputs that are held at a time
_LAYERS, _NETWORKS = 2, 32
# The metric of the mean outputs of ensembles, each given by the places of its networks.
Score = Callable[[Sequence[tuple[int, ...]]], Sequence[float]]
_ALIKE = 0.4  # what a second graph, deflated behind the first, takes of its bytes: 0.2 to 0.57 in five networks


@dataclass(frozen=True)
class Network:
    """A candidate that an ensemble may hold, and the bytes of its file: of its tensors, by content, and the rest (the
    graph).
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
    """Networks, and what is foretold of their ensemble, by metric."""

    networks: tuple[Network, ...]
    values: dict[str, float]

    @property
    def recipe(self) -> Recipe:
        return Recipe((Ensemble(tuple(n.candidate.recipe.to_json() for n in self.networks)),))


def eligible(front: Front) -> list[Candidate]:
    """The candidates that an ensemble may hold, the best in the metric first."""
    left = [c for c in front.candidates if c.measurement and c.state in (OK, OVER_BUDGET) and not c.recipe.of(Ensemble)]
    found: list[Candidate] = []
    for _ in range(_LAYERS):
        kept = nondominated([front.losses(c) for c in left])
        found += [c for c, best in zip(left, kept, strict=True) if best]
        left = [c for c, best in zip(left, kept, strict=True) if not best]
    sign = -1 if front.maximizes(front.quality) else 1
    return sorted(found, key=lambda c: (sign * _value(c, front.quality), c.number))


def chosen(front: Front, networks: Sequence[Network]) -> list[Network]:
    """Those that fit into the limits on costs beside another one, so many at most that their pairs are soon looked
    through.
    """
    fit = [n for n in networks if any(_keeps(front, _costs(front, (n, other))) for other in networks if other is not n)]
    return fit[:_NETWORKS]


def combinations(front: Front, networks: Sequence[Network], score: Score) -> list[Combination]:
    """All pairs of networks and what may come of them, each with what is predicted.

    Args:
        front: The front so far.
        networks: To choose from.
        score: The metric of the mean outputs of some ensembles, each given by the places of its networks.
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
    """The combination within all limits that the front would grow by the most; None where it would grow by none.

    known: the keys of recipes that were tried.
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
    for gain, combination in sorted(gains, key=lambda found: -found[0]):
        if gain > 0 and combination.recipe.key not in known:
            return combination
    return None


def _grown(level: Sequence[tuple[int, ...]], count: int) -> Iterator[tuple[int, ...]]:
    """Each of some sets with one more, every set once."""
    seen: set[tuple[int, ...]] = set()
    for places, place in itertools.product(level, range(count)):
        grown = tuple(sorted({*places, place}))
        if len(grown) > len(places) and grown not in seen:
            seen.add(grown)
            yield grown


def _costs(front: Front, networks: Sequence[Network]) -> dict[str, float]:
    found = {
        name: sum(_value(n.candidate, name) for n in networks) for name in _metrics(front) if name != front.quality
    }
    tensors = dict(itertools.chain.from_iterable(n.tensors.items() for n in networks))  # equal ones are stored once
    rest = sorted(n.rest for n in networks)
    return found | {"size_bytes": sum(tensors.values()) + rest[-1] + _ALIKE * sum(rest[:-1])}


def _metrics(front: Front) -> list[str]:
    """What objectives and limits speak of."""
    return list(dict.fromkeys([o.metric for o in front.objectives] + [limit.metric for limit in front.budget.limits]))


def _keeps(front: Front, values: dict[str, float]) -> bool:
    base = front.baseline.values
    return all(excess <= 0 for excess in front.budget.excess(values, base).values())


def _value(candidate: Candidate, metric: str) -> float:
    assert candidate.measurement is not None
    return candidate.measurement.value(metric)
