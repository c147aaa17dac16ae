"""Whether anything that only the scoring process may hold has got into what a run left behind.

The truths themselves cannot be searched for; the canaries beside them can (:mod:`bascule.plugins.canary`). A report
counts what was looked at, so that "nothing found" says in how much.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from bascule.plugins.canary import DIGITS, PREFIX, Canaries, Planted
from bascule.runtime.audit.token_search import Found, search, tokens_in
from bascule.runtime.blob_care import BlobReferences
from bascule.runtime.log.blobs import Blobs, FileBlobs
from bascule.runtime.log.dead_letters import DeadLetter
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import NotFound
from bascule.schemas.events import TrajectoryLogged
from bascule.schemas.trajectory import ModelCall, Trajectory, unpack_ids

Decode = Callable[[Sequence[int]], str]
_SHOWN = 4
_BYTES = 256


class Leak(msgspec.Struct, frozen=True, kw_only=True):
    """A canary where none may be.

    Attributes:
        where: the event's subject, the blob, or the file, with what it lies in inside of that.
        form: how it was written.
        token: the beginning of it.
        task, split, example: what it stands beside; None if this machine's key makes no such token for the run's task.
    """

    where: str
    form: str
    token: str
    task: str | None = None
    split: str | None = None
    example: str | None = None


class CanaryReport(msgspec.Struct, kw_only=True):
    """What was found, and in how much.

    Attributes:
        known: canaries of the run's task that a token can be recognised as.
        letters: dead letters.
        prompts: model calls whose prompts and answers were decoded from token ids.
        undecoded: those for which there was no tokenizer.
        absent: blobs that events name and that are not there.
        unread: blobs that no event names and that could not be read.
    """

    run: str
    known: int
    leaks: list[Leak] = []
    events: int = 0
    event_bytes: int = 0
    letters: int = 0
    blobs: int = 0
    blob_bytes: int = 0
    absent: int = 0
    unread: int = 0
    files: int = 0
    file_bytes: int = 0
    prompts: int = 0
    undecoded: int = 0


class _Scan:
    """Collects what is found; one thing at one place once."""

    def __init__(self, run: str, canaries: Canaries, decode: Decode | None) -> None:
        self.report = CanaryReport(run=run, known=len(canaries.tokens))
        self._canaries = canaries
        self._decode = decode
        self._seen: set[tuple[str, Planted | str]] = set()

    def add(self, where: str, found: Found) -> None:
        planted = self._canaries.find(found.digits)
        if planted is None and len(found.digits) < DIGITS:
            return  # too short to be told from chance
        thing = (where, planted if planted is not None else found.digits)
        if thing in self._seen:
            return
        self._seen.add(thing)
        token = f"{PREFIX}{found.digits[:_SHOWN]}…"
        leak = Leak(where=where, form=found.form, token=token)
        if planted is not None:
            leak = msgspec.structs.replace(leak, task=planted.task, split=planted.split, example=planted.example)
        self.report.leaks.append(leak)

    def data(self, where: str, data: bytes) -> None:
        for found in tokens_in(data):
            self.add(where, found)

    def file(self, where: str, source: IO[bytes]) -> None:
        for inside, found in search(source):
            self.add(f"{where}: {inside}" if inside else where, found)

    def trajectory(self, where: str, trajectory: Trajectory) -> None:
        """Prompts and answers are recorded as token ids, in which no text can be seen."""
        for call in (s for s in trajectory.steps if isinstance(s, ModelCall)):
            texts = [self._text(unpack_ids(ids)) for ids in (call.prompt_ids, *(o.token_ids for o in call.outputs))]
            if None in texts:
                self.report.undecoded += 1
            else:
                self.report.prompts += 1
            for text in texts:
                for found in tokens_in((text or "").encode("utf-8", "replace")):
                    self.add(where, Found(found.digits, f"token ids ({found.form})"))

    def _text(self, ids: Sequence[int]) -> str | None:
        if self._decode is not None:
            return self._decode(ids)
        # Tokens of an engine without a tokenizer may be bytes.
        return bytes(ids).decode("utf-8", "replace") if all(0 <= i < _BYTES for i in ids) else None


async def scan(
    run: str,
    events: AsyncIterable[Recorded],
    blobs: Blobs,
    *,
    canaries: Canaries,
    letters: Iterable[DeadLetter] = (),
    paths: Iterable[Path] = (),
    decode: Decode | None = None,
) -> CanaryReport:
    """Search a run for canaries.

    Args:
        canaries: those of its task.
        letters: its dead letters.
        paths: files, and folders with all that is in them: exports, logs, pages.
        decode: text of token ids, if they are no bytes.

    Raises:
        NotFound: there is nothing at one of ``paths``.
        Corrupt: a blob is not what was stored.
    """
    scanning = _Scan(run, canaries, decode)
    report = scanning.report
    references = BlobReferences()
    trajectories: dict[str, str] = {}
    async for event in events:
        report.events += 1
        report.event_bytes += len(event.payload)
        scanning.data(event.subject, event.subject.encode() + b"\n" + event.payload)
        references.apply(event)
        if isinstance(event.data, TrajectoryLogged):
            if event.data.body is not None:
                scanning.trajectory(event.subject, event.data.body)
            elif event.data.blob is not None:
                trajectories[event.data.blob.sha256] = event.subject
    for letter in letters:
        report.letters += 1
        scanning.data(f"dead letter of {letter.subject}", msgspec.json.encode(letter))
    await _scan_blobs(scanning, blobs, references, trajectories)
    for path in paths:
        for file in _files(path):
            report.files += 1
            report.file_bytes += file.stat().st_size
            scanning.data(str(file), str(file).encode("utf-8", "surrogateescape"))
            with file.open("rb") as source:
                scanning.file(str(file), source)
    return report


async def _scan_blobs(scanning: _Scan, blobs: Blobs, references: BlobReferences, trajectories: dict[str, str]) -> None:
    report = scanning.report
    for sha256, mention in references.referenced.items():
        try:
            data = await blobs.get(mention.ref)
        except NotFound:
            report.absent += 1
            continue
        report.blobs += 1
        report.blob_bytes += len(data)
        where = f"blob {sha256} of {mention.subject}"
        scanning.file(where, io.BytesIO(data))
        if sha256 in trajectories:
            with suppress(msgspec.DecodeError, UnicodeDecodeError):  # `bascule verify` is for what is damaged
                scanning.trajectory(where, msgspec.json.decode(data, type=Trajectory))
    for stored in await blobs.list():
        if stored.sha256 in references.referenced:
            continue
        if not isinstance(blobs, FileBlobs):
            report.unread += 1
            continue
        try:
            with blobs.path(stored.sha256).open("rb") as source:
                scanning.file(f"blob {stored.sha256}, which no event names", source)
        except FileNotFoundError:
            continue  # collected meanwhile
        report.blobs += 1
        report.blob_bytes += stored.size


def _files(path: Path) -> Iterator[Path]:
    """The file, or all plain files below the folder, in order; links are not followed."""
    if path.is_dir():
        yield from sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
    elif path.is_file():
        yield path
    else:
        raise NotFound(f"There is no {path}.", next_step="Name an export, a file or a folder that is there.")
