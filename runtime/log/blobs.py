"""Blobs under the hash of their bytes: what every store of them promises, and the store in a folder.

A blob is durable before an event names it, and verified on reading. Its identity is that of its plain bytes, however
they are stored.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import msgspec

from bascule.runtime.log.disk import durable_write, explained, make_private, read_file, sync_folder
from bascule.schemas.errors import Corrupt, Erased, NotFound
from bascule.schemas.events import BlobRef

_SHA256 = re.compile(r"[0-9a-f]{64}")
OCTETS = "application/octet-stream"


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A blob as it lies in a store: seconds since it was last put, and the bytes that it takes there."""

    sha256: str
    age: float
    size: int


class Blobs(Protocol):
    """The blobs of one run. Several processes may use one store at the same time."""

    async def put(self, data: bytes, media: str = OCTETS) -> BlobRef:
        """Store ``data`` and return once it survives a loss of power. Harmless when repeated.

        Raises:
            Erased: these bytes were erased, and what is erased stays so.
            LogError: the store cannot be written or is full.
        """
        ...

    async def get(self, ref: BlobRef) -> bytes:
        """The bytes of a blob, verified.

        Raises:
            Erased: it was deleted on request.
            NotFound: it is not in this store.
            Corrupt: the stored bytes are not those that were put.
        """
        ...

    async def discard(self, ref: BlobRef) -> None:
        """Delete a blob that nothing needs any more; harmless if it is gone."""
        ...

    async def erase(self, sha256: str) -> None:
        """Delete a blob for good, and remember that; harmless when repeated."""
        ...

    async def list(self) -> tuple[Stored, ...]:
        """Every blob that is there, sorted by hash."""
        ...

    async def sweep(self, sha256: str, older: float) -> bool:
        """Delete a blob unless it was put, even if again, in the last ``older`` seconds. Whether it was deleted."""
        ...

    async def tidy(self, older: float, *, dry_run: bool = False) -> int:
        """Delete what puts that were cut short more than ``older`` seconds ago have left; how many pieces."""
        ...


class FileBlobs:
    """Blobs in a folder, on this machine or shared: ``<root>/<first two hex digits>/<sha256>``.

    A file as long as its blob holds the blob; a shorter one holds it as one zstd frame. ``<sha256>.erased`` marks an
    erased blob. ``<root>/.lock`` is held shared while a blob is put, and alone while one is deleted.

    Args:
        root: made on the first ``put``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    async def put(self, data: bytes, media: str = OCTETS) -> BlobRef:
        return await asyncio.to_thread(self._put, data, media)

    async def get(self, ref: BlobRef) -> bytes:
        return await asyncio.to_thread(self._get, ref)

    async def discard(self, ref: BlobRef) -> None:
        await asyncio.to_thread(self._delete, ref.sha256)

    async def erase(self, sha256: str) -> None:
        await asyncio.to_thread(self._erase, sha256)

    async def list(self) -> tuple[Stored, ...]:
        return await asyncio.to_thread(self._list)

    async def sweep(self, sha256: str, older: float) -> bool:
        return await asyncio.to_thread(self._delete, sha256, older)

    async def tidy(self, older: float, *, dry_run: bool = False) -> int:
        return await asyncio.to_thread(self._tidy, older, dry_run)

    def path(self, sha256: str) -> Path:
        """Where a blob lies.

        Raises:
            Corrupt: ``sha256`` is no hash, and could point anywhere.
        """
        return self.root / checked_hash(sha256)[:2] / sha256

    def _put(self, data: bytes, media: str) -> BlobRef:
        ref = ref_of(data, media)
        path = self.path(ref.sha256)
        with explained(path):
            make_private(path.parent)
            with self._locked(fcntl.LOCK_SH):
                if _marker(path).exists():
                    raise erased(ref.sha256)
                if _holds(path, ref):
                    os.utime(path)  # it is young again, so that no sweep takes it before its event is there
                else:
                    durable_write(path, packed(data, media))
                # Also for a file that was there: its writer may not have come this far yet.
                sync_folder(path.parent)
        return ref

    def _get(self, ref: BlobRef) -> bytes:
        path = self.path(ref.sha256)
        if _marker(path).exists():
            raise erased(ref.sha256)
        try:
            stored = read_file(path, ref.size)
        except FileNotFoundError as e:
            raise missing(path) from e
        except OSError as e:
            raise Corrupt(f"The blob {path} cannot be read: {e.strerror}.", next_step="Restore it.") from e
        return verified(unpacked(stored, ref.size), ref, path)

    def _delete(self, sha256: str, older: float | None = None) -> bool:
        path = self.path(sha256)
        if not os.path.lexists(path):
            return False
        with explained(path), self._locked(fcntl.LOCK_EX):
            try:
                if older is not None and time.time() - path.lstat().st_mtime <= older:
                    return False
                path.unlink()
            except FileNotFoundError:
                return False
        return True

    def _erase(self, sha256: str) -> None:
        path = self.path(sha256)
        with explained(path):
            make_private(path.parent)
            with self._locked(fcntl.LOCK_EX):
                if not _marker(path).exists():
                    durable_write(_marker(path), b"")
                path.unlink(missing_ok=True)
                sync_folder(path.parent)

    def _list(self) -> tuple[Stored, ...]:
        now = time.time()
        found = [
            Stored(sha256=path.name, age=max(0.0, now - info.st_mtime), size=info.st_size)
            for path, info in self._files()
            if _SHA256.fullmatch(path.name)
        ]
        return tuple(sorted(found, key=lambda s: s.sha256))

    def _tidy(self, older: float, dry_run: bool) -> int:
        now = time.time()
        left = [p for p, info in self._files() if p.suffix == ".tmp" and now - info.st_mtime > older]
        for path in () if dry_run else left:
            with explained(path), self._locked(fcntl.LOCK_EX):
                path.unlink(missing_ok=True)
        return len(left)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The regular files of all sub-folders; one that goes meanwhile is left out."""
        with explained(self.root):
            for folder in self.root.iterdir() if self.root.is_dir() else ():
                for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
                    with suppress(FileNotFoundError):
                        info = path.lstat()
                        if stat.S_ISREG(info.st_mode):
                            yield path, info

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)


