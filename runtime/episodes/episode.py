"""The channel to one episode's process: frames, printed output and the clock. What comes from there is bounded data."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import msgspec

Handler = Callable[[bytes], Awaitable[bytes | None]]
"""Answers one frame; None where no answer is due. Raises :class:`StopEpisode` to end the episode."""

Ending = Literal[
    "stopped", "exited", "timeout", "overdue", "output-limit", "memory", "processes", "disk", "lost", "unavailable"
]

_TAIL = 4096
_CHUNK = 65536
_SETTLE_SECONDS = 60.0


class StopEpisode(Exception):
    """The handler has what it needs, or refuses to go on."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one episode may use.

    Attributes:
        seconds: wall time in which the harness itself runs; waiting for the handler does not count.
        overall_seconds: wall time of the whole episode.
        output_bytes: everything that comes out: frames, stdout and stderr.
        memory_bytes: memory of all its processes together, and address space of each.
        disk_bytes: everything that it writes to files.
        open_files: open descriptors of each of its processes.
        processes: processes and threads at one time.
        prepare_seconds: wall time of the ``prepare`` of its batch.
    """

    seconds: float = 20.0
    overall_seconds: float = 3600.0
    output_bytes: int = 256 * 1024
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20
    open_files: int = 64
    processes: int = 32
    prepare_seconds: float = 120.0


def cpu_seconds(seconds: float) -> int:
    """CPU time of each process, s, where its wall time is ``seconds``, which comes first for one busy process."""
    return math.ceil(seconds) + 1


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an episode's process ended.

    Attributes:
        ending: ``stopped`` by the handler; ``exited`` by itself; ``timeout``, ``overdue`` (overall), ``output-limit``,
            ``memory``, ``processes`` and ``disk``; ``lost`` with the zygote, which says nothing about this episode;
            ``unavailable``: no process could be had.
        exit_code: exit status, or minus the number of the signal; None where there was no report.
        output: the last 4 KiB of stdout and stderr.
        seconds: wall time in which the harness itself ran.
        during: what ended: the episode itself, or the ``prepare`` of its batch, or the batch with all that was in it.
    """

    ending: Ending
    exit_code: int | None = None
    output: str = ""
    seconds: float = 0.0
    during: Literal["solve", "prepare", "batch"] = "solve"


class Episode:
    """One end of an episode's channel and of its output pipe; both are owned and closed here."""

    def __init__(self, channel: socket.socket, output: int, limits: Limits) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._output = output
        self._limits = limits
        self._buffer = bytearray()
        self._bytes = 0
        self._tail = b""
        self._overflow = False
        self._left = limits.seconds
        channel.setblocking(False)
        os.set_blocking(output, False)
        self._loop.add_reader(output, self._on_output)

    @property
    def seconds(self) -> float:
        """Wall time used by the harness so far."""
        return self._limits.seconds - self._left

    @property
    def printed(self) -> str:
        """The end of what was printed."""
        return self._tail.decode("utf-8", "replace")

    async def converse(self, opening: bytes, handler: Handler) -> Ending:
        """Send the first frame once the process is settled, then have frames answered until either side ends it.

        The process may still be alive afterwards. Exceptions of the handler other than :class:`StopEpisode` pass
        through.
        """
        overall = asyncio.timeout(self._limits.overall_seconds)
        try:
            async with overall:
                if not await self._settled():
                    return "unavailable"
                async with self._clock():
                    await self._send(opening)
                while True:
                    async with self._clock():
                        request = await self._receive()
                    reply = await handler(request)
                    async with self._clock():
                        if reply is None:
                            # A flood of frames that need no answer must not hold the loop.
                            await asyncio.sleep(0)
                        else:
                            await self._send(reply)
        except StopEpisode:
            return "stopped"
        except _OutOfTime:
            return "timeout"
        except _OutOfSpace:
            return "output-limit"
        except EOFError:
            return "output-limit" if self._overflow else "exited"
        except TimeoutError:
            if overall.expired():
                return "overdue"
            raise

    async def wait(self, exited: asyncio.Future[Any]) -> bool:
        """Wait for the process within the time that is left to the harness. False if it did not exit."""
        try:
            async with self._clock():
                await asyncio.shield(exited)
        except _OutOfTime:
            return False
        return True

    def hang_up(self) -> None:
        """Nothing more will be sent; what has been sent can still be received."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Take what was printed last, and close."""
        while not self._overflow and self._on_output():
            pass
        self._loop.remove_reader(self._output)
        self._loop.remove_reader(self._channel)
        self._loop.remove_writer(self._channel)
        os.close(self._output)
        self._channel.close()

    @contextlib.asynccontextmanager
    async def _clock(self) -> AsyncIterator[None]:
        started = self._loop.time()
        limit = asyncio.timeout(max(self._left, 0.0))
        try:
            async with limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise _OutOfTime from None
            raise
        finally:
            self._left -= self._loop.time() - started

    async def _settled(self) -> bool:
        """Wait for the byte that comes before any code of the harness runs."""
        try:
            async with asyncio.timeout(_SETTLE_SECONDS):
                await self._exactly(1)
        except (TimeoutError, EOFError):
            return False
        return True

    async def _send(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._channel, len(data).to_bytes(4, "big") + data)
        except OSError as e:
            raise EOFError from e

    async def _receive(self) -> bytes:
        size = int.from_bytes(await self._exactly(4), "big")
        self._bytes += 4 + size
        if self._bytes > self._limits.output_bytes:
            raise _OutOfSpace
        return await self._exactly(size)

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            try:
                part = await self._loop.sock_recv(self._channel, _CHUNK)
            except OSError as e:
                raise EOFError from e
            if not part:
                raise EOFError
            self._buffer += part
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _on_output(self) -> bool:
        try:
            part = os.read(self._output, _CHUNK)
        except BlockingIOError:
            return False
        if not part:
            self._loop.remove_reader(self._output)
            return False
        self._bytes += len(part)
        self._tail = (self._tail + part)[-_TAIL:]
        if self._bytes > self._limits.output_bytes:
            self._overflow = True
            self._loop.remove_reader(self._output)
            self.hang_up()
        return True


class _OutOfTime(Exception):
    pass


class _OutOfSpace(Exception):
    pass
