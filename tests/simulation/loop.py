"""An event loop with virtual time that takes the ready steps of tasks in a seeded order.

What asyncio promises is kept: callbacks run in the order in which they were scheduled. Only the steps of different
tasks, whose order nobody may rely on, are drawn at random. Time moves when nothing is ready, to the next timer. Work
for executors is done inline. So a schedule depends on the seed alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import random
import time
from bisect import insort
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

#: Which process a task, a timer or a callback belongs to; None for the network and the simulation itself.
OWNER: contextvars.ContextVar[Owner | None] = contextvars.ContextVar("owner", default=None)


class Owner:
    """A simulated process, as the loop sees it: its living tasks, and whether it stands still."""

    def __init__(self) -> None:
        self.tasks: dict[int, Step] = {}
        self.paused = False
        self.held: list[asyncio.Handle] = []


class Hang(AssertionError):
    """Nothing will ever happen again, or a deadline has passed."""


class Step(asyncio.Task[Any]):
    """A task with a place in the order of creation."""

    serial: int


class SimulationLoop(asyncio.BaseEventLoop):
    """See the module's docstring.

    Args:
        deadline: virtual seconds after which a schedule counts as hanging.
        work: most virtual seconds until what an executor computes is there.
        patience: real seconds after which a schedule counts as hanging.
    """

    def __init__(self, rng: random.Random, *, deadline: float, work: float = 0.0, patience: float = 30.0) -> None:
        super().__init__()
        self._rng = rng
        self._now = 0.0
        self._deadline = deadline
        self._work = work
        self._patience = time.monotonic() + patience
        self._steps: list[tuple[int, int, asyncio.Handle]] = []
        self._serials = itertools.count()
        self._turns = 0
        self.set_task_factory(self._make_task)
        self.set_exception_handler(lambda loop, context: None)

    def time(self) -> float:
        return self._now

    @property
    def turns(self) -> int:
        """Steps taken so far."""
        return self._turns

    def abandon(self) -> None:
        """Cancel what is left, let it unwind, and close."""
        left = asyncio.all_tasks(self)
        for task in left:
            task.cancel()
        self._deadline = float("inf")
        with suppress(Hang):
            self.run_until_complete(asyncio.wait(left) if left else asyncio.sleep(0))
        self.close()

    def pause(self, owner: Owner) -> None:
        """Let nothing of ``owner`` run; its timers go off late."""
        owner.paused = True

    def resume(self, owner: Owner) -> None:
        """Let ``owner`` go on where it was."""
        owner.paused = False
        self._ready.extend(owner.held)
        owner.held.clear()

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Compute now; the result is there later."""
        future = self.create_future()
        settle: Callable[[Any], None] = future.set_result
        try:
            outcome = func(*args)
        except Exception as error:
            settle, outcome = future.set_exception, error
        if self._work:
            self.call_later(self._rng.random() * self._work, _settle, settle, future, outcome)
        else:
            self.call_soon(_settle, settle, future, outcome)
        return future

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        """Let an abandoned generator go as it is: when the collector finds it is no part of the schedule."""
        self._asyncgens.discard(agen)

    def _make_task(self, loop: Any, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        task = Step(coro, loop=loop, **options)
        task.serial = next(self._serials)
        context = options.get("context")
        owner = context.get(OWNER) if context is not None else OWNER.get()
        if owner is not None:
            owner.tasks[task.serial] = task
            task.add_done_callback(lambda t: owner.tasks.pop(t.serial, None))  # type: ignore[attr-defined]
        return task

    def _run_once(self) -> None:
        """One step of one task, after all callbacks that are due."""
        ready, steps = self._ready, self._steps
        while ready:
            handle = ready.popleft()
            if handle._cancelled:
                continue
            owner = handle._context.get(OWNER)
            if owner is not None and owner.paused:
                owner.held.append(handle)
                continue
            task = getattr(handle._callback, "__self__", None)
            if isinstance(task, Step):
                # Sorted by age, since the order of arrival may come from a set of tasks, which is not reproducible.
                insort(steps, (task.serial, id(handle), handle))
            else:
                handle._run()
        if self._stopping:
            return
        if not steps:
            self._advance()
            return
        _, _, handle = steps.pop(int(self._rng.random() * len(steps)))
        owner = handle._context.get(OWNER)
        if owner is not None and owner.paused:
            owner.held.append(handle)
        elif not handle._cancelled:
            handle._run()
        self._turns += 1
        if self._turns % 4096 == 0 and time.monotonic() > self._patience:
            raise Hang(f"busy for too long, at {self._now:.1f} virtual seconds")

    def _advance(self) -> None:
        timers = self._scheduled
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not timers:
            raise Hang(f"nothing is left to happen, at {self._now:.1f} virtual seconds")
        self._now = max(self._now, timers[0]._when)
        if self._now > self._deadline:
            raise Hang(f"not at its end after {self._now:.0f} virtual seconds")
        while timers and timers[0]._when <= self._now:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            self._ready.append(timer)


def _settle(settle: Callable[[Any], None], future: asyncio.Future[Any], outcome: Any) -> None:
    if not future.done():
        settle(outcome)
