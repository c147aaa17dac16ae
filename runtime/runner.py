"""One runner for all services: subscription, fold, decisions, appends, effects, drain.

The same code decides live and after a crash. Every event is folded and handed to each service's ``decide``; what is
decided but not in the log once the log has been read to its end is appended then. So a crash between a trigger and its
consequence costs nothing, and replay is the same pass without the appends.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog
from msgspec.structs import replace

from bascule.plugins.loader import Plugins
from bascule.runtime.log.anchor import Anchor
from bascule.runtime.log.blobs import Blobs
from bascule.runtime.log.guard import Watch, rule_out_damage
from bascule.runtime.log.protocol import EventLog, Fence, NewEvent
from bascule.runtime.notary import NAME as NOTARY
from bascule.runtime.notary import notarised
from bascule.runtime.redaction import Redaction
from bascule.runtime.services.inference import Engines
from bascule.runtime.state import RunState
from bascule.runtime.world import World, world_of
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.errors import BasculeError, NotFound
from bascule.schemas.events import RunForked, RunStarted

Decide = Callable[[RunState, Recorded, World], list[Draft]]


class Effects(Protocol):
    """The effects of one service on one run."""

    async def run(self, view: View) -> None:
        """Work until cancelled, which happens when the run needs nothing more."""
        ...


@dataclass(frozen=True)
class Service:
    """A service: a name, a pure ``decide``, and effects if it has any."""

    name: str
    decide: Decide
    effects: Callable[[], Effects] | None = None


class View:
    """One process's view of one run: its folded state, kept up to date, and the way to append to it.

    Args:
        writers: the log as each service may write it, by service; ``log`` stands in for the others.
        fresh: deliver shared work again at once instead of waiting for the leases of workers that are gone; only right
            where no other process serves the run.
        anchor: what the log must not be behind; None where nothing is kept outside it.
    """

    def __init__(
        self,
        log: EventLog,
        blobs: Blobs,
        plugins: Plugins,
        run: str,
        producer: Callable[[str], Producer],
        *,
        home: Path,
        fresh: bool,
        writers: Mapping[str, EventLog] | None = None,
        anchor: Anchor | None = None,
        logger: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.log = log
        self._writers = writers or {}
        self.anchor = anchor
        self.watch = Watch(run)
        self.blobs = blobs
        self.plugins = plugins
        self.redaction = Redaction.of(plugins.registry)
        self.run = run
        self.home = home
        self.fresh = fresh
        self.clock = clock
        self.logger = logger if logger is not None else structlog.get_logger()
        self.state = RunState(run=run)
        self.listeners: list[Callable[[Recorded], None]] = []
        self.engines = Engines()
        self._producer = producer
        self._world: World | None = None
        self._changed = asyncio.Condition()
        self._version = 0
        self._caught_up = asyncio.Event()

    @property
    def world(self) -> World:
        assert self._world is not None
        return self._world

    def writer(self, service: str) -> EventLog:
        """The log with the permissions of ``service``."""
        return self._writers.get(service, self.log)

    def version(self, service: str) -> str:
        """The version of the code that writes as ``service``."""
        return self._producer(service).version

    async def append(self, service: str, drafts: Sequence[Draft], *, fence: Fence | None = None) -> list[Recorded]:
        """Redact, encode and append; what is already there is adopted. Nothing quotes an item of a restricted task.

        Raises:
            PluginError: a redactor failed, and so nothing was appended.
        """
        producer = self._producer(service)
        withhold = self._world.withholding if self._world is not None else None
        if withhold is not None:
            drafts = [replace(d, data=withhold.value(d.data)) for d in drafts]
        new = [
            NewEvent(subject=d.subject, payload=self.redaction.encoded(d, run=self.run, producer=producer))
            for d in drafts
        ]
        return await self.writer(service).append(new, fence=fence)

    @property
    def caught_up(self) -> bool:
        """Whether the log has been read to its end once."""
        return self._caught_up.is_set()

    async def ready(self) -> None:
        """Wait until the log has been read to its end once."""
        await self._caught_up.wait()

    async def changes(self) -> AsyncIterator[RunState]:
        """The state, each time that it has moved, skipping what nobody looked at."""
        await self.ready()
        seen = -1
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._version > seen)  # noqa: B023
                seen = self._version
            yield self.state

    async def until(self, condition: Callable[[RunState], bool]) -> None:
        """Wait until the folded state satisfies ``condition``."""
        async with self._changed:
            await self._changed.wait_for(lambda: condition(self.state))

    async def _notify(self) -> None:
        async with self._changed:
            self._version += 1
            self._changed.notify_all()

    async def follow(self, services: Sequence[Service]) -> None:
        """Fold the run's events, decide, and append what follows, until the run has ended or is paused.

        Raises:
            NotFound: there is no such run.
            Corrupt: the log is not the one that was anchored. Nothing has been appended then.
        """
        try:
            await self._follow(services)
        except BasculeError:
            raise
        except Exception:
            await rule_out_damage(self.watch, self.log)
            raise

    async def _follow(self, services: Sequence[Service]) -> None:
        pattern = f"bascule.{self.run}.>"
        if self.anchor is not None:  # before the log, which is ahead of it at any time
            self.watch = Watch(self.run, self.anchor.read().heads.get(self.run))
        head = await self.log.head(pattern)
        if head == 0:
            self.watch.finish()
            raise NotFound(f"There is no run {self.run!r} in this log.", next_step="`bascule status` lists the runs.")
        decided: dict[str, tuple[str, list[Draft]]] = {}
        async with contextlib.aclosing(self.log.follow(pattern)) as events:  # type: ignore[type-var]
            async for event in events:
                self.watch.add(event)
                self.state.apply(event)
                if isinstance(event.data, RunStarted | RunForked) and self.state.started is not None:
                    self._world = await asyncio.to_thread(world_of, self.plugins, self.state.started)
                decided.pop(event.subject, None)
                for service in services:
                    drafts = service.decide(self.state, event, self.world)
                    if drafts:
                        decided[drafts[0].subject] = (service.name, drafts)
                for listener in self.listeners:
                    listener(event)
                if event.seq < head:
                    continue
                self.watch.finish()
                if self.state.active:
                    for name, drafts in decided.values():
                        await self.append(name, drafts)
                decided.clear()
                self._caught_up.set()
                await self._notify()
                if not self.state.active:
                    return

    async def catch_up(self) -> None:
        """Fold what has come since :meth:`follow` ended, deciding nothing."""
        async for event in self.log.read(f"bascule.{self.run}.>", after=self.watch.chain.seq):
            self.watch.add(event)
            self.state.apply(event)
            for listener in self.listeners:
                listener(event)


async def serve(view: View, services: Sequence[Service]) -> None:
    """Run services on one view until the run has ended or is paused; the first failure ends them all."""
    async with contextlib.AsyncExitStack() as stack:
        notary = await stack.enter_async_context(notarised(view)) if any(s.name == NOTARY for s in services) else None
        group = await stack.enter_async_context(asyncio.TaskGroup())
        effects = [group.create_task(s.effects().run(view), name=s.name) for s in services if s.effects is not None]
        if notary is not None:
            effects.append(group.create_task(notary.run(), name="notary"))
        await view.follow(services)
        for task in effects:
            task.cancel()
    # What this process held when it let go, for a comparison with a fold of the log.
    digest = hashlib.blake2b(view.state.digest(), digest_size=16).hexdigest()
    view.logger.info("run.left", seq=view.state.seq, state=digest)
