"""The first harness of a run, as somebody gives it: a folder of text files."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NoReturn

from bascule.runtime.episodes.allowed import refusal
from bascule.runtime.world import World
from bascule.schemas.errors import ConfigError, HarnessError
from bascule.schemas.harness import MAX_BYTES, make_harness

_LEFT_OUT = ("__pycache__", ".git")
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


def harness_in(folder: Path) -> dict[str, str]:
    """The files of a harness, by their names below the folder, checked as those of any harness.

    The folder itself may be given as a link; nothing in it may be one, so that only what stands there is recorded.

    Raises:
        HarnessError: there is no such folder, something in it is neither a file nor a folder, a file cannot be read or
            is no text, or they are no usable harness; names the folder and the file.
    """
    if not folder.is_dir():
        raise HarnessError(
            f"There is no folder {folder} to take a harness from.",
            next_step="Give the folder that holds harness.py, manifest.json and system_prompt.md.",
        )
    try:
        return make_harness(_read(folder)).files
    except HarnessError as e:
        raise HarnessError(f"The harness in {folder} is not usable. {e.message}", next_step=e.next_step) from e


def _read(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    size = 0
    top = folder.resolve()
    # It follows no links, and opens by folder, so that none that takes a folder's place meanwhile is followed either.
    for path, folders, files, descriptor in os.fwalk(top, onerror=_unread):
        below = Path(path).relative_to(top)
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT)
        for file in sorted({*folders, *files} - {*_LEFT_OUT}):
            name = (below / file).as_posix()
            if not name.isprintable():
                raise HarnessError(f"{name!a} is no name of a file in a harness.", next_step="Give it another name.")
            data = _data(name, file, descriptor)
            if data is None:
                continue
            try:
                found[name] = data.decode()
            except UnicodeDecodeError as e:
                raise HarnessError(f"{name} is no UTF-8 text: {e}.", next_step="Save it as UTF-8, or remove it.") from e
            size += len(name.encode()) + len(data)
            if size > MAX_BYTES:  # a folder that is none may be large
                raise HarnessError(
                    f"With {name} it is over {MAX_BYTES} bytes, the limit.",
                    next_step="Keep data in the task, not in the harness.",
                )
    return found


def _data(name: str, file: str, folder: int) -> bytes | None:
    """What a file of an open folder begins with, a byte more than a harness may have; None for a folder."""
    try:
        mode = os.stat(file, dir_fd=folder, follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            return None
        _check_kind(name, mode)
        # What it is may have changed since.
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        with open(opened, "rb") as data:
            _check_kind(name, os.fstat(opened).st_mode)
            return data.read(MAX_BYTES + 1)
    except OSError as e:
        raise HarnessError(f"{name} cannot be read: {e.strerror or e}.", next_step="Correct that.") from e


def _check_kind(name: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise HarnessError(
            f"{name} is {kind}; a harness has files and folders alone.",
            next_step="Copy the file itself into the folder, or take it away.",
        )


def _unread(error: OSError) -> NoReturn:
    raise HarnessError(
        f"{error.filename} cannot be read: {error.strerror or error}.", next_step="Correct that."
    ) from error


def check_harness(world: World) -> None:
    """Refuse a given harness that the run could not begin with.

    Raises:
        HarnessError: it is not usable, or asks for what the task does not allow.
        ConfigError: a file holds what is not recorded: a key, or an item of a restricted task.
    """
    files = world.config.harness
    if not files:
        return
    harness = make_harness(files)
    if (refused := refusal(harness.manifest, world.public)) is not None:
        raise HarnessError(
            f"The harness that the run is to begin with is not usable. {refused}",
            next_step="Correct its manifest.json.",
        )
    for name, text in files.items():
        if world.redaction.text(text, name) != text:
            raise ConfigError(
                f"{name} of the harness holds what looks like a key, which is not recorded.",
                next_step="Take it out; a harness needs no keys.",
            )
        if world.withholding is not None and world.withholding.text(text) != text:
            raise ConfigError(
                f"{name} of the harness quotes an item of the task {world.public.name}, whose items are restricted.",
                next_step="Take it out.",
            )
