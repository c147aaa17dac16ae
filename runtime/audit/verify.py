"""Verify a run's log: everything that it says is held against itself, its checkpoints, its anchor and its blobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import msgspec

from bascule.runtime.blob_care import BlobReferences
from bascule.runtime.log.anchor import Anchor, Anchored, Head
from bascule.runtime.log.blobs import Blobs
from bascule.runtime.log.chain import START, link
from bascule.runtime.log.guard import check_extent, find_missing
from bascule.runtime.log.permissions import may_append
from bascule.runtime.log.protocol import EventLog
from bascule.schemas.codec import decode
from bascule.schemas.envelope import Recorded, Unknown
from bascule.schemas.errors import BasculeError, Corrupt, NotFound, SchemaError
from bascule.schemas.events import LogCheckpointed
from bascule.schemas.subjects import event_id, id_digest, is_event_subject

#: How many heads are kept for a checkpoint that is yet to come; a notary is never that late.
_KEPT: Final = 65536


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it should be, and where."""

    seq: int
    subject: str
    what: str


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification found.

    Attributes:
        events, seq, head: of the run: their number, place of the last in the store, and the chain's value after it.
        checkpoints: how many of the log's own agree with the chain.
        anchored: so many events are those that the anchor knows; ``unanchored`` came after them.
        anchor_time: when the anchor's newest line was written; None without one.
        signed_by: public key of the newest line; ``trusted`` if every signature was checked against it.
        unknown: events of types that this version does not know, by type.
        blobs, erased: how many are there and match, and how many were erased on request.
        accepted: damage that somebody accepted: when, and why.
    """

    run: str
    events: int
    seq: int
    head: str
    checkpoints: int
    anchored: int
    unanchored: int
    anchor_time: str | None
    signed_by: str | None
    trusted: bool
    unknown: dict[str, int]
    blobs: int
    erased: int
    accepted: tuple[str, ...]
    faults: tuple[Fault, ...]


class Checker:
    """All checks of a run's events that need nothing but the events. Give it each of them once, in order.

    Args:
        anchored: heads that are known from outside, by count.
        accepted: up to this count, somebody took the run for what it is: earlier checkpoints are not compared.

    Attributes:
        count, seq, head: of the chain so far.
        verified: the highest count at which the chain was the one that is known from outside.
        checkpoints: how many agreed.
        unknown: events of unknown types, by type.
        event: the newest event, None if it could not be decoded.
    """

    def __init__(self, run: str, *, anchored: Mapping[int, Head] | None = None, accepted: int = 0) -> None:
        self.run = run
        self.count = self.seq = self.verified = self.checkpoints = 0
        self.head = START
        self.unknown: Counter[str] = Counter()
        self.event: Recorded | None = None
        self._anchored = anchored or {}
        self._accepted = accepted
        self._seen: set[bytes] = set()
        self._heads: list[tuple[bytes, int]] = []  # with their sequences; the first is that of count ``_first``
        self._first = 1
        self._good = (0, 0)  # count and sequence up to which the chain agreed with something
        self._broken = False

    def add(self, count: int, seq: int, subject: str, payload: bytes, decoded: Recorded | None = None) -> list[Fault]:
        """Check the next event.

        Args:
            count: its number in the run, from 1; seq: its place in the store.
            decoded: what the payload says, if the caller knows.
        """
        wrong = [] if seq > self.seq else [f"sequence {seq} does not follow {self.seq}"]
        self.count, self.seq = count, max(seq, self.seq)
        self.head = link(self.head, count, subject, payload)
        self._heads.append((self.head, seq))
        if len(self._heads) > 2 * _KEPT:
            self._forget(self._first + _KEPT)
        try:
            self.event = decoded or decode(seq, subject, payload)
        except (Corrupt, SchemaError, UnicodeDecodeError, RecursionError) as e:
            wrong.append(str(e))
            self.event = None
            self._seen.add(id_digest(event_id(subject)))
        else:
            self._check(self.event, wrong)
        if count in self._anchored:
            self._compare_anchored(self._anchored[count], wrong)
        return [Fault(seq=seq, subject=subject, what=what) for what in wrong]

    def finish(self) -> list[Fault]:
        """What only shows at the end of the run."""
        last = max(self._anchored, default=0)
        if last <= self.count:
            return []
        up_to = f" (up to sequence {self.seq})" if self.seq else ""
        what = f"the log gives out {self.count} events of the run{up_to}; its anchor knows {last} events, up to "
        what += f"sequence {self._anchored[last].seq}"
        return [Fault(seq=self.seq, subject=f"bascule.{self.run}", what=what)]

    def _check(self, event: Recorded, wrong: list[str]) -> None:
        envelope = event.envelope
        identity = id_digest(envelope.id)
        if identity in self._seen:
            wrong.append("its identity was there before")
        self._seen.add(identity)
        if envelope.causationid is not None and not self._is_there(envelope.causationid):
            wrong.append(f"its cause {envelope.causationid} is not in the log before it")
        if envelope.run != self.run:
            wrong.append(f"it says that it belongs to the run {envelope.run}")
        if not is_event_subject(event.subject):
            wrong.append("its subject is none that an event can have")
        elif not may_append(envelope.producer.service, event.subject):
            wrong.append(f"{envelope.producer.service!r} may not write it")
        if isinstance(event.data, Unknown):
            self.unknown[envelope.type] += 1
        elif isinstance(event.data, LogCheckpointed) and self.count > self._accepted:
            self._compare_checkpoint(event.data, wrong)

    def _is_there(self, identity: str) -> bool:
        try:
            return id_digest(identity) in self._seen
        except ValueError:
            return False

    def _compare_checkpoint(self, checkpoint: LogCheckpointed, wrong: list[str]) -> None:
        at = checkpoint.count - self._first
        agrees = 0 <= at < len(self._heads) - 1 and self._heads[at][0].hex() == checkpoint.head
        place = self._heads[at][1] if agrees else self.seq
        self._compared(agrees, "the head that it notes", checkpoint.count, place, wrong)
        if agrees and not self._broken:
            self.checkpoints += 1
            self._forget(checkpoint.count + 1)

    def _compare_anchored(self, known: Head, wrong: list[str]) -> None:
        agrees = (known.head, known.seq) == (self.head.hex(), self.seq)
        self._compared(agrees, "the head that the anchor knows here", known.count, self.seq, wrong)
        if agrees and not self._broken:
            self.verified = known.count

    def _compared(self, agrees: bool, what: str, count: int, seq: int, wrong: list[str]) -> None:
        if self._broken:  # everything after the first difference differs as well
            return
        if agrees:
            self._good = max(self._good, (count, seq))
            return
        self._broken = True
        after, last = self._good
        wrong.append(
            f"{what} is not the chain's: of the run's events {after + 1} to {count} (after sequence {last}, up to "
            f"{seq}) at least one was changed, removed or added"
        )

    def _forget(self, first: int) -> None:
        """Drop the heads before count ``first``."""
        del self._heads[: max(0, first - self._first)]
        self._first = max(first, self._first)


async def verify(run: str, log: EventLog, blobs: Blobs, anchor: Anchor) -> Verification:
    """Verify a run as it is in the log now. Needs memory for the identities of its events, not for the events.

    Raises:
        NotFound: there is no such run, and the anchor knows none.
        LogError: the log cannot be read.
    """
    faults: list[Fault] = []

    def of_run(what: str) -> Fault:
        return Fault(seq=0, subject=f"bascule.{run}", what=what)

    anchored = Anchored()
    try:
        anchored = anchor.read()
    except Corrupt as e:
        faults.append(of_run(str(e)))
    try:
        check_extent(await log.extent(), anchored, anchor.path)
    except Corrupt as e:
        faults.append(of_run(str(e)))
    accepted = anchored.accepted.get(run, [])
    checker = Checker(run, anchored=anchored.points.get(run), accepted=accepted[-1].count if accepted else 0)
    refs = BlobReferences()
    try:
        async for raw in log.read_raw(f"bascule.{run}.>"):
            faults += checker.add(checker.count + 1, *raw)
            if checker.event is not None:
                refs.apply(checker.event)
    except Corrupt as e:
        faults.append(of_run(str(e)))
    faults += checker.finish()
    if faults:
        faults += [of_run(f"in the store {missing}") for missing in [await find_missing(log)] if missing.count]
    if checker.count == 0 and run not in anchored.heads and not faults:
        raise NotFound(f"There is no run {run!r} in this log.", next_step="`bascule status` lists the runs.")
    there, gone = await _checked_blobs(refs, run, log, blobs, checker.seq)
    faults += gone
    return Verification(
        run=run,
        events=checker.count,
        head=checker.head.hex(),
        seq=checker.seq,
        checkpoints=checker.checkpoints,
        anchored=checker.verified,
        unanchored=checker.count - checker.verified,
        anchor_time=anchored.time or None,
        signed_by=anchored.signed_by,
        trusted=anchor.trusted is not None and anchored.n > 0,
        unknown=dict(checker.unknown),
        blobs=there,
        erased=len(refs.erased),
        accepted=tuple(f"{a.time}: {a.reason}" for a in accepted),
        faults=tuple(faults),
    )


async def accept(found: Verification, log: EventLog, anchor: Anchor, reason: str) -> None:
    """Write into the anchor that the run is taken for what it is now, and why; what the anchor knew is void.

    Raises:
        Corrupt: the anchor itself is not intact.
    """
    extent = await log.extent()
    head = Head(count=found.events, seq=found.seq, head=found.head)
    anchor.append(extent.log, {found.run: head}, accepted=reason, missing=extent.last - extent.messages)


async def _checked_blobs(
    refs: BlobReferences, run: str, log: EventLog, blobs: Blobs, seq: int
) -> tuple[int, list[Fault]]:
    """Read what has to be there by the events up to ``seq``: how many blobs are, and what is wrong with the others."""
    needed, gone = refs.retained, dict[str, Fault]()
    for sha256 in [s for s in refs.referenced if s in needed]:
        mention = refs.referenced[sha256]
        try:
            await blobs.get(mention.ref)
        except BasculeError as e:
            gone[sha256] = Fault(seq=mention.seq, subject=mention.subject, what=str(e))
    there = len(needed) - len(gone)
    if gone:
        # A run that went on meanwhile has superseded its checkpoint; a blob may have been erased.
        with suppress(BasculeError):
            async for event in log.read(f"bascule.{run}.>", after=seq):
                refs.apply(event)
    return there, [fault for sha256, fault in gone.items() if sha256 in refs.retained]
