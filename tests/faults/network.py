"""A network that delays, cuts, goes silent, and loses or repeats acknowledgements."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, aclosing, suppress

from bascule.runtime.log.nats import NatsLog
from bascule.schemas import subjects
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import LogUnavailable
from tests.faults.fault import Outcome, Setting
from tests.faults.ledger import HANG_SECONDS, Ledger, connected, event, everything, persistent, serving
from tests.faults.proxy import Proxy

_RUN = "faults"
_WRITERS, _EVENTS, _FAULTS = 4, 40, 4
_DEADLINE, _LEASE = 20.0, 2.0
_AT_ONCE = 6
_KINDS = ("delay", "cut", "stall", "repeat", "drop", "half-open")


def schedule(number: int, rng: random.Random) -> list[tuple[int, str]]:
    """Which fault after how many acknowledgements; over six schedules each kind comes first once."""
    places = sorted(rng.sample(range(5, _WRITERS * _EVENTS * 3 // 4), _FAULTS))
    # A connection that is silent for good costs what a client needs to notice it, so it is never drawn.
    return list(zip(places, [_KINDS[number % len(_KINDS)], *rng.choices(_KINDS[:-1], k=_FAULTS - 1)], strict=True))


async def disturb_network(setting: Setting) -> Outcome:
    """Four writers, a follower and a worker behind a proxy with a schedule of faults; some schedules at a time."""
    limit = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int) -> Outcome:
        async with limit:
            return await _Schedule(setting, number).play()

    outcomes = await asyncio.gather(*(one(n) for n in range(setting.count)))
    return Outcome(
        injected=sum(o.injected for o in outcomes),
        lost=sum(o.lost for o in outcomes),
        duplicated=sum(o.duplicated for o in outcomes),
        broken=tuple(b for o in outcomes for b in o.broken),
        note=f"{setting.count} schedules",
    )


class _Schedule:
    """One schedule on a server of its own. Every event asks for an outcome, which the worker appends."""

    def __init__(self, setting: Setting, number: int) -> None:
        self._setting = setting
        self._number = number
        self._rng = setting.rng("network", number)
        self._ledger = Ledger()
        self._followed: list[Recorded] = []
        self._broken: list[str] = []

    async def play(self) -> Outcome:
        faults = schedule(self._number, self._rng)
        self._setting.say(f"schedule {self._number}: " + ", ".join(f"{kind} at {at}" for at, kind in faults))
        async with serving(self._setting.folder / f"home-{self._number}") as server:
            proxy = Proxy(server.port)
            await proxy.start()
            try:
                async with AsyncExitStack() as stack:
                    logs = [
                        await stack.enter_async_context(
                            connected(server, port=proxy.port, deadline=_DEADLINE, lease=_LEASE)
                        )
                        for _ in range(_WRITERS + 2)
                    ]
                    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
                        group.create_task(self._inject(proxy, faults))
                        group.create_task(self._follow(logs[0]))
                        group.create_task(self._work(logs[1]))
                        for number, log in enumerate(logs[2:]):
                            group.create_task(self._write(log, number))
            except* TimeoutError:
                self._broken.append("a call hung")
            finally:
                await proxy.close()
            async with connected(server) as log:
                events = await everything(log)
        tally = self._ledger.audit(events)
        if [e.seq for e in self._followed] != [e.seq for e in events]:
            self._broken.append("the follower did not see every event once and in order")
        if len(events) != 2 * _WRITERS * _EVENTS:
            self._broken.append(f"{len(events)} events instead of {2 * _WRITERS * _EVENTS}")
        return Outcome(
            injected=len(faults),
            lost=tally.lost,
            duplicated=tally.duplicated,
            broken=tuple(f"schedule {self._number}: {b}" for b in (*tally.broken, *self._broken)),
        )

    async def _inject(self, proxy: Proxy, faults: list[tuple[int, str]]) -> None:
        for at, kind in faults:
            await self._ledger.reach(at)
            match kind:
                case "delay":
                    proxy.slow, proxy.delay = 50, self._rng.uniform(0.001, 0.02)
                case "cut":
                    proxy.cut()
                case "stall":
                    proxy.stall(self._rng.uniform(0.1, 1.5))
                case "repeat":
                    proxy.repeat = 20
                case "drop":
                    proxy.drop = self._rng.randint(1, 4)
                case "half-open":
                    proxy.stall(None)

    async def _write(self, log: NatsLog, number: int) -> None:
        writer = f"w{number}"
        for i in range(_EVENTS):
            asked = event(subjects.subject(_RUN, "job", f"{writer}-{i:03d}", "asked"), writer)
            self._ledger.note(await persistent(log, [asked], deadline=_DEADLINE), writer=writer)

    async def _follow(self, log: NatsLog) -> None:
        while len(self._followed) < 2 * _WRITERS * _EVENTS:
            after = self._followed[-1].seq if self._followed else 0
            with suppress(LogUnavailable):
                async with aclosing(log.follow(f"bascule.{_RUN}.>", after=after)) as events:
                    async for e in events:
                        self._followed.append(e)
                        if len(self._followed) == 2 * _WRITERS * _EVENTS:
                            return

    async def _work(self, log: NatsLog) -> None:
        """Answer every trigger as often as it is delivered, each time with other bytes."""
        queue = await log.work(_RUN, "worker", [f"bascule.{_RUN}.*.*.asked"])
        answered: set[str] = set()
        deliveries = 0
        while len(answered) < _WRITERS * _EVENTS:
            items = []
            with suppress(LogUnavailable):
                async with asyncio.timeout(_DEADLINE + HANG_SECONDS):
                    items = list(await queue.next(8, 1.0))
            for item in items:
                deliveries += 1
                done = event(item.event.subject.removesuffix("asked") + "done", f"delivery {deliveries}")
                self._ledger.note(await persistent(log, [done], deadline=_DEADLINE))
                answered.add(done.subject)
                await item.done()
        await queue.close()
