"""Finding processes that should be over."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_LIMIT = 60.0


def processes_with(mark: str) -> list[int]:
    """Processes that have ``mark`` among their arguments."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                if mark.encode() in Path("/proc", name, "cmdline").read_bytes():
                    found.append(int(name))
    return found


def wait_until_gone(mark: str) -> bool:
    """Whether they are gone before a minute is over."""
    deadline = time.monotonic() + _LIMIT
    while time.monotonic() < deadline:
        if not processes_with(mark):
            return True
        os.sched_yield()
    return False
