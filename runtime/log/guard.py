"""Holding a log against its anchor: at once when it is opened, and event by event when a run is read.

The sequences of a log count from 1 without a gap, so that what the store no longer gives out can be named.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from bascule.runtime.log.anchor import Anchored, Head, other_log
from bascule.runtime.log.chain import Chain
from bascule.runtime.log.protocol import EventLog, Extent
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import Corrupt, LogError
from bascule.schemas.events import LogCheckpointed
from bascule.schemas.subjects import ROOT

_NAMED: Final = 5
_WAY_OUT = 'Restore the store from a backup, or accept it as it is with `bascule verify {run} --accept "REASON"`.'


def check_extent(extent: Extent, anchored: Anchored, anchor: Path) -> None:
    """Refuse a store that has a gap or ends before its anchor. Looks at no event.

    Raises:
        Corrupt: naming the first sequence that is wrong.
    """
    run = anchored.last[0] if anchored.last else "RUN"
    way_out = _WAY_OUT.format(run=run)
    if anchored.n and anchored.log != extent.log:
        raise other_log(anchor, anchored.log, extent.log)
    if extent.last - extent.messages > anchored.missing:
        first = extent.missing[0] if extent.missing else extent.first if extent.first > 1 else extent.last
        raise Corrupt(
            f"The log has a gap at sequence {first}: it ends at sequence {extent.last} and holds only "
            f"{extent.messages} events.",
            next_step=way_out,
        )
    if anchored.last is not None and extent.last < anchored.last[1].seq:
        behind = sorted(r for r, head in anchored.heads.items() if head.seq > extent.last)
        shown = ", ".join(behind[:5]) + (f" and {len(behind) - 5} more" if len(behind) > 5 else "")
        raise Corrupt(
            f"The log ends at sequence {extent.last}, but its anchor {anchor} knows it up to sequence "
            f"{anchored.last[1].seq} ({anchored.time}). Events of these runs are gone: {shown}.",
            next_step=way_out,
        )


class Missing(msgspec.Struct, frozen=True):
    """Sequences that a store does not give out: the first few, and how many."""

    first: tuple[int, ...]
    count: int

    def __str__(self) -> str:
        names = ", ".join(map(str, self.first))
        more = f" and {self.count - len(self.first)} others" if self.count > len(self.first) else ""
        return f"sequence{'s' if self.count > 1 else ''} {names}{more} {'are' if self.count > 1 else 'is'} missing"


async def find_missing(log: EventLog) -> Missing:
    """Read the whole log, undecoded, for gaps in its sequences.

    Raises:
        LogError: it cannot be read.
    """
    extent = await log.extent()
    first: list[int] = []
    count, expected = 0, 1

    def skip(until: int) -> None:  # as a range: a damaged sequence can be of any size
        nonlocal count
        gap = range(expected, until)
        first.extend(islice(gap, _NAMED - len(first)))
        count += len(gap)

    with suppress(Corrupt):  # it counts more than it gives out: just that is looked into
        async for raw in log.read_raw(f"{ROOT}.>"):
            skip(raw.seq)
            expected = max(expected, raw.seq + 1)
    skip(extent.last + 1)
    return Missing(tuple(first), count)


async def located(error: Corrupt, log: EventLog) -> Corrupt:
    """The error, with the sequences that are missing from the log, if any are."""
    with suppress(LogError):
        missing = await find_missing(log)
        if missing.count:
            return Corrupt(f"{error.message} In the store {missing}.", next_step=error.next_step)
    return error


async def rule_out_gaps(log: EventLog, accepted: int) -> None:
    """See whether the log is without gaps, but for as many events as somebody ``accepted`` to be gone.

    Raises:
        Corrupt: it has more.
    """
    missing = await find_missing(log)
    if missing.count > accepted:
        raise Corrupt(f"The log is damaged: in the store {missing}.", next_step=_WAY_OUT.format(run="RUN"))


async def known_runs(log: EventLog, anchored: Anchored, anchor: Path) -> AsyncIterator[str]:
    """Names of all runs, oldest first.

    Args:
        anchored: read before the log.

    Raises:
        Corrupt: at the end, if the anchor knows one whose start the log does not give out.
    """
    gone = anchored.heads.keys() - anchored.accepted.keys()
    async for event in log.read(f"{ROOT}.*.run.run.started"):
        gone.discard(event.envelope.run)
        yield event.envelope.run
    if gone:
        shown = ", ".join(sorted(gone)[:_NAMED]) + (f" and {len(gone) - _NAMED} more" if len(gone) > _NAMED else "")
        raise Corrupt(
            f"The anchor {anchor} knows runs whose start the log does not give out: {shown}.",
            next_step=_WAY_OUT.format(run=min(gone)),
        )


async def rule_out_damage(watch: Watch, log: EventLog) -> None:
    """Read on to the end of the run: for whoever failed on the way, since a damaged log can be why.

    Raises:
        Corrupt: it is.
    """
    if watch.behind:
        async for event in log.read(f"bascule.{watch.run}.>", after=watch.chain.seq):
            watch.add(event)
        watch.finish()


class Watch:
    """Goes along as a run is read from its start: computes the chain, and compares it where the anchor knows it.

    Attributes:
        chain: up to the newest event.
        newest: sequence of the newest checkpoint in the log, 0 if there is none.
        covered: number of events that it covers.
    """

    def __init__(self, run: str, anchored: Head | None = None) -> None:
        self.chain = Chain()
        self.newest = 0
        self.covered = 0
        self.run = run
        self._anchored = anchored
        self._last = 0

    @property
    def open(self) -> int:
        """How many events no checkpoint covers; 0 if nothing but checkpoints is new."""
        return self.chain.count - self.covered if self._last > self.covered else 0

    @property
    def behind(self) -> bool:
        """Whether the anchor knows more than was read so far."""
        return self._anchored is not None and self.chain.count < self._anchored.count

    @property
    def head(self) -> Head:
        return Head(count=self.chain.count, seq=self.chain.seq, head=self.chain.head.hex())

    def add(self, event: Recorded) -> None:
        """Take the run's next event.

        Raises:
            Corrupt: with it the run is another one than was anchored.
        """
        if event.seq <= self.chain.seq:
            raise Corrupt(
                f"In the run {self.run}, sequence {event.seq} ({event.subject}) comes after {self.chain.seq}.",
                next_step=_WAY_OUT.format(run=self.run),
            )
        self.chain.add(event)
        if isinstance(event.data, LogCheckpointed):
            self.newest = event.seq
            self.covered = max(self.covered, min(event.data.count, self.chain.count - 1))
        else:
            self._last = self.chain.count
        if self._anchored is not None and self.chain.count == self._anchored.count and self.head != self._anchored:
            raise Corrupt(
                f"The run {self.run} is not the one that was anchored: something up to sequence {event.seq} (its "
                f"event {self.chain.count}) was changed, removed or added.",
                next_step=f"`bascule verify {self.run}` says where. {_WAY_OUT.format(run=self.run)}",
            )

    def finish(self) -> None:
        """The run has been read to its end.

        Raises:
            Corrupt: it ends before its anchor.
        """
        if self._anchored is not None and self.behind:
            raise Corrupt(
                f"The log gives out {self.chain.count} events of the run {self.run}{_up_to(self.chain.seq)}, but its "
                f"anchor knows {self._anchored.count} events, up to sequence {self._anchored.seq}.",
                next_step=_WAY_OUT.format(run=self.run),
            )


def _up_to(seq: int) -> str:
    return f" (up to sequence {seq})" if seq else ""
