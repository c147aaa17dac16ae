"""The server of programs: makes sandboxes for a scoring process, which has given up the rights to make any.

Run as ``python -P -m bascule.verifiers.sandbox.server PARENT_PID CHANNEL``. It holds no truth and never opens a private
face. On standard input comes one :class:`Confine`, answered on standard output by :class:`Probed` or
:class:`~bascule.verifiers.frames.Refused`. Then it answers the requests of :mod:`bascule.verifiers.sandbox.served` on
the socket ``CHANNEL``, one at a time, so that no program's timing is disturbed by another's. It ends with the socket,
its parent or SIGTERM, and what it runs ends with it; of the folders of programs some may be left if it is killed.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Callable

import msgspec

from bascule.plugins.sandbox import Programs, Running
from bascule.schemas.errors import BasculeError
from bascule.schemas.sandbox import SandboxConfig, SandboxReport
from bascule.verifiers.frames import Refused, frame, own_streams, read_body, read_frame, where, with_length
from bascule.verifiers.privileges import die_with, shield
from bascule.verifiers.sandbox.served import (
    MAX_MESSAGE,
    Answer,
    Done,
    Ended,
    Failed,
    Leave,
    Read,
    Request,
    Run,
    Start,
    Wait,
    Write,
    decode_request,
)

#: Programs that may be under way at a time; a comparison needs two.
MOST = 16
Choose = Callable[[SandboxConfig, SandboxReport | None], tuple[Programs, SandboxReport]]


class Confine(msgspec.Struct, frozen=True, kw_only=True):
    """What the sandbox must hold.

    Attributes:
        report: what it is known to hold; it is probed if that is None.
    """

    config: SandboxConfig
    report: SandboxReport | None = None


class Probed(msgspec.Struct, frozen=True, kw_only=True, tag="probed"):
    """What the sandbox holds; programs can be run."""

    report: SandboxReport


class _Server:
    """Carries out requests; knows the programs that are under way."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._running: dict[int, tuple[Running, contextlib.ExitStack]] = {}

    def answer(self, body: bytes) -> Answer:
        """Carry out one request; whatever goes wrong is an answer too."""
        try:
            request = decode_request(body)
        except msgspec.MsgspecError as e:
            return Failed("request", str(e))
        try:
            return self._done(request)
        except EOFError as e:
            return Failed("eof", str(e))
        except TimeoutError as e:
            return Failed("timeout", str(e))
        except LookupError:
            return Failed("request", "There is no such program.")
        except Exception as e:
            return Failed("server", f"The server of programs failed: {where(e)}.")

    def _done(self, request: Request) -> Answer:
        match request:
            case Run(program=program, stdin=stdin):
                return Ended(self._programs.run(program, stdin))
            case Start(number=number, program=program):
                if len(self._running) >= MOST or number in self._running:
                    return Failed("request", f"No more than {MOST} programs are started at a time.")
                with contextlib.ExitStack() as stack:
                    running = stack.enter_context(self._programs.start(program))
                    self._running[number] = running, stack.pop_all()
            case Write(number=number, data=data):
                self._running[number][0].write(data)
            case Read(number=number, size=size):
                return Done(self._running[number][0].read(size))
            case Wait(number=number):
                return Ended(self._running[number][0].wait())
            case Leave(number=number):
                self._running.pop(number)[1].close()
        return Done()

    def close(self) -> None:
        """Kill what is under way."""
        for number in list(self._running):
            self._running.pop(number)[1].close()


def serve(channel: socket.socket, programs: Programs) -> None:
    """Answer requests until the other end is closed; nothing that they started is alive then."""
    channel.setblocking(True)
    server = _Server(programs)
    try:
        with channel.makefile("rb") as stream:
            while (body := read_body(stream, MAX_MESSAGE)) is not None:
                data = msgspec.msgpack.encode(server.answer(body))
                if len(data) > MAX_MESSAGE:
                    data = msgspec.msgpack.encode(Failed("request", f"The results are over {MAX_MESSAGE} bytes."))
                channel.sendall(with_length(data, MAX_MESSAGE))
    finally:
        server.close()


def choose_sandbox(config: SandboxConfig, known: SandboxReport | None) -> tuple[Programs, SandboxReport]:
    """The sandbox of this machine, probed unless it is ``known``; see :mod:`bascule.verifiers.sandbox.probe`.

    Raises:
        ConfigError: it does not hold what it must.
    """
    from bascule.verifiers.sandbox.layered import LayeredSandbox
    from bascule.verifiers.sandbox.probe import choose, require

    if known is None or known.kind != "layered" or config.unsafe:
        return choose(config)
    require(known, config)
    return LayeredSandbox(), known


def main(choose: Choose = choose_sandbox) -> None:
    # Ended in order also while a program runs: then nothing would be read from the socket.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    die_with(int(sys.argv[1]))
    channel = socket.socket(fileno=int(sys.argv[2]))
    channel.set_inheritable(False)
    source, sink = own_streams()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        asked = read_frame(source, Confine)
        if asked is None:
            return
        try:
            programs, report = choose(asked.config, asked.report)
            said: Probed | Refused = Probed(report=report)
        except BasculeError as e:
            said = Refused(message=e.message, next_step=e.next_step)
        except Exception as e:
            said = Refused(message=f"No sandbox can be made: {where(e)}.", next_step="Report this.")
        shield()  # not before: what the sandbox keeps a program from is compared with what it could do otherwise
        sink.write(frame(said))
        sink.flush()
        if isinstance(said, Probed):
            serve(channel, programs)


if __name__ == "__main__":
    main()
