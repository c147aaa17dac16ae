"""From times of calls to a speed-up, and how much of it can be told from chance. Pure.

Reference and candidate are called in turn on the same core: R C R C ... R. A candidate's call is compared with the two
reference calls beside it, and the reference calls with one another: that is the A/A control, measured at the same
moments, and any difference that it shows is no kernel's merit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

#: A smaller difference from 1 is no difference.
LEAST_GAIN = 0.10
#: As many A/A deviations must a gain have.
DEVIATIONS = 3.0
#: How much more than without the candidate the reference may be held up before it is laid at the candidate's door.
DISTURBANCE = 1.1
#: A step of the clock of processor time may be this much of a call for the call to be judged by itself, and calls
#: together must take so many steps.
FINE, STEPS = 0.02, 10
_MAD_TO_SD = 1.4826
_MEDIAN_TO_MEAN = math.sqrt(math.pi / 2)


class Coarse(ValueError):
    """The clock of processor time is too coarse for these calls; the message says how coarse."""


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Calls of one case, in seconds.

    Attributes:
        reference: wall time of n + 1 calls.
        processor: processor time of the same calls.
        candidate: wall time of n calls, each made between two of the reference.
    """

    reference: tuple[float, ...]
    processor: tuple[float, ...]
    candidate: tuple[float, ...]


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison over some cases.

    Attributes:
        ratio: geometric mean over the cases of the median ratio reference / candidate.
        deviation: of the A/A control, as a natural logarithm: its own distance from 0, or its standard error.
        held_up: how much longer the reference took, at equal processor time, than while there was no candidate; a
            candidate that works while it should wait does this. At least 1.
        speedup: what counts; see :func:`compare`.
        conclusive: whether a speed-up above 1 is more than chance.
        cases: median ratio of each case.
    """

    ratio: float
    deviation: float
    held_up: float
    speedup: float
    conclusive: bool
    cases: tuple[float, ...]

    @property
    def band(self) -> float:
        """The factor from 1 within which a ratio says nothing."""
        return math.exp(max(math.log1p(LEAST_GAIN), DEVIATIONS * self.deviation, math.log(self.held_up)))


def ratios(times: Times) -> list[float]:
    """Reference over candidate, pair by pair; the reference's time is the geometric mean of the calls beside."""
    beside = zip(times.reference, times.reference[1:], times.candidate, strict=False)
    return [math.sqrt(before * after) / between for before, after, between in beside]


def hold_up(reference: Sequence[float], processor: Sequence[float], tick: float = 0.0) -> float:
    """Wall time over processor time: the median over the calls, or of their sums where the clock is coarse for a call.

    Args:
        tick: least step of the clock of processor time, s.

    Raises:
        Coarse: the clock made too few steps in all calls together.
    """
    if tick <= FINE * min(reference):
        return statistics.median(w / max(p, 1e-6) for w, p in zip(reference, processor, strict=True))
    together = math.fsum(processor)
    if together < STEPS * tick:
        raise Coarse(
            f"the clock of processor time has steps of {tick * 1e3:.3g} ms, and the calls took {together * 1e3:.3g} ms"
        )
    return math.fsum(reference) / together


def compare(measured: Sequence[Times], alone: float, tick: float = 0.0) -> Compared:
    """The speed-up of a candidate.

    A ratio within 10% of 1 is 1. One above counts only if it is also outside three A/A deviations, otherwise it is 1.
    One below counts as it is. Where the candidate's presence held up the reference by more than 10%, the ratio is
    divided by that first.

    Args:
        measured: the times of each case.
        alone: :func:`hold_up` of reference calls made while there was no candidate.
        tick: least step of the clock of processor time, s.

    Raises:
        Coarse: that clock tells nothing about calls so short.
    """
    medians = tuple(statistics.median(ratios(times)) for times in measured)
    logs = [math.log(b / a) for t in measured for a, b in zip(t.reference, t.reference[1:], strict=False)]
    centre = statistics.median(logs)
    spread = _MAD_TO_SD * statistics.median(abs(v - centre) for v in logs)
    deviation = max(abs(centre), _MEDIAN_TO_MEAN * spread / math.sqrt(len(logs)))
    present = statistics.median(hold_up(times.reference, times.processor, tick) for times in measured)
    held_up = present / alone if present > DISTURBANCE * alone else 1.0
    ratio = math.exp(math.fsum(map(math.log, medians)) / len(medians))
    fair = ratio / held_up
    result = Compared(ratio=ratio, deviation=deviation, held_up=held_up, speedup=1.0, conclusive=False, cases=medians)
    if fair > result.band:
        return msgspec.structs.replace(result, speedup=fair, conclusive=True)
    if fair < 1 / (1 + LEAST_GAIN):
        return msgspec.structs.replace(result, speedup=fair)
    return result
