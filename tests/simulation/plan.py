"""What goes wrong in a schedule, drawn from its seed, and when it strikes."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec

from bascule.schemas.errors import Conflict
from tests.simulation.loop import SimulationLoop

SERVICES = ("meta", "rollout", "verifier", "feedback", "trainer")
#: Virtual seconds: a work item's lease, when the last fault comes, and when a schedule that is not over hangs.
LEASE, CALM, DEADLINE = 4.0, 30.0, 240.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What may go wrong in one schedule; probabilities are per operation, times in virtual seconds.

    Attributes:
        machines: the services of each process.
        fresh: the one process takes all work again when it starts.
        latency: mean of an operation; effort: longest effect; work: longest computation in a thread.
        lag: probability that a follower is late with an event, by up to ``lag_seconds``.
        faults: at most so many operations are struck, none of the first ``spared`` that could be.
        refuse, lose, late, crash: not done; done and not acknowledged; done later, when the sender knows of no answer;
            the process dies before or after it, or with the operation still under way.
        forget_ack, duplicate, reorder: of deliveries of shared work.
        pauses: (when, machine, how long) a process stands still; kills: (when, machine) it dies.
        clocks: (offset, rate) of each machine's clock.
    """

    machines: tuple[tuple[str, ...], ...]
    fresh: bool = False
    latency: float = 0.0
    effort: float = 0.0
    work: float = 0.0
    lag: float = 0.0
    lag_seconds: float = 0.0
    faults: int = 0
    spared: int = 0
    refuse: float = 0.0
    lose: float = 0.0
    late: float = 0.0
    crash: float = 0.0
    forget_ack: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    pauses: tuple[tuple[float, int, float], ...] = ()
    kills: tuple[tuple[float, int], ...] = ()
    clocks: tuple[tuple[float, float], ...] = ((0.0, 1.0),)


CALM_PLAN = Plan(machines=(SERVICES,))


def drawn(rng: random.Random) -> Plan:
    """A plan. Each kind of fault is left out of about half of them, so that rare combinations come up unmixed too."""
    machines: list[list[str]] = [[] for _ in range(rng.choice((1, 1, 1, 2, 2, 2, 3, 3, 4, 5)))]
    for service in rng.sample(SERVICES, len(SERVICES)):
        min(machines, key=len).append(service)
    for service in ("rollout", "verifier", "trainer", "feedback"):
        if len(machines) > 1 and rng.random() < 0.3:
            rng.choice([m for m in machines if service not in m]).append(service)
    n = len(machines)

    def sometimes(*values: float) -> float:
        return rng.choice(values) if rng.random() < 0.5 else 0.0

    return Plan(
        machines=tuple(tuple(sorted(m)) for m in machines),
        fresh=n == 1 and rng.random() < 0.5,
        latency=rng.choice((0.0, 0.003, 0.05)),
        effort=rng.choice((0.0, 0.2, 1.0)),
        work=rng.choice((0.0, 0.1, 1.0)),
        lag=sometimes(0.1),
        lag_seconds=rng.choice((0.1, 1.0)),
        faults=rng.choice((0, 2, 4, 8)),
        spared=rng.choice((0, rng.randrange(600))),
        refuse=sometimes(0.02, 0.1),
        lose=sometimes(0.03, 0.2),
        late=sometimes(0.03, 0.2),
        crash=sometimes(0.03, 0.1),
        forget_ack=sometimes(0.2),
        duplicate=sometimes(0.2),
        reorder=sometimes(0.3),
        pauses=tuple((rng.uniform(0, 6), rng.randrange(n), rng.uniform(1, 9)) for _ in range(rng.choice((0, 0, 1, 2)))),
        kills=tuple((rng.uniform(0, 6), rng.randrange(n)) for _ in range(rng.choice((0, 0, 1, 2)))),
        clocks=tuple((rng.choice((0.0, 0.0, -3600.0, 86400.0)), rng.choice((1.0, 0.9, 1.2))) for _ in range(n)),
    )


class Weather:
    """What strikes when, for all processes of one schedule; remembers the trace and what was found wrong."""

    def __init__(self, plan: Plan, rng: random.Random, loop: SimulationLoop) -> None:
        self.plan = plan
        self.rng = rng
        self.loop = loop
        self.trace: list[str] = []
        self.problems: list[str] = []
        self.effects = 0
        self._left = plan.faults
        self._spared = plan.spared

    def strikes(self, probability: float) -> bool:
        """Whether a fault comes now; their number and their time are bounded."""
        if not probability or not self._left or self.loop.time() > CALM:
            return False
        if self._spared:
            self._spared -= 1
            return False
        if self.rng.random() >= probability:
            return False
        self._left -= 1
        return True

    def happens(self, probability: float) -> bool:
        """The same for what no service notices as a fault."""
        return bool(probability) and self.loop.time() <= CALM and self.rng.random() < probability

    def note(self, who: str, what: str) -> None:
        self.trace.append(f"{self.loop.time():9.3f}  {who:3} {what}")

    async def latency(self) -> None:
        if self.plan.latency:
            await asyncio.sleep(self.rng.expovariate(1 / self.plan.latency))

    async def effort(self) -> None:
        """An effect takes its time; now and then longer than a lease."""
        if self.plan.effort:
            long = 6.0 if self.rng.random() < 0.02 else 1.0
            await asyncio.sleep(self.rng.random() * self.plan.effort * long)
        else:
            await asyncio.sleep(0)

    def deliver(self, work: Callable[[], Awaitable[Any]], who: str, what: str) -> None:
        """Let an operation whose sender is gone, or has given up on it, land later."""

        async def landing() -> None:
            await asyncio.sleep(self.rng.random() * self.rng.choice((0.02, 0.5, 3.0)))
            with suppress(Conflict):
                await work()
            self.note(who, f"lands: {what}")

        self.loop.create_task(landing(), context=contextvars.Context())
