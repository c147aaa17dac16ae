"""What was acknowledged, against what the log holds; and how the faults open and read a log."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.protocol import Fence, NewEvent
from bascule.runtime.log.server import EmbeddedServer
from bascule.schemas import subjects
from bascule.schemas.codec import encode
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.errors import LogUnavailable
from bascule.schemas.events import RunPaused

EVERYTHING = f"{subjects.ROOT}.>"
#: An append that is neither confirmed nor refused so long after its deadline hangs.
HANG_SECONDS = 10.0
_PRODUCER = Producer(service="faults", version="0", hash="0")


def event(subject: str, text: str) -> NewEvent:
    """An event whose bytes differ by ``text``."""
    draft = Draft(subject=subject, step=0, data=RunPaused(reason=text))
    payload = encode(draft, run=subject.split(".")[1], producer=_PRODUCER, time="2026-01-01T00:00:00Z", root=None)
    return NewEvent(subject=subject, payload=payload)


@asynccontextmanager
async def serving(home: Path, **options: Any) -> AsyncIterator[EmbeddedServer]:
    """A server on ``home``, stopped at the end."""
    server = await asyncio.to_thread(EmbeddedServer.start, home, **options)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.stop)


@asynccontextmanager
async def connected(server: EmbeddedServer, *, port: int | None = None, **options: Any) -> AsyncIterator[NatsLog]:
    """The log of ``server``, over ``port`` where something stands before it."""
    url = f"nats://127.0.0.1:{port or server.port}"
    log = await NatsLog.connect(url, user=server.user, password=server.password, **options)
    try:
        yield log
    finally:
        await log.close()


async def everything(log: NatsLog, filter_: str = EVERYTHING) -> list[Recorded]:
    async with aclosing(log.read(filter_)) as events:
        return [e async for e in events]


async def persistent(log: NatsLog, events: Sequence[NewEvent], *, deadline: float) -> list[Recorded]:
    """Append with the same identity until the log answers.

    Raises:
        TimeoutError: a call went on for longer than its deadline.
    """
    while True:
        try:
            async with asyncio.timeout(deadline + HANG_SECONDS):
                return await log.append(events)
        except LogUnavailable:
            continue


async def take_over(log: NatsLog, filter_: str, started: NewEvent) -> Recorded:
    """Start an attempt: an event fenced by the newest under ``filter_``."""
    (recorded,) = await log.append([started], fence=Fence(filter=filter_, seq=await log.head(filter_)))
    return recorded


class Tally(msgspec.Struct, frozen=True):
    """How the log differs from what was acknowledged."""

    lost: int
    duplicated: int
    broken: tuple[str, ...]


class Ledger:
    """The acknowledgements that writers got, in the order in which they came."""

    def __init__(self) -> None:
        self.acked: list[Recorded] = []
        self._places: defaultdict[str, list[int]] = defaultdict(list)
        self._grown = asyncio.Event()

    def note(self, recorded: Iterable[Recorded], *, writer: str | None = None) -> None:
        """Take an answer of the log.

        Args:
            writer: of an event that nobody else appends; its events are in the log in the order of these calls.
        """
        for r in recorded:
            self.acked.append(r)
            if writer is not None:
                self._places[writer].append(r.seq)
        self._grown.set()

    async def reach(self, count: int) -> None:
        """Wait until ``count`` events are acknowledged."""
        while len(self.acked) < count:
            self._grown.clear()
            await self._grown.wait()

    def audit(self, events: Sequence[Recorded]) -> Tally:
        """Hold the whole log ``events`` against the acknowledgements."""
        broken = []
        if [e.seq for e in events] != list(range(1, len(events) + 1)):
            broken.append("the sequences of the log are not contiguous")
        broken += [f"{w} wrote in another order" for w, seqs in self._places.items() if seqs != sorted(set(seqs))]
        return Tally(missing(self.acked, events), repeated(events), tuple(broken))


def missing(acked: Iterable[Recorded], events: Iterable[Recorded]) -> int:
    """How many acknowledged events are not in the log at their place with their bytes."""
    there = {e.seq: (e.subject, e.payload) for e in events}
    return sum(there.get(a.seq) != (a.subject, a.payload) for a in acked)


def repeated(events: Iterable[Recorded]) -> int:
    """How many events stand under a subject that has one already."""
    return sum(n - 1 for n in Counter(e.subject for e in events).values())
