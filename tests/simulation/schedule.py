"""One schedule: the processes of a seeded plan serve the run until it is over, and then what holds is checked."""

from __future__ import annotations

import asyncio
import contextvars
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import msgspec

from bascule.runtime import redaction
from bascule.runtime.log import memory
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.protocol import EventLog, NewEvent
from bascule.runtime.runner import View, serve
from bascule.runtime.state import RunState
from bascule.schemas import codec, subjects
from bascule.schemas.codec import encode
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import LogUnavailable
from tests.simulation import world
from tests.simulation.effects import plugins, services
from tests.simulation.faults import FaultyBlobs, FaultyLog, MemoryBlobs, Process
from tests.simulation.loop import OWNER, Hang, SimulationLoop
from tests.simulation.plan import CALM_PLAN, DEADLINE, LEASE, Plan, Weather, drawn

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class Played(msgspec.Struct, kw_only=True):
    """What one schedule came to.

    Attributes:
        events: the run's log at the end.
        views: each process's state when it let go of the ended run.
        effects: how many effects were begun.
        problems: what was found wrong while it ran.
    """

    seed: int
    plan: Plan
    events: list[Recorded]
    views: list[RunState]
    effects: int
    turns: int
    seconds: float
    problems: list[str]
    trace: list[str]


class _Clock:
    """Stands in for ``datetime`` where events get their time: the clock of the process that writes."""

    @staticmethod
    def now(zone: tzinfo) -> datetime:
        process = OWNER.get()
        assert isinstance(process, Process)
        return (_EPOCH + timedelta(seconds=process.clock())).astimezone(zone)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """The virtual clock for dates; memories of pure functions that are asked the same in every schedule; and no digest
    of a state, which would only be logged: the states themselves are compared.
    """
    stand_ins: list[tuple[Any, str, Any]] = [
        (redaction, "datetime", _Clock),
        (memory, "matches", _matches),
        (codec, "event_id", _event_id),
        (RunState, "digest", lambda state: b""),
    ]
    real = [getattr(place, name) for place, name, _ in stand_ins]
    for place, name, stand_in in stand_ins:
        setattr(place, name, stand_in)
    try:
        yield
    finally:
        for (place, name, _), was in zip(stand_ins, real, strict=True):
            setattr(place, name, was)


