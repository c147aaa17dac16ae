"""The built-in authors of harnesses."""

from __future__ import annotations

from typing import Any

from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.policy import Author
from bascule.plugins.registry import Registry


def _operators(params: dict[str, Any]) -> Author:
    from bascule.plugins.authors.operators import Operators

    return Operators(params)


def _tuner(params: dict[str, Any]) -> Author:
    from bascule.plugins.authors.tuner import make

    return make(params)


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.author("operators", _operators, version="1")
    registry.author("tuner", _tuner, version="1")
