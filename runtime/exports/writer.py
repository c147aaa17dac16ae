"""Write a run as an export. Held in memory are the biggest blob and the checkpoints of open training jobs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from msgspec.structs import replace

from bascule.runtime.blob_care import BlobReferences
from bascule.runtime.exports.archive import END, header, padding
from bascule.runtime.exports.manifest import (
    CHAIN,
    EVENTS,
    FORMAT,
    MANIFEST,
    Blob,
    Manifest,
    encode_manifest,
    signed_bytes,
)
from bascule.runtime.log.blobs import Blobs
from bascule.runtime.log.chain import Chain
from bascule.runtime.signing import Signer
from bascule.schemas.codec import DecisionHash
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import Corrupt, NotFound, SchemaError
from bascule.schemas.events import BlobRef
from bascule.schemas.subjects import is_event_subject

_CHUNK: Final = 1024 * 1024


class Sink(Protocol):
    """Where an export is written to."""

    def add(self, name: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write the next member; ``chunks`` give exactly ``size`` bytes."""
        ...

    def close(self) -> None:
        """Nothing more follows. Without this a tar is not valid."""
        ...


class TarSink:
    """Writes a tar to a stream."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def add(self, name: str, size: int, chunks: Iterable[bytes]) -> None:
        self._out.write(header(name, size))
        for chunk in chunks:
            self._out.write(chunk)
        self._out.write(bytes(padding(size)))

    def close(self) -> None:
        self._out.write(END)
        self._out.flush()


class FolderSink:
    """Writes the members as files into a new folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(mode=0o700)

    def add(self, name: str, size: int, chunks: Iterable[bytes]) -> None:
        path = self._root / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as f:
            f.writelines(chunks)

    def close(self) -> None:
        pass


async def write_export(
    run: str,
    read: Callable[[], AsyncIterator[Recorded]],
    blobs: Blobs,
    sink: Sink,
    *,
    with_blobs: bool = True,
    restricted: bool = False,
    signer: Signer | None = None,
) -> Manifest:
    """Write a run's events and blobs to ``sink``; the manifest that was written.

    Args:
        read: all events of the run, in order, up to the newest at the time; read again if the run went on meanwhile
            and discarded a checkpoint that these events need.
        with_blobs: without, the manifest marks them as omitted.
        restricted: with the blobs that hold items which must not be published; else those are omitted.

    Raises:
        NotFound: there are no events, or a blob that has to be there is missing. Nothing was written then.
        SchemaError: an event whose bytes are no single line.
        LogError: a blob does not match its hash, or is too large for a tar.
    """
    with tempfile.TemporaryFile() as lines, tempfile.TemporaryFile() as heads:
        before = 0
        while True:
            spooled = await _spool(run, read(), lines, heads)
            try:
                content = await _content(spooled.refs, blobs, with_blobs, restricted)
                break
            except NotFound:
                if spooled.chain.count <= before:
                    raise
                before = spooled.chain.count
        manifest = Manifest(
            format=FORMAT,
            run=run,
            events=spooled.chain.count,
            head=spooled.chain.head.hex(),
            bytes=lines.tell(),
            decision_hash=spooled.decisions.hexdigest(),
            blobs=content.blobs,
        )
        if signer is not None:
            manifest = replace(manifest, public_key=signer.public_key)
            manifest = replace(manifest, signature=signer.sign(signed_bytes(manifest)))
        encoded = encode_manifest(manifest)
        sink.add(MANIFEST, len(encoded), [encoded])
        sink.add(EVENTS, lines.tell(), _from_start(lines))
        sink.add(CHAIN, heads.tell(), _from_start(heads))
    for blob in manifest.blobs:
        if blob.included:
            data = content.held.get(blob.sha256)
            ref = BlobRef(sha256=blob.sha256, size=blob.size)
            sink.add(blob.name, blob.size, [data if data is not None else await blobs.get(ref)])
    sink.close()
    return manifest


@dataclass(frozen=True)
class _Spooled:
    """What is known of events once they are written to files."""

    chain: Chain
    refs: BlobReferences
    decisions: DecisionHash


async def _spool(run: str, events: AsyncIterator[Recorded], lines: BinaryIO, heads: BinaryIO) -> _Spooled:
    """Write the events and the chain after each of them, in place of what the files hold."""
    for file in (lines, heads):
        file.seek(0)
        file.truncate()
    chain, refs, decisions = Chain(), BlobReferences(), DecisionHash()
    async for event in events:
        if not is_event_subject(event.subject):
            raise Corrupt(
                f"The run holds an event under {event.subject!r} (sequence {event.seq}), which no event can have.",
                next_step="Somebody else wrote it there; `bascule verify` says more. Such a run cannot be exported.",
            )
        if b"\n" in event.payload:
            raise SchemaError(f"The event {event.subject} is not one line.", next_step="It was not made by bascule.")
        lines.write(event.payload + b"\n")
        heads.write(chain.add(event).hex().encode() + b"\n")
        refs.apply(event)
        decisions.add(event)
    if not chain.count:
        raise NotFound(f"The run {run} has no events.", next_step="`bascule status` lists the runs.")
    return _Spooled(chain, refs, decisions)


@dataclass(frozen=True)
class _Content:
    """The blobs of an export; ``held`` are the bytes of those that may soon be discarded."""

    blobs: tuple[Blob, ...]
    held: dict[str, bytes]


async def _content(refs: BlobReferences, blobs: Blobs, with_blobs: bool, restricted: bool) -> _Content:
    """What becomes of each blob that the events name: what has to be there, and of the suspected what is there.

    Raises:
        NotFound: a blob that has to be there is not.
    """
    there = {stored.sha256 for stored in await blobs.list()}
    retained, passing = refs.retained, refs.passing
    found: list[Blob] = []
    held: dict[str, bytes] = {}
    for sha256 in sorted(refs.referenced.keys() | (refs.suspected.keys() & there)):
        ref = refs.ref(sha256)
        if ref is None:
            continue
        blob = Blob(sha256=sha256, size=ref.size, erased=sha256 in refs.erased)
        if blob.erased:
            found.append(blob)
        elif sha256 in retained:
            if not with_blobs or (ref.restricted and not restricted):
                blob = replace(blob, omitted=True)
            elif sha256 in passing:
                held[sha256] = await blobs.get(ref)
            elif sha256 not in there:
                await blobs.get(ref)  # says what is wrong
            found.append(blob)
        elif sha256 in refs.suspected and sha256 in there and await _matches(blobs, ref):
            included = with_blobs and (restricted or not ref.restricted)
            found.append(blob if included else replace(blob, omitted=True))
    return _Content(tuple(found), held)


async def _matches(blobs: Blobs, ref: BlobRef) -> bool:
    """Whether a blob is there and of the size that an event of an unknown type seems to say."""
    try:
        await blobs.get(ref)
    except (NotFound, Corrupt):
        return False
    return True


def _from_start(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(_CHUNK):
        yield chunk
