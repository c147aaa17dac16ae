"""The search of ``tuner`` in version 1, for the runs that are pinned to it: a pure function of what the trials gave.

Bayesian optimisation by expected improvement (Jones, Schonlau and Welch 1998, doi 10.1023/A:1008306431147) on a
Gaussian process whose kernel is mostly a mean over the parameters (as in arXiv:1112.4394): from eight
trials it learns what each parameter does by itself, and a little of what they do together. The first trials fill the
space as a Latin hypercube does. With so few trials the plain arithmetic below is fast, and gives the same proposals on
every machine, which a decision that is replayed needs.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from bascule.plugins.authors.dimensions import Dimension, Setting

ADDITIVE = 0.85
LENGTH = 0.35
NOISE = 0.1
ANYWHERE, AROUND = 300, 100
#: Digits in which two expected improvements have to differ: rounding of the last ones is no reason.
_DIGITS = 9


def settings(
    space: Sequence[Dimension], present: Setting, scores: Sequence[float | None], *, seed: int, trials: int, first: int
) -> list[Setting]:
    """The settings of the trials so far and the next one, if there is one; the first is ``present``.

    Args:
        scores: of the trials so far, higher is better; None for one that failed.
        trials: how many there are to be; fewer if the space has no more settings.
        first: how many after the present one fill the space, before what was learnt leads.
    """
    filling = _hypercube(space, min(first, trials - 1), seed)
    found = [present]
    while len(found) <= len(scores) and len(found) < trials:
        # repr tells 1 from 1.0 and True, and takes the lists that a setting may hold.
        tried = {repr(s) for s in found}
        given = filling[len(found) - 1] if len(found) <= len(filling) else None
        if given is None or repr(given) in tried:
            given = _proposal(_Known(space, found, scores, seed))
        if given is None:
            break
        found.append(given)
    return found


def _generator(*parts: object) -> random.Random:
    return random.Random(hashlib.sha256(repr(parts).encode()).digest())  # noqa: S311


def _hypercube(space: Sequence[Dimension], n: int, seed: int) -> list[Setting]:
    """``n`` settings of which every dimension's values are spread evenly (McKay, Beckman and Conover 1979)."""
    draw = _generator("fill", seed)
    columns = []
    for dimension in space:
        strata = list(range(n))
        draw.shuffle(strata)
        columns.append([dimension.at((stratum + draw.random()) / n) for stratum in strata])
    return [tuple(column[i] for column in columns) for i in range(n)]


class _Known:
    """What a proposal follows from; equal where it is written the same."""

    def __init__(
        self, space: Sequence[Dimension], found: Sequence[Setting], scores: Sequence[float | None], seed: int
    ) -> None:
        self.space = tuple(space)
        self.tried = {repr(setting) for setting in found}
        self.trials = tuple(zip(found, scores, strict=False))
        self.seed = seed
        self._text = repr((self.space, self.trials, seed))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


# The machine is stepped anew from all its results each time.
@lru_cache(maxsize=256)
def _proposal(known: _Known) -> Setting | None:
    """The untried setting whose improvement on the best one is expected to be highest; None if none is left."""
    scored = [(setting, score) for setting, score in known.trials if score is not None]
    worst = min((score for _, score in scored), default=0.0)
    best = max(scored, key=lambda pair: pair[1])[0] if scored else known.trials[0][0]
    # One that failed counts as the worst: its neighbours are left alone.
    rated = [(s, worst if score is None else score) for s, score in known.trials]
    model = _Process(known.space, [(p, v) for s, v in rated if (p := _places(known.space, s)) is not None])
    chosen, expected = None, -1.0
    for setting in _candidates(known, best):
        places = _places(known.space, setting)
        assert places is not None
        improvement = round(model.improvement(places), _DIGITS)
        if improvement > expected:
            chosen, expected = setting, improvement
    return chosen


def _candidates(known: _Known, best: Setting) -> list[Setting]:
    """Untried settings from anywhere, and some that differ from the best one in one or two values."""
    draw = _generator("propose", known.seed, len(known.trials))
    found: dict[str, Setting] = {}
    for i in range(ANYWHERE + AROUND):
        setting = [dimension.at(draw.random()) for dimension in known.space]
        if i >= ANYWHERE:
            moved = draw.sample(range(len(setting)), min(draw.randint(1, 2), len(setting)))
            setting = [value if k in moved else best[k] for k, value in enumerate(setting)]
        if _places(known.space, setting) is not None and repr(tuple(setting)) not in known.tried:
            found.setdefault(repr(setting), tuple(setting))
    return list(found.values())


def _places(space: Sequence[Dimension], setting: Sequence[Any]) -> tuple[float, ...] | None:
    """Where a setting lies; None if one of its values is none of its dimension's, as the present one may be."""
    places = [dimension.place(value) for dimension, value in zip(space, setting, strict=True)]
    return None if None in places else tuple(p for p in places if p is not None)


class _Process:
    """A Gaussian process of unit variance over trials whose scores are put on a common scale."""

    def __init__(self, space: Sequence[Dimension], trials: Sequence[tuple[tuple[float, ...], float]]) -> None:
        self._ordered = [dimension.ordered for dimension in space]
        self._at = [places for places, _ in trials]
        values = [value for _, value in trials]
        mean = math.fsum(values) / len(values) if values else 0.0
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)) if values else 0.0
        scaled = [(v - mean) / (spread or 1.0) for v in values]
        self._top = max(scaled, default=0.0)
        self._factor = _cholesky(
            [
                [self._kernel(a, b) + (NOISE**2 if i == j else 0.0) for j, b in enumerate(self._at)]
                for i, a in enumerate(self._at)
            ]
        )
        self._white = _solved(self._factor, scaled)

    def _kernel(self, a: Sequence[float], b: Sequence[float]) -> float:
        near = [
            math.exp(-0.5 * ((x - y) / LENGTH) ** 2) if ordered else 1.0 if x == y else math.exp(-0.5)
            for x, y, ordered in zip(a, b, self._ordered, strict=True)
        ]
        return ADDITIVE * math.fsum(near) / len(near) + (1 - ADDITIVE) * math.prod(near)

    def improvement(self, places: tuple[float, ...]) -> float:
        """How much better than the best trial a setting is expected to be, worse counted as 0."""
        row = _solved(self._factor, [self._kernel(places, other) for other in self._at])
        mean = math.fsum(r * w for r, w in zip(row, self._white, strict=True))
        deviation = math.sqrt(max(1.0 - math.fsum(r * r for r in row), 1e-9))
        z = (mean - self._top) / deviation
        below = 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))
        return deviation * (z * below + math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi))


def _cholesky(matrix: list[list[float]]) -> list[list[float]]:
    """The lower triangular factor of a positive definite matrix."""
    factor: list[list[float]] = []
    for i, row in enumerate(matrix):
        new: list[float] = []
        for j in range(i + 1):
            rest = row[j] - math.fsum(x * y for x, y in zip(new, (factor[j] if j < i else new)[:j], strict=True))
            new.append(math.sqrt(rest) if i == j else rest / factor[j][j])
        factor.append(new)
    return factor


def _solved(factor: list[list[float]], right: Sequence[float]) -> list[float]:
    """The solution of ``factor`` times x = ``right``."""
    out: list[float] = []
    for row, value in zip(factor, right, strict=True):
        out.append((value - math.fsum(f * x for f, x in zip(row, out, strict=False))) / row[len(out)])
    return out
