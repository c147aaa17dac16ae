"""The manifest of an export, ``bascule-export/1``: what it holds and what that hashes to.

An export is a tar (or a folder) of ``manifest.json``, ``events.jsonl`` (the recorded bytes, one event a line),
``chain.txt`` (the run's chain after each event) and ``blobs/<sha256>``. It holds nothing of the store that it came from
and no time of its own, so that a run that was imported is exported again to the same bytes.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from bascule.schemas.errors import Corrupt, SchemaError

FORMAT: Final = "bascule-export/1"
MANIFEST: Final = "manifest.json"
EVENTS: Final = "events.jsonl"
CHAIN: Final = "chain.txt"
#: Bytes of a line of ``chain.txt``.
HEAD_LINE: Final = 65
MAX_MANIFEST: Final = 64 * 1024 * 1024

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Blob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A blob that the run's events name.

    Attributes:
        erased: it was deleted on request, and the run's log says so.
        omitted: it was left out of this export.
    """

    sha256: Sha256
    size: Count
    erased: bool = False
    omitted: bool = False

    @property
    def name(self) -> str:
        """Of its member."""
        return f"blobs/{self.sha256}"

    @property
    def included(self) -> bool:
        return not (self.erased or self.omitted)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What an export holds.

    Attributes:
        events: their number; head: the run's chain after the last, hexadecimal; bytes: the size of ``events.jsonl``.
        blobs: sorted by hash.
        public_key, signature: ed25519, hexadecimal; over the manifest without its signature.
    """

    format: Literal["bascule-export/1"]
    run: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_-]{1,64}$")]
    events: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    head: Sha256
    bytes: Count
    decision_hash: str
    blobs: tuple[Blob, ...]
    public_key: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    signature: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{128}$")] | None = None


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``."""
    return msgspec.json.encode(manifest) + b"\n"


def signed_bytes(manifest: Manifest) -> bytes:
    """What the manifest's signature is over."""
    return encode_manifest(msgspec.structs.replace(manifest, signature=None))


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in ``manifest.json``.

    Raises:
        SchemaError: of another format.
        Corrupt: not a manifest, or not in the one way in which it is written.
    """
    try:
        found = msgspec.json.decode(data, type=_AnyFormat).format
        if found != FORMAT:
            raise SchemaError(
                f"{MANIFEST} is of the format {found!r}; this version reads {FORMAT!r}.",
                next_step="Install the version of bascule that wrote this export.",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise Corrupt(f"{MANIFEST} is not a manifest: {e}.", next_step="Get the export again.") from e
    hashes = [b.sha256 for b in manifest.blobs]
    if encode_manifest(manifest) != data or hashes != sorted(set(hashes)):
        raise Corrupt(f"{MANIFEST} is not as bascule writes it.", next_step="Get the export again.")
    return manifest


class _AnyFormat(msgspec.Struct):
    format: str
