"""Work that is delivered again, to others, late and out of order."""

from __future__ import annotations

import asyncio

from bascule.runtime.log.nats import NatsLog
from bascule.schemas import subjects
from tests.faults.fault import Outcome, Setting
from tests.faults.ledger import Ledger, connected, event, everything, serving

_RUN = "faults"
_LEASE = 0.3
_ROUNDS = 3


async def redeliver_work(setting: Setting) -> Outcome:
    """No outcome is acknowledged in time, so that every trigger goes to several workers; all append their own."""
    rng, ledger = setting.rng("queue"), Ledger()
    async with serving(setting.folder / "home") as server, connected(server) as log:
        for i in range(setting.count):
            trigger = event(subjects.subject(_RUN, "job", f"i{i:04d}", "asked"), "do it")
            ledger.note(await log.append([trigger]), writer="asker")
        delivered: list[tuple[str, str]] = []
        for number in range(_ROUNDS):
            async with connected(server, lease=_LEASE) as other:
                delivered += [(subject, f"round {number}") for subject in await _take(other, setting.count)]
        rng.shuffle(delivered)

        async def append(subject: str, text: str) -> None:
            ledger.note(await log.append([event(subject.removesuffix("asked") + "done", text)]))

        await asyncio.gather(*(append(*d) for d in delivered))
        events = await everything(log)
    tally = ledger.audit(events)
    outcomes = sum(e.subject.endswith(".done") for e in events)
    setting.say(f"{len(delivered)} deliveries of {setting.count} triggers, answered in a shuffled order")
    return Outcome(
        injected=len(delivered) - setting.count,
        lost=tally.lost + max(0, setting.count - outcomes),
        duplicated=tally.duplicated + max(0, outcomes - setting.count),
        broken=tally.broken,
        note=f"{setting.count} triggers, {outcomes} outcomes",
    )


async def _take(log: NatsLog, count: int) -> list[str]:
    """Take every trigger and acknowledge none; the queue gives those of an earlier worker once its lease is over."""
    queue = await log.work(_RUN, "worker", [f"bascule.{_RUN}.*.*.asked"])
    taken: dict[str, None] = {}
    while len(taken) < count:
        taken |= dict.fromkeys(item.event.subject for item in await queue.next(count, 2.0))
    return list(taken)
