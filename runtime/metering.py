"""How much of a worker's time each piece of work took, where many are under way at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Share:
    """What a piece of work took of its worker's time; ``seconds`` is set when it is over."""

    seconds: float = 0.0


class Meter:
    """Splits time evenly among what is under way: all shares together are the time in which anything was.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._under_way = 0
        self._seen = 0.0
        self._each = 0.0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """A piece of work, from here to the end of the block."""
        self._advance()
        self._under_way += 1
        begun, share = self._each, Share()
        try:
            yield share
        finally:
            self._advance()
            self._under_way -= 1
            share.seconds = self._each - begun

    def _advance(self) -> None:
        """Add to ``each`` what one that was under way all along has had since it was last looked at."""
        now = self._clock()
        if self._under_way:
            self._each += (now - self._seen) / self._under_way
        self._seen = now
