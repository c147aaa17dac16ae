"""The notary: while a run is served, it notes in the log and in the anchor how far the run's chain goes.

A task of the verifier service. Any number of them may serve a run: a checkpoint is fenced by the one before it, so that
the checkpoints of a run are one sequence, whoever wrote them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

from bascule.runtime.log.protocol import Fence
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import BasculeError, Conflict
from bascule.schemas.events import LogCheckpointed

if TYPE_CHECKING:
    from bascule.runtime.runner import View

NAME: Final = "verifier"
EVERY: Final = 256
SECONDS: Final = 10.0
_LET_GO_SECONDS: Final = 5.0
_ATTEMPTS: Final = 8


class Notary:
    """Notes how far one run goes.

    Args:
        every: events after which a checkpoint is due.
        seconds: time after which one is due if anything but checkpoints is new.
    """

    def __init__(self, view: View, *, every: int = EVERY, seconds: float = SECONDS) -> None:
        self._view = view
        self._every = every
        self._seconds = seconds
        self._new = asyncio.Event()
        self._due = asyncio.Event()
        view.listeners.append(self._look)

    def _look(self, event: Recorded) -> None:
        del event
        waiting = self._view.watch.open
        for flag, up in ((self._new, waiting > 0), (self._due, waiting >= self._every)):
            if up:
                flag.set()
            else:
                flag.clear()

    async def run(self) -> None:
        """Note until cancelled.

        Raises:
            Corrupt: the anchor is not intact, or belongs to another log.
            LogError: the log or the anchor cannot be written.
        """
        await self._view.ready()
        while True:
            await self._new.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await self._due.wait()
            if self._view.watch.open:
                newest = self._view.watch.newest
                await self._checkpoint()
                await self._anchor()
                # Until it comes back as an event; if another notary was faster, its checkpoint does.
                await self._view.until(lambda _: self._view.watch.newest > newest)  # noqa: B023

    async def close(self) -> None:
        """Note everything that is in the log now: the run has ended, or this process lets go of it."""
        if not self._view.caught_up:
            return
        for _ in range(_ATTEMPTS):
            await self._view.catch_up()
            if not self._view.watch.open:
                break
            await self._checkpoint()
        await self._anchor()

    async def _checkpoint(self) -> None:
        """Append a checkpoint, unless there is one that this process has not seen yet."""
        view, watch = self._view, self._view.watch
        data = LogCheckpointed(count=watch.chain.count, head=watch.chain.head.hex())
        draft = Draft(
            subject=subjects.log_checkpointed(view.run, data.count), step=max(view.state.steps, default=0), data=data
        )
        with suppress(Conflict):
            await view.append(NAME, [draft], fence=Fence(filter=subjects.log_aggregate(view.run), seq=watch.newest))

    async def _anchor(self) -> None:
        if self._view.anchor is not None:
            head = self._view.watch.head
            extent = await self._view.log.extent()
            await asyncio.to_thread(self._view.anchor.append, extent.log, {self._view.run: head})


@asynccontextmanager
async def notarised(view: View) -> AsyncIterator[Notary]:
    """A notary for as long as a run is served. Its last note covers all that is in the log when the serving ends."""
    notary = Notary(view)
    try:
        yield notary
    except BaseException:
        # The failure is what counts; what stays open is the next notary's.
        with suppress(BasculeError, TimeoutError):
            async with asyncio.timeout(_LET_GO_SECONDS):
                await notary.close()
        raise
    await notary.close()
