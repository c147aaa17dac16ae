"""The built-in authors of harnesses."""

from __future__ import annotations

from typing import Any

from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.policy import Author
from bascule.plugins.registry import Registry


def _claude(params: dict[str, Any]) -> Author:
    from bascule.plugins.authors.claude import make

    return make(params)


def _operators(params: dict[str, Any]) -> Author:
    from bascule.plugins.authors.operators import make

    return make(params)


def _operators_1(params: dict[str, Any]) -> Author:
    from bascule.plugins.authors.operators_first import OperatorsFirst

    return OperatorsFirst(params)


def _tuner(params: dict[str, Any]) -> Author:
    from bascule.plugins.authors.tuner import make

    return make(params)


def _tuner_1(params: dict[str, Any]) -> Author:
    from bascule.plugins.authors.tuner import make

    return make(params, "1")


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.author("claude", _claude, version="1")
    registry.author("operators", _operators, version="2")
    registry.author("operators", _operators_1, version="1", earlier=True)
    registry.author("tuner", _tuner, version="2")
    registry.author("tuner", _tuner_1, version="1", earlier=True)
