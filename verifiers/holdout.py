"""Guards of dev: asked at each generation, it stays a measure only while levers cannot adapt to its answers.

``ladder`` is the Ladder of Blum and Hardt (2015, arXiv:1502.04585), whose score moves only where a candidate is better
by a step. As in its section on no parameters the step comes from the paired differences; it is a multiple of their
standard error here, since many rejected candidates must not add up to one lucky promotion. ``thresholdout`` puts the
noise of Thresholdout (Dwork et al. 2015, arXiv:1506.02629) on that step and on the answer. Unlike in that paper dev is
compared with the parent on dev, not with a training set.

A rejected candidate gets its parent's score, so that an author learns nothing of it but that it was rejected.

The default is the ladder with a step of 2.75, frozen by ``ops/bench/gate.py``: 2,000 runs of 30 generations on 200
items, with authors that can only do harm. At most 2.2% of the runs end with a candidate that is truly worse by more
than a point (60% with the paired test alone, nearly all with whatever scores higher), and the reported score exceeds
the true one by .5 points (5.2; 7.3). A true gain of 10 points is promoted in 68% of the cases and one of 15 in 99%,
where candidates differ on 20% of the items. A step of 2.5 harms 4.8%. Noise costs more than it gives: ``thresholdout``
harms 6% with the same step.

That holds only for an author that sees no more than what is reported. One that sees each candidate's raw score on dev
and combines what scored well harms 17% of the runs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from bascule.schemas.events import GuardFigures
from bascule.schemas.run import GateConfig


def mean(differences: Sequence[float]) -> float:
    """0 without any pairs."""
    return math.fsum(differences) / len(differences) if differences else 0.0


def standard_error(differences: Sequence[float]) -> float:
    """Of their mean if each sign were a fair toss: sqrt(sum of squares) / n, as in the sign-flip test.

    For pass/fail the mean over this is McNemar's z, (wins - losses) / sqrt(wins + losses). The variance about the mean
    would be too small where few pairs differ: 0 where all are wins.
    """
    return math.sqrt(math.fsum(d * d for d in differences)) / len(differences) if differences else 0.0


def laplace(rng: random.Random, scale: float) -> float:
    """A draw from the Laplace distribution around 0 with this scale."""
    return scale * (rng.expovariate(1.0) - rng.expovariate(1.0))


def guarded(
    differences: Sequence[float], *, score: float, reported: float, config: GateConfig, seed: int
) -> tuple[bool, GuardFigures]:
    """Whether a candidate is better by the guard's step, and what the run reports if that decides.

    Args:
        differences: candidate minus parent, by pair.
        score: of the candidate on dev.
        reported: what the run reported for the parent.
        seed: of the noise.
    """
    difference, error = mean(differences), standard_error(differences)
    threshold, answer = (0.0 if config.guard == "none" else config.step * error), score
    if config.guard == "thresholdout":
        # Scales 2, 4 and 1 times the noise: threshold, comparison and answer, as in the paper's figure 1.
        rng = random.Random(f"thresholdout {seed}")  # noqa: S311 - a recorded seed, not a secret
        scale = config.noise * error
        threshold += laplace(rng, 2 * scale) + laplace(rng, 4 * scale)
        answer += laplace(rng, scale)
    # Noise must not promote what is not better at all.
    passed = difference > max(0.0, threshold)
    return passed, GuardFigures(
        kind=config.guard, difference=difference, threshold=threshold, reported=answer if passed else reported
    )