def ref_of(data: bytes, media: str) -> BlobRef:
    return BlobRef(sha256=hashlib.sha256(data).hexdigest(), size=len(data), media=media)


def checked_hash(sha256: str) -> str:
    """``sha256`` if it is one.

    Raises:
        Corrupt: it is not.
    """
    if not _SHA256.fullmatch(sha256):
        raise Corrupt(f"{sha256!r} is not a sha256.", next_step="The event that names this blob is not genuine.")
    return sha256


def verified(data: bytes, ref: BlobRef, where: object) -> bytes:
    """``data`` if it is the blob.

    Raises:
        Corrupt: it is not; names ``where`` it lies.
    """
    if len(data) != ref.size or hashlib.sha256(data).hexdigest() != ref.sha256:
        raise Corrupt(f"The blob {where} does not match its hash.", next_step="Restore it from a backup.")
    return data


def missing(where: object) -> NotFound:
    return NotFound(
        f"The blob {where} is missing.", next_step="Copy it from where the run was made, or restore a backup."
    )


def erased(sha256: str) -> Erased:
    return Erased(
        f"The blob {sha256} was erased on request.",
        next_step="`bascule log RUN --type blob.erased --json` shows when and why.",
    )


def packed(data: bytes, media: str) -> bytes:
    """One zstd frame of ``data`` if ``media`` is a kind of text and the frame is smaller; else ``data``."""
    kind = media.partition(";")[0].strip()
    if kind != "application/json" and not kind.startswith("text/"):
        return data
    import zstandard

    frame = zstandard.ZstdCompressor().compress(data)
    return frame if len(frame) < len(data) else data


def unpacked(stored: bytes, size: int) -> bytes:
    """The ``size`` bytes of a frame that says that it holds as many; anything else as it is. Allocates no more."""
    if len(stored) >= size:
        return stored
    import zstandard

    with suppress(zstandard.ZstdError):
        # The decompressor believes the header, so that it has to be read first.
        if zstandard.get_frame_parameters(stored).content_size == size:
            return zstandard.ZstdDecompressor().decompress(stored, max_output_size=size, allow_extra_data=False)
    return stored


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.erased")


def _holds(path: Path, ref: BlobRef) -> bool:
    try:
        verified(unpacked(read_file(path, ref.size), ref.size), ref, path)
    except (OSError, Corrupt):
        return False
    return True
