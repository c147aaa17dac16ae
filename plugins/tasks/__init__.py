"""The built-in tasks. Their modules load when a task is made."""

from __future__ import annotations

from typing import Any

from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.registry import Registry
from bascule.plugins.task import Task


def _arith(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.arith import Arith

    return Arith(params)


def _spaceship(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.spaceship import Spaceship

    return Spaceship(params)


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.task("arith", _arith, version="1")
    registry.task("spaceship-titanic", _spaceship, version="1")
