"""Programs by way of a server: what a process that may make no sandbox holds of one.

Requests and answers are frames of MessagePack on one stream socket; each request is answered before the next is sent.
The process at the other end is :mod:`bascule.verifiers.sandbox.server`.
"""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Annotated, Literal, Self

import msgspec

from bascule.plugins.sandbox import Program, Ran
from bascule.verifiers.frames import read_body, with_length

#: Results are up to 256 MiB unless a program says otherwise; two of them fit.
MAX_MESSAGE = 512 * 1024 * 1024


class Run(msgspec.Struct, frozen=True, tag=True):
    """Run a program to its end; answered by :class:`Ended`."""

    program: Program
    stdin: bytes


class Start(msgspec.Struct, frozen=True, tag=True):
    """Start a program; answered by :class:`Done`. ``number`` names it from then on."""

    number: int
    program: Program


class Write(msgspec.Struct, frozen=True, tag=True):
    """Send to a program's standard input; answered by :class:`Done`."""

    number: int
    data: bytes


class Read(msgspec.Struct, frozen=True, tag=True):
    """Read from a program's standard output; answered by :class:`Done` with so many bytes."""

    number: int
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_MESSAGE - 1024)]


class Wait(msgspec.Struct, frozen=True, tag=True):
    """Wait for a program's end; answered by :class:`Ended`."""

    number: int


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Kill a program, unless it has ended, and forget it; answered by :class:`Done`."""

    number: int


Request = Run | Start | Write | Read | Wait | Leave


class Ended(msgspec.Struct, frozen=True, tag=True):
    """What came of a program."""

    ran: Ran


class Done(msgspec.Struct, frozen=True, tag=True):
    """It was done; ``data`` is what was read."""

    data: bytes = b""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It was not done.

    Attributes:
        kind: ``eof`` and ``timeout`` are the program's; ``request``: nobody could do what was asked; ``server``: the
            server failed.
        message: the reason; of a failure of the server its class and place alone.
    """

    kind: Literal["eof", "timeout", "request", "server"]
    message: str


Answer = Ended | Done | Failed
_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def decode_request(body: bytes) -> Request:
    """A request; a program with limits that cannot be is refused.

    Raises:
        msgspec.DecodeError: naming the field that is wrong.
    """
    return _REQUESTS.decode(body)


class ServerFailed(Exception):
    """The server of programs is gone or failed. No fault of the program: what it was for has no verdict."""


class ServedPrograms:
    """A :class:`~bascule.plugins.sandbox.Programs` that a server at the other end of ``channel`` runs.

    Attributes:
        lost: the server is gone; nothing will be run any more.
        failure: why the newest request that failed through no fault of a program did.
    """

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(True)
        self.lost = False
        self.failure: str | None = None
        self._channel = channel
        self._stream = channel.makefile("rb")
        self._lock = threading.Lock()
        self._number = 0

    def run(self, program: Program, stdin: bytes = b"") -> Ran:
        """Run a program to its end. Nothing of it is alive afterwards.

        Raises:
            ValueError: the program cannot be: a limit out of range, or more than 512 MiB of files.
            ServerFailed: nobody runs it.
        """
        return self.ended(Run(program, stdin))

    def start(self, program: Program) -> ServedRunning:
        """Start a program to speak with.

        Raises:
            ValueError, ServerFailed: as :meth:`run`.
        """
        self._number += 1
        self.done(Start(self._number, program))
        return ServedRunning(self, self._number)

    def ask(self, request: Request) -> Ended | Done:
        """One request and its answer.

        Raises:
            EOFError, TimeoutError: of the program.
            ValueError, ServerFailed: as :meth:`run`.
        """
        data = with_length(msgspec.msgpack.encode(request), MAX_MESSAGE)
        with self._lock:
            answer = self._answer(data)
        if not isinstance(answer, Failed):
            return answer
        match answer.kind:
            case "eof":
                raise EOFError(answer.message)
            case "timeout":
                raise TimeoutError(answer.message)
            case "request":
                raise ValueError(answer.message)
            case "server":
                self.failure = answer.message
                raise ServerFailed(answer.message)

    def _answer(self, data: bytes) -> Answer:
        if not self.lost:
            try:
                self._channel.sendall(data)
                body = read_body(self._stream, MAX_MESSAGE)
                if body is not None:
                    return _ANSWERS.decode(body)
            except (OSError, ValueError, msgspec.MsgspecError):
                pass  # half a message may be on the way: this stream is of no more use
        self.lost = True
        raise ServerFailed("The server of programs is gone.")

    def ended(self, request: Run | Wait) -> Ran:
        """As :meth:`ask`, of what ends a program."""
        answer = self.ask(request)
        if not isinstance(answer, Ended):
            raise self._broken()
        return answer.ran

    def done(self, request: Start | Write | Read | Leave) -> Done:
        """As :meth:`ask`, of anything else."""
        answer = self.ask(request)
        if not isinstance(answer, Done):
            raise self._broken()
        return answer

    def _broken(self) -> ServerFailed:
        self.lost = True
        return ServerFailed("The server of programs broke its protocol.")


class ServedRunning:
    """A :class:`~bascule.plugins.sandbox.Running` of the server's."""

    def __init__(self, programs: ServedPrograms, number: int) -> None:
        self._programs = programs
        self._number = number

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._programs.done(Leave(self._number))

    def write(self, data: bytes) -> None:
        self._programs.done(Write(self._number, data))

    def read(self, size: int) -> bytes:
        return self._programs.done(Read(self._number, size)).data

    def wait(self) -> Ran:
        return self._programs.ended(Wait(self._number))
