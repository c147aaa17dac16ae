"""One batch seen from the runtime: its harness's ``prepare`` has run once, and the episodes are forked from there.

The process that forks has run code of the harness by then. So nothing that it does is taken for a failure of ours, and
what it breaks is its own batch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import msgspec

from bascule.runtime.episodes.batch import Batch
from bascule.runtime.episodes.episode import Handler, Limits, Outcome
from bascule.runtime.episodes.host import EpisodeProcessError, ZygoteHost
from bascule.schemas.harness import Harness

# How often a batch is prepared anew after it was lost with all that ran in it.
LOSSES = 2


class Prepared:
    """A batch of a pool.

    Args:
        spawn: starts a zygote.

    Attributes:
        users: episodes that run or wait in it.
        over: it is to end with its last user.
    """

    def __init__(
        self, harness: Harness, batch: Batch, limits: Limits, spawn: Callable[..., Awaitable[ZygoteHost]]
    ) -> None:
        self.users = 0
        self.over = False
        self._harness = harness
        self._batch = batch
        self._limits = limits
        self._spawn = spawn
        self._losses = 0
        self._opening: asyncio.Task[ZygoteHost | Outcome] | None = None
        self._buried: set[asyncio.Task[None]] = set()

    async def failure(self) -> Outcome | None:
        """Prepare the batch if it is not; how that ended, where it failed.

        Raises:
            EpisodeProcessError: no process for it can be had.
        """
        opened = await self._open()
        return opened if isinstance(opened, Outcome) else None

    @property
    def shared(self) -> bool:
        """Whether its episodes are sealed off from one another; where they cannot be, each needs a batch of its own."""
        opened = self._opening.result() if self._opening is not None and self._opening.done() else None
        return not isinstance(opened, ZygoteHost) or opened.seals_guests

    async def run(self, opening: bytes, handler: Handler, limits: Limits) -> Outcome:
        """Run one episode in it; arguments as :meth:`HarnessPool.run` has them."""
        opened = await self._open()
        if isinstance(opened, Outcome):
            return opened
        return await opened.run(self._harness, opening, handler, limits)

    async def close(self) -> None:
        """End it with everything that runs in it."""
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                opened = await opening
                if isinstance(opened, ZygoteHost):
                    await opened.close()
        await asyncio.gather(*self._buried)

    async def _open(self) -> ZygoteHost | Outcome:
        while True:
            if self._opening is None:
                # A task of its own: whoever is cancelled while waiting for it takes it from nobody else.
                self._opening = asyncio.create_task(self._prepare())
            opening = self._opening
            try:
                opened = await asyncio.shield(opening)
            except BaseException as e:
                if opening.done() and self._opening is opening:
                    self._opening = None  # the next one tries again
                task = asyncio.current_task()
                if isinstance(e, asyncio.CancelledError) and not (task and task.cancelling()):
                    raise EpisodeProcessError("The batch was closed.", next_step="Start the pool again.") from None
                raise
            if isinstance(opened, Outcome) or opened.alive:
                return opened
            if self._opening is opening:
                self._bury(opened)
                self._losses += 1
                self._opening = None
                if opened.over is not None:
                    self._opening = _settled(Outcome(ending=opened.over, during="batch"))
                elif self._losses > LOSSES:
                    self._opening = _settled(Outcome(ending="lost", during="batch"))

    async def _prepare(self) -> ZygoteHost | Outcome:
        host = await self._spawn(guest=True)
        try:
            data = msgspec.json.encode({"data": self._batch.data, "seed": self._batch.seed})
            failed = await host.prepare(self._harness, data, self._limits)
        except BaseException:
            self._bury(host)
            raise
        if failed is None:
            return host
        self._bury(host)
        return failed

    def _bury(self, host: ZygoteHost) -> None:
        task = asyncio.create_task(host.close())
        self._buried.add(task)
        task.add_done_callback(self._buried.discard)


def _settled(outcome: Outcome) -> asyncio.Task[ZygoteHost | Outcome]:
    async def result() -> ZygoteHost | Outcome:
        return outcome

    return asyncio.create_task(result())
