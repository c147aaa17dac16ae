"""What every event log does. The subject is the identity; the first write wins; acks carry no truth."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from bascule.schemas.envelope import Recorded

if TYPE_CHECKING:
    from bascule.runtime.log.dead_letters import DeadLetters
    from bascule.runtime.log.telemetry import Telemetry


class NewEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An encoded event that is to be appended once for ever under its subject."""

    subject: str
    payload: bytes


class Fence(msgspec.Struct, frozen=True, kw_only=True):
    """Refuse the append unless the newest event under ``filter`` (a subject with wildcards) is at ``seq``.

    ``seq`` 0 means that there is none yet.
    """

    filter: str
    seq: int


class Raw(NamedTuple):
    """An event as it lies in the store, undecoded."""

    seq: int
    subject: str
    payload: bytes


class Extent(msgspec.Struct, frozen=True, kw_only=True):
    """What a store says that it holds, over all runs.

    Attributes:
        log: identity of the log, given when it was made; empty if it has none.
        first, last: sequences, 0 if it is empty.
        missing: sequences between them that the store knows to be gone.
    """

    log: str
    first: int
    last: int
    messages: int
    missing: tuple[int, ...] = ()


class WorkItem(Protocol):
    """A delivered trigger. It comes back unless it is marked done; a lease is extended by ``progress``."""

    @property
    def event(self) -> Recorded: ...

    async def done(self) -> None:
        """The outcome is in the log. Losing this acknowledgement is harmless: the item is then found done."""
        ...

    async def progress(self) -> None:
        """Still working: extend the lease."""
        ...

    async def retry(self, delay: float) -> None:
        """Give it back, to be delivered again after ``delay`` seconds."""
        ...


class WorkQueue(Protocol):
    """Shares the triggers of one run among the workers of one service."""

    async def next(self, limit: int, wait: float) -> Sequence[WorkItem]:
        """At most ``limit`` items; waits at most ``wait`` seconds for the first and may return none."""
        ...

    async def close(self) -> None: ...


class EventLog(Protocol):
    """An ordered, append-only log of events."""

    @property
    def letters(self) -> DeadLetters:
        """Pointers to events that a service has given up on."""
        ...

    @property
    def telemetry(self) -> Telemetry:
        """Figures for people who watch, never folded."""
        ...

    async def append(self, events: Sequence[NewEvent], *, fence: Fence | None = None) -> list[Recorded]:
        """Append one event, or several atomically, each at most once for ever under its subject.

        If all of them are there already, the stored ones are returned (``duplicate`` set) and nothing is written: the
        first write wins, and the caller adopts it. A fence is for single events.

        Raises:
            Conflict: the fence does not hold (and the event is not stored), or only some events of a batch exist.
            LogUnavailable: not confirmed before the deadline. It may be stored all the same; appending again is safe.
            LogError: the log is full, or refuses for another reason.
        """
        ...

    async def get(self, subject: str) -> Recorded | None:
        """The event under ``subject``, None if there is none."""
        ...

    async def head(self, filter: str) -> int:  # noqa: A002
        """Sequence of the newest event under ``filter``, 0 if there is none."""
        ...

    def follow(self, filter: str, *, after: int = 0) -> AsyncIterator[Recorded]:  # noqa: A002
        """Every event under ``filter`` with a sequence above ``after``, in order, without end; live events included."""
        ...

    def read(self, filter: str, *, after: int = 0) -> AsyncIterator[Recorded]:  # noqa: A002
        """The same up to the head at the time of the call."""
        ...

    def read_raw(self, filter: str) -> AsyncIterator[Raw]:  # noqa: A002
        """The same from the start, undecoded: what cannot be decoded is no obstacle.

        Raises:
            Corrupt: at the end, if the store counts more events than it gave out.
        """
        ...

    async def extent(self) -> Extent:
        """What the store says that it holds."""
        ...

    async def work(self, run: str, service: str, filters: Sequence[str], *, fresh: bool = False) -> WorkQueue:
        """A queue of the events under ``filters``, shared by all callers with the same run and service.

        ``fresh`` delivers everything from the start again, without waiting for leases of workers that are gone.
        """
        ...

    async def close(self) -> None: ...
