"""What an attack is, and what came of one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

HERE = Path(__file__).parent


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One attack at one place.

    Attributes:
        place: where it was made: as a ``program``, as a ``harness``, against a scorer.
        control: what the same achieved where nothing stands against it; empty: it achieved nothing there, so that the
            row proves nothing; None: no control is possible, and ``note`` says why.
        layer: what stopped it, or what scored it for what it is.
        result: what it came to.
        problems: what it achieved, or why it says nothing; one that succeeded has some.
    """

    place: str
    control: str | None
    layer: str
    result: str
    problems: tuple[str, ...] = ()

    @property
    def stopped(self) -> bool:
        return not self.problems and self.control != ""


class Attack(msgspec.Struct, frozen=True, kw_only=True):
    """An attack.

    Attributes:
        tries: one line.
        play: makes it, in a folder of its own, and says what came of it.
        quick: it takes seconds, and is also made by the everyday tests.
    """

    name: str
    tries: str
    play: Callable[[Path], Awaitable[list[Outcome]]]
    quick: bool = False


def text_of(folder: str, name: str) -> str:
    """The text of an attack's program, ``folder/name.py`` beside this file."""
    return (HERE / folder / f"{name}.py").read_text(encoding="utf-8")


def line_of(text: str) -> str:
    """What a program says that it tries: the first line of its docstring."""
    return text.lstrip().split("\n", 1)[0].strip('"').strip()


def told(error: str) -> str:
    """The layer that an error comes from, as far as it tells; empty for an attempt that met none."""
    return _LAYERS.get(error, "" if " " in error else error)


_LAYERS = {
    "ENOENT": "own root",
    "ENOTDIR": "own root",
    "EROFS": "own root, read-only",
    "EXDEV": "own root",
    "ESRCH": "own processes",
    "EACCES": "Landlock or user id",
    "EPERM": "seccomp or user id",
    "ENOSYS": "seccomp",
    "EAFNOSUPPORT": "seccomp",
    "ENETUNREACH": "own network",
    "EHOSTUNREACH": "own network",
    "ECONNREFUSED": "own network",
    "EADDRNOTAVAIL": "own network",
    "gaierror": "seccomp",
    "EAGAIN": "limit of processes",
    "ENOSPC": "limit of disk",
    "EFBIG": "limit of disk",
    "EDQUOT": "limit of disk",
    "ENOMEM": "limit of memory",
    "MemoryError": "limit of memory",
    "timeout": "clock outside",
    "memory": "watch over memory",
    "disk": "watch over disk",
    "processes": "watch over processes",
    "output": "watch over output",
    "output-limit": "watch over output",
}
