"""What the kernel tells of processes: which there are below another, and how much memory they have."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable

_PAGE = os.sysconf("SC_PAGE_SIZE")


def below(pid: int) -> list[int]:
    """The processes below one, itself not included; those that come or go meanwhile may be there or not."""
    found: list[int] = []
    waiting = [pid]
    children = _children if _told_by_kernel() else _by_parents().get
    while waiting:
        inner = children(waiting.pop()) or []
        found += inner
        waiting += inner
    return found


def resident(pids: Iterable[int]) -> int:
    """Bytes of memory that these processes have, pages that they share counted for each."""
    total = 0
    for pid in pids:
        text = _read(f"/proc/{pid}/statm").split()
        total += int(text[1]) * _PAGE if len(text) > 1 else 0
    return total


def proportional(pids: Iterable[int]) -> int:
    """Bytes of memory and swap that these processes have, shared pages divided among those that share them."""
    total = 0
    for pid in pids:
        rollup = _read(f"/proc/{pid}/smaps_rollup")
        if not rollup:
            total += resident([pid])
            continue
        for line in rollup.splitlines():
            if line.startswith((b"Pss:", b"SwapPss:")):
                total += int(line.split()[1]) * 1024
    return total


def uids_in_use() -> set[int]:
    """User ids that some process has."""
    uids = set()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                uids.add(os.stat(f"/proc/{name}").st_uid)
            except OSError:
                continue
    return uids


def tasks_of(uid: int) -> int:
    """Threads of all processes of a user."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if os.stat(f"/proc/{name}").st_uid == uid:
                    total += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue
    return total


def _children(pid: int) -> list[int]:
    found = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    for thread in threads:
        found += [int(word) for word in _read(f"/proc/{pid}/task/{thread}/children").split()]
    return found


@functools.cache
def _told_by_kernel() -> bool:
    # Some kernels are built without it.
    return os.path.exists(f"/proc/self/task/{threading.get_native_id()}/children")


def _by_parents() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            fields = _read(f"/proc/{name}/stat").rpartition(b")")[2].split()
            if len(fields) > 1:
                found.setdefault(int(fields[1]), []).append(int(name))
    return found


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
