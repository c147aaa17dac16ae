"""Open an export and walk its events. Nothing of it is believed before it was checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import msgspec

from bascule.runtime.exports.archive import Part, Source, TarSource, open_source
from bascule.runtime.exports.manifest import (
    CHAIN,
    EVENTS,
    HEAD_LINE,
    MANIFEST,
    MAX_MANIFEST,
    Blob,
    Manifest,
    parse_manifest,
)
from bascule.runtime.log.chain import START, link
from bascule.schemas.codec import MAX_EVENT_BYTES, decode
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import BasculeError, Corrupt
from bascule.schemas.subjects import ROOT, is_event_subject

_ROOM: Final = 1024 * 1024
UNLIKE: Final = f"is not the one that {CHAIN} covers"
OTHER_HEAD: Final = f"the manifest's head is not the last of {CHAIN}"


class Export:
    """An open export. Made by :func:`open_export`; a context manager."""

    def __init__(
        self, manifest: Manifest, events: Part, chain: Part, blobs: dict[str, Part], close: Callable[[], None]
    ) -> None:
        self.manifest = manifest
        self._events = events
        self._chain = chain
        self._blobs = blobs
        self._close = close

    def lines(self) -> Iterator[bytes]:
        """The recorded bytes of the events, checked as those of :meth:`events` are."""
        return (event.payload for event in self.events())

    def unchecked(self) -> Iterator[bytes]:
        """The lines of ``events.jsonl`` as they are.

        Raises:
            Corrupt: a line over 512 KiB, or one that is cut off.
        """
        return self._events.lines(MAX_EVENT_BYTES)

    def heads(self) -> Iterator[bytes]:
        """The lines of ``chain.txt``, the 32 bytes of each.

        Raises:
            Corrupt: a line that is no hash in lower-case hexadecimal.
        """
        for number, line in enumerate(self._chain.lines(HEAD_LINE), 1):
            head = b""
            with suppress(ValueError):
                head = bytes.fromhex(line.decode("ascii"))
            if len(head) != len(START) or head.hex().encode() != line:
                raise Corrupt(f"Line {number} of {CHAIN} is not a hash.", next_step="Get the export again.")
            yield head

    def events(self) -> Iterator[Recorded]:
        """The events, numbered from 1, each checked against the run's chain, and its end against the manifest.

        Raises:
            Corrupt: an event is not the one that the chain covers, or some are missing or too many.
            SchemaError: an event that this version cannot read.
        """
        heads, head, number = self._chain.lines(HEAD_LINE), START, 0
        for number, line in enumerate(self.unchecked(), 1):
            event = self.decoded(number, line)
            stated = next(heads, None)
            if stated is None:
                break
            head = link(head, number, event.subject, line)
            if head.hex().encode() != stated:
                raise Corrupt(f"Event {number} ({event.subject}) {UNLIKE}.", next_step="Get the export again.")
            yield event
        if number != self.manifest.events or next(heads, None) is not None:
            raise Corrupt(f"The export: {anchored(self.manifest.events, number)}.", next_step="Get it again.")
        if head.hex() != self.manifest.head:
            raise Corrupt(f"The export: {OTHER_HEAD}.", next_step="Get it again.")

    def decoded(self, number: int, line: bytes) -> Recorded:
        """One line as an event.

        Raises:
            Corrupt, SchemaError: naming the line.
        """
        try:
            event = decode(number, None, line)
            check_subject(event.subject, self.manifest.run)
            return event
        except BasculeError as e:
            raise type(e)(f"Line {number} of {EVENTS}: {e.message}", next_step=e.next_step) from e
        except (UnicodeDecodeError, RecursionError) as e:
            raise Corrupt(f"Line {number} of {EVENTS} is not an event: {e}.") from e

    def blob(self, blob: Blob) -> bytes:
        """The bytes of a blob that the export includes, verified.

        Raises:
            Corrupt: they are not those that it names.
        """
        data = b"".join(self._blobs[blob.sha256].chunks())
        if hashlib.sha256(data).hexdigest() != blob.sha256:
            raise Corrupt(f"{blob.name} does not match its hash.", next_step="Get the export again.")
        return data

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_export(source: Path | BinaryIO) -> Export:
    """Open a tar (a path, or a file object, which may be a pipe) or an unpacked folder; its shape is checked.

    Raises:
        NotFound: there is nothing to read at the path.
        Corrupt: it is cut off, damaged, or holds something other than its manifest says.
        SchemaError: of another format.
    """
    found, stream = open_source(source) if isinstance(source, Path) else (TarSource(source), None)

    def close() -> None:
        found.close()
        if stream is not None:
            stream.close()

    try:
        return _opened(found, close)
    except BaseException:
        close()
        raise


def _opened(source: Source, close: Callable[[], None]) -> Export:
    manifest = parse_manifest(b"".join(source.take(MANIFEST, MAX_MANIFEST).chunks()))
    # There is room for what was added by somebody, so that the check of the events can name it.
    events = source.take(EVENTS, 2 * manifest.bytes + _ROOM)
    chain = source.take(CHAIN, 2 * HEAD_LINE * manifest.events + _ROOM)
    blobs: dict[str, Part] = {}
    for blob in manifest.blobs:
        if blob.included:
            part = blobs[blob.sha256] = source.take(blob.name, blob.size)
            if part.size != blob.size:
                raise Corrupt(f"{blob.name} takes {part.size} bytes; the manifest says {blob.size}.")
    source.finish()
    return Export(manifest, events, chain, blobs, close)


class _Named(msgspec.Struct):
    subject: str


def subject_of(line: bytes, run: str) -> str:
    """The subject of a recorded event of ``run``.

    Raises:
        Corrupt: the line is no event, or its subject is not one of this run.
    """
    try:
        subject = msgspec.json.decode(line, type=_Named).subject
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise Corrupt(f"It is not an event: {e}.") from e
    check_subject(subject, run)
    return subject


def check_subject(subject: str, run: str) -> None:
    """Raise Corrupt unless ``subject`` is one of an event of ``run``."""
    if not is_event_subject(subject) or not subject.startswith(f"{ROOT}.{run}."):
        raise Corrupt(f"{subject!r} is not the subject of an event of the run {run}.")


def anchored(covered: int, count: int) -> str:
    """What is wrong where the manifest covers another number of events than there are."""
    if count < covered:
        return f"the manifest's anchor is ahead: it covers {covered} events, the log ends at {count}"
    return f"the log goes on after the manifest's anchor: it covers {covered} events, the log ends at {count}"
