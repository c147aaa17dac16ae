"""Bring an export into a store: all of it is checked before anything is written; what was cut short can be repeated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from bascule.runtime.blob_care import references
from bascule.runtime.exports.check import verify_export
from bascule.runtime.exports.reader import Export
from bascule.runtime.log.anchor import Anchor, Head
from bascule.runtime.log.blobs import Blobs
from bascule.runtime.log.chain import Chain
from bascule.runtime.log.disk import durable_write, explained, make_private, sync_folder
from bascule.runtime.log.protocol import EventLog, NewEvent
from bascule.runtime.log.rules import MAX_BATCH
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import ConfigError, Corrupt
from bascule.schemas.subjects import token

#: Bytes of payload in one atomic batch. The server takes far more (59 MiB in 2.6 s), and gives a batch 10 s.
BATCH_BYTES: Final = 4 * 1024 * 1024


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What an import did.

    Attributes:
        events: of the run; added: of these, how many were not there before; blobs: how many the export held.
    """

    run: str
    events: int
    added: int
    blobs: int
    head: str


async def import_export(
    export: Export, log: EventLog, blobs: Blobs, *, home: Path, anchor: Anchor | None = None
) -> Imported:
    """Write a run into ``log`` and ``blobs``: blobs first, then the events in order, in atomic batches.

    A run that is there already must be the same as far as it goes; then the rest is added.

    Args:
        log: as the user who may write whole runs.
        home: where it is noted that the run is not whole yet.
        anchor: notes how far the run goes, once all of it is there.

    Raises:
        Corrupt: the export is not intact. Nothing was written, unless it was changed while it was read.
        ConfigError: the run is there with other events, or the export leaves out blobs. Nothing was written.
        LogError: the log or the blob store refuses; doing it again is safe.
    """
    manifest = export.manifest
    faults = verify_export(export)
    if faults:
        first = faults[0]
        raise Corrupt(
            f"The export of {manifest.run} is not intact: {first.subject}: {first.what}"
            + (f" (and {len(faults) - 1} more)." if len(faults) > 1 else "."),
            next_step="Nothing was written. `bascule verify PATH` lists every fault.",
        )
    omitted = sum(blob.omitted for blob in manifest.blobs)
    if omitted:
        raise ConfigError(
            f"The export of {manifest.run} leaves out {omitted} blobs that its events name.",
            next_step="Export again without --no-blobs, or with --restricted; verify, diff and fold read it as it is.",
        )
    there = await _matching(export, log)
    await _put_blobs(export, blobs)
    rest = (NewEvent(subject=e.subject, payload=e.payload) for e in export.events() if e.seq > there)
    await append_all(log, rest, home=home, run=manifest.run)
    chain = await chain_of(log, manifest.run)
    if (chain.count, chain.head.hex()) != (manifest.events, manifest.head):
        raise Corrupt(
            f"The run {manifest.run} was imported, but its chain is not the export's.",
            next_step="The log or the export was changed meanwhile: run `bascule verify` on both.",
        )
    if anchor is not None:
        await note(anchor, log, manifest.run, chain)
    return Imported(
        run=manifest.run,
        events=manifest.events,
        added=manifest.events - there,
        blobs=sum(blob.included for blob in manifest.blobs),
        head=manifest.head,
    )


async def chain_of(log: EventLog, run: str) -> Chain:
    """The chain of a run as the log holds it."""
    chain = Chain()
    async for event in log.read(f"bascule.{run}.>"):
        chain.add(event)
    return chain


async def note(anchor: Anchor, log: EventLog, run: str, chain: Chain) -> None:
    """Let the anchor know a run that was written whole."""
    head = Head(count=chain.count, seq=chain.seq, head=chain.head.hex())
    anchor.append((await log.extent()).log, {run: head})


async def _matching(export: Export, log: EventLog) -> int:
    """How many of the export's events the log holds.

    Raises:
        ConfigError: it holds others under the run's name.
    """
    run, count, theirs = export.manifest.run, 0, export.events()
    async for event in log.read(f"bascule.{run}.>"):
        count += 1
        other = next(theirs, None)
        if other is None:
            what = f"goes on after event {count - 1}, where the export ends, with {event.subject}"
        elif (event.subject, event.payload) != (other.subject, other.payload):
            what = f"differs from event {count} on: {event.subject} there, {other.subject} in the export"
        else:
            continue
        raise ConfigError(
            f"There is a run {run} already, and it {what}.",
            next_step="Nothing was written. Import into another home: --home DIR; `bascule diff` compares the two.",
        )
    return count


async def _put_blobs(export: Export, blobs: Blobs) -> None:
    refs = await references(_each(export))
    for blob in export.manifest.blobs:
        if blob.included:
            ref = refs.ref(blob.sha256)
            assert ref is not None  # or the export would not be intact
            await blobs.put(export.blob(blob), ref.media)
        elif blob.erased:
            await blobs.erase(blob.sha256)


async def _each(export: Export) -> AsyncIterator[Recorded]:
    for event in export.events():
        yield event


async def append_all(log: EventLog, events: Iterable[NewEvent], *, home: Path, run: str) -> None:
    """Append any number of events of a run, in order, in as few atomic batches as possible.

    Until all of them are there the run is :func:`unfinished`, since what was one batch once may be two now: a service
    that met the first half of a decision would never make the other.

    Raises:
        Conflict: some events of a batch are there already.
        LogError: the log refuses, or cannot be reached; what was appended before stays.
    """
    mark = _mark(home, run)
    for number, batch in enumerate(batches(events)):
        if number == 0:
            with explained(mark):
                make_private(mark.parent)
                durable_write(mark, b"")
                sync_folder(mark.parent)
        await log.append(batch)
    if mark.exists():
        with explained(mark):
            mark.unlink()
            sync_folder(mark.parent)


def unfinished(home: Path, run: str) -> bool:
    """Whether a run is being written as a whole, or that was cut short: nothing may be decided in it."""
    return _mark(home, run).exists()


def _mark(home: Path, run: str) -> Path:
    return home / "imports" / token(run)


def batches(events: Iterable[NewEvent]) -> Iterator[list[NewEvent]]:
    """The events, each time as many as one append takes."""
    batch: list[NewEvent] = []
    size = 0
    for event in events:
        if batch and (len(batch) == MAX_BATCH or size + len(event.payload) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += len(event.payload)
    if batch:
        yield batch
