"""What else than dev the gate looks at: a regression set, dev in another form, a second verifier, and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from bascule.schemas.events import CheaperFigures, PairedFigures, SecondFigures
from bascule.schemas.landscape import Interval
from bascule.schemas.run import GateConfig
from bascule.verifiers.holdout import mean
from bascule.verifiers.statistics import Z95, mcnemar_exact, non_inferiority_exact, sign_flip

Rewards = Sequence[float | None]


def aligned(candidate: Rewards, parent: Rewards) -> list[tuple[float, float] | None]:
    """The pair at each position; None where the parent has no verdict.

    Where only the candidate has none it counts 0, and never as better than its parent.

    Raises:
        ValueError: the two were not measured on the same number of positions.
    """
    if len(candidate) != len(parent):
        raise ValueError(f"The candidate has {len(candidate)} positions and its parent {len(parent)}.")
    return [None if p is None else (min(0.0, p) if c is None else c, p) for c, p in zip(candidate, parent, strict=True)]


def differences(candidate: Rewards, parent: Rewards) -> list[float]:
    """Candidate minus parent, by pair.

    Raises:
        ValueError: as :func:`aligned`.
    """
    return [pair[0] - pair[1] for pair in aligned(candidate, parent) if pair is not None]


def pass_fail(candidate: Rewards, parent: Rewards) -> bool:
    """Whether all rewards of the pairs are 0 or 1, so that exact tests count them."""
    return all(r in (0, 1) for pair in aligned(candidate, parent) if pair is not None for r in pair)


def won_and_lost(found: Sequence[float]) -> tuple[int, int]:
    """How many differences are above and below 0."""
    return sum(d > 0 for d in found), sum(d < 0 for d in found)


def p_better(found: Sequence[float], *, exact: bool, seed: int) -> float:
    """One-sided p of "the candidate is better": exact McNemar, or else the sign-flip test, on paired differences."""
    return mcnemar_exact(*won_and_lost(found)) if exact else sign_flip(found, seed=seed)


def compared(candidate: Rewards, parent: Rewards, *, seed: int) -> PairedFigures:
    """The candidate against its parent on other examples, both ways: the test of the gate, exact McNemar or sign-flip.

    Raises:
        ValueError: as :func:`aligned`.
    """
    found, exact = differences(candidate, parent), pass_fail(candidate, parent)
    wins, losses = won_and_lost(found)
    return PairedFigures(
        pairs=len(found),
        difference=mean(found),
        wins=wins,
        losses=losses,
        p_better=p_better(found, exact=exact, seed=seed),
        p_worse=p_better([-d for d in found], exact=exact, seed=seed),
    )


def diverged(first: tuple[Rewards, Rewards], second: tuple[Rewards, Rewards], *, seed: int) -> SecondFigures:
    """The comparison by a second verifier, whose rewards are on the same scale and positions, beside the first one's.

    Args:
        first, second: rewards of the candidate and of its parent.

    Raises:
        ValueError: they are not of the same positions.
    """
    one, two = aligned(*first), aligned(*second)
    if len(one) != len(two):
        raise ValueError(f"The first verifier has {len(one)} positions and the second {len(two)}.")
    gaps = [(a[0] - a[1]) - (b[0] - b[1]) for a, b in zip(one, two, strict=True) if a is not None and b is not None]
    n, gap = len(gaps), mean(gaps)
    half = Z95 * math.sqrt(math.fsum((g - gap) ** 2 for g in gaps) / (n - 1) / n) if n > 1 else math.inf
    # Rewards are between 0 and 1 mostly, and an interval has to be a figure: nothing known is all that two gains allow.
    interval = Interval(gap - half, gap + half) if n > 1 else Interval(-2.0, 2.0)
    figures = msgspec.structs.asdict(compared(*second, seed=seed))
    return SecondFigures(**figures, divergence=gap, interval=interval)


def cheaper(
    candidate: Rewards, parent: Rewards, *, costs: tuple[float, float], config: GateConfig, seed: int
) -> CheaperFigures | None:
    """The test of a cheaper candidate; None where it is not cheaper by enough, or none may be worse.

    For pass/fail it is exact. For other rewards it is the sign-flip test on the differences plus the margin, which
    takes them to be symmetric about their mean.

    Args:
        costs: tokens a rollout of the candidate and of its parent.
    """
    saved = 1 - costs[0] / costs[1] if costs[1] > 0 else 0.0
    if config.margin == 0 or saved < config.cheaper:
        return None
    found = differences(candidate, parent)
    if pass_fail(candidate, parent):
        wins, losses = won_and_lost(found)
        p = non_inferiority_exact(wins, losses, len(found), margin=config.margin)
    else:
        p = sign_flip([d + config.margin for d in found], seed=seed)
    return CheaperFigures(saved=saved, margin=config.margin, p=p)


def objection(
    difference: float,
    *,
    alpha: float,
    gained: bool,
    regression: PairedFigures | None,
    perturbed: PairedFigures | None,
    second: SecondFigures | None,
) -> str | None:
    """Why a candidate that dev would promote is rejected; None if nothing speaks against it.

    - Regression set: it is significantly worse there.
    - Perturbed dev, where it gained: the gain there is not even half of that on dev, so nearer to "gone" than to "the
      same". Half way between the two both errors are equally likely, whatever the number of perturbed examples;
      asking for significance there would reject true gains on a small copy, and asking for more than 0 would let every
      second brittle one pass.
    - Second verifier: it is significantly worse by that one; or it gained by the first, not significantly by the
      second, and the interval of the divergence is above 0. Without the last a second verifier that is merely noisy
      would block every gain.

    Args:
        difference: on dev, candidate minus parent.
        gained: whether it is to be promoted for being better, rather than for being cheaper.
    """
    if regression is not None and regression.difference < 0 and regression.p_worse < alpha:
        lost = f"{regression.losses} worse and {regression.wins} better, p = {regression.p_worse:.2g}"
        return f"worse on the regression set: {lost}"
    if gained and perturbed is not None and perturbed.difference < difference / 2:
        return f"brittle: {difference:+.3f} on dev, {perturbed.difference:+.3f} with the same questions in another form"
    if second is None:
        return None
    if second.difference < 0 and second.p_worse < alpha:
        return f"worse by the second verifier: {second.losses} worse and {second.wins} better, p = {second.p_worse:.2g}"
    if gained and second.p_better >= alpha and second.interval.low > 0:
        return (
            f"no gain by the second verifier ({second.difference:+.3f}, p = {second.p_better:.2g}), which the first's "
            f"exceeds by {second.divergence:.3f} (at least {second.interval.low:.3f})"
        )
    return None
