"""The container of an export: a tar in one canonical form or a folder, read member by member in a known order.

Whoever reads says which member must come next, so that nothing else (a link, a path out of the folder, a second copy)
is ever looked at, and every byte of a tar is accounted for: headers, padding and end are compared with what
:func:`header` gives.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from bascule.schemas.errors import Corrupt, LogError, NotFound

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
MAX_MEMBER: Final = 8 * 1024**3 - 1
_CHUNK: Final = 1024 * 1024
_OCTAL: Final = re.compile(rb"[0-7]{11}")
_REPACKED: Final = "Get it again; if it was packed by another program, unpack it and give the folder."


def header(name: str, size: int) -> bytes:
    """The ustar header of a plain file with mode 0600, owner 0 and time 0.

    Raises:
        LogError: 8 GiB or more, which ustar cannot say.
    """
    if size > MAX_MEMBER:
        raise LogError(f"{name} takes {size} bytes, too many for a tar.", next_step="Export into a folder: --to DIR.")
    octal = b"0000000\0"
    fields = (
        name.encode().ljust(100, b"\0"), b"0000600\0", octal, octal, b"%011o\0" % size, b"00000000000\0",
        b" " * 8, b"0", bytes(100), b"ustar\x0000", bytes(64), octal, octal, bytes(167),
    )  # fmt: skip
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padding(size: int) -> int:
    """Zero bytes that follow a member of ``size`` bytes."""
    return -size % BLOCK


@dataclass(frozen=True)
class Part:
    """One member: ``size`` bytes at ``offset`` of an open file, or of the file at a path. Read any number of times."""

    name: str
    size: int
    source: int | Path
    offset: int = 0

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a MiB at a time.

        Raises:
            Corrupt: the file has become shorter.
        """
        fd = self.source if isinstance(self.source, int) else _open(self.source, self.name)
        try:
            done = 0
            while done < self.size:
                chunk = os.pread(fd, min(_CHUNK, self.size - done), self.offset + done)
                if not chunk:
                    raise Corrupt(f"{self.name} ends after {done} of {self.size} bytes.", next_step="Get it again.")
                done += len(chunk)
                yield chunk
        finally:
            if fd is not self.source:
                os.close(fd)

    def lines(self, limit: int) -> Iterator[bytes]:
        """The lines without their ends.

        Raises:
            Corrupt: a line is longer than ``limit`` bytes, or the last one has no end.
        """
        rest, number = b"", 0
        for chunk in self.chunks():
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                number += 1
                if len(line) > limit:
                    raise self._too_long(number, limit)
                yield line
            if len(rest) > limit:
                raise self._too_long(number + 1, limit)
        if rest:
            raise Corrupt(f"Line {number + 1} of {self.name} is cut off.", next_step="Get the export again.")

    def _too_long(self, number: int, limit: int) -> Corrupt:
        return Corrupt(f"Line {number} of {self.name} is longer than {limit} bytes.")


