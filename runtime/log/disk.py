"""Files that survive a loss of power, and that are what they seem."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bascule.plugins.whole import whole_file
from bascule.schemas.errors import LogError


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a LogError."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        raise LogError(
            f"The disk of {path} is full." if full else f"{path} cannot be written: {e.strerror}.",
            next_step="Free some space and resume." if full else "Make the folder writable, or choose another one.",
        ) from e


def durable_write(path: Path, data: bytes) -> None:
    """Put a file of mode 0600 in place as a whole. Its name is durable once its folder is synced."""
    with whole_file(path, durable=True) as file:
        file.write(data)


def make_private(folder: Path) -> None:
    """Make ``folder`` and its missing parents with mode 0700, each durable in its own parent."""
    if folder.is_dir():
        return
    make_private(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_file(path: Path, size: int) -> bytes:
    """At most ``size`` bytes and one more, so that a file that is too long shows."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "it is not a file", str(path))
        with open(fd, "rb", closefd=False) as f:
            return f.read(min(size, info.st_size) + 1)
    finally:
        os.close(fd)
