"""What processes use, seen from outside: memory, as ``/proc`` tells it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path

from bascule.verifiers.sandbox.processes import below

_COUNTED = (b"RssAnon:", b"RssShmem:", b"VmSwap:")


def own_bytes(pid: int) -> int:
    """Anonymous, shared and swapped memory of a process, bytes; what it shares with its parent counts too."""
    total = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc", str(pid), "status").read_bytes().splitlines():
            if line.startswith(_COUNTED):
                total += int(line.split()[1]) << 10
    return total


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


def memory(pids: Collection[int], limit: int) -> int:
    """Memory of some processes together, bytes. Exact only where a rough look, which is cheap, is over ``limit``."""
    rough = {pid: own_bytes(pid) for pid in pids}
    if sum(rough.values()) <= limit:
        return sum(rough.values())
    total = 0
    for pid, bytes_ in rough.items():
        exact = proportional_bytes(pid)
        total += bytes_ if exact is None else exact
    return total


def over(limits: Mapping[int, int]) -> set[int]:
    """Those of some processes that have, with all below them, more memory than the bytes given for each."""
    return {pid for pid, limit in limits.items() if memory([pid, *below(pid)], limit) > limit}
