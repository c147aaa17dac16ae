"""The built-in tasks. Their modules load when a task is made."""

from __future__ import annotations

from typing import Any

from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.registry import Registry
from bascule.plugins.task import PrivateFace, SecondOpinion, Task, TaskFactory
from bascule.schemas.errors import ConfigError


def _arith(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.arith import Arith

    return Arith(params)


def _spaceship(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.spaceship import Spaceship

    return Spaceship(params)


def _lawbench(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.lawbench import LawBench

    return LawBench(params)


def _gpqa(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.gpqa import GPQA

    return GPQA(params)


def _chess(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.chess import Chess

    return Chess(params)


def _rooms(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.rooms import Rooms

    return Rooms(params)


def _own(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.own import Own

    return Own(params)


def _rg(name: str) -> TaskFactory:
    def make(params: dict[str, Any]) -> Task:
        from bascule.plugins.tasks.rg import ReasoningGym

        return ReasoningGym(name, params)

    return make


def _denoising(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.denoising import Denoising

    return Denoising(params)


def _trimul(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.trimul import Trimul

    return Trimul(params)


def _sia_dir(params: dict[str, Any]) -> Task:
    from bascule.plugins.tasks.sia_dir import SiaDir

    return SiaDir(params)


def _second(task: Task, params: dict[str, Any]) -> PrivateFace:
    """The second verifier that a task brings itself."""
    if params:
        raise ConfigError(f"The verifier task has no parameter {min(params)!r}.", next_step="Leave it out.")
    if not isinstance(task, SecondOpinion):
        raise ConfigError(
            f"The task {task.name} has no second verifier of its own.",
            next_step="Leave `second` out, or name a verifier of a plugin: `bascule plugins` lists them.",
        )
    return task.second()


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.task("arith", _arith, version="1")
    registry.task("spaceship-titanic", _spaceship, version="2")
    registry.task("lawbench", _lawbench, version="1")
    registry.task("gpqa", _gpqa, version="1")
    registry.task("longcot-chess", _chess, version="1")
    registry.task("rooms", _rooms, version="1")
    registry.task("own", _own, version="1")
    registry.task("denoising", _denoising, version="1")
    registry.task("trimul", _trimul, version="1")
    registry.task("sia-dir", _sia_dir, version="1")
    registry.verifier("task", _second, version="1")
    registry.task_family("rg", _rg, version="1")
