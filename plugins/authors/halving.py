"""Successive halving: all are tried on a few items, the better half on some more, until few are left.

Every round gets the same share of the budget (Karnin, Koren and Somekh 2013, "Almost Optimal Exploration in
Multi-Armed Bandits", algorithm 1), and what is there is tried in each of them beside the others, on the same items.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Round(msgspec.Struct, frozen=True):
    """How many entrants are tried, and on how many items that none has seen."""

    entrants: int
    items: int


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """An entrant and its rewards by item, in the order of the items."""

    entrant: int
    rewards: tuple[float, ...]

    @property
    def score(self) -> float:
        return sum(self.rewards) / len(self.rewards)


def rounds(entrants: int, *, budget: int, items: int) -> list[Round]:
    """The rounds for so many entrants besides what is there.

    Args:
        budget: of trials of one on one item, all rounds together; each round has at least one item.
        items: how many there are; a round that finds none any more is left out.
    """
    sizes = [entrants]
    while sizes[-1] > 2:
        sizes.append((sizes[-1] + 1) // 2)
    found, used = [], 0
    for size in sizes:
        new = min(max(1, budget // (len(sizes) * (size + 1))), items - used)
        if new > 0:
            found.append(Round(entrants=size, items=new))
            used += new
    return found


def kept(standings: Sequence[Standing], n: int) -> list[Standing]:
    """The ``n`` best, in the order of before; of equal ones the first."""
    best = sorted(standings, key=lambda s: (-s.score, s.entrant))[:n]
    return sorted(best, key=lambda s: s.entrant)


def excess(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """By how much ``one`` is better than ``other`` on the same items on average, and the standard error of that."""
    n = len(one)
    differences = [a - b for a, b in zip(one, other, strict=True)]
    mean = sum(differences) / n
    if n < 2:
        return mean, abs(mean)
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean, (variance / n) ** 0.5
