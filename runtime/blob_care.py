"""Which blobs a run's events name, which of them have to be kept, and what becomes of the others."""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import suppress
from typing import Literal

import msgspec

from bascule.runtime.log.blobs import Blobs
from bascule.schemas.envelope import Recorded, Unknown
from bascule.schemas.errors import NotFound
from bascule.schemas.events import AdapterCheckpointed, AdapterPublished, BlobErased, BlobRef, TrainFailed

GRACE_SECONDS = 24 * 3600.0
_HASH = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")

State = Literal["kept", "erased", "missing", "discarded"]


class Mention(msgspec.Struct, frozen=True, kw_only=True):
    """A blob, and the first event that names it."""

    ref: BlobRef
    seq: int
    subject: str
    event: str


class BlobReferences(msgspec.Struct):
    """The blobs that events name: a fold, the only one that knows which of them have to be there.

    Attributes:
        referenced: by hash, each with the first event that names it.
        lasting: hashes of what is kept for good.
        checkpoints: of each training job that is still open, the hashes of its newest checkpoint.
        erased: hashes of what somebody had deleted.
        suspected: hashes in events of unknown types, which may be those of blobs; with what such an event says of size
            and media, if it does.
    """

    referenced: dict[str, Mention] = {}
    lasting: set[str] = set()
    checkpoints: dict[int, set[str]] = {}
    erased: set[str] = set()
    suspected: dict[str, BlobRef | None] = {}

    def apply(self, event: Recorded) -> None:
        data = event.data
        if isinstance(data, Unknown):
            self._suspect(data.raw)
            return
        refs = list(refs_of(data))
        for ref in refs:
            mention = Mention(ref=ref, seq=event.seq, subject=event.subject, event=event.envelope.id)
            self.referenced.setdefault(ref.sha256, mention)
        hashes = {ref.sha256 for ref in refs}
        if isinstance(data, AdapterCheckpointed):
            self.checkpoints[data.generation] = hashes
            return
        self.lasting |= hashes
        if isinstance(data, AdapterPublished | TrainFailed):
            self.checkpoints.pop(data.generation, None)
        elif isinstance(data, BlobErased):
            self.erased.add(data.sha256)

    @property
    def retained(self) -> set[str]:
        """Hashes of what has to be there: all that is named, except checkpoints of training jobs, and what was erased.

        Of an open job the newest checkpoint has to be there, of another none.
        """
        return self.lasting.union(*self.checkpoints.values()) - self.erased

    @property
    def passing(self) -> set[str]:
        """Those of the retained that the trainer discards once its job has gone on."""
        return self.retained - self.lasting

    def ref(self, sha256: str) -> BlobRef | None:
        """What the events say of a blob; None if they do not."""
        mention = self.referenced.get(sha256)
        return mention.ref if mention is not None else self.suspected.get(sha256)

    def _suspect(self, raw: bytes) -> None:
        for found in _HASH.findall(raw):
            self.suspected.setdefault(found.decode(), None)
        for ref in _refs_within(raw):
            if ref.sha256 in self.suspected:
                self.suspected[ref.sha256] = self.suspected[ref.sha256] or ref


def _refs_within(raw: bytes) -> Iterator[BlobRef]:
    """Whatever in a JSON text has the form of a reference."""
    try:
        values = [msgspec.json.decode(raw)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    while values:
        value = values.pop()
        if isinstance(value, dict):
            with suppress(msgspec.ValidationError):
                yield msgspec.convert(value, BlobRef)
            values += value.values()
        elif isinstance(value, list):
            values += value


def refs_of(data: msgspec.Struct) -> Iterator[BlobRef]:
    """The blobs that an event's data names, in its fields and in mappings among them."""
    for field in data.__struct_fields__:
        value = getattr(data, field)
        for found in value.values() if isinstance(value, dict) else (value,):
            if isinstance(found, BlobRef):
                yield found


async def references(events: AsyncIterable[Recorded]) -> BlobReferences:
    """The fold of these events."""
    found = BlobReferences()
    async for event in events:
        found.apply(event)
    return found


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A blob that an event names, and whether it is there.

    Attributes:
        state: ``missing`` is one that has to be there; ``discarded``, one that need not be.
        stored: bytes that it takes in the store.
    """

    sha256: str
    size: int
    media: str
    state: State
    stored: int
    seq: int
    subject: str


async def standings(events: AsyncIterable[Recorded], blobs: Blobs) -> tuple[tuple[Standing, ...], int]:
    """Every blob that the events name, in their order; and how many there are besides."""
    stored = {s.sha256: s.size for s in await blobs.list()}
    found = await references(events)
    needed = found.retained

    def state(sha256: str) -> State:
        if sha256 in stored:
            return "kept"
        if sha256 in found.erased:
            return "erased"
        return "missing" if sha256 in needed else "discarded"

    rows = tuple(
        Standing(
            sha256=sha256,
            size=m.ref.size,
            media=m.ref.media,
            state=state(sha256),
            stored=stored.get(sha256, 0),
            seq=m.seq,
            subject=m.subject,
        )
        for sha256, m in found.referenced.items()
    )
    return rows, len(stored.keys() - found.referenced.keys())


class Collected(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection did, or would do.

    Attributes:
        swept: hashes of blobs that no event needs; freed: the bytes that they took.
        young: how many more there are that may yet get their event.
        erased: hashes of blobs whose erasure was recorded and not carried out.
        tidied: pieces of puts that were cut short.
    """

    run: str
    kept: int
    swept: tuple[str, ...]
    freed: int
    young: int
    erased: tuple[str, ...]
    tidied: int


async def collect(
    run: str,
    blobs: Blobs,
    events: Callable[[], AsyncIterable[Recorded]],
    *,
    grace: float = GRACE_SECONDS,
    dry_run: bool = False,
) -> Collected:
    """Delete what no event needs and was not put in the last ``grace`` seconds.

    A blob is put before its event is appended. So the events are read after the store is listed, and what is put again
    while this goes on is young again.
    """
    stored = await blobs.list()
    found = await references(events())
    needed = found.retained | found.suspected.keys()
    unfinished = [s.sha256 for s in stored if s.sha256 in found.erased]
    garbage = [s for s in stored if s.sha256 not in needed and s.sha256 not in found.erased]
    old = [s for s in garbage if s.age > grace]
    if not dry_run:
        for sha256 in unfinished:
            await blobs.erase(sha256)
        old = [s for s in old if await blobs.sweep(s.sha256, grace)]
    return Collected(
        run=run,
        kept=len(stored) - len(garbage) - len(unfinished),
        swept=tuple(s.sha256 for s in old),
        freed=sum(s.size for s in old),
        young=len(garbage) - len(old),
        erased=tuple(unfinished),
        tidied=await blobs.tidy(grace, dry_run=dry_run),
    )


def mention_of(found: BlobReferences, run: str, sha256: str) -> Mention:
    """The first event that names a blob.

    Raises:
        NotFound: none does.
    """
    mention = found.referenced.get(sha256)
    if mention is None:
        raise NotFound(
            f"No event of {run} names a blob {sha256!r}.",
            next_step=f"`bascule blobs list {run}` shows those there are.",
        )
    return mention
