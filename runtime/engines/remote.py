"""What engines have in common whose model is behind somebody's endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from bascule.plugins.models.endpoint import CLAUDE
from bascule.schemas.errors import ConfigError, EngineError
from bascule.trainers.base_model import DEFAULT_MODEL

T = TypeVar("T")
CLOSED = "The engine was closed before it answered."


class Calls:
    """Calls that are open: so many at one time, and ended when the engine closes."""

    def __init__(self, most: int) -> None:
        self._room = asyncio.Semaphore(most)
        self._open: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do some work once there is room for it.

        Raises:
            EngineError: the engine was closed meanwhile.
        """

        async def in_turn() -> T:
            async with self._room:
                return await work()

        task = asyncio.create_task(in_turn())
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._closed and not (current and current.cancelling()):
                raise EngineError(CLOSED, next_step="Start the engine again.") from None
            raise
        finally:
            task.cancel()

    async def all(self, works: Iterable[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        """Do several, and give their results in order; the first that fails ends the others.

        Raises:
            EngineError: the engine was closed meanwhile; or what the first raised that failed.
        """
        tasks = [asyncio.create_task(self.run(work)) for work in works]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        self._closed = True
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)


def target_model(engine: str, params: Mapping[str, Any], model: str) -> str | None:
    """The model that an engine asks for at somebody's endpoint; None for an engine that asks none.

    Its parameters go before the run's ``model``. The run's usual one is embedded and no Claude, so that with
    ``anthropic`` it stands for the usual Claude.

    Args:
        params: of the engine.
        model: the run's.
    """
    if engine not in ("anthropic", "openai"):
        return None
    named: str | None = params.get("model")
    if named:
        return named
    return CLAUDE if engine == "anthropic" and model in ("", DEFAULT_MODEL) else model


def read_params(engine: str, params: dict[str, Any], kind: type[T]) -> T:
    """Parameters in their type.

    Raises:
        ConfigError: one is unknown or of a wrong type.
    """
    try:
        return msgspec.convert(params, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"The engine {engine!r} cannot use its parameters: {error}.",
            next_step=f"It knows {', '.join(f.name for f in msgspec.structs.fields(kind))}.",  # type: ignore[arg-type]
        ) from error


def no_adapters(engine: str, name: str) -> EngineError:
    """The refusal of an adapter by an engine that takes none."""
    return EngineError(
        f"The engine {engine!r} takes no adapters, and {name!r} is one.",
        next_step="Leave the weights out of --levers, or use the engine 'transformers' or 'vllm'.",
    )
