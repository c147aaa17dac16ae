"""The processes of episodes, as they are seen from outside."""

from __future__ import annotations

import os
from pathlib import Path

from bascule.verifiers.sandbox.processes import below


def alive(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def zygotes() -> set[int]:
    """The zygotes of this process that are not over."""
    return {pid for pid in below(os.getpid()) if is_zygote(pid) and parent(pid) == os.getpid() and alive(pid)}


def is_zygote(pid: int) -> bool:
    return b"/zygote.py" in read(pid, "cmdline")


def parent(pid: int) -> int:
    return int(read(pid, "stat").rpartition(b")")[2].split()[1])


def read(pid: int, name: str) -> bytes:
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b"0 () Z 0"


def episodes() -> set[int]:
    """What runs below the zygotes of this process."""
    return {pid for zygote in zygotes() for pid in below(zygote) if alive(pid)}


def folder_of(zygote: int) -> Path:
    """The folder of a zygote on this machine."""
    return Path(read(zygote, "cmdline").split(b"\0")[-3].decode())
