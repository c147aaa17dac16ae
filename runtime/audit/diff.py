"""Compare two runs: their bytes, their decisions, and what they recorded besides."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from bascule.runtime.audit.replay import first_path
from bascule.runtime.log.chain import Chain
from bascule.schemas.codec import canonical, is_compared
from bascule.schemas.envelope import Recorded
from bascule.schemas.events import Data, LogCheckpointed, SandboxProbed

#: What is recorded when it happens to be due, or of the machine, and so differs between equal runs.
_INCIDENTAL = (LogCheckpointed, SandboxProbed)


class Entry(msgspec.Struct, frozen=True):
    """One event of a run, in brief.

    Attributes:
        stored: hash of what is recorded.
        content: for a decision its type and data in canonical JSON, for others a hash of these; empty for what happens
            to be due.
    """

    stored: bytes
    content: bytes
    decision: bool


class Brief(msgspec.Struct, frozen=True):
    """What is kept of a run to compare it; ``entries`` by subject without the run's name, in the order of the log."""

    run: str
    events: int
    head: bytes
    entries: dict[str, Entry]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The first decision that differs.

    Attributes:
        subject: without the run's name.
        path: where in the data, e.g. ``$.options[1].score``; empty if only one run has the event or the types differ.
    """

    subject: str
    path: str
    a: Any
    b: Any


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What two runs have in common.

    Attributes:
        events, decisions: of each run.
        equal: byte for byte.
        decisions_differ: how many decisions differ or are in one run only; ``first`` is the first of them.
        outcomes_differ: other events that record something else, or are in one run only.
        measured_differ: events that record the same, and differ in time, measured cost, writer or the run's name.
    """

    a: str
    b: str
    events: tuple[int, int]
    decisions: tuple[int, int]
    equal: bool
    decisions_differ: int
    outcomes_differ: int
    measured_differ: int
    first: Difference | None


async def brief(run: str, events: AsyncIterator[Recorded]) -> Brief:
    """Read a run once; what remains of each event is its subject and two hashes, and the data of its decisions."""
    chain, entries = Chain(), dict[str, Entry]()
    async for event in events:
        chain.add(event)
        entries[event.subject.split(".", 2)[2]] = _entry(event)
    return Brief(run, chain.count, chain.head, entries)


def _entry(event: Recorded) -> Entry:
    data, type_ = event.data, event.envelope.type.encode()
    stored = hashlib.blake2b(event.payload, digest_size=16).digest()
    if isinstance(data, _INCIDENTAL):
        return Entry(stored, b"", False)
    content = type_ + b"\0" + (canonical(data, measured=False) if isinstance(data, Data) else data.raw)
    if is_compared(data):
        return Entry(stored, content, True)
    return Entry(stored, hashlib.blake2b(content, digest_size=16).digest(), False)


def compare(a: Brief, b: Brief) -> Comparison:
    """Decisions are compared as canonical JSON with figures at 12 digits, without measured cost and the run's name."""
    first: Difference | None = None
    decisions = outcomes = measured = 0
    for subject in a.entries | b.entries:
        mine, other = a.entries.get(subject), b.entries.get(subject)
        if _content(mine) == _content(other):
            measured += mine is None or other is None or mine.stored != other.stored
        elif (mine is not None and mine.decision) or (other is not None and other.decision):
            decisions += 1
            first = first or _difference(subject, mine, other)
        else:
            outcomes += 1
    return Comparison(
        a=a.run,
        b=b.run,
        events=(a.events, b.events),
        decisions=(_decisions(a), _decisions(b)),
        equal=(a.events, a.head) == (b.events, b.head),
        decisions_differ=decisions,
        outcomes_differ=outcomes,
        measured_differ=measured,
        first=first,
    )


def _content(entry: Entry | None) -> bytes:
    return b"" if entry is None else entry.content


def _decisions(run: Brief) -> int:
    return sum(entry.decision for entry in run.entries.values())


def _difference(subject: str, a: Entry | None, b: Entry | None) -> Difference:
    (type_a, data_a), (type_b, data_b) = _parts(a), _parts(b)
    found = first_path(data_a, data_b) if type_a == type_b else None
    if found is None:
        return Difference(subject=subject, path="", a=type_a, b=type_b)
    return Difference(subject=subject, path=found[0], a=found[1], b=found[2])


def _parts(entry: Entry | None) -> tuple[str | None, Any]:
    """Type and data of a decision."""
    if entry is None or not entry.decision:
        return None, None
    type_, _, data = entry.content.partition(b"\0")
    return type_.decode(), msgspec.json.decode(data)
