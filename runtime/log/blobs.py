"""Blobs in a folder, under the hash of their bytes: durable before an event names them, verified on reading."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from bascule.schemas.errors import Corrupt, LogError, NotFound
from bascule.schemas.events import BlobRef

_SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """A content-addressed store: ``<root>/<first two hex digits>/<sha256>``.

    Args:
        root: made on the first ``put``. Several processes may share it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, data: bytes, media: str = "application/octet-stream") -> BlobRef:
        """Store ``data`` and return once it survives a loss of power. Harmless when repeated.

        Raises:
            LogError: the folder cannot be written, or the disk is full.
        """
        ref = BlobRef(sha256=hashlib.sha256(data).hexdigest(), size=len(data), media=media)
        path = self.path(ref)
        try:
            _make_private(path.parent)
            if not _holds(path, data):
                _write_durably(path, data)
            # Also for a file that was there: its writer may not have come this far yet.
            _sync_folder(path.parent)
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT)
            raise LogError(
                f"The disk of {self.root} is full." if full else f"{path} cannot be written: {e.strerror}.",
                next_step="Free some space and resume." if full else "Make the folder writable, or choose another one.",
            ) from e
        return ref

    def get(self, ref: BlobRef) -> bytes:
        """The bytes of a blob, verified.

        Raises:
            NotFound: it is not in this store.
            Corrupt: the stored bytes are not those that were put.
        """
        path = self.path(ref)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as e:
            raise NotFound(
                f"The blob {path} is missing.", next_step="Copy it from where the run was made, or restore a backup."
            ) from e
        except OSError as e:
            raise Corrupt(f"The blob {path} cannot be read: {e.strerror}.", next_step="Restore it.") from e
        with open(fd, "rb") as f:
            data = f.read(ref.size + 1)
        if len(data) != ref.size or hashlib.sha256(data).hexdigest() != ref.sha256:
            raise Corrupt(f"The blob {path} does not match its hash.", next_step="Restore it from a backup.")
        return data

    def discard(self, ref: BlobRef) -> None:
        """Delete a blob that nothing needs any more; harmless if it is gone."""
        self.path(ref).unlink(missing_ok=True)

    def path(self, ref: BlobRef) -> Path:
        """Where a blob lies.

        Raises:
            Corrupt: ``ref.sha256`` is no hash, and could point anywhere.
        """
        if not _SHA256.fullmatch(ref.sha256):
            raise Corrupt(
                f"{ref.sha256!r} is not a sha256.", next_step="The event that names this blob is not genuine."
            )
        return self.root / ref.sha256[:2] / ref.sha256


def _holds(path: Path, data: bytes) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    with open(fd, "rb") as f:
        return f.read(len(data) + 1) == data


def _write_durably(path: Path, data: bytes) -> None:
    tmp = path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}.tmp")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(fd)
        tmp.replace(path)
    except BaseException:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise


def _make_private(folder: Path) -> None:
    """Make ``folder`` and its missing parents with mode 0700, each durable in its own parent."""
    if folder.is_dir():
        return
    _make_private(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
