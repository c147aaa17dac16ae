"""Deviations from oracles, kept by the tests and printed as a table at the end of a test run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any


@dataclass(frozen=True)
class Deviation:
    """How far a figure is from an oracle's, and how far it may be."""

    what: str
    oracle: str
    deviation: float
    bound: float


_seen: list[Deviation] = []


def within(what: str, oracle: str, deviation: float, bound: float) -> None:
    """Keep a deviation for the table, and fail the test if it is over its bound (or no number)."""
    _seen.append(Deviation(what, oracle, float(deviation), bound))
    assert math.isfinite(deviation), f"{what} against {oracle}: the deviation is {deviation}"
    assert deviation <= bound, f"{what} is {deviation:.3g} from {oracle}, more than {bound:g}"


def seen() -> list[tuple[Any, ...]]:
    """What was kept, in the plain types that another process takes."""
    return [astuple(d) for d in _seen]


def take(deviations: Iterable[tuple[Any, ...]]) -> None:
    """Keep what another process has seen."""
    _seen.extend(Deviation(*d) for d in deviations)


def table() -> list[str]:
    """The deviations, the largest of each comparison, a line each."""
    worst: dict[tuple[str, str], Deviation] = {}
    for d in _seen:
        held = worst.get((d.what, d.oracle))
        if held is None or not d.deviation <= held.deviation:
            worst[d.what, d.oracle] = d
    if not worst:
        return []
    rows = [("figure", "oracle", "deviation", "bound", "")]
    rows += [
        (d.what, d.oracle, f"{d.deviation:.2e}", f"{d.bound:.0e}", "" if d.deviation <= d.bound else "OVER")
        for d in sorted(worst.values(), key=lambda d: (d.what, d.oracle))
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
