"""How often the sealed split of a task has been looked at: each look makes the next one worth less."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from bascule.schemas.envelope import Recorded
from bascule.schemas.events import AblationRequested, RunCompleted, RunStarted
from bascule.schemas.subjects import ROOT

Read = Callable[[str], AsyncIterator[Recorded]]


async def looks(read: Read, task: str) -> dict[str, int]:
    """Looks at the sealed split of ``task``, by run, in the order of the runs' starts.

    A completed run is one look, which compares its first harness with its best candidate; an ablation is another.

    Args:
        read: gives the events that match a pattern.
    """
    found = {
        event.envelope.run: 0
        async for event in read(f"{ROOT}.*.run.run.started")
        if isinstance(event.data, RunStarted) and event.data.config.task.name == task
    }
    for pattern in (f"{ROOT}.*.run.run.end", f"{ROOT}.*.ablation.*.requested"):
        async for event in read(pattern):
            if event.envelope.run in found and isinstance(event.data, RunCompleted | AblationRequested):
                found[event.envelope.run] += 1
    return found
