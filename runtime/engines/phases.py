"""Two kinds of work that must not be under way at one time, each of which may be by itself any number of times."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Phases:
    """Lets work of one kind in at a time; who comes first goes first, and neither kind waits for ever."""

    def __init__(self) -> None:
        self._kind: object = None
        self._active = 0
        self._waiting: deque[tuple[object, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def of(self, kind: object) -> AsyncIterator[None]:
        """Hold the phase of a kind, once it is there."""
        if self._waiting or (self._active and self._kind != kind):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((kind, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # let in, and gone at the same time
                    self._leave()
                else:
                    self._waiting = deque(one for one in self._waiting if one[1] is not turn)
                    self._admit()
                raise
        else:
            self._kind, self._active = kind, self._active + 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self._active -= 1
        self._admit()

    def _admit(self) -> None:
        """Let in those at the front that are of the phase, or of the next one if nobody is in."""
        while self._waiting and (not self._active or self._waiting[0][0] == self._kind):
            kind, turn = self._waiting.popleft()
            if not turn.done():
                self._kind, self._active = kind, self._active + 1
                turn.set_result(None)
