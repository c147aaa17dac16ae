"""The server is killed while many write."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from itertools import count

from bascule.runtime.log.nats import NatsLog
from bascule.schemas import subjects
from tests.faults.fault import Outcome, Setting
from tests.faults.ledger import Ledger, connected, event, everything, persistent, serving
from tests.log.restarts import restart

_WRITERS = 8
#: Shorter than a restart, so that appends give up and are tried again with the same identity.
_DEADLINE = 0.15


async def kill_server(setting: Setting) -> Outcome:
    """SIGKILL and restart on the same store and port, each after a few acknowledgements of eight writers."""
    ledger, rng, stop = Ledger(), setting.rng("kill"), asyncio.Event()
    async with serving(setting.folder / "home") as server:

        async def supervise() -> None:
            for _ in range(setting.count):
                await ledger.reach(len(ledger.acked) + rng.randint(1, 40))
                os.kill(server.pid, signal.SIGKILL)
                await asyncio.to_thread(restart, server)
            await ledger.reach(len(ledger.acked) + _WRITERS)
            stop.set()

        async def write(number: int) -> None:
            async with connected(server, deadline=_DEADLINE) as log:
                await _write(log, number, setting.rng("writer", number), ledger, stop)

        async with asyncio.TaskGroup() as group:
            group.create_task(supervise())
            for number in range(_WRITERS):
                group.create_task(write(number))
        async with connected(server) as log:
            tally = ledger.audit(await everything(log))
    setting.say(f"killed the server {setting.count} times under {_WRITERS} writers; {len(ledger.acked)} acknowledged")
    return Outcome(
        injected=setting.count,
        lost=tally.lost,
        duplicated=tally.duplicated,
        broken=tally.broken,
        note=f"{len(ledger.acked)} appends acknowledged",
    )


async def _write(log: NatsLog, number: int, rng: random.Random, ledger: Ledger, stop: asyncio.Event) -> None:
    """Single events, batches, events that every writer claims, and appends that are given up and made again."""
    writer = f"w{number}"
    for i in count():
        if stop.is_set():
            return
        kind = rng.choice(("single", "single", "batch", "shared", "abandoned"))
        if kind == "shared":
            claimed = subjects.subject("faults", "shared", f"i{i:05d}", "said")
            ledger.note(await persistent(log, [event(claimed, writer)], deadline=_DEADLINE))
            continue
        own = [
            event(subjects.subject("faults", "own", f"{writer}-{i:05d}-{k}", "said"), f"{rng.random()}")
            for k in range(3 if kind == "batch" else 1)
        ]
        if kind == "abandoned":
            task = asyncio.create_task(log.append(own))
            for _ in range(rng.randint(1, 4)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        ledger.note(await persistent(log, own, deadline=_DEADLINE), writer=writer)
