"""A log in memory: for tests and simulations, with the semantics of the real one. One event loop only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from msgspec.structs import replace

from bascule.runtime.log.dead_letters import MemoryDeadLetters
from bascule.runtime.log.protocol import Extent, Fence, NewEvent, Raw
from bascule.runtime.log.rules import adopted, checked, fenced_off, matches
from bascule.runtime.log.telemetry import MemoryTelemetry
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import LogError
from bascule.schemas.subjects import token


class MemoryLog:
    """An :class:`~bascule.runtime.log.protocol.EventLog` that forgets.

    Args:
        lease: seconds that a delivered work item stays with its worker.
    """

    def __init__(self, *, lease: float = 10.0) -> None:
        self.letters = MemoryDeadLetters()
        self.telemetry = MemoryTelemetry()
        self._lease = lease
        self._events: list[Recorded] = []
        self._by_subject: dict[str, Recorded] = {}
        self._queues: dict[tuple[str, str], _Shared] = {}
        self._changed = asyncio.Event()
        self._closed = False

    async def append(self, events: Sequence[NewEvent], *, fence: Fence | None = None) -> list[Recorded]:
        mine = checked(events, fence)
        await asyncio.sleep(0)  # as any real append does, let others go between deciding and writing
        self._check_open()
        there = adopted(mine, [self._by_subject.get(m.subject) for m in mine])
        if there is not None:
            return there
        if fence is not None:
            newest = self._newest(fence.filter)
            if (newest.seq if newest else 0) != fence.seq:
                raise fenced_off(mine[0].subject, fence, (newest.seq, newest.subject) if newest else None)
        first = len(self._events) + 1
        written = [replace(m, seq=first + i) for i, m in enumerate(mine)]
        self._events += written
        self._by_subject |= {w.subject: w for w in written}
        self._wake()
        return written

    async def get(self, subject: str) -> Recorded | None:
        return self._by_subject.get(subject)

    async def head(self, filter: str) -> int:  # noqa: A002
        newest = self._newest(filter)
        return newest.seq if newest else 0

    async def follow(self, filter: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:  # noqa: A002
        position = after
        while True:
            self._check_open()
            changed = self._changed
            while position < len(self._events):
                event = self._events[position]
                position += 1
                if matches(filter, event.subject):
                    yield event
            await changed.wait()

    async def read(self, filter: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:  # noqa: A002
        for event in self._events[after:]:
            if matches(filter, event.subject):
                yield event

    async def read_raw(self, filter: str) -> AsyncGenerator[Raw, None]:  # noqa: A002
        for event in self._events[:]:
            if matches(filter, event.subject):
                yield Raw(event.seq, event.subject, event.payload)

    async def extent(self) -> Extent:
        last = len(self._events)
        return Extent(log="memory", first=min(1, last), last=last, messages=last)

    async def work(self, run: str, service: str, filters: Sequence[str], *, fresh: bool = False) -> MemoryQueue:
        key = (token(run), token(service))
        shared = self._queues.get(key)
        if shared is None or shared.filters != tuple(filters):
            shared = self._queues[key] = _Shared(tuple(filters))
        elif fresh:
            shared.reset()
        return MemoryQueue(self, shared)

    async def close(self) -> None:
        self._closed = True
        self._wake()

    def _newest(self, filter_: str) -> Recorded | None:
        return next((e for e in reversed(self._events) if matches(filter_, e.subject)), None)

    def _check_open(self) -> None:
        if self._closed:
            raise LogError("The log is closed.", next_step="Open it again.")

    def _wake(self) -> None:
        self._changed, changed = asyncio.Event(), self._changed
        changed.set()


class _Shared:
    """One queue's state, shared by its workers: what is not done yet, and when each becomes free (loop time)."""

    def __init__(self, filters: tuple[str, ...]) -> None:
        self.filters = filters
        self.position = 0
        self.free_at: dict[int, float] = {}

    def reset(self) -> None:
        self.position = 0
        self.free_at.clear()

    def take(self, events: Sequence[Recorded], limit: int, now: float, lease: float) -> list[Recorded]:
        for event in events[self.position :]:
            if any(matches(f, event.subject) for f in self.filters):
                self.free_at[event.seq] = now
        self.position = len(events)
        free = sorted(seq for seq, at in self.free_at.items() if at <= now)[:limit]
        self.free_at |= dict.fromkeys(free, now + lease)
        return [events[seq - 1] for seq in free]


class MemoryQueue:
    """A :class:`~bascule.runtime.log.protocol.WorkQueue` of a :class:`MemoryLog`."""

    def __init__(self, log: MemoryLog, shared: _Shared) -> None:
        self._log = log
        self._shared = shared
        self._closed = False

    async def next(self, limit: int, wait: float) -> list[MemoryItem]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        while not self._closed:
            self._log._check_open()
            changed = self._log._changed
            events = self._shared.take(self._log._events, limit, loop.time(), self._log._lease)
            if events:
                return [MemoryItem(self._log, self._shared, e) for e in events]
            if loop.time() >= end:
                break
            try:
                async with asyncio.timeout_at(min(end, *self._shared.free_at.values(), end)):
                    await changed.wait()
            except TimeoutError:
                pass
        return []

    async def close(self) -> None:
        self._closed = True
        self._log._wake()


class MemoryItem:
    """A delivered trigger."""

    def __init__(self, log: MemoryLog, shared: _Shared, event: Recorded) -> None:
        self._log = log
        self._shared = shared
        self._event = event

    @property
    def event(self) -> Recorded:
        return self._event

    async def done(self) -> None:
        self._shared.free_at.pop(self._event.seq, None)

    async def progress(self) -> None:
        self._free_after(self._log._lease)

    async def retry(self, delay: float) -> None:
        self._free_after(delay)
        self._log._wake()

    def _free_after(self, seconds: float) -> None:
        if self._event.seq in self._shared.free_at:
            self._shared.free_at[self._event.seq] = asyncio.get_running_loop().time() + seconds
