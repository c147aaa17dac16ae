"""Intervals and paired tests, exact where they can be; nothing here reads a clock or a global generator.

Exact tests count in integers: rewards are binary fractions, so a common denominator makes every sum exact and ties
with the observed sum are ties.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction

from bascule.schemas.landscape import Interval

Z95 = 1.959963984540054
EXACT_FLIPS = 16
RESAMPLES = 9999
_BLOCK = 8


def wilson(successes: float, n: int) -> Interval:
    """The 95% score interval of a proportion (Wilson 1927, JASA 22:209, without continuity correction).

    Args:
        successes: in [0, n]; may be fractional where an example's success is a mean over its samples.
        n: number of examples; 0 gives the whole of [0, 1].
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is no proportion.")
    if n == 0:
        return Interval(0.0, 1.0)
    p, z2 = successes / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At the ends the bound is exact in theory; rounding would leave it a hair inside.
    return Interval(
        0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == n else min(1.0, centre + half)
    )


def score_interval(scores: Sequence[float], *, pass_fail: bool) -> Interval:
    """The 95% interval of the mean of ``scores``, one per example.

    For pass/fail it is Wilson's with one trial per example, which is conservative where a score is the mean over
    several samples; otherwise normal over examples, which for a single example is that point.
    """
    n = len(scores)
    if pass_fail or n == 0:
        return wilson(math.fsum(scores), n)
    mean = math.fsum(scores) / n
    if n == 1:
        return Interval(mean, mean)
    half = Z95 * math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / (n - 1) / n)
    return Interval(mean - half, mean + half)


def mcnemar_exact(wins: int, losses: int) -> float:
    """One-sided exact McNemar test: P(at least ``wins`` heads in ``wins + losses`` fair tosses).

    Small values speak for the candidate; without discordant pairs it is 1. (McNemar 1947, Psychometrika 12:153.)
    """
    if wins < 0 or losses < 0:
        raise ValueError("Counts of pairs are not negative.")
    n = wins + losses
    return float(Fraction(sum(math.comb(n, k) for k in range(wins, n + 1)), 2**n))


def sign_flip(differences: Sequence[float], *, seed: int, resamples: int = RESAMPLES) -> float:
    """One-sided paired sign-flip permutation test on the sum of ``differences`` (candidate minus parent).

    All 2^n flips are counted for up to 16 non-zero differences. Beyond that ``resamples`` flips are drawn from
    ``seed`` and p = (k + 1) / (m + 1), which is valid at any m (Phipson & Smyth 2010, SAGMB 9:39).

    Raises:
        ValueError: a difference is not finite.
    """
    if not all(math.isfinite(d) for d in differences):
        raise ValueError("A paired test needs finite differences.")
    fractions = [Fraction(d) for d in differences if d != 0]
    scale = math.lcm(*(f.denominator for f in fractions))
    values = [int(f * scale) for f in fractions]
    observed = sum(values)
    if len(values) <= EXACT_FLIPS:
        sums = _signed_sums(values)
        return float(Fraction(sum(s >= observed for s in sums), len(sums)))
    # A random byte picks the signs of eight differences at once.
    tables = [_signed_sums(values[i : i + _BLOCK], pad=True) for i in range(0, len(values), _BLOCK)]
    rng = random.Random(seed)  # noqa: S311 - a recorded seed, not a secret
    reached = sum(
        sum(table[byte] for table, byte in zip(tables, rng.randbytes(len(tables)), strict=True)) >= observed
        for _ in range(resamples)
    )
    return (reached + 1) / (resamples + 1)


def _signed_sums(values: Sequence[int], *, pad: bool = False) -> list[int]:
    """Sums of ``values`` under all sign patterns; ``pad`` repeats them to 256 entries."""
    sums = [0]
    for v in values:
        sums = [s + v for s in sums] + [s - v for s in sums]
    return sums * (2**_BLOCK // len(sums)) if pad else sums
