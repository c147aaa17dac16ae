"""The pool of episode processes: how many run at one time, and below which zygote."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from functools import partial

from bascule.runtime.episodes.batch import Batch
from bascule.runtime.episodes.episode import Handler, Limits, Outcome
from bascule.runtime.episodes.host import EpisodeProcessError, ZygoteHost
from bascule.runtime.episodes.prepared import Prepared
from bascule.schemas.harness import Harness

BATCHES = 2


class HarnessPool:
    """Runs harness code in processes of its own.

    Args:
        children: most processes at one time; further episodes wait their turn.
        unsafe: run them unconfined.
        without: mechanisms of confinement that are not to be used though the machine has them.
    """

    def __init__(self, *, children: int = 64, unsafe: bool = False, without: tuple[str, ...] = ()) -> None:
        self._slots = asyncio.Semaphore(children)
        self._spawn = partial(ZygoteHost.spawn, unsafe=unsafe, without=without)
        self._starting = asyncio.Lock()
        self._closed = False
        self._zygote: ZygoteHost | None = None
        self._batches: OrderedDict[tuple[str, str], Prepared] = OrderedDict()
        self._idle = asyncio.Condition()
        self._retired: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the zygote now rather than with the first episode.

        Raises:
            EpisodeProcessError: it does not start, or cannot confine what runs below it.
        """
        self._closed = False
        await self._shared()

    async def close(self) -> None:
        """End every episode that still runs, and remove what they left. The pool may be started again."""
        self._closed = True
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            self._retire(zygote)
        for batch in self._batches.values():
            self._retire(batch)
        self._batches.clear()
        async with self._idle:
            self._idle.notify_all()
        while self._retired:
            await asyncio.gather(*self._retired)

    async def retire(self, key: str) -> None:
        """End the batches of this key; those that episodes still run in, after the last of these."""
        async with self._idle:
            for name, batch in list(self._batches.items()):
                if name[0] == key:
                    batch.over = True
                    self._put_away(name, batch)
            self._idle.notify_all()

    async def run(
        self,
        harness: Harness,
        opening: bytes,
        handler: Handler,
        *,
        limits: Limits,
        batch: Batch | None = None,
        alone: bool = False,
    ) -> Outcome:
        """Run one episode in a process of its own; when this returns, nothing of the episode is alive.

        Args:
            harness: whose ``harness.py`` is run.
            opening: JSON object with ``example``, ``seed`` and ``tools``, the first frame that the process reads.
            handler: answers the frames that the process sends.
            limits: what the process may use.
            batch: whose prepared process it is forked from; what ``prepare`` ended by, the episode ends by too.
            alone: under a zygote of its own, where no other episode can do it harm; not for an episode of a batch.

        Raises:
            EpisodeProcessError: the zygote does not start, or the pool is closed.
        """
        if batch is not None:
            return await self._run_prepared(batch, harness, opening, handler, limits)
        async with self._slots:
            self._check()
            if not alone:
                return await (await self._shared()).run(harness, opening, handler, limits)
            zygote = await self._spawn()
            try:
                return await zygote.run(harness, opening, handler, limits)
            finally:
                self._retire(zygote)

    def _check(self) -> None:
        if self._closed:
            raise EpisodeProcessError("The pool of episode processes is closed.", next_step="Start it again.")

    async def _shared(self) -> ZygoteHost:
        async with self._starting:
            if self._zygote is not None and not self._zygote.alive:
                self._retire(self._zygote)
                self._zygote = None
            if self._zygote is None:
                self._zygote = await self._spawn()
            return self._zygote

    async def _run_prepared(
        self, batch: Batch, harness: Harness, opening: bytes, handler: Handler, limits: Limits
    ) -> Outcome:
        name = (batch.key, harness.digest)
        # Whoever waits for a batch holds no slot: those inside another one need theirs to be done with it.
        prepared = await self._enter(name, batch, harness, limits)
        try:
            failure = await prepared.failure()
            if failure is not None:
                return failure
            async with self._slots:
                self._check()
                if prepared.shared:
                    return await prepared.run(opening, handler, limits)
                own = Prepared(harness, batch, limits, self._spawn)
                try:
                    return await own.run(opening, handler, limits)
                finally:
                    self._retire(own)
        finally:
            async with self._idle:
                prepared.users -= 1
                self._put_away(name, prepared)
                self._idle.notify_all()

    async def _enter(self, name: tuple[str, str], batch: Batch, harness: Harness, limits: Limits) -> Prepared:
        """The batch of this name, opened if need be once there is room for it."""
        async with self._idle:
            await self._idle.wait_for(lambda: self._closed or name in self._batches or self._room())
            self._check()
            if name not in self._batches:
                self._batches[name] = Prepared(harness, batch, limits, self._spawn)
            self._batches.move_to_end(name)
            prepared = self._batches[name]
            prepared.users += 1
            prepared.over = False
            return prepared

    def _room(self) -> bool:
        """Whether one more batch may be open; the one that was used least recently makes place."""
        if len(self._batches) < BATCHES:
            return True
        idle = next((name for name, batch in self._batches.items() if not batch.users), None)
        if idle is None:
            return False
        self._retire(self._batches.pop(idle))
        return True

    def _put_away(self, name: tuple[str, str], batch: Prepared) -> None:
        if batch.over and not batch.users and self._batches.get(name) is batch:
            del self._batches[name]
            self._retire(batch)

    def _retire(self, what: ZygoteHost | Prepared) -> None:
        task = asyncio.create_task(what.close())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)
