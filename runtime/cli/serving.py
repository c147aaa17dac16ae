"""Serve one service for every run of a log: what ``bascule serve`` does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bascule.runtime.cli.launch import check_pins, state_of, view_of
from bascule.runtime.cli.store import Store, leaves
from bascule.runtime.exports.importing import unfinished
from bascule.runtime.runner import Service, View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.schemas import subjects
from bascule.schemas.errors import ConfigError, OutOfStep
from bascule.schemas.events import RunCancelled, RunResumed


def service_named(name: str) -> Service:
    """A service by name.

    Raises:
        ConfigError: there is no such service.
    """
    if name not in SERVICES:
        raise ConfigError(f"There is no service {name!r}.", next_step=f"Known: {', '.join(SERVICES)}.")
    return SERVICES[name]


async def serve_forever(store: Store, service: Service, only: str | None, say: Callable[[str], None]) -> None:
    """Serve one service for every run of the log, each run on its own; a failing run does not stop the others.

    A run that has ended is taken up again when ablations are asked for.

    Raises:
        OutOfStep: the processes that train together cannot go on.
    """
    serving: set[str] = set()

    async def one(run: str) -> None:
        if run in serving:
            return
        serving.add(run)
        delay = 1.0
        try:
            while not await attempt(run, delay):
                await asyncio.sleep(delay)
                delay = min(delay * 2, 60.0)
        finally:
            serving.discard(run)

    async def resumed(view: View) -> None:
        async for event in store.log.follow(f"bascule.{view.run}.run.>", after=view.state.seq):
            if isinstance(event.data, RunResumed | RunCancelled):
                return

    async def attempt(run: str, delay: float) -> bool:
        if unfinished(store.home, run):
            say(f"{run}: it is not whole yet. Looking again in {delay:.0f} s.")
            return False
        if await _finished(store, run):
            return True
        view = view_of(store, run, fresh=False)
        try:
            state = await state_of(store, run)
            if state.end is not None and not state.active:
                return True
            if state.paused is None:
                check_pins(state)
            say(f"{run}: serving {service.name}")
            await serve(view, [service])
            if view.state.paused is not None:
                say(f"{run}: paused")
                await resumed(view)
                return False
            say(f"{run}: done")
        except* Exception as errors:
            text = view.redaction.value("; ".join(str(e) or type(e).__name__ for e in leaves(errors)))
            view.logger.exception("service.failed", service=service.name)
            if any(isinstance(e, OutOfStep) for e in leaves(errors)):
                raise
            say(f"{run}: {text} Trying again in {delay:.0f} s.")
        else:
            return True
        return False

    async def each(pattern: str, group: asyncio.TaskGroup) -> None:
        async for event in store.log.follow(pattern):
            group.create_task(one(event.envelope.run))

    runs = subjects.token(only) if only else "*"
    async with asyncio.TaskGroup() as group:
        group.create_task(each(f"bascule.{runs}.run.run.started", group))
        group.create_task(each(f"bascule.{runs}.ablation.*.requested", group))


async def _finished(store: Store, run: str) -> bool:
    """Whether a run has ended and was never asked for more; says so without reading all of it."""
    if not await store.log.head(subjects.run_end(run)):
        return False
    return not await store.log.head(f"bascule.{run}.ablation.>")
