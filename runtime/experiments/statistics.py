"""Means over few seeds and their differences: Student's t, a bootstrap over seeds and items, a permutation test.

Scores come as a table: a row for each seed, a column for each item, the same items in every row. A difference of two
arms is the table of their paired differences.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

from bascule.schemas.landscape import Interval
from bascule.verifiers.statistics import sign_flip

RESAMPLES = 4999
#: Of the generators of resamples and flips: fixed, so that a table comes out the same again.
SEED = 20260101
_LEVEL = 0.95
Table = Sequence[Sequence[float]]


def t_within(t: float, df: int) -> float:
    """P(-t <= T <= t) of Student's t with ``df`` degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    if df < 1 or t < 0:
        raise ValueError(f"Student's t has no {df} degrees of freedom, or {t} is negative.")
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, df, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(within: float, df: int) -> float:
    """The t with P(-t <= T <= t) = ``within``, by bisection."""
    low, high = 0.0, 1.0
    while t_within(high, df) < within:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < within else (low, middle)
    return (low + high) / 2


def over_seeds(values: Sequence[float]) -> Interval | None:
    """The 95% interval of a mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = statistics.fmean(values)
    half = t_quantile(_LEVEL, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(centre - half, centre + half)


def paired_t(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test; None for fewer than two differences, or where all are the same."""
    if len(differences) < 2 or (spread := statistics.stdev(differences)) == 0:
        return None
    t = abs(statistics.fmean(differences)) / (spread / math.sqrt(len(differences)))
    return max(0.0, 1 - t_within(t, len(differences) - 1))


def bootstrap(table: Table, *, seed: int = SEED, resamples: int = RESAMPLES) -> Interval:
    """The 95% percentile interval of the mean over seeds and items.

    In each resample seeds are drawn as clusters, and items, the same ones for all of them, both with replacement (the
    pigeonhole bootstrap of Owen 2007, Annals of Applied Statistics 1:386, which errs on the wide side in items). With a
    single seed only items are drawn. Of few seeds hardly more can be learnt than that they differ: their share of the
    spread is too small by a factor of 1 - 1/seeds, and :func:`over_seeds` says what they tell by themselves.

    Raises:
        ValueError: there is no entry, or rows differ in length.
    """
    rows, width = len(table), len(table[0]) if table else 0
    if not width or any(len(row) != width for row in table):
        raise ValueError("A bootstrap needs a row for each seed, with the same items in each.")
    rng = random.Random(seed)  # noqa: S311 - a fixed seed, not a secret
    places = range(width)
    sums: dict[tuple[int, ...], list[float]] = {}
    means = []
    for _ in range(resamples):
        drawn = tuple(sorted(rng.choices(range(rows), k=rows))) if rows > 1 else (0,)
        if drawn not in sums:
            sums[drawn] = [math.fsum(table[r][i] for r in drawn) for i in places]
        means.append(math.fsum(map(sums[drawn].__getitem__, rng.choices(places, k=width))) / (rows * width))
    means.sort()
    outside = round((1 - _LEVEL) / 2 * resamples)
    return Interval(means[outside], means[resamples - 1 - outside])


def item_p(table: Table, *, seed: int = SEED) -> float:
    """Two-sided p of the paired sign-flip test over items: an item's differences of all seeds are flipped together.

    It says whether these very runs differ on more items than these, and nothing of other seeds.
    """
    items = [math.fsum(column) for column in zip(*table, strict=True)]
    better, worse = (sign_flip([sign * d for d in items], seed=seed) for sign in (1, -1))
    return min(1.0, 2 * min(better, worse))
