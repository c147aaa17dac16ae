"""``python -m tests.faults.launcher INJECTION COMMAND...``: a ``bascule`` command in a process with a fault in it.

The product has no hooks for this: what is disturbed is replaced here, before the command begins.
"""

from __future__ import annotations

import datetime
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

MOMENTS = ("before", "published", "acked")


class Injection(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a process.

    Attributes:
        points: a file of the kill points that were used; the process kills itself at each that is not in it.
        kills: how many points may be used at most.
        stop: a type of event; the process pauses itself before its first append of one, and notes that in ``stopped``.
        ledger: a file that gets what was acknowledged to this process.
        clock: seconds by which its clock is ahead.
        deliveries: a seed for handing out work twice and shuffled.
        lease: seconds that a work item stays with its worker.
        retry: seconds before failed work is tried again.
    """

    points: str | None = None
    kills: int = 10_000
    stop: str | None = None
    stopped: str = ""
    ledger: str | None = None
    clock: float = 0.0
    deliveries: int | None = None
    lease: float = 2.0
    retry: float = 0.1


class Point(msgspec.Struct, frozen=True, order=True):
    """A moment in the append of an event of one type by one service."""

    service: str
    type: str
    moment: str


class Acked(msgspec.Struct, frozen=True):
    """An acknowledged event."""

    seq: int
    subject: str
    payload: str


class _Head(msgspec.Struct):
    """The parts of an envelope that say who writes what."""

    class _Producer(msgspec.Struct):
        service: str

    type: str
    producer: _Producer
    origin: str = "live"


def lines_of(path: Path, kind: type[Any]) -> list[Any]:
    """The whole lines of a file; a kill cuts none, since each is one write."""
    text = path.read_bytes() if path.exists() else b""
    return [msgspec.json.decode(line, type=kind) for line in text.splitlines()]


def write_lines(path: Path, items: Iterable[Any]) -> None:
    """Append a line each, durably."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, b"".join(msgspec.json.encode(i) + b"\n" for i in items))
        os.fsync(fd)
    finally:
        os.close(fd)


def written_by(payloads: Iterable[bytes]) -> set[tuple[str, str]]:
    """Service and type of events. What a fork repeats of another run is nobody's own, but its mark is."""
    heads = [msgspec.json.decode(p, type=_Head) for p in payloads]
    return {(h.producer.service, h.type) for h in heads if h.origin != "whatif" or h.type == "bascule.run.forked"}


def inject(injection: Injection) -> None:
    if injection.clock:
        _skew(injection.clock)
    from bascule.runtime import work
    from bascule.runtime.log.nats import NatsLog

    work.RETRY_SECONDS = injection.retry  # type: ignore[misc]
    NatsLog.connect = partial(NatsLog.connect, lease=injection.lease)  # type: ignore[method-assign]
    if injection.points is not None or injection.ledger is not None or injection.stop is not None:
        _disturb_appends(injection)
    if injection.deliveries is not None:
        _disturb_deliveries(random.Random(injection.deliveries))


def _disturb_appends(injection: Injection) -> None:
    from bascule.runtime.log.nats import NatsLog

    append, publish = NatsLog.append, NatsLog._publish

    def at(moment: str, payloads: Sequence[bytes]) -> None:
        if injection.points is None:
            return
        path = Path(injection.points)
        used = lines_of(path, Point)
        new = sorted({Point(*who, moment) for who in written_by(payloads)} - set(used))
        if new and len(used) < injection.kills:
            write_lines(path, new)
            os.kill(os.getpid(), signal.SIGKILL)

    async def killing_publish(self: NatsLog, mine: Any, fence: Any) -> dict[str, Any]:
        answer = await publish(self, mine, fence)
        if "error" not in answer and not answer.get("duplicate"):
            at("published", [m.payload for m in mine])
        return answer

    async def killing_append(self: NatsLog, events: Any, *, fence: Any = None) -> Any:
        payloads = [e.payload for e in events]
        at("before", payloads)
        if injection.stop in {type_ for _, type_ in written_by(payloads)} and not Path(injection.stopped).exists():
            write_lines(Path(injection.stopped), [os.getpid()])
            os.kill(os.getpid(), signal.SIGSTOP)
        recorded = await append(self, events, fence=fence)
        if injection.ledger is not None:
            write_lines(Path(injection.ledger), [Acked(r.seq, r.subject, r.payload.decode()) for r in recorded])
        if not any(r.duplicate for r in recorded):
            at("acked", payloads)
        return recorded

    NatsLog._publish = killing_publish  # type: ignore[method-assign]
    NatsLog.append = killing_append  # type: ignore[method-assign]


def _disturb_deliveries(rng: random.Random) -> None:
    """Work is kept for a while, comes in any order, and some of it twice."""
    from bascule.runtime.log.queues import NatsQueue

    real, kept = NatsQueue.next, []  # type: ignore[var-annotated]

    async def disturbed(self: NatsQueue, limit: int, wait: float) -> list[Any]:
        kept.extend(await real(self, 64, 0.1 if kept else wait))
        rng.shuffle(kept)
        now = [kept.pop() for _ in range(min(limit, len(kept)))]
        kept.extend(i for i in now if rng.random() < 0.3)
        return now

    NatsQueue.next = disturbed  # type: ignore[method-assign]


def _skew(seconds: float) -> None:
    """Before anything else is imported, so that everybody gets this clock."""
    real, ahead = time.time, datetime.timedelta(seconds=seconds)

    class Skewed(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return super().now(tz) + ahead

    time.time = lambda: real() + seconds
    datetime.datetime = Skewed  # type: ignore[misc]


if __name__ == "__main__":
    sys.path.pop(0)  # as the command itself would be found
    inject(msgspec.json.decode(sys.argv[1], type=Injection))
    sys.argv = ["bascule", *sys.argv[2:]]
    from bascule.runtime.cli.app import main

    main()
