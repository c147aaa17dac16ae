"""Holding a log against its anchor: at once when it is opened, and event by event when a run is read."""

from __future__ import annotations

from pathlib import Path

from bascule.runtime.log.anchor import Anchored, Head, other_log
from bascule.runtime.log.chain import Chain
from bascule.runtime.log.protocol import EventLog, Extent
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import Corrupt
from bascule.schemas.events import LogCheckpointed

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
                f"The run {self.run} ends at its event {self.chain.count} (sequence {self.chain.seq}), but its anchor "
                f"knows {self._anchored.count} events, up to sequence {self._anchored.seq}.",
                next_step=_WAY_OUT.format(run=self.run),
            )
