"""Asking an algorithm for credit: with copies, since a plugin may change what it is given; its failures are named."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from bascule.plugins.algorithm import Algorithm, Credit, Group, OwnFigures
from bascule.schemas.errors import BasculeError, TrainError


def credit_of(algorithm: Algorithm, groups: Sequence[Group], params: Mapping[str, Any]) -> list[Credit]:
    """The credit that the algorithm gives.

    Raises:
        ConfigError: a parameter is not usable.
        TrainError: the algorithm fails, or gives something else.
    """
    try:
        credit = algorithm.credit(list(groups), copy.deepcopy(dict(params)))
    except BasculeError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(algorithm, f"failed to give credit: {error!r}") from error
    if not isinstance(credit, list) or not all(isinstance(c, Credit) for c in credit):
        raise _failed(algorithm, f"gave a {type(credit).__name__} where a list of Credit was to be")
    for c in credit:
        if c.rejected == c.trajectory:
            raise _failed(algorithm, f"prefers the trajectory {c.trajectory} to itself")
    return credit


def figures_of(
    algorithm: Algorithm, groups: Sequence[Group], credit: Sequence[Credit], params: Mapping[str, Any]
) -> dict[str, float]:
    """The figures that the algorithm wants kept of its credit; none if it has no such wish.

    Raises:
        TrainError: the algorithm fails, or gives something else.
    """
    if not isinstance(algorithm, OwnFigures):
        return {}
    try:
        figures = algorithm.figures(list(groups), list(credit), copy.deepcopy(dict(params)))
        return {str(name): float(value) for name, value in figures.items()}
    except BasculeError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(algorithm, f"failed to give its figures: {error!r}") from error


def _failed(algorithm: Algorithm, how: str) -> TrainError:
    return TrainError(f"The algorithm {algorithm.name} {algorithm.version} {how}.", next_step=report_to(algorithm))


def report_to(algorithm: Algorithm) -> str:
    """What somebody can do about an algorithm that is wrong."""
    return f"Report it to the authors of the algorithm {algorithm.name}, or choose another one."
