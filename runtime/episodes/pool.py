"""The pool of episode processes: how many run at one time, and below which zygote."""

from __future__ import annotations

import asyncio

from bascule.runtime.episodes.episode import Handler, Limits, Outcome
from bascule.runtime.episodes.host import EpisodeProcessError, ZygoteHost
from bascule.schemas.harness import Harness


class HarnessPool:
    """Runs harness code in processes of its own.

    Args:
        children: most processes at one time; further episodes wait their turn.
    """

    def __init__(self, *, children: int = 64) -> None:
        self._slots = asyncio.Semaphore(children)
        self._starting = asyncio.Lock()
        self._closed = False
        self._zygote: ZygoteHost | None = None
        self._retired: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the zygote now rather than with the first episode.

        Raises:
            EpisodeProcessError: it does not start.
        """
        self._closed = False
        await self._shared()

    async def close(self) -> None:
        """End every episode that still runs, and remove what they left. The pool may be started again."""
        self._closed = True
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            self._retire(zygote)
        while self._retired:
            await asyncio.gather(*self._retired)

    async def run(
        self, harness: Harness, opening: bytes, handler: Handler, *, limits: Limits, alone: bool = False
    ) -> Outcome:
        """Run one episode in a process of its own; when this returns, nothing of the episode is alive.

        Args:
            harness: whose ``harness.py`` is run.
            opening: JSON object with ``example``, ``seed`` and ``tools``, the first frame that the process reads.
            handler: answers the frames that the process sends.
            limits: what the process may use.
            alone: under a zygote of its own, where no other episode can do it harm.

        Raises:
            EpisodeProcessError: the zygote does not start, or the pool is closed.
        """
        async with self._slots:
            if self._closed:
                raise EpisodeProcessError("The pool of episode processes is closed.", next_step="Start it again.")
            if not alone:
                return await (await self._shared()).run(harness, opening, handler, limits)
            zygote = await ZygoteHost.spawn()
            try:
                return await zygote.run(harness, opening, handler, limits)
            finally:
                self._retire(zygote)

    async def _shared(self) -> ZygoteHost:
        async with self._starting:
            if self._zygote is not None and not self._zygote.alive:
                self._retire(self._zygote)
                self._zygote = None
            if self._zygote is None:
                self._zygote = await ZygoteHost.spawn()
            return self._zygote

    def _retire(self, zygote: ZygoteHost) -> None:
        task = asyncio.create_task(zygote.close())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)
