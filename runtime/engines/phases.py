"""Two kinds of work that must not be under way at one time, each of which may be by itself any number of times."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

from bascule.schemas.errors import EngineError

_POLL_SECONDS = 0.01


class Door:
    """Lets one process in at a time, and whoever waits next: two files with locks, which end with their process.

    Args:
        path: of the lock; the other file, which is held by who is next, lies beside it.

    Raises:
        OSError: they cannot be made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock, self._next = (os.open(f"{path}{end}", os.O_RDWR | os.O_CREAT, 0o600) for end in ("", ".next"))

    async def enter(self) -> None:
        """Wait for the turn.

        Raises:
            OSError: the files cannot be locked.
        """
        await _locked(self._next)
        try:
            await _locked(self._lock)
        finally:
            fcntl.flock(self._next, fcntl.LOCK_UN)

    def leave(self) -> None:
        with contextlib.suppress(OSError):  # as above
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    @property
    def wanted(self) -> bool:
        """Whether another process waits to be let in."""
        try:
            fcntl.flock(self._next, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(self._next, fcntl.LOCK_UN)
        except BlockingIOError:
            return True
        except OSError:
            return False  # the next who enters will see it
        return False

    def close(self) -> None:
        os.close(self._lock)
        os.close(self._next)


async def _locked(file: int) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(_POLL_SECONDS)


class Phases:
    """Lets work of one kind in at a time; who comes first goes first, and neither kind waits for ever.

    Args:
        door: shared with other processes, so that their work and this one's exclude each other; they take turns.
    """

    def __init__(self, door: Door | None = None) -> None:
        self._door = door
        self._inside = door is None
        self._entering: asyncio.Task[None] | None = None
        self._kind: object = None
        self._active = 0
        self._free = 0  # so many go in although another process waits, who were here before it
        self._waiting: deque[tuple[object, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def of(self, kind: object) -> AsyncIterator[None]:
        """Hold the phase of a kind, once it is there.

        Raises:
            EngineError: the door that is shared with other processes cannot be locked.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((kind, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:  # let in, and gone at the same time
                self._leave()
            else:
                self._waiting = deque(one for one in self._waiting if one[1] is not turn)
                self._admit()
            raise
        try:
            yield
        finally:
            self._leave()

    def close(self) -> None:
        """Let go of the door."""
        if self._entering is not None:
            self._entering.cancel()
        if self._door is not None:
            self._door.close()

    def _leave(self) -> None:
        self._active -= 1
        self._admit()

    def _admit(self) -> None:
        """Let in those at the front that are of the phase, or of the next one if nobody is in."""
        while self._inside and self._waiting and (not self._active or self._waiting[0][0] == self._kind):
            if self._door is not None and self._free <= 0 and self._door.wanted:
                break
            kind, turn = self._waiting.popleft()
            if not turn.done():
                self._kind, self._active, self._free = kind, self._active + 1, self._free - 1
                turn.set_result(None)
        if self._door is None or self._active:
            return
        if self._inside:
            self._door.leave()
            self._inside = False
        if self._waiting and self._entering is None:
            self._entering = asyncio.create_task(self._enter(self._door))

    async def _enter(self, door: Door) -> None:
        try:
            await door.enter()
        except OSError as error:
            self._entering = None
            for _, turn in self._waiting:
                if not turn.done():
                    turn.set_exception(EngineError(f"The lock that is shared with other workers failed: {error}."))
            self._waiting.clear()
            return
        self._inside, self._entering, self._free = True, None, len(self._waiting)
        self._admit()
