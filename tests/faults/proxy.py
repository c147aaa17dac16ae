"""A TCP proxy before a NATS server that delays, cuts, goes silent, and drops or repeats acknowledgements."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

#: How a JetStream publish acknowledgement begins.
_ACK = b'{"stream":"'
_LONGEST_LINE = 1024 * 1024


class _Connection:
    """A client's connection and ours to the server."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        self.flowing = asyncio.Event()
        self.flowing.set()

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Proxy:
    """Forwards to the server on ``server_port``; without faults until told.

    Attributes:
        port: where it listens, once started.
        drop, repeat: how many of the next acknowledgements are not forwarded, or are forwarded twice.
        slow: how many of the next messages of the server are held back by ``delay`` seconds each.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self.port = 0
        self.drop = self.repeat = self.slow = 0
        self.delay = 0.0

    async def start(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._listener is not None
        self._listener.close()
        for connection in self._connections:
            connection.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """End every connection without a word."""
        for connection in self._connections:
            connection.abort()

    def stall(self, seconds: float | None) -> None:
        """Forward nothing on the present connections, which stay open: for ``seconds``, or for good with None."""
        for connection in self._connections:
            connection.flowing.clear()
            if seconds is not None:
                asyncio.get_running_loop().call_later(seconds, connection.flowing.set)

    async def _accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port, limit=_LONGEST_LINE)
        except OSError:
            to_client.transport.abort()
            return
        connection = _Connection(to_client, to_server)
        self._connections.add(connection)

        async def upstream() -> None:
            while data := await client.read(65536):
                await connection.flowing.wait()
                to_server.write(data)
                await to_server.drain()

        async def downstream() -> None:
            while True:
                frame, is_ack = await _frame(server)
                await connection.flowing.wait()
                await self._forward(frame, is_ack, to_client)

        ends = [asyncio.create_task(_until_broken(end)) for end in (upstream, downstream)]
        self._tasks.update(ends)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        connection.abort()
        self._connections.discard(connection)
        for end in ends:
            end.cancel()

    async def _forward(self, frame: bytes, is_ack: bool, to_client: asyncio.StreamWriter) -> None:
        times = 1
        if self.slow > 0:
            self.slow -= 1
            await asyncio.sleep(self.delay)
        if is_ack and self.drop > 0:
            self.drop -= 1
            times = 0
        elif is_ack and self.repeat > 0:
            self.repeat -= 1
            times = 2
        to_client.write(frame * times)
        await to_client.drain()


async def _frame(server: asyncio.StreamReader) -> tuple[bytes, bool]:
    """The server's next protocol message, and whether it is a publish acknowledgement."""
    line = await server.readuntil(b"\r\n")
    if not line.startswith((b"MSG ", b"HMSG ")):
        return line, False
    body = await server.readexactly(int(line.split()[-1]) + 2)
    return line + body, body.startswith(_ACK)


async def _until_broken(end: Callable[[], Awaitable[None]]) -> None:
    with suppress(OSError, EOFError):
        await end()
