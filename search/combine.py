"""The phase after the trials of a study that tries ensembles of its candidates (see `search.ensembles`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ..results.folder import StudyFolder, read_json
from ..results.front import Front
from ..runners.files.atomic import write_atomic
from ..runners.runner import PredictValidation, Runner, ScoreAverages
from ..spaces.recipe import Recipe
from . import ensembles
from .history import History
from .listener import Listener


def combine(
    folder: StudyFolder,
    front: Front,
    history: History,
    runner: Runner,
    listener: Listener,
    run: Callable[[Recipe], Front],
    end_is_near: Callable[[], bool],
) -> None:
    """Try ensembles of the candidates.

    The networks that were considered are recorded, so that a resumed study searches again only when it has new ones.

    Args:
        folder: The study's folder.
        front: The front so far.
        history: The candidates; every ensemble that is tried is added.
        runner: The runner of the study's task.
        listener: Follows the progress.
        run: Executes the recipe of an ensemble and returns the front including it.
        end_is_near: Whether only the time for the finalists and the report is left.
    """
    files = folder.candidates
    there = [c for c in ensembles.eligible(front) if files.packed(c.recipe).exists()]
    keys = sorted(history.keys[c.number] for c in there)
    if folder.ensembles.exists() and read_json(folder.ensembles).get("networks") == keys:
        return
    packed = {c.number: files.packed(c.recipe).read_bytes() for c in there}
    networks = ensembles.chosen(front, [ensembles.Network.of(c, packed[c.number]) for c in there])
    outputs = _outputs(networks, packed, runner, listener, end_is_near)
    listener.phase("ensembles: averaging")

    def score(combinations: Sequence[tuple[int, ...]]) -> Sequence[float]:
        return runner.submit(ScoreAverages(tuple(outputs), tuple(combinations))).result()

    combinations = ensembles.combinations(front, networks[: len(outputs)], score)
    before = len(history.candidates)
    while history.ensembles_since_the_last_trial < ensembles.TRIED:
        best = ensembles.best(front, combinations, history.by_key)
        if best is None:
            break
        if end_is_near():
            listener.say(
                "the time is used up before all ensembles were tried; run the same command with more time to resume"
            )
            return
        front = run(best.recipe)
    write_atomic(folder.ensembles, json.dumps({"networks": keys}, indent=1))
    new = {c.number for c in history.candidates[before:]}
    kept = sum(member.number in new for member in front.members)
    listener.say(
        f"ensembles {len(combinations)} combinations of {len(outputs)} networks looked through, {len(new)} measured, "
        f"{kept} on the front"
    )


def _outputs(
    networks: Sequence[ensembles.Network],
    packed: Mapping[int, bytes],
    runner: Runner,
    listener: Listener,
    end_is_near: Callable[[], bool],
) -> list[NDArray[Any]]:
    """The outputs on the validation samples, of as many of the first networks as memory and time allow."""
    outputs: list[NDArray[Any]] = []
    for network in networks:
        if sum(each.nbytes for each in outputs) > ensembles.MEMORY or end_is_near():
            break
        listener.phase(f"ensembles: outputs of network {len(outputs) + 1} of {len(networks)}")
        outputs.append(runner.submit(PredictValidation(packed[network.candidate.number])).result())
    return outputs
