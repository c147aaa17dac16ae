"""A process whose every access to the log, the queues and the blobs may be late, be refused, go unanswered, land after
its sender is gone, or be the last thing that the process did.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from bascule.runtime.log.blobs import OCTETS, missing, ref_of
from bascule.runtime.log.memory import MemoryItem, MemoryLog, MemoryQueue
from bascule.runtime.log.protocol import Fence, NewEvent
from bascule.runtime.runner import View
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import Conflict, LogUnavailable
from bascule.schemas.events import BlobRef
from tests.simulation.loop import Owner
from tests.simulation.plan import Weather


class Process(Owner):
    """One life of a machine's process.

    Attributes:
        dead: it was killed. What is left of it unwinds and reaches nothing any more.
    """

    def __init__(self, name: str, weather: Weather, clock: tuple[float, float]) -> None:
        super().__init__()
        self.name = name
        self.weather = weather
        self.dead = False
        self.view: View | None = None
        self._offset, self._rate = clock

    def clock(self) -> float:
        return self.weather.loop.time() * self._rate + self._offset

    def note(self, what: str) -> None:
        self.weather.note(self.name, what)

    def kill(self, why: str) -> None:
        """End it where it stands."""
        if self.dead:
            return
        self.note(f"dies {why}")
        self.dead = True
        self.weather.loop.resume(self)
        for _, task in sorted(self.tasks.items()):
            task.cancel()

    def alive(self) -> None:
        if self.dead:
            raise asyncio.CancelledError

    async def reach(self, what: str) -> None:
        """On the way to something outside the process."""
        self.alive()
        weather = self.weather
        if weather.strikes(weather.plan.crash):
            self.kill(f"before {what}")
            raise asyncio.CancelledError
        if weather.strikes(weather.plan.refuse):
            self.note(f"is refused: {what}")
            raise unavailable()
        await weather.latency()
        self.alive()


def unavailable() -> LogUnavailable:
    return LogUnavailable("The simulated server does not answer.", next_step="Wait.")


class FaultyLog:
    """The shared log, as one process reaches it."""

    def __init__(self, inner: MemoryLog, process: Process) -> None:
        self._inner = inner
        self._process = process
        self.letters = inner.letters
        self.telemetry = inner.telemetry
        self.extent = inner.extent

    async def append(self, events: Sequence[NewEvent], *, fence: Fence | None = None) -> list[Recorded]:
        process, weather = self._process, self._process.weather
        plan = weather.plan
        what = "append " + ", ".join(e.subject.removeprefix("bascule.sim.") for e in events)
        await process.reach(what)
        if weather.strikes(plan.late):
            weather.deliver(partial(self._inner.append, events, fence=fence), process.name, what)
            if weather.rng.random() < 0.5:
                process.kill(f"while it sends: {what}")
                raise asyncio.CancelledError
            await asyncio.sleep(weather.rng.random())
            process.note(f"gets no answer: {what}")
            raise unavailable()
        try:
            recorded = await self._inner.append(events, fence=fence)
        except Conflict:
            process.note(f"conflict: {what}")
            raise
        process.note(f"{'adopts' if recorded[0].duplicate else 'writes'}: {what}")
        if weather.strikes(plan.lose):
            process.note(f"gets no answer: {what}")
            raise unavailable()
        if weather.strikes(plan.crash):
            process.kill(f"after {what}")
            raise asyncio.CancelledError
        await weather.latency()
        process.alive()
        return recorded

    async def get(self, subject: str) -> Recorded | None:
        await self._process.reach("get")
        return await self._inner.get(subject)

    async def head(self, filter: str) -> int:  # noqa: A002
        await self._process.reach("head")
        return await self._inner.head(filter)

    async def follow(self, filter: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:  # noqa: A002
        process, weather = self._process, self._process.weather
        await process.reach("follow")
        async with aclosing(self._inner.follow(filter, after=after)) as events:
            async for event in events:
                if weather.happens(weather.plan.lag):
                    await asyncio.sleep(weather.rng.random() * weather.plan.lag_seconds)
                process.alive()
                yield event

    async def read(self, filter: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:  # noqa: A002
        await self._process.reach("read")
        async for event in self._inner.read(filter, after=after):
            yield event

    async def work(self, run: str, service: str, filters: Sequence[str], *, fresh: bool = False) -> FaultyQueue:
        await self._process.reach("work")
        return FaultyQueue(await self._inner.work(run, service, filters, fresh=fresh), self._process)


class FaultyQueue:
    """Deliveries that come twice, late and out of order."""

    def __init__(self, inner: MemoryQueue, process: Process) -> None:
        self._inner = inner
        self._process = process
        self._kept: list[FaultyItem] = []

    async def next(self, limit: int, wait: float) -> list[FaultyItem]:
        process, weather = self._process, self._process.weather
        plan = weather.plan
        process.alive()
        there = self._kept[:limit]
        del self._kept[:limit]
        if len(there) == limit:
            return there
        # Longer than asked: that a worker looks again in vain is of no interest here, and takes real time.
        items = [FaultyItem(i, process) for i in await self._inner.next(limit - len(there), 4 * wait)]
        process.alive()
        self._kept += [item for item in items if weather.happens(plan.duplicate)]
        if weather.happens(plan.reorder):
            items += there
            weather.rng.shuffle(items)
            cut = weather.rng.randint(0, len(items))
            self._kept += items[cut:]
            return items[:cut]
        return there + items

    async def close(self) -> None:
        await self._inner.close()


#: The trigger that a worker's task handles.
TRIGGER: contextvars.ContextVar[Recorded | None] = contextvars.ContextVar("trigger", default=None)


class FaultyItem:
    """A delivery whose acknowledgement may get lost."""

    def __init__(self, inner: MemoryItem, process: Process) -> None:
        self._inner = inner
        self._process = process

    @property
    def event(self) -> Recorded:
        TRIGGER.set(self._inner.event)  # whoever asks is the task that handles it
        return self._inner.event

    async def done(self) -> None:
        process = self._process
        process.alive()
        if not process.weather.happens(process.weather.plan.forget_ack):
            await self._inner.done()

    async def progress(self) -> None:
        process = self._process
        process.alive()
        if not process.weather.happens(process.weather.plan.forget_ack):
            await self._inner.progress()

    async def retry(self, delay: float) -> None:
        await self._inner.retry(delay)


class MemoryBlobs:
    """The blobs that all processes share."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}


class FaultyBlobs:
    """The shared blobs, as one process reaches them."""

    def __init__(self, shared: MemoryBlobs, process: Process) -> None:
        self._stored = shared.stored
        self._process = process

    async def put(self, data: bytes, media: str = OCTETS) -> BlobRef:
        await self._process.reach("put")
        ref = ref_of(data, media)
        self._stored[ref.sha256] = data
        return ref

    async def get(self, ref: BlobRef) -> bytes:
        await self._process.reach("get blob")
        if ref.sha256 not in self._stored:
            raise missing(ref.sha256)
        return self._stored[ref.sha256]

    async def discard(self, ref: BlobRef) -> None:
        # Draws nothing: the order of discards is that of a set.
        await asyncio.sleep(0)
        self._process.alive()
        self._stored.pop(ref.sha256, None)