class Source(Protocol):
    """Where an export is read from."""

    def take(self, name: str, limit: int) -> Part:
        """The next member, which must be ``name`` and at most ``limit`` bytes long.

        Raises:
            Corrupt: it is missing, too long, no plain file, or something else is in its place.
        """
        ...

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            Corrupt: there is.
        """
        ...

    def close(self) -> None: ...


class TarSource:
    """Reads a tar. What is not a regular file (a pipe, a buffer) is copied to a temporary one as far as it is taken."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._spool: BinaryIO | None = None
        self._position = self._spooled = 0
        try:
            self._fd = stream.fileno()
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                self._position = stream.tell()
                return
        except OSError:  # io.UnsupportedOperation: a stream without a file
            pass
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115
        self._fd = self._spool.fileno()

    def take(self, name: str, limit: int) -> Part:
        at = self._position
        block = self._read(BLOCK)
        if len(block) < BLOCK:
            raise Corrupt(f"The export ends where {name} should begin (byte {at}).", next_step="Get it again.")
        size = int(block[124:135], 8) if _OCTAL.fullmatch(block[124:135]) else -1
        if block != header(name, max(size, 0)):
            raise _unexpected(block, name, at)
        if size > limit:
            raise Corrupt(f"{name} takes {size} bytes; at most {limit} fit the manifest.")
        part = Part(name, size, self._fd, self._position)
        self._pull(self._position + size)
        self._position += size
        pad = self._read(padding(size))
        if len(pad) < padding(size):
            raise Corrupt(f"The export is cut off inside {name}.", next_step="Get it again.")
        if any(pad):
            raise Corrupt(f"The padding after {name} is not zero.", next_step=_REPACKED)
        return part

    def finish(self) -> None:
        at = self._position
        end = self._read(len(END) + 1)
        if len(end) >= BLOCK and any(end[:BLOCK]):
            raise _unexpected(end[:BLOCK], "its end", at)
        if len(end) < len(END):
            raise Corrupt("The export is cut off before its end.", next_step="Get it again.")
        if end != END:
            raise Corrupt(f"Something follows the end of the export (byte {at}).", next_step=_REPACKED)

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()

    def _read(self, size: int) -> bytes:
        self._pull(self._position + size)
        data = b""
        while len(data) < size and (more := os.pread(self._fd, size - len(data), self._position)):
            data += more
            self._position += len(more)
        return data

    def _pull(self, end: int) -> None:
        """Have the stream's first ``end`` bytes, or all there are, in the temporary file."""
        while self._spool is not None and self._spooled < end:
            chunk = self._stream.read(min(_CHUNK, end - self._spooled))
            if not chunk:
                break
            self._spool.write(chunk)
            self._spooled += len(chunk)
        if self._spool is not None:
            self._spool.flush()


class FolderSource:
    """Reads an unpacked export."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._taken: set[str] = set()

    def take(self, name: str, limit: int) -> Part:
        folder, path = self._root / name.rpartition("/")[0], self._root / name
        try:
            if not stat.S_ISDIR(folder.lstat().st_mode) and folder != self._root:
                raise Corrupt(f"{folder} is not a folder.")
            found = path.lstat()
        except FileNotFoundError as e:
            raise Corrupt(f"The export {self._root} has no {name}.", next_step="Get it again.") from e
        if not stat.S_ISREG(found.st_mode):
            raise Corrupt(f"{path} is not a plain file.", next_step="Get the export again.")
        if found.st_size > limit:
            raise Corrupt(f"{path} takes {found.st_size} bytes; at most {limit} fit the manifest.")
        self._taken.add(name)
        return Part(name, found.st_size, path)

    def finish(self) -> None:
        for folder in (self._root, self._root / "blobs"):
            if not folder.is_dir():
                continue
            for entry in sorted(os.scandir(folder), key=lambda e: e.name):
                name = str(Path(entry.path).relative_to(self._root))
                if name not in self._taken and not (name == "blobs" and entry.is_dir(follow_symlinks=False)):
                    raise Corrupt(f"The manifest of {self._root} does not name {name!r}.", next_step="Remove it.")

    def close(self) -> None:
        pass


def open_source(path: Path) -> tuple[Source, BinaryIO | None]:
    """The export at ``path``, and the file to be closed after it.

    Raises:
        NotFound: there is none, or it cannot be read.
    """
    if path.is_dir():
        return FolderSource(path), None
    try:
        stream = path.open("rb")
    except OSError as e:
        raise NotFound(f"The export {path} cannot be read: {e.strerror}.", next_step="Correct the path.") from e
    return TarSource(stream), stream


def _open(path: Path, name: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as e:
        raise Corrupt(f"{name} cannot be read: {e.strerror} ({path}).") from e


def _unexpected(block: bytes, wanted: str, at: int) -> Corrupt:
    """What a header says that is not the one of ``wanted``."""
    if not any(block):
        return Corrupt(f"The export has no {wanted}: it ends at byte {at}.", next_step="Get it again.")
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as e:
        return Corrupt(f"The export is damaged where {wanted} should be (byte {at}): {e}.", next_step=_REPACKED)
    if info.name != wanted:
        return Corrupt(f"The export holds {info.name!r} where {wanted} should be (byte {at}).", next_step=_REPACKED)
    if not info.isreg():
        return Corrupt(f"{wanted} is not a plain file in the export (byte {at}).", next_step="Do not trust it.")
    return Corrupt(f"The header of {wanted} (byte {at}) is not as bascule writes it.", next_step=_REPACKED)
