"""Telemetry: how work goes on, for people who watch. It is kept for a while, and nothing is ever decided from it.

Subjects are ``bascule-telemetry.<run>.train.<generation>.<what>``. A line is sent without waiting for anybody to have
it: one that is lost is no error, and the stream drops the oldest when it is full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Final, Protocol

import msgspec

from bascule.runtime.log.link import TRANSIENT, Link
from bascule.runtime.log.raw import read_raw
from bascule.runtime.log.rules import matches
from bascule.runtime.log.streams import TELEMETRY, TELEMETRY_ROOT
from bascule.schemas.errors import LogError
from bascule.schemas.subjects import token

_KEPT_IN_MEMORY: Final = 10_000


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of telemetry.

    Attributes:
        time: when it was sent, UTC, ISO 8601.
        attempt, iteration: of the training job.
        figures: by name; of one optimiser step where ``subject`` ends in ``step``.
    """

    subject: str
    time: str
    attempt: int
    iteration: int
    figures: dict[str, float]


class Telemetry(Protocol):
    """Where telemetry goes, and is read."""

    async def send(self, line: Line) -> None:
        """Send a line, without waiting for it to arrive. It raises nothing: a line may be lost."""
        ...

    def read(self, run: str) -> AsyncGenerator[Line, None]:
        """What is there of a run, oldest first."""
        ...


def step_subject(run: str, generation: int) -> str:
    """Of the figures of an optimiser step."""
    return f"{TELEMETRY_ROOT}.{token(run)}.train.g{generation:02d}.step"


class MemoryTelemetry:
    """Telemetry of a log in memory."""

    def __init__(self) -> None:
        self._lines: deque[Line] = deque(maxlen=_KEPT_IN_MEMORY)

    async def send(self, line: Line) -> None:
        self._lines.append(line)

    async def read(self, run: str) -> AsyncGenerator[Line, None]:
        wanted = f"{TELEMETRY_ROOT}.{token(run)}.>"
        for line in tuple(self._lines):
            if matches(wanted, line.subject):
                yield line


class NatsTelemetry:
    """Telemetry on the stream ``BASCULE_TELEMETRY``."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def send(self, line: Line) -> None:
        with suppress(LogError, *TRANSIENT):
            await self._link.publish(line.subject, msgspec.json.encode(line))

    async def read(self, run: str) -> AsyncGenerator[Line, None]:
        async with aclosing(read_raw(self._link, TELEMETRY, f"{TELEMETRY_ROOT}.{token(run)}.>")) as lines:
            async for raw in lines:
                with suppress(msgspec.DecodeError, UnicodeDecodeError):
                    yield msgspec.json.decode(raw.payload, type=Line)
