"""What a parameter may be, as a search sees it."""

from __future__ import annotations

import math
from typing import Any

import msgspec


class Dimension(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter's values: those listed, or the numbers from ``low`` to ``high``; see ``Tunable``."""

    values: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False

    def fault(self) -> str | None:
        """Why it cannot be searched; None if it can."""
        if self.values:
            return None if self.low is None and self.high is None else "with values and with limits"
        if self.low is None or self.high is None:
            return "without values and without both limits"
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            return f"from {self.low:g} to {self.high:g}"
        if self.log and self.low <= 0:
            return f"from {self.low:g} on a logarithmic scale"
        if self.integer and math.floor(self.high) < math.ceil(self.low):
            return f"from {self.low:g} to {self.high:g} in integers"
        return None

    @property
    def ordered(self) -> bool:
        """Whether neighbours are alike: numbers, and lists of rising or falling ones."""
        if not self.values:
            return True
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in self.values):
            return False
        steps = [b > a for a, b in zip(self.values, self.values[1:], strict=False)]
        return len(set(self.values)) == len(self.values) and len(set(steps)) <= 1

    def at(self, place: float) -> Any:
        """The value at a place in [0, 1)."""
        if self.values:
            return self.values[min(int(place * len(self.values)), len(self.values) - 1)]
        low, high = self._scale
        return rounded(self._unscaled(low + place * (high - low)), self)

    def place(self, value: Any) -> float | None:
        """Where a value lies in [0, 1]; None if it is none of the dimension's."""
        if self.values:
            found = [i for i, v in enumerate(self.values) if type(v) is type(value) and v == value]
            return found[0] / max(len(self.values) - 1, 1) if found else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if not (self.low or 0) <= value <= (self.high or 0) or (self.integer and value != int(value)):
            return None
        low, high = self._scale
        return (self._scaled(value) - low) / (high - low)

    @property
    def _scale(self) -> tuple[float, float]:
        return self._scaled(self.low or 0), self._scaled(self.high or 0)

    def _scaled(self, number: float) -> float:
        return math.log(number) if self.log else float(number)

    def _unscaled(self, number: float) -> float:
        return math.exp(number) if self.log else number


Setting = tuple[Any, ...]
"""A value for each dimension, in order."""


def rounded(number: float, within: Dimension) -> float | int:
    """A number as it is tried: an integer where it is to be one, and within the limits."""
    low, high = within.low or 0, within.high or 0
    if within.integer:
        return min(max(round(number), math.ceil(low)), math.floor(high))
    # Three digits are enough to tell trials apart, and can be read.
    return min(max(float(f"{number:.3g}"), float(low)), float(high))
