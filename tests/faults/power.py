"""The power fails: what was acknowledged is on the disk."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path

from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.log.server import EmbeddedServer
from bascule.schemas import subjects
from tests.faults.fault import Outcome, Setting
from tests.faults.ledger import Ledger, connected, event, everything, missing, persistent, repeated, serving

_DEADLINE = 20.0
_PROBES = 30


async def lose_power(setting: Setting) -> Outcome:
    """Copy the store of a running server after acknowledgements, while more is written, and start on the copy."""
    ledger, rng, stop = Ledger(), setting.rng("power"), asyncio.Event()
    lost = duplicated = 0
    async with serving(setting.folder / "home") as server, connected(server) as log:
        synced = await _syncs(server, log)

        async def write() -> None:
            for i in count():
                if stop.is_set():
                    return
                ledger.note(await persistent(log, [_event("written", i)], deadline=_DEADLINE), writer="w")

        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            for number in range(setting.count):
                await ledger.reach(len(ledger.acked) + rng.randint(1, 20))
                acked = tuple(ledger.acked)
                copy = setting.folder / "copy"
                await asyncio.to_thread(_copy, setting.folder / "home" / "nats", copy / "nats")
                async with serving(copy) as other, connected(other) as reread:
                    events = await everything(reread)
                lost += missing(acked, events)
                duplicated += repeated(events)
                setting.say(f"copy {number + 1} after {len(acked)} acknowledgements: {len(events)} events")
                await asyncio.to_thread(shutil.rmtree, copy)
            stop.set()
    broken = () if synced is None or synced >= _PROBES else (f"{synced} fsyncs for {_PROBES} acknowledgements",)
    traced = "strace is not usable, fsyncs not counted" if synced is None else f"{synced} fsyncs for {_PROBES} appends"
    return Outcome(
        injected=setting.count,
        lost=lost,
        duplicated=duplicated,
        broken=broken,
        note=f"copies of a running store; {traced}; LazyFS and dm-flakey are not simulated",
    )


def _event(kind: str, i: int) -> NewEvent:
    return event(subjects.subject("faults", kind, f"i{i:06d}", "said"), "x" * 200)


async def _syncs(server: EmbeddedServer, log: NatsLog) -> int | None:
    """How often the server syncs a file during ``_PROBES`` appends, None if strace is not usable."""
    binary = shutil.which("strace")
    if binary is None:
        return None
    trace = await asyncio.create_subprocess_exec(
        *(binary, "-f", "-e", "trace=fsync,fdatasync", "-p", str(server.pid)),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert trace.stderr is not None
    if b"attached" not in await trace.stderr.readline():
        await trace.wait()
        return None
    for i in range(_PROBES):
        await log.append([_event("probe", i)])
    trace.terminate()
    lines = (await trace.stderr.read()).splitlines()
    await trace.wait()
    return sum(b"sync(" in line for line in lines)


def _copy(store: Path, to: Path) -> None:
    """Copy what a server would find after a crash; files may go while it runs."""
    for path in sorted(store.rglob("*")):
        target = to / path.relative_to(store)
        with suppress(FileNotFoundError):
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif path.name not in ("server.log", "server.conf") and path.suffix != ".ports":
                shutil.copyfile(path, target)
