"""The parity check of a finalist: does the file that ships compute what was simulated?"""

from __future__ import annotations

from ..errors import StudyError
from ..runners.settings import PARITY_AGREEMENT, PARITY_DIFFERENCE, PARITY_INPUTS
from .candidate import Candidate


def parity_failure(candidate: Candidate) -> str:
    """How the file of a finalist differs from the simulated network.

    At least 99.5% of 1,000 predicted classes must agree; with fewer inputs, the share must not be significantly below
    99.5% (95% interval). Without classes, the outputs must agree within 5% of the largest output, on average. Also, the
    file's metric fails only if it differs significantly from the simulation's (paired 95% interval) and lies outside
    the 95% interval of the simulation's metric.

    Returns:
        The difference, for people; empty where there is none, or where nothing was compared.
    """
    known, reasons = candidate.test, []
    if "parity_metric" not in known:
        return ""
    if (agreement := known.get("parity_agreement")) is not None:
        if (agreement.value if agreement.n >= PARITY_INPUTS else agreement.high) < PARITY_AGREEMENT:
            reasons.append(
                f"{100 * agreement.value:.2f}% of {agreement.n} answers are the simulation's (at least "
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
    """Check that the file of a finalist computes what was simulated.

    Raises:
        StudyError: It does not.
    """
    if why := parity_failure(candidate):
        raise StudyError(
            f"candidate {candidate.number}: its file does not compute what was simulated: {why}; pick another one, or "
            "take it all the same with --force (in Python force=True)"
        )
