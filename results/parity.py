"""Whether the file that ships computes what was simulated: the parity check of a finalist."""

from __future__ import annotations

from ..errors import StudyError
from ..runners.settings import PARITY_AGREEMENT, PARITY_DIFFERENCE, PARITY_INPUTS
from .candidate import Candidate


def parity_failure(candidate: Candidate) -> str:
    """In what a finalist's file differs from the network that was simulated.

    At least 99.5% of 1,000 answers must be the same; of fewer the share must not be significantly below that, by its
    95% interval. (Without classes: the outputs within 5% of the largest, on average.) And the file's metric must not
    differ from the simulation's beyond chance (paired 95% interval) and beyond what the inputs tell of it (the 95%
    interval of the simulation's).

    Returns:
        Empty where it does not differ, or where nobody has compared.
    """
    known, reasons = candidate.test, []
    if "parity_metric" not in known:
        return ""
    if (answers := known.get("parity_agreement")) is not None:
        if (answers.value if answers.n >= PARITY_INPUTS else answers.high) < PARITY_AGREEMENT:
            reasons.append(
                f"{100 * answers.value:.2f}% of {answers.n} answers are the simulation's (at least "
                f"{100 * PARITY_AGREEMENT:g}% are asked)"
            )
    elif (mean := known["parity_mean_output"].value) > PARITY_DIFFERENCE:
        reasons.append(
            f"its outputs are {100 * mean:.3g}% of the largest off the simulation's on average "
            f"(at most {100 * PARITY_DIFFERENCE:g}% are allowed)"
        )
    difference, simulated = known["parity_metric"], known["parity_simulated"]
    chance = difference.low <= 0 <= difference.high
    if not chance and not simulated.low <= simulated.value + difference.value <= simulated.high:
        interval = f"[{difference.low:+.4g}, {difference.high:+.4g}]"
        reasons.append(
            f"its metric is {difference.value:+.4g} {interval} beside the simulation's {simulated.value:.4g}"
        )
    return ", ".join(reasons)


def check_parity(candidate: Candidate) -> None:
    """Raises `StudyError` for a finalist whose file is not the network that was simulated."""
    if why := parity_failure(candidate):
        raise StudyError(
            f"candidate {candidate.number}: its file does not compute what was simulated: {why}; pick another one, or "
            "take it all the same with --force (in Python force=True)"
        )
