"""What processes use, seen from outside: memory, their number, and what lies in their folder.

Memory is always watched. The other two are where nothing else bounds them: the number of processes where the kernel
does not count them by a user id of the episode's own, the folder where it is no file system of its own.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from bascule.runtime.episodes.confinement import GUEST_DISK, GUEST_PROCESSES, INODES
from bascule.runtime.episodes.episode import Limits
from bascule.verifiers.sandbox import folder
from bascule.verifiers.sandbox.confine import seal
from bascule.verifiers.sandbox.processes import below

Over = Literal["memory", "processes", "disk"]

_COUNTED = (b"RssAnon:", b"RssShmem:", b"VmSwap:")
# What one look at folders may take, besides the last of them.
_DISK_SECONDS = 0.1


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What some processes may use together.

    Attributes:
        memory: bytes.
        processes: processes and threads at one time; None: not watched.
        folder: where they write; None: not watched.
        disk: bytes that may lie in ``folder``, in at most ``INODES`` files and folders.
    """

    memory: int
    processes: int | None = None
    folder: str | None = None
    disk: int = 0


def bounds(limits: Limits, mechanisms: Collection[str], place: str, *, guest: bool = False) -> Bounds:
    """What is to be watched of an episode, or of a guest that has no episodes.

    Args:
        mechanisms: that confine it.
        place: its folder, where it has no root of its own.
    """
    counted = seal.UID in mechanisms or seal.USER in mechanisms
    return Bounds(
        memory=limits.memory_bytes,
        processes=None if counted else limits.processes + (GUEST_PROCESSES if guest else 0),
        folder=None if seal.ROOT in mechanisms else place,
        disk=limits.disk_bytes * (GUEST_DISK if guest else 1),
    )


def together(guest: Bounds, *episodes: Bounds) -> Bounds:
    """What a guest may use with its episodes: these write below its folder, and it has room for their processes."""
    return msgspec.structs.replace(
        guest,
        memory=guest.memory + sum(episode.memory for episode in episodes),
        disk=guest.disk + sum(episode.disk for episode in episodes),
    )


def over(watched: Mapping[int, Bounds], due: Sequence[int], *, fronted: bool) -> tuple[dict[int, Over], list[int]]:
    """Which of some processes use more than they may, with all that belongs to them.

    Args:
        watched: by process id.
        due: whose folders are to be looked at first: all take turns, since a look takes as long as their owners want,
            within bounds.
        fronted: what belongs to a process cannot leave it. Otherwise it can, but not its process group.

    Returns:
        What each has too much of, and whose folders are due next.
    """
    found: dict[int, Over] = {}
    for pid, members in _members(watched, fronted=fronted).items():
        if what := _excess(members, watched[pid]):
            found[pid] = what
    due = [pid for pid in due if pid in watched] or list(watched)
    deadline = time.monotonic() + _DISK_SECONDS
    for turn, pid in enumerate(due, 1):
        bounds = watched[pid]
        if bounds.folder is not None and folder.used(bounds.folder, INODES) > bounds.disk:
            found.setdefault(pid, "disk")
        if time.monotonic() >= deadline:
            return found, due[turn:]
    return found, []


def _members(pids: Collection[int], *, fronted: bool) -> dict[int, set[int]]:
    found = {pid: {pid, *below(pid)} for pid in pids}
    if fronted:
        return found
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                if (group := os.getpgid(int(name))) in found:
                    found[group].add(int(name))
    return found


def _excess(pids: Collection[int], bounds: Bounds) -> Over | None:
    most = bounds.processes
    if most is not None and len(pids) > most:
        return "processes"
    uses = {pid: use(pid) for pid in pids}
    if most is not None and sum(threads for threads, _ in uses.values()) > most:
        return "processes"
    return "memory" if _memory({pid: bytes_ for pid, (_, bytes_) in uses.items()}, bounds.memory) else None


def _memory(rough: Mapping[int, int], most: int) -> bool:
    """Whether it is more. An exact look is dear, and taken only where a rough one says so."""
    if sum(rough.values()) <= most:
        return False
    exact = {pid: proportional_bytes(pid) for pid in rough}
    return sum(rough[pid] if bytes_ is None else bytes_ for pid, bytes_ in exact.items()) > most


def use(pid: int) -> tuple[int, int]:
    """Threads of a process, and its anonymous, shared and swapped memory in bytes; what it shares with its parent
    counts too. Zeros once it is gone."""
    threads = total = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc", str(pid), "status").read_bytes().splitlines():
            if line.startswith(_COUNTED):
                total += int(line.split()[1]) << 10
            elif line.startswith(b"Threads:"):
                threads = int(line.split()[1])
    return threads, total


def proportional_bytes(pid: int) -> int | None:
    """Anonymous, shared and swapped memory with each page divided among those that share it, bytes; None if it is not
    to be read."""
    total = 0
    try:
        for line in Path("/proc", str(pid), "smaps_rollup").read_bytes().splitlines():
            if line.startswith((b"Pss_Anon:", b"Pss_Shmem:", b"SwapPss:")):
                total += int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        return None
    return total
