"""Check an export: everything that it says of a run is held against everything else that it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from bascule.runtime.blob_care import BlobReferences
from bascule.runtime.exports.manifest import CHAIN, EVENTS, Manifest, signed_bytes
from bascule.runtime.exports.reader import OTHER_HEAD, UNLIKE, Export, anchored, subject_of
from bascule.runtime.log.chain import START, link
from bascule.runtime.signing import VERIFY_KEY, is_signed_by, trusted_key_from_environment
from bascule.schemas.codec import DecisionHash
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import BasculeError, Corrupt
from bascule.schemas.subjects import ROOT

if TYPE_CHECKING:
    from bascule.runtime.audit.verify import Fault

_MAX_CHAIN_FAULTS: Final = 20
_BAD_SIGNATURE: Final = "the manifest's signature is not one of its key over it"


def verify_export(export: Export) -> list[Fault]:
    """Check everything that an export says: chain, anchor, identities, causes, schemas, blobs, signature.

    The signature is checked against the key that BASCULE_VERIFY_KEY names, if it is set: then it has to be there.

    Raises:
        ConfigError: BASCULE_VERIFY_KEY names no usable key.
    """
    from bascule.runtime.audit.verify import Fault

    key = trusted_key_from_environment()
    manifest = export.manifest
    refs, decisions, faults = BlobReferences(), DecisionHash(), list[Fault]()
    try:
        for found in _checked_lines(export):
            if isinstance(found, Fault):
                faults.append(found)
                continue
            refs.apply(found)
            decisions.add(found)
    except Corrupt as e:
        faults.append(_whole(manifest, str(e)))
    if not faults:  # with other events, these would be differences that follow from the first
        if decisions.hexdigest() != manifest.decision_hash:
            faults.append(_whole(manifest, "the manifest's decision hash is not the one of its decisions"))
        faults += (_whole(manifest, what) for what in _unlike_events(manifest, refs))
    for blob in manifest.blobs:
        if blob.included:
            try:
                export.blob(blob)
            except Corrupt as e:
                faults.append(_whole(manifest, str(e)))
    what = _unlike_key(manifest, key)
    return [*faults, _whole(manifest, what)] if what else faults


def _checked_lines(export: Export) -> Iterator[Recorded | Fault]:
    """Each event that can be read, and whatever is wrong with it or with the run as a whole."""
    from bascule.runtime.audit.verify import Checker, Fault

    manifest, checker = export.manifest, Checker(export.manifest.run)
    heads, head, count, size, unlike = _Heads(export.heads()), START, 0, 0, 0
    for count, line in enumerate(export.unchecked(), 1):
        size += len(line) + 1
        stated = heads.next()
        event = _readable(export, count, line)
        try:
            subject = event.subject if event is not None else subject_of(line, manifest.run)
        except Corrupt as e:
            yield Fault(seq=count, subject=f"{ROOT}.{manifest.run}", what=f"line {count} of {EVENTS}: {e}")
        else:
            if stated is not None and link(head, count, subject, line) != stated:
                unlike += 1
                if unlike <= _MAX_CHAIN_FAULTS:
                    yield Fault(seq=count, subject=subject, what=f"event {count} {UNLIKE}")
            yield from checker.add(count, count, subject, line, event)
            if checker.event is not None:
                yield checker.event
        head = stated or head
    yield from checker.finish()
    if unlike > _MAX_CHAIN_FAULTS:
        yield _whole(manifest, f"{unlike - _MAX_CHAIN_FAULTS} more events are not those that {CHAIN} covers")
    for what in _unlike_anchor(manifest, count, size, heads):
        yield _whole(manifest, what)


def _readable(export: Export, number: int, line: bytes) -> Recorded | None:
    """A line as an event; None if it is not one in order, and what is wrong is yet to be found."""
    try:
        return export.decoded(number, line)
    except BasculeError:
        return None


class _Heads:
    """The lines of the chain, counted."""

    def __init__(self, heads: Iterator[bytes]) -> None:
        self._heads = heads
        self.count = 0
        self.last = START

    def next(self) -> bytes | None:
        head = next(self._heads, None)
        if head is not None:
            self.count, self.last = self.count + 1, head
        return head


def _unlike_anchor(manifest: Manifest, count: int, size: int, heads: _Heads) -> Iterator[str]:
    """What the manifest says otherwise of ``count`` events in ``size`` bytes, of which ``heads`` were read."""
    while heads.next() is not None:
        pass
    if count != manifest.events:
        yield anchored(manifest.events, count)
    elif size != manifest.bytes:
        yield f"{EVENTS} takes {size} bytes; the manifest says {manifest.bytes}"
    if heads.count != manifest.events:
        yield f"{CHAIN} covers {heads.count} events; the manifest says {manifest.events}"
    elif heads.last.hex() != manifest.head:
        yield OTHER_HEAD


def _unlike_events(manifest: Manifest, refs: BlobReferences) -> Iterator[str]:
    """What the manifest says of blobs that the events do not."""
    there = {blob.sha256: blob for blob in manifest.blobs}
    needed = refs.retained | refs.erased
    for sha256 in refs.referenced:
        if sha256 in needed and sha256 not in there:
            yield f"the blob {sha256}, which an event names, is not in the manifest"
    for blob in manifest.blobs:
        ref = refs.ref(blob.sha256)
        if ref is None:
            yield f"no event names the blob {blob.sha256}"
        elif ref.size != blob.size:
            yield f"the blob {blob.sha256} has {blob.size} bytes by the manifest and {ref.size} by its event"
        elif blob.erased != (blob.sha256 in refs.erased):
            yield f"manifest and events do not agree on whether the blob {blob.sha256} was erased"


def _unlike_key(manifest: Manifest, trusted: str | None) -> str | None:
    """What is wrong with the signature; an unsigned manifest is right unless a key is trusted."""
    if manifest.signature is None or manifest.public_key is None:
        half = manifest.signature is not None or manifest.public_key is not None
        return f"the manifest is not signed, and {VERIFY_KEY} is set" if trusted else _BAD_SIGNATURE if half else None
    if not is_signed_by(manifest.public_key, manifest.signature, signed_bytes(manifest)):
        return _BAD_SIGNATURE
    if trusted not in (None, manifest.public_key):
        return f"the manifest is signed with another key than the one that {VERIFY_KEY} names"
    return None


def _whole(manifest: Manifest, what: str) -> Fault:
    """A fault of the export as a whole."""
    from bascule.runtime.audit.verify import Fault

    return Fault(seq=0, subject=f"{ROOT}.{manifest.run}", what=what)
