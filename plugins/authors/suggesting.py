"""The search of ``tuner``: which setting to try next, by Optuna, as a recorded call.

A suggestion is a function of the call's arguments: the space, the earlier trials and a seed. It is recorded like any
call's result, so a replay needs neither Optuna nor the version that made it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec

from bascule.plugins.authors.dimensions import Dimension, Setting, rounded
from bascule.plugins.extras import install_command
from bascule.schemas.errors import ModelError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

#: The tool that the author asks itself for.
SUGGEST = "suggest"
#: How often the sampler is asked where it suggests what was tried; the first few times it is the one that learns.
_ATTEMPTS, _LEARNT = 100, 10

Point = tuple[int | float | None, ...]
"""A setting as the search sees it: of each listed value its index, else the number; None if it is none of the space."""


class Axis(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A parameter as the search sees it, in numbers alone: what its values are is not its concern.

    Attributes:
        listed: how many values are listed; if none are, it is a number from ``low`` to ``high``.
        ordered: whether listed values that are neighbours are alike.
    """

    listed: int = 0
    ordered: bool = False
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False


class SuggestRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of ``suggest``.

    Attributes:
        points: the trials so far.
        scores: theirs, higher is better; None for one that failed.
        filling: whether it is to be any setting, before what was learnt leads.
    """

    space: tuple[Axis, ...]
    points: tuple[Point, ...]
    scores: tuple[float | None, ...]
    seed: int
    filling: bool = False


def axis_of(dimension: Dimension) -> Axis:
    """A dimension without its values."""
    if dimension.values:
        return Axis(listed=len(dimension.values), ordered=dimension.ordered)
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    return Axis(low=low, high=high, log=dimension.log, integer=dimension.integer)


def point_of(space: Sequence[Dimension], setting: Setting) -> Point:
    """Where a setting lies."""
    return tuple(_coordinate(dimension, value) for dimension, value in zip(space, setting, strict=True))


def setting_of(space: Sequence[Dimension], point: Point) -> Setting:
    """What a suggested point means."""
    return tuple(
        dimension.values[int(number or 0)] if dimension.values else number
        for dimension, number in zip(space, point, strict=True)
    )


def _coordinate(dimension: Dimension, value: Any) -> int | float | None:
    if dimension.place(value) is None:
        return None
    if dimension.values:
        return next(i for i, v in enumerate(dimension.values) if type(v) is type(value) and v == value)
    return int(value) if dimension.integer else float(value)


def need_optuna() -> None:
    """Refuse where Optuna is not installed.

    Raises:
        ModelError: with the command that installs it.
    """
    if find_spec("optuna") is None:
        raise ModelError(
            "The author tuner searches with Optuna, which is not installed.",
            next_step=f"Choose another author, or install it: {install_command('tuner')}",
        )


def suggestion(request: SuggestRequest) -> Point | None:
    """The point to try next, which was not tried yet; None if the space has no other.

    Trials that failed count as the worst, so that their neighbours are left alone. A trial from outside of the space,
    as the first one may be, says nothing about it.

    Raises:
        ModelError: Optuna is not installed.
    """
    need_optuna()
    tried = {point for point in request.points if None not in point}
    sizes = [_size(axis) for axis in request.space]
    most = math.prod(size for size in sizes if size is not None) if None not in sizes else math.inf
    if len(tried) >= most:
        return None
    for attempt in range(_ATTEMPTS):
        learnt = bool(tried) and not request.filling and attempt < _LEARNT
        point = _asked(request, _seed(request, attempt), learnt=learnt)
        if point not in tried:
            return point
    # Hardly any is left.
    every = itertools.product(*(range(_first(axis), _first(axis) + (_size(axis) or 0)) for axis in request.space))
    return next((point for point in every if point not in tried), None)


def _asked(request: SuggestRequest, seed: int, *, learnt: bool) -> Point:
    """What Optuna's sampler says, tried or not."""
    import optuna
    from optuna.trial import create_trial

    with _quiet():
        study = optuna.create_study(direction="maximize", sampler=_sampler(seed, learnt=learnt))
        distributions = {str(i): _distribution(axis) for i, axis in enumerate(request.space)}
        worst = min((score for score in request.scores if score is not None), default=0.0)
        for point, score in zip(request.points, request.scores, strict=True):
            if None not in point:
                params = {str(i): number for i, number in enumerate(point)}
                value = worst if score is None else score
                study.add_trial(create_trial(params=params, distributions=distributions, value=value))
        found = study.ask(distributions).params
    return tuple(_tidied(axis, found[str(i)]) for i, axis in enumerate(request.space))


def _sampler(seed: int, *, learnt: bool) -> BaseSampler:
    from optuna.samplers import RandomSampler, TPESampler

    if not learnt:
        return RandomSampler(seed=seed)
    # Within 40 trials each parameter by itself is learnt sooner than all of them together.
    return TPESampler(seed=seed, multivariate=False, n_startup_trials=0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's log lines are left out."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.listed:
        last = axis.listed - 1
        return IntDistribution(0, last) if axis.ordered else CategoricalDistribution(tuple(range(axis.listed)))
    if axis.integer:
        return IntDistribution(math.ceil(axis.low), math.floor(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _tidied(axis: Axis, number: float) -> int | float:
    """A sampled number as it is tried."""
    limits = Dimension(low=axis.low, high=axis.high, integer=axis.integer)
    return int(number) if axis.listed else rounded(number, limits)


def _size(axis: Axis) -> int | None:
    """How many values there are; None for a number that is no integer."""
    if axis.listed:
        return axis.listed
    return math.floor(axis.high) - math.ceil(axis.low) + 1 if axis.integer else None


def _first(axis: Axis) -> int:
    return 0 if axis.listed else math.ceil(axis.low)


def _seed(request: SuggestRequest, attempt: int) -> int:
    """31 bits that depend on the request's seed, how far it is and the attempt."""
    text = repr((request.seed, len(request.points), attempt))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
