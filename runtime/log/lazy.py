"""A log that connects when it is first used: of its many users a command needs few."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from bascule.runtime.log.dead_letters import DeadLetter
from bascule.runtime.log.protocol import EventLog, Extent, Fence, NewEvent, Raw, WorkQueue
from bascule.runtime.log.telemetry import Line
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import LogError


class LazyLog:
    """An :class:`~bascule.runtime.log.protocol.EventLog`.

    Args:
        connect: makes the log; what it raises, the first use raises, and the next one tries again.
    """

    def __init__(self, connect: Callable[[], Awaitable[EventLog]]) -> None:
        self.letters = LazyLetters(self)
        self.telemetry = LazyTelemetry(self)
        self._connect = connect
        self._log: EventLog | None = None
        self._connecting = asyncio.Lock()

    async def opened(self) -> EventLog:
        async with self._connecting:
            if self._log is None:
                self._log = await self._connect()
            return self._log

    async def append(self, events: Sequence[NewEvent], *, fence: Fence | None = None) -> list[Recorded]:
        return await (await self.opened()).append(events, fence=fence)

    async def get(self, subject: str) -> Recorded | None:
        return await (await self.opened()).get(subject)

    async def head(self, filter: str) -> int:  # noqa: A002
        return await (await self.opened()).head(filter)

    async def follow(self, filter: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:  # noqa: A002
        async with _closing((await self.opened()).follow(filter, after=after)) as events:
            async for event in events:
                yield event

    async def read(self, filter: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:  # noqa: A002
        async with _closing((await self.opened()).read(filter, after=after)) as events:
            async for event in events:
                yield event

    async def read_raw(self, filter: str) -> AsyncGenerator[Raw, None]:  # noqa: A002
        async with _closing((await self.opened()).read_raw(filter)) as events:
            async for event in events:
                yield event

    async def extent(self) -> Extent:
        return await (await self.opened()).extent()

    async def work(self, run: str, service: str, filters: Sequence[str], *, fresh: bool = False) -> WorkQueue:
        return await (await self.opened()).work(run, service, filters, fresh=fresh)

    async def close(self) -> None:
        if self._log is not None:
            await self._log.close()


class LazyLetters:
    """The dead letters of a lazy log."""

    def __init__(self, log: LazyLog) -> None:
        self._log = log

    async def bury(self, letter: DeadLetter) -> None:
        await (await self._log.opened()).letters.bury(letter)

    async def retry(self, letter: DeadLetter) -> None:
        await (await self._log.opened()).letters.retry(letter)

    async def list(self, run: str = "*", service: str = "*") -> list[DeadLetter]:
        return await (await self._log.opened()).letters.list(run, service)


class LazyTelemetry:
    """The telemetry of a lazy log."""

    def __init__(self, log: LazyLog) -> None:
        self._log = log

    async def send(self, line: Line) -> None:
        with suppress(LogError):
            await (await self._log.opened()).telemetry.send(line)

    async def read(self, run: str) -> AsyncGenerator[Line, None]:
        async with _closing((await self._log.opened()).telemetry.read(run)) as lines:
            async for line in lines:
                yield line


def _closing(events: Any) -> aclosing[Any]:
    """The end of reading reaches the source; the protocol does not say that it can be closed, and every log's can."""
    return aclosing(events)
