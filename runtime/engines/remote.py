"""What engines have in common whose model is behind somebody's endpoint."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from bascule.plugins.models.endpoint import CLAUDE
from bascule.runtime.engines.refusals import closed
from bascule.trainers.base_model import DEFAULT_MODEL

T = TypeVar("T")
#: The engines whose model is a name at somebody's endpoint.
REMOTE = ("anthropic", "openai")
#: Hosts of URLs that are this machine.
LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
#: A question that every endpoint takes, and most tokens of its answer.
HELLO = "Say yes."
HELLO_TOKENS = 16


class Calls:
    """Calls that are open: at most so many at one time, and ended when the engine closes."""

    def __init__(self, most: int | None = None) -> None:
        self._room = contextlib.nullcontext() if most is None else asyncio.Semaphore(most)
        self._open: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do some work once there is room for it; ends it where nobody waits any more.

        Raises:
            EngineError: the engine was closed meanwhile.
        """

        async def in_turn() -> T:
            async with self._room:
                return await work()

        if self._closed:
            raise closed()
        task = self.begin(in_turn())
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._closed and not (current and current.cancelling()):
                raise closed() from None
            raise
        finally:
            task.cancel()

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do some work that nobody waits for."""
        task = asyncio.create_task(work)
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        return task

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
    if engine not in REMOTE:
        return None
    named: str | None = params.get("model")
    if named:
        return named
    return CLAUDE if engine == "anthropic" and model in ("", DEFAULT_MODEL) else model