_matches = lru_cache(20_000)(memory.matches)
_event_id = lru_cache(5_000)(codec.event_id)


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    """Where adapters lie for a moment; in memory where that can be had."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)


class _Logger:
    """What the services log; an exception that a worker met is a problem, since nothing here raises on purpose."""

    def __init__(self, weather: Weather, name: str) -> None:
        self._weather = weather
        self._name = name

    def info(self, event: str, **fields: Any) -> None:
        pass

    def warning(self, event: str, **fields: Any) -> None:
        self._weather.note(self._name, f"warns: {event} {fields}")

    def exception(self, event: str, **fields: Any) -> None:
        error = sys.exc_info()[1]
        self._weather.problems.append(f"{self._name}: {event} {fields}: {error!r}")

    error = exception


class _Simulation:
    def __init__(self, plan: Plan, weather: Weather, home: Path) -> None:
        self.plan = plan
        self.weather = weather
        self.home = home
        self.log = MemoryLog(lease=LEASE)
        self.blobs = MemoryBlobs()
        self.views: list[RunState] = []
        self.processes: dict[int, Process] = {}

    async def run(self) -> None:
        subject = subjects.run_started(world.RUN)
        payload = encode(
            Draft(subject=subject, step=0, data=world.STARTED),
            run=world.RUN,
            producer=world.producer("cli"),
            time="2026-01-01T00:00:00Z",
            root=None,
        )
        await self.log.append([NewEvent(subject=subject, payload=payload)])
        loop = asyncio.get_running_loop()
        for when, machine in self.plan.kills:
            loop.call_at(when, self._kill, machine)
        for when, machine, seconds in self.plan.pauses:
            loop.call_at(when, self._pause, machine, seconds)
        async with asyncio.TaskGroup() as group:
            for i in range(len(self.plan.machines)):
                group.create_task(self._operate(i))

    def _kill(self, machine: int) -> None:
        if process := self.processes.get(machine):
            process.kill("at a moment of no account")

    def _pause(self, machine: int, seconds: float) -> None:
        process = self.processes.get(machine)
        if process is None or process.dead:
            return
        process.note(f"stands still for {seconds:.1f} s")
        self.weather.loop.pause(process)
        self.weather.loop.call_later(seconds, self.weather.loop.resume, process)

    async def _operate(self, machine: int) -> None:
        """Start the machine's process again and again, until it sees the end of the run."""
        weather, rng = self.weather, self.weather.rng
        life = 0
        while True:
            process = Process(f"{'ABCDE'[machine]}{life}", weather, self.plan.clocks[machine % len(self.plan.clocks)])
            self.processes[machine] = process
            process.note(f"starts {' '.join(self.plan.machines[machine])}")
            context = contextvars.copy_context()
            context.run(OWNER.set, process)
            task = weather.loop.create_task(self._live(process, self.plan.machines[machine]), context=context)
            await asyncio.wait([task])
            if not process.dead:
                error = None if task.cancelled() else task.exception()
                if error is None:
                    assert process.view is not None
                    self.views.append(process.view.state)
                    process.note("is done")
                    return
                process.note(f"fails: {'; '.join(type(e).__name__ for e in leaves(error))}")
                weather.problems += [f"{process.name}: {e!r}" for e in leaves(error) if not _expected(e)]
                # What a failed service leaves behind goes on if its process tries again by itself.
                if self.plan.fresh or rng.random() < 0.5:
                    process.kill("of that")
            life += 1
            await asyncio.sleep(rng.choice((0.0, 0.5, 3.0)))

    async def _live(self, process: Process, names: tuple[str, ...]) -> None:
        log: EventLog = FaultyLog(self.log, process)  # type: ignore[assignment]
        process.view = View(
            log,
            FaultyBlobs(self.blobs, process),  # type: ignore[arg-type]
            plugins(),
            world.RUN,
            world.producer,
            home=self.home,
            fresh=self.plan.fresh,
            logger=_Logger(self.weather, process.name),
            clock=process.clock,
        )
        known = services()
        await serve(process.view, [known[name] for name in names])


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions of a group."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for e in error.exceptions for leaf in leaves(e)]
    return [error]


def _expected(error: BaseException) -> bool:
    return isinstance(error, LogUnavailable)


def play(seed: int) -> Played:
    """The schedule of a seed."""
    rng = random.Random(seed)
    return play_plan(drawn(rng), seed, rng)


@cache
def calm() -> Played:
    """The run on one machine, with nothing going wrong."""
    return play_plan(CALM_PLAN, -1, random.Random(0))


def play_plan(plan: Plan, seed: int, rng: random.Random) -> Played:
    """Play ``plan``; a hang is a problem."""
    loop = SimulationLoop(random.Random(rng.random()), deadline=DEADLINE, work=plan.work)
    weather = Weather(plan, rng, loop)
    with _stand_ins():
        simulation = _Simulation(plan, weather, Path(_home().name))
        try:
            loop.run_until_complete(simulation.run())
        except Hang as error:
            weather.problems.append(f"the run hangs: {error}")
        except BaseExceptionGroup as group:
            weather.problems += [repr(e) for e in leaves(group)]
        finally:
            for process in simulation.processes.values():
                process.dead = True
                loop.resume(process)
            loop.abandon()
    return Played(
        seed=seed,
        plan=plan,
        events=list(simulation.log._events),
        views=simulation.views,
        effects=weather.effects,
        turns=loop.turns,
        seconds=loop.time(),
        problems=weather.problems,
        trace=weather.trace,
    )
