"""Events under subjects that no event can have: written past us, found by verify, taken along by no export."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from bascule.runtime.audit.verify import Checker
from bascule.runtime.exports.writer import TarSink, write_export
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View
from bascule.schemas import subjects
from bascule.schemas.codec import decode
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import Corrupt

SUBJECT = "bascule.small.traj.UPPER.logged"


async def foreign(log: MemoryLog) -> list[Recorded]:
    """The run's start, and a copy of it under a subject of its own."""
    (start,) = [e async for e in log.read("bascule.small.>")]
    envelope = msgspec.structs.replace(start.envelope, subject=SUBJECT, id=subjects.event_id(SUBJECT))
    return [start, decode(2, SUBJECT, msgspec.json.encode(envelope))]


async def test_verify_names_it(make_view: Callable[[MemoryLog], View], started_log: MemoryLog) -> None:
    checker = Checker("small")
    found = [f for e in await foreign(started_log) for f in checker.add(e.seq, e.seq, e.subject, e.payload)]
    assert [(f.seq, f.subject, f.what) for f in found] == [(2, SUBJECT, "its subject is none that an event can have")]


async def test_no_export_is_written_that_could_not_be_read(
    make_view: Callable[[MemoryLog], View], started_log: MemoryLog
) -> None:
    events = await foreign(started_log)

    async def read() -> AsyncIterator[Recorded]:
        for event in events:
            yield event

    sink = io.BytesIO()
    with pytest.raises(Corrupt, match="UPPER"):
        await write_export("small", read, make_view(started_log).blobs, TarSink(sink))
    assert sink.getvalue() == b""
