"""Write a run as an export. Nothing but the biggest blob is held in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from msgspec.structs import replace

from bascule.runtime.archive import END, header, padding
from bascule.runtime.log.blobs import Blobs
from bascule.runtime.log.chain import Chain
from bascule.runtime.manifest import (
    CHAIN,
    EVENTS,
    FORMAT,
    MANIFEST,
    Blob,
    Manifest,
    NamedBlobs,
    encode_manifest,
    signed_bytes,
)
from bascule.runtime.signing import Signer
from bascule.schemas.codec import DecisionHash
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import NotFound, SchemaError

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
    events: AsyncIterator[Recorded],
    blobs: Blobs,
    sink: Sink,
    *,
    with_blobs: bool = True,
    signer: Signer | None = None,
) -> Manifest:
    """Write a run's events and blobs to ``sink``; the manifest that was written.

    Args:
        events: all events of the run, in order.
        with_blobs: without, the manifest marks them as omitted.

    Raises:
        NotFound: there are no events, or a blob that has to be there is missing. Nothing was written then.
        SchemaError: an event whose bytes are no single line.
        LogError: a blob does not match its hash, or is too large for a tar.
    """
    chain, named, decisions = Chain(), NamedBlobs(), DecisionHash()
    with tempfile.TemporaryFile() as lines, tempfile.TemporaryFile() as heads:
        async for event in events:
            if b"\n" in event.payload:
                raise SchemaError(
                    f"The event {event.subject} is not one line.", next_step="It was not made by bascule."
                )
            lines.write(event.payload + b"\n")
            heads.write(chain.add(event).hex().encode() + b"\n")
            named.add(event)
            decisions.add(event)
        if not chain.count:
            raise NotFound(f"The run {run} has no events.", next_step="`bascule status` lists the runs.")
        manifest = Manifest(
            format=FORMAT,
            run=run,
            events=chain.count,
            head=chain.head.hex(),
            bytes=lines.tell(),
            decision_hash=decisions.hexdigest(),
            blobs=await _inventory(named, blobs, with_blobs),
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
            sink.add(blob.name, blob.size, [await blobs.get(named.all[blob.sha256])])
    sink.close()
    return manifest


async def _inventory(named: NamedBlobs, blobs: Blobs, with_blobs: bool) -> tuple[Blob, ...]:
    """What becomes of each blob that the events name; checkpoints that are gone were no longer needed."""
    there = {stored.sha256 for stored in await blobs.list()}
    found: list[Blob] = []
    for sha256, ref in sorted(named.all.items()):
        if sha256 in named.erased:
            found.append(Blob(sha256=sha256, size=ref.size, erased=True))
        elif not with_blobs:
            if sha256 in named.kept:
                found.append(Blob(sha256=sha256, size=ref.size, omitted=True))
        elif sha256 in there:
            found.append(Blob(sha256=sha256, size=ref.size))
        elif sha256 in named.kept:
            await blobs.get(ref)  # says what is wrong
    return tuple(found)


def _from_start(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(_CHUNK):
        yield chunk
