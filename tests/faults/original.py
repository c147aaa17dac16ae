"""A small home to damage: two runs with blobs, checkpoints, a work queue, an anchor, and an export beside it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from bascule.runtime.exports.reader import Export
from bascule.runtime.exports.writer import TarSink, write_export
from bascule.runtime.log.anchor import Anchor, Head, anchor_path
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.chain import Chain
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.protocol import NewEvent
from bascule.schemas import subjects
from bascule.schemas.codec import encode
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.events import AdapterPublished, BlobRef, Data, LogCheckpointed, RunPaused, RunResumed
from tests.faults.ledger import connected, everything, serving

RUNS: Final = ("r1", "r2")
HOME: Final = "home"
EXPORT: Final = "r1.tar"
_GENERATIONS, _PAUSES = 6, 4
_TIME = "2026-01-01T00:00:00Z"


class Content(msgspec.Struct, frozen=True):
    """All that a reader can get out of a home, or of an export (with the lines of its events and without sequences)."""

    events: tuple[tuple[int, str, bytes], ...]
    blobs: Mapping[str, bytes]


async def make_original(folder: Path, rng: random.Random) -> None:
    """Make ``folder/home`` and ``folder/r1.tar``; all of it is covered by the anchor."""
    home = folder / HOME
    async with serving(home) as server, connected(server) as log:
        for run in RUNS:
            await _record(log, run, FileBlobs(home / "blobs" / run), rng)
        await _anchor(log, home)
        queue = await log.work(RUNS[0], "verifier", [f"bascule.{RUNS[0]}.>"])
        for item in await queue.next(10, 2.0):
            await item.done()
        await queue.close()
        with (folder / EXPORT).open("wb") as file:
            blobs = FileBlobs(home / "blobs" / RUNS[0])
            await write_export(RUNS[0], lambda: log.read(f"bascule.{RUNS[0]}.>"), blobs, TarSink(file))


async def content(log: NatsLog, home: Path) -> Content:
    events = await everything(log)
    blobs = {
        ref.sha256: await FileBlobs(home / "blobs" / e.envelope.run).get(ref) for e in events for ref in _blobs_of(e)
    }
    return Content(tuple((e.seq, e.subject, e.payload) for e in events), blobs)


def exported(export: Export) -> Content:
    lines = tuple((number, "", line) for number, line in enumerate(export.lines(), 1))
    return Content(lines, {b.sha256: export.blob(b) for b in export.manifest.blobs})


def _blobs_of(event: Recorded) -> tuple[BlobRef, ...]:
    return tuple(event.data.files.values()) if isinstance(event.data, AdapterPublished) else ()


async def _record(log: NatsLog, run: str, blobs: FileBlobs, rng: random.Random) -> None:
    """A run that is paused and resumed and publishes adapters, with a checkpoint after each."""
    chain = Chain()
    for g in range(1, _GENERATIONS + 1):
        for i in range(g * _PAUSES, (g + 1) * _PAUSES):
            text = rng.randbytes(300).hex()
            await _append(log, chain, "cli", subjects.run_paused(run, i), RunPaused(reason=text))
            await _append(log, chain, "cli", subjects.run_resumed(run, i), RunResumed())
        files = {name: await blobs.put(rng.randbytes(2000)) for name in ("adapter_model.safetensors", "state")}
        published = AdapterPublished(
            generation=g,
            adapter=f"g{g:02d}",
            files=files,
            sha256=hashlib.sha256(f"{run}{g}".encode()).hexdigest(),
            parent_adapter=None,
            iterations=1,
        )
        await _append(log, chain, "trainer", subjects.train_outcome(run, g), published)
        noted = LogCheckpointed(count=chain.count, head=chain.head.hex())
        await _append(log, chain, "verifier", subjects.log_checkpointed(run, chain.count), noted)


async def _append(log: NatsLog, chain: Chain, service: str, subject: str, data: Data) -> None:
    producer = Producer(service=service, version="0", hash="0")
    draft = Draft(subject=subject, step=0, data=data)
    payload = encode(draft, run=subject.split(".")[1], producer=producer, time=_TIME, root=None)
    (recorded,) = await log.append([NewEvent(subject=subject, payload=payload)])
    chain.add(recorded)


async def _anchor(log: NatsLog, home: Path) -> None:
    """Two lines: how far the runs went at half of their events, and at their end."""
    events, extent = await everything(log), await log.extent()
    anchor = Anchor(anchor_path(home))
    for part in (events[: len(events) // 2], events):
        chains = {run: Chain() for run in RUNS}
        for e in part:
            chains[e.envelope.run].add(e)
        heads = {r: Head(count=c.count, seq=c.seq, head=c.head.hex()) for r, c in chains.items() if c.count}
        anchor.append(extent.log, heads)
