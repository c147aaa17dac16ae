"""The disk, or the room that the server may take of it, is full, and grows."""

from __future__ import annotations

import asyncio

from bascule.runtime.log.nats import NatsLog
from bascule.schemas import subjects
from bascule.schemas.errors import LogError
from tests.faults.fault import Outcome, Setting
from tests.faults.ledger import Ledger, connected, event, everything, serving
from tests.log.restarts import restart

_MEBIBYTE = 1024**2
_TEXT = "x" * 20_000
#: Events that are appended once there is room again.
_MORE = 20


async def fill_store(setting: Setting) -> Outcome:
    """Append until the server's ``max_file_store`` is reached, raise it, and go on."""
    writer, home, size = _Writer(), setting.folder / "home", _MEBIBYTE
    for _ in range(setting.count):
        # max_bytes -1: no room is set aside for the stream, so that the server's own limit is what is met.
        async with serving(home, max_file_store=size) as server, connected(server, max_bytes=-1) as log:
            setting.say(f"{size} bytes of store: {await writer.fill(log)}")
        size += _MEBIBYTE
    async with serving(home, max_file_store=size) as server, connected(server) as log:
        return await writer.outcome(log, setting.count)


async def fill_disk(setting: Setting) -> Outcome:
    """Append until a small file system is full, grow it, restart the server, and go on."""
    writer, disk, size = _Writer(), setting.folder / "disk", 4 * _MEBIBYTE
    disk.mkdir()
    if not await ran("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)):
        return Outcome(injected=0, skipped="a tmpfs cannot be mounted: not root")
    try:
        async with serving(disk / "home") as server:
            for _ in range(setting.count):
                async with connected(server, deadline=1.0) as log:
                    setting.say(f"{size} bytes of disk: {await writer.fill(log)}")
                size += 2 * _MEBIBYTE
                await ran("mount", "-o", f"remount,size={size}", str(disk))
                # A nats-server that failed to write stores nothing more until it is restarted.
                await asyncio.to_thread(restart, server)
            async with connected(server) as log:
                return await writer.outcome(log, setting.count)
    finally:
        await ran("umount", str(disk))


class _Writer:
    """Appends large events one after the other; one that was refused is appended again, with the same identity."""

    def __init__(self) -> None:
        self._next = 0
        self._ledger = Ledger()
        self._broken: list[str] = []

    async def fill(self, log: NatsLog) -> str:
        """Append until the log refuses; the refusal in words."""
        before = self._next
        try:
            while True:
                await self._append(log)
        except LogError as e:
            if self._next == before:
                self._broken.append(f"nothing could be appended: {e}")
            if "full" not in str(e) or e.next_step is None:
                self._broken.append(f"a refusal that does not say what is full: {e}")
            return f"full after {self._next} events: {e}"

    async def outcome(self, log: NatsLog, injected: int) -> Outcome:
        """What came of it, after some more events."""
        for _ in range(_MORE):
            await self._append(log)
        tally = self._ledger.audit(await everything(log))
        return Outcome(
            injected=injected,
            lost=tally.lost,
            duplicated=tally.duplicated,
            broken=(*tally.broken, *self._broken),
            note=f"{self._next} appends acknowledged",
        )

    async def _append(self, log: NatsLog) -> None:
        new = event(subjects.subject("faults", "own", f"i{self._next:05d}", "said"), _TEXT)
        self._ledger.note(await log.append([new]), writer="w")
        self._next += 1


async def ran(*command: str) -> bool:
    """Whether a command ends with 0."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait() == 0
