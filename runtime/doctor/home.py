"""The home: whether somebody else has it, and whether its log is what its anchor knows."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from bascule.plugins.loader import described
from bascule.runtime.cli.store import leaves, open_store
from bascule.runtime.doctor.finding import Asked, Finding, failed
from bascule.runtime.log.anchor import anchor_path
from bascule.schemas.errors import BasculeError


def check_home(asked: Asked) -> Iterator[Finding]:
    """Look who holds the home's lock, and open its log as any command does."""
    home = Path(asked.home)
    holder = _holder(home)
    if holder is not None:
        yield Finding(
            about="home",
            outcome="fails",
            found=f"{home} is in use by another process (pid {holder}), and a run wants it for itself",
            next_step="Wait for its end or stop it, choose another --home, or name its server with --url.",
        )
    else:
        there = "is free" if home.exists() else "is not there yet, and is made by the first run"
        yield Finding(about="home", outcome="ok", found=f"{home} {there}")
    if not (home / "nats" / "jetstream").exists() and not anchor_path(home).exists():
        yield Finding(about="log", outcome="skipped", found="there is none yet")
        return
    yield _log(home, start=holder is None)


def _holder(home: Path) -> str | None:
    """The pid in a lock that is held; None if the home is free. The lock is let go again at once."""
    try:
        fd = os.open(home / "server.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(fd)
    return None


def _log(home: Path, *, start: bool) -> Finding:
    async def look() -> int:
        async with open_store(home, start=start) as store:
            return len([run async for run in store.runs()])

    try:
        runs = asyncio.run(look())
    except Exception as error:
        causes = list(leaves(error))
        known = next((e for e in causes if isinstance(e, BasculeError)), None)
        if known is not None:
            return failed("log", known)
        return Finding(about="log", outcome="fails", found=f"cannot be opened: {described(causes[0])}"[:600])
    found = f"{runs} run{'' if runs == 1 else 's'}; no gap, not behind its anchor"
    return Finding(about="log", outcome="ok", found=found, figures={"runs": runs})
