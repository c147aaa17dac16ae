"""Files and folders that appear whole or not at all.

Each is written beside its place, under a hidden name of its own, and then given its name. So whoever reads sees all of
it or nothing, and processes that write the same one at once do not mix. A crash leaves at most the hidden one, which
ends in ``.tmp``.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

_PRIVATE: Final = 0o600


@contextmanager
def whole_file(path: Path, *, mode: int = _PRIVATE, durable: bool = False, replace: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which is at ``path`` once the block has ended; if that raises, all stays as it was.

    Args:
        path: where it appears; its folder is there.
        mode: its permissions, whatever the umask.
        durable: its bytes are on the disk before it has its name. The name itself is once its folder is synced.
        replace: what is there is replaced, and of two that come at once the later counts.

    Raises:
        FileExistsError: there is something already, and ``replace`` is false.
        OSError: it cannot be written.
    """
    temporary = _beside(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _PRIVATE)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            if mode != _PRIVATE:  # some file systems refuse every change of it
                os.fchmod(descriptor, mode)
            if durable:
                os.fsync(descriptor)
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is at ``path`` with mode 0755 once the block has ended; if that raises, it is gone.

    Raises:
        FileExistsError: there is something already, other than an empty folder.
        OSError: it cannot be written.
    """
    temporary = _beside(path)
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(path)
        except OSError as e:
            if os.path.lexists(path):
                raise FileExistsError(*e.args[:2], str(path)) from e
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}.tmp")
