"""The working folder of a program, by descriptor: files are put there, and what came of them is read.

What the program left is hostile: no link is followed, nothing but plain files is read.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

_CHUNK = 1 << 20


class TooLarge(Exception):
    """The results are larger than was allowed."""


def parts_of(name: str) -> tuple[str, ...]:
    """The parts of a relative name.

    Raises:
        ValueError: it is none that stays in the folder.
    """
    parts = tuple(name.split("/"))
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts) or PurePosixPath(name).is_absolute():
        raise ValueError(f"{name!r} is no name of a file in the working folder.")
    return parts


def put(folder: int, files: Mapping[str, bytes], owner: int | None = None) -> None:
    """Write files into an empty folder.

    Args:
        folder: its descriptor.
        owner: user and group id that they are to belong to; None: as they are made.

    Raises:
        ValueError: a name leaves the folder.
        OSError: there is no room, or the names contradict each other.
    """
    for name, data in files.items():
        *inner, last = parts_of(name)
        with contextlib.ExitStack() as stack:
            at = folder
            for part in inner:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=at)
                    if owner is not None:
                        os.chown(part, owner, owner, dir_fd=at, follow_symlinks=False)
                at = _open(part, os.O_DIRECTORY, at)
                stack.callback(os.close, at)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(last, flags, 0o600, dir_fd=at), "wb") as file:
                file.write(data)
                if owner is not None:
                    os.fchown(file.fileno(), owner, owner)


def take(folder: int, names: Iterable[str], most: int) -> dict[str, bytes]:
    """Read plain files; what is not there, is a link, or lies behind one, is left out.

    Args:
        most: bytes altogether.

    Raises:
        TooLarge: there are more.
    """
    found: dict[str, bytes] = {}
    for name in names:
        *inner, last = parts_of(name)
        with contextlib.ExitStack() as stack:
            try:
                at = folder
                for part in inner:
                    at = _open(part, os.O_DIRECTORY, at)
                    stack.callback(os.close, at)
                descriptor = _open(last, os.O_NONBLOCK, at)
            except OSError:
                continue
            stack.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                continue
            # A hole in a file is as long as its author wants: the size is asked before anything is read.
            if status.st_size > most:
                raise TooLarge(name)
            found[name] = _read(descriptor, status.st_size)
            most -= len(found[name])
    return found


def used(path: str, most: int) -> int:
    """Bytes that a tree occupies; what vanishes meanwhile counts no more.

    A folder that its owner closed to itself is opened, since files lie in it all the same.

    Args:
        most: files and folders that there may be. A tree with more, or one so deep that its paths are too long for the
            kernel, or with a folder that we cannot open, is not looked through: it occupies ``sys.maxsize``.
    """
    total = entries = 0
    waiting = [path]
    while waiting:
        at = waiting.pop()
        try:
            try:
                found = _look(at, most - entries)
            except PermissionError:
                _open_up(at)
                found = _look(at, most - entries)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return sys.maxsize
        if found is None:
            return sys.maxsize
        for size, inner in found:
            entries += 1
            total += size
            if inner:
                waiting.append(inner)
    return total


def _look(path: str, most: int) -> list[tuple[int, str]] | None:
    """What lies in a folder: bytes, and the path of what is a folder itself; None: more than ``most``."""
    found: list[tuple[int, str]] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if len(found) >= most:
                return None
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            found.append((status.st_blocks * 512, entry.path if stat.S_ISDIR(status.st_mode) else ""))
    return found


def _open_up(path: str) -> None:
    # By descriptor: whoever owns the folder may put a link in its place meanwhile.
    folder = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chmod(f"/proc/self/fd/{folder}", 0o700)
    finally:
        os.close(folder)


def _open(name: str, flags: int, at: int) -> int:
    return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=at)


def _read(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(descriptor, min(_CHUNK, size - len(data)))
        if not part:
            break
        data += part
    return bytes(data)
