"""Working off triggers: shared among workers, each failure tried again, and what keeps failing set aside.

An acknowledgement carries no truth: whether something is done is seen in the log. So a trigger that comes twice, late
or out of order does no harm.
"""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from bascule.runtime.log.dead_letters import DeadLetter
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import BasculeError
from bascule.schemas.events import EpisodesRequested, TrajectoryLogged

if TYPE_CHECKING:
    from bascule.runtime.log.protocol import WorkItem
    from bascule.runtime.runner import View
    from bascule.runtime.state import RunState

ATTEMPTS: Final = 3
RETRY_SECONDS: Final = 1.0
IDLE_SECONDS: Final = 1.0

Handle = Callable[[Recorded], Awaitable[None]]


class DeadLettered(BasculeError):
    """The run cannot go on without an event that a service has given up on."""

    code = "bascule.dead_letter"


async def work_off(view: View, service: str, pattern: str, handle: Handle, *, slots: int, batch: int = 1) -> None:
    """Handle the run's events under ``pattern``, at most ``slots`` at a time, until cancelled.

    ``handle`` may be called again for the same event. If it raises a BasculeError, alone or in a group, that ends the
    service: it says that something around the event is not usable (the log, an engine). Any other exception is the
    event's own: after ``ATTEMPTS`` of them a dead letter points to it and the others go on.

    Args:
        batch: how many to take at once; what one worker takes no other can do.

    Raises:
        DeadLettered: nothing is left but what cannot be done.
    """
    worker = _Worker(view, service, handle)
    again = await worker.look()
    queue = await view.writer(service).work(view.run, service, [pattern], fresh=view.fresh)
    running: set[asyncio.Task[None]] = set()
    try:
        async with asyncio.TaskGroup() as group:

            def begin(work: Coroutine[Any, Any, None]) -> None:
                task = group.create_task(work)
                running.add(task)
                task.add_done_callback(running.discard)

            for event in again:
                begin(worker.event(event))
            while True:
                while len(running) >= slots:
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                items = await queue.next(min(batch, slots - len(running)), IDLE_SECONDS)
                for item in items:
                    begin(worker.item(item))
                if not items:
                    for event in await worker.look():
                        begin(worker.event(event))
                    if not running:
                        worker.check()
    finally:
        await queue.close()


class _Worker:
    """Handles events, and keeps an eye on what any worker of the run has given up on."""

    def __init__(self, view: View, service: str, handle: Handle) -> None:
        self._view = view
        self._service = service
        self._handle = handle
        self._dead: dict[tuple[str, int], tuple[DeadLetter, Recorded]] = {}
        self._retried: dict[int, int] = {}
        self._under_way: set[int] = set()

    async def item(self, item: WorkItem) -> None:
        if item.event.seq in self._under_way:
            return  # delivered twice; the first of the two says when it is done
        heartbeat = asyncio.create_task(_heartbeat(item))
        try:
            if (self._service, item.event.seq) not in self._dead:
                await self.event(item.event)
        finally:
            heartbeat.cancel()
        await item.done()

    async def event(self, event: Recorded) -> None:
        """Handle an event, several times if it fails, and bury it in the end."""
        self._under_way.add(event.seq)
        try:
            await self._tried(event)
        finally:
            self._under_way.discard(event.seq)

    async def _tried(self, event: Recorded) -> None:
        await self._view.until(lambda s: s.seq >= event.seq)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._handle(event)
            except Exception as error:
                if ends_service(error):
                    raise
                self._view.logger.exception("work.failed", service=self._service, subject=event.subject)
                if attempt == ATTEMPTS:
                    await self._bury(event, error)
                else:
                    await asyncio.sleep(RETRY_SECONDS * 4 ** (attempt - 1))
            else:
                return

    async def _bury(self, event: Recorded, error: Exception) -> None:
        frames = "".join(f"{f.filename}:{f.name}" for f in traceback.extract_tb(error.__traceback__))
        letter = DeadLetter(
            run=self._view.run,
            service=self._service,
            seq=event.seq,
            subject=event.subject,
            error=self._view.redaction.value(f"{type(error).__name__}: {error}")[:500],
            trace=hashlib.blake2b(frames.encode(), digest_size=8).hexdigest(),
            version=self._view.version(self._service),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            retries=self._retried.get(event.seq, 0),
        )
        await self._view.writer(self._service).letters.bury(letter)
        self._dead[self._service, event.seq] = letter, event
        self._view.logger.error("work.dead", service=self._service, subject=event.subject, error=letter.error)

    async def look(self) -> list[Recorded]:
        """Learn what the run's workers gave up on; the events of this service that somebody asked to try again."""
        dead, again = {}, []
        for letter in await self._view.log.letters.list(self._view.run):
            key = letter.service, letter.seq
            known = self._dead.get(key)
            event = known[1] if known else await self._view.log.get(letter.subject)
            if event is None:
                continue
            if letter.dead:
                dead[key] = letter, event
            elif letter.service == self._service and self._retried.get(letter.seq, 0) < letter.retries:
                self._retried[letter.seq] = letter.retries
                again.append(event)
        self._dead = dead
        return again

    def check(self) -> None:
        """Raise if nothing that the run waits for can come."""
        if not stuck(self._view.state, [event for _, event in self._dead.values()]):
            return
        letter = next(iter(self._dead.values()))[0]
        raise DeadLettered(
            f"The run {self._view.run} cannot go on: {letter.subject} (sequence {letter.seq}) failed in "
            f"{letter.service} {ATTEMPTS} times: {letter.error}.",
            next_step=f"Mend the cause, then `bascule dlq retry {self._view.run}` and go on with the run.",
        )


def ends_service(error: Exception) -> bool:
    """Whether ``error``, or one of a group of errors, says that something around the event is not usable."""
    return isinstance(error, BasculeError) or (
        isinstance(error, ExceptionGroup) and error.subgroup(BasculeError) is not None
    )


def stuck(state: RunState, dead: Sequence[Recorded]) -> bool:
    """Whether every evaluation that the run waits for waits for nothing but the events in ``dead``."""
    given_up: set[tuple[str, int, int]] = set()
    for event in dead:
        match event.data:
            case EpisodesRequested(evaluation=name, positions=positions, samples=samples):
                given_up |= {(name, p, n) for p in positions for n in range(samples)}
            case TrajectoryLogged(evaluation=name, position=position, sample=sample):
                given_up.add((name, position, sample))
            case _:
                pass
    waiting = {
        (name, *key)
        for name, e in state.evaluations.items()
        if e.completed is None
        for key in e.trajectories()
        if key not in e.verdicts
    }
    return bool(waiting) and waiting <= given_up


async def _heartbeat(item: WorkItem) -> None:
    while True:
        await asyncio.sleep(3)
        await item.progress()
