"""How often the sealed split of a task has been looked at: each look makes the next one worth less."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from bascule.schemas.envelope import Recorded
from bascule.schemas.events import AblationRequested, RunCompleted, RunStarted
from bascule.schemas.run import PluginChoice
from bascule.schemas.subjects import ROOT

Read = Callable[[str], AsyncIterator[Recorded]]
#: Parameters that name a user's file or folder with the data of a task.
_FILES = ("path", "h5ad")


def same_data(one: PluginChoice, other: PluginChoice) -> bool:
    """Whether two tasks have the same sealed data: one name and, where the data are a user's own, one file.

    A file is the same at the same path, also when it was changed there, and anywhere with the same contents. Other
    parameters, such as a regime, make no other data; so a look is rather counted once too often than not.
    """
    if one.name != other.name:
        return False
    files = [tuple(c.params[p] for p in _FILES if c.params.get(p)) for c in (one, other)]
    contents = [c.params.get("sha256") for c in (one, other)]
    return files[0] == files[1] or (contents[0] is not None and contents[0] == contents[1])


async def looks(read: Read, task: PluginChoice) -> dict[str, int]:
    """Looks at the sealed split of ``task``, by run, in the order of the runs' starts.

    A completed run is one look, which compares its first harness with its best candidate; an ablation is another.

    Args:
        read: gives the events that match a pattern.
        task: as a run recorded it; see :func:`same_data`.
    """
    found = {
        event.envelope.run: 0
        async for event in read(f"{ROOT}.*.run.run.started")
        if isinstance(event.data, RunStarted) and same_data(event.data.config.task, task)
    }
    for pattern in (f"{ROOT}.*.run.run.end", f"{ROOT}.*.ablation.*.requested"):
        async for event in read(pattern):
            if event.envelope.run in found and isinstance(event.data, RunCompleted | AblationRequested):
                found[event.envelope.run] += 1
    return found
