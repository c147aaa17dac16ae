"""Intervals and paired tests, exact where they can be; nothing here reads a clock or a global generator.

Exact tests count in integers: differences are rounded to a grid that has tenths, thirds and the like, so that sums are
exact and ties with the observed sum are ties.
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
#: Steps in 1 of the grid for differences: 2 to 12 divide it, and the rounding of floats stays far below a step.
_GRID = 27720 * 10**9


def wilson(successes: float, n: float) -> Interval:
    """The 95% score interval of a proportion (Wilson 1927, JASA 22:209, without continuity correction).

    Args:
        successes: in [0, n]; may be fractional where an example's success is a mean over its samples.
        n: number of examples, or of effective samples; 0 gives the whole of [0, 1].
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


def clustered_interval(sums: Sequence[float], counts: Sequence[int]) -> Interval | None:
    """The normal 95% interval of the mean over samples that come in groups; None for fewer than two groups.

    Args:
        sums, counts: of each group, which has at least one sample.
    """
    if len(counts) < 2:
        return None
    n = sum(counts)
    mean = math.fsum(sums) / n
    half = Z95 * math.sqrt(_clustered_variance(sums, counts, mean))
    return Interval(mean - half, mean + half)


def clustered_wilson(successes: Sequence[int], counts: Sequence[int]) -> Interval:
    """Wilson's 95% interval of a proportion over samples that come in groups.

    Samples of one example are alike, so fewer trials than there are samples: p (1 - p) / v, with v the variance of p by
    linearisation (the effective sample size of Kish 1965, Survey Sampling, section 8.2). It is held between the number
    of groups, which is also what is taken where all or none succeed, and the number of samples.

    Args:
        successes, counts: of each group, which has at least one sample.
    """
    groups, n = len(counts), sum(counts)
    if n == 0:
        return wilson(0, 0)
    p = sum(successes) / n
    trials: float = groups
    if groups > 1 and 0 < p < 1:
        variance = _clustered_variance(successes, counts, p)
        trials = n if variance == 0 else min(n, max(groups, p * (1 - p) / variance))
    return wilson(p * trials, trials)


def _clustered_variance(sums: Sequence[float], counts: Sequence[int], mean: float) -> float:
    """Variance of the ratio of ``sums`` and ``counts`` by linearisation (Cochran 1977, Sampling Techniques, 6.3)."""
    groups, n = len(counts), sum(counts)
    squares = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return squares * groups / (groups - 1) / (n * n)


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

    Differences below 2e-14 are none: 0.3 - 0.2 and 0.2 - 0.1 are the same, and a tie is one in decimals too.
    All 2^n flips are counted for up to 16 non-zero differences. Beyond that ``resamples`` flips are drawn from
    ``seed`` and p = (k + 1) / (m + 1), which is valid at any m (Phipson & Smyth 2010, SAGMB 9:39).

    Raises:
        ValueError: a difference is not finite.
    """
    if not all(math.isfinite(d) for d in differences):
        raise ValueError("A paired test needs finite differences.")
    values = [v for d in differences if (v := round(Fraction(d) * _GRID))]
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


#: Of the interval that the share of pairs that differ is searched in; the value that Berger and Boos work with.
NUISANCE_LEVEL = 0.001
_NUISANCE_POINTS = 24
_NEGLIGIBLE = 1e-18


def non_inferiority_exact(wins: int, losses: int, n: int, *, margin: float) -> float:
    """One-sided test of "worse by less than ``margin``" on ``n`` pairs of pass/fail.

    P(wins - losses as large or larger), unconditional and, but for the grid, exact: wins and losses are trinomial with
    a difference of ``-margin``, and the share of pairs that differ is not known. The largest probability over its 99.9%
    interval is taken, plus the 0.1% outside (Berger & Boos 1994, JASA 89:1012), on a grid of 24 shares.

    Raises:
        ValueError: the counts are no counts of pairs, or the margin is not in (0, 1).
    """
    if wins < 0 or losses < 0 or wins + losses > n:
        raise ValueError(f"{wins} better and {losses} worse are not counts of {n} pairs.")
    if not 0 < margin < 1:
        raise ValueError(f"{margin} is no margin: it lies between 0 and 1.")
    if n == 0:
        return 1.0
    low, high = _proportion_bounds(wins + losses, n, NUISANCE_LEVEL)
    # A difference of -margin needs at least so many pairs that differ.
    low, high = max(low, margin), max(high, margin)
    grid = [low + (high - low) * i / (_NUISANCE_POINTS - 1) for i in range(_NUISANCE_POINTS)]
    return min(1.0, NUISANCE_LEVEL + max(_excess(wins - losses, n, d, (d - margin) / 2) for d in grid))


def _log_binomial(k: int, n: int, p: float) -> float:
    """Log of the probability of ``k`` successes in ``n``."""
    if p <= 0 or p >= 1:
        return 0.0 if k == (0 if p <= 0 else n) else -math.inf
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + k * math.log(p) + (n - k) * math.log1p(-p)


def _binomial_tail(k: int, n: int, p: float) -> float:
    """P(at least ``k`` successes in ``n``)."""
    if k <= 0:
        return 1.0
    if k > n:
        return 0.0
    if k <= n * p:  # the shorter side
        return 1.0 - _binomial_tail(n - k + 1, n, 1 - p)
    total = 0.0
    for i in range(k, n + 1):
        term = math.exp(_log_binomial(i, n, p))
        total += term
        if term < _NEGLIGIBLE:
            break
    return min(1.0, total)


def _excess(least: int, n: int, differ: float, win: float) -> float:
    """P(wins - losses >= ``least``) of ``n`` pairs that differ, and are won, with these probabilities."""
    total = 0.0
    for pairs in range(n + 1):
        weight = math.exp(_log_binomial(pairs, n, differ))
        if weight > _NEGLIGIBLE:
            total += weight * _binomial_tail(math.ceil((pairs + least) / 2), pairs, win / differ)
    return min(1.0, total)


def _proportion_bounds(successes: int, n: int, level: float) -> tuple[float, float]:
    """The exact two-sided interval of a proportion (Clopper & Pearson 1934, Biometrika 26:404), by bisection."""

    def solve(wanted: float, successes: int) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _binomial_tail(successes, n, middle) < wanted else (low, middle)
        return low

    lower = 0.0 if successes == 0 else solve(level / 2, successes)
    return lower, 1.0 if successes == n else solve(1 - level / 2, successes + 1)
