"""The process in front of a program: forked by a zygote (``confine/zygote.py``), of which each process here has one.

The zygote is started with the first program and kept. If it ends, the next program gets a new one; what is in front of
the programs under way lives on, but nobody is left who could tell its exit code, so they are stopped and count as
killed.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path

from bascule.verifiers.sandbox.confine import zygote
from bascule.verifiers.sandbox.packages import executable

FLAGS = ("-P", "-s", "-S", "-B")
"""Of our own programs outside of the sandbox: nothing is imported but the standard library."""

_BOOT = """
import sys
sys.path.insert(0, sys.argv[1])
from confine import zygote
del sys.path[0]
zygote.serve(int(sys.argv[2]))
"""
_INT = struct.Struct("i")
_START_SECONDS = 60.0
_MOST_SAID = 4096


class NotForked(Exception):
    """There is no process; the message says why."""


class _Gone(NotForked):
    """There was no zygote any more."""


class Front:
    """The process in front of a program.

    Attributes:
        pid: its number, which may be another's once it has ended.
        stdin, stdout, stderr: pipes; ``stdin`` is None where nothing can be written.
        returncode: its status, or minus the number of its signal; None until :meth:`poll` or :meth:`wait` has seen its
            end. Where the zygote ended before it, it counts as killed.
    """

    def __init__(
        self,
        pid: int,
        channel: socket.socket,
        lifeline: io.FileIO,
        stdin: io.FileIO | None,
        stdout: io.FileIO,
        stderr: io.FileIO,
    ) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._channel = channel
        self._lifeline = lifeline

    def fileno(self) -> int:
        """A descriptor that can be read once it has ended, or once nobody will tell of its end."""
        return self._channel.fileno()

    def poll(self) -> int | None:
        """The return code; None while it lives."""
        if self.returncode is None:
            try:
                told = self._channel.recv(_INT.size)
            except BlockingIOError:
                return None
            except OSError:
                told = b""
            if told:
                (self.returncode,) = _INT.unpack(told)
            elif self._is_gone():
                self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self, seconds: float) -> int | None:
        """Wait for its end, about so long; the return code, or None."""
        # Where the zygote is gone, nothing but the lifeline tells.
        for descriptor, event in ((self._channel.fileno(), select.POLLIN), (self._lifeline.fileno(), 0)):
            if self.poll() is None:
                _happens(descriptor, event, seconds)
        return self.poll()

    def stop(self) -> None:
        """Have it kill all that it is in front of, and end."""
        with contextlib.suppress(OSError):
            os.write(self._lifeline.fileno(), b"\0")

    def kill(self) -> None:
        """Kill it, and never another that has its number by now. Nothing happens if it has ended."""
        try:
            self._channel.send(b"k")
        except OSError:
            self._kill_without_zygote()

    def close(self) -> None:
        """Close all that is open to it. If it has not ended, it ends now, with all that it is in front of."""
        for stream in (self.stdin, self.stdout, self.stderr, self._lifeline):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._channel.close()

    def _kill_without_zygote(self) -> None:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(self.pid)
            try:
                # If it is there now, it was there when its number was looked up.
                if not self._is_gone():
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    def _is_gone(self) -> bool:
        # It alone has the other end of its lifeline, until it ends.
        return _happens(self._lifeline.fileno(), 0, 0)


def fork(*, stdin: bool) -> tuple[Front, socket.socket]:
    """Have a process forked: a launcher (``confine/launcher.py``), which then stays in front of its program.

    Args:
        stdin: whether its standard input is a pipe; otherwise it is empty.

    Returns:
        The process, and the socket on which the launcher waits for its plan.

    Raises:
        NotForked, OSError: with the reason.
    """
    try:
        return _forked(stdin)
    except _Gone:
        # Since the last program. What may have been forked for this one ends, since its sockets have.
        return _forked(stdin)


def _forked(stdin: bool) -> tuple[Front, socket.socket]:
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as given:

        def pipe(*, write: bool) -> tuple[io.FileIO, int]:
            """Our end of a new pipe, which we write or read, and the other one."""
            reading, writing = os.pipe()
            ours, theirs = (writing, reading) if write else (reading, writing)
            given.callback(os.close, theirs)
            return undo.enter_context(io.FileIO(ours, "w" if write else "r")), theirs

        def pair(kind: socket.SocketKind) -> tuple[socket.socket, int]:
            ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
            given.enter_context(theirs)
            return undo.enter_context(ours), theirs.fileno()

        channel, their_channel = pair(socket.SOCK_SEQPACKET)
        control, their_control = pair(socket.SOCK_STREAM)
        lifeline, their_life = pipe(write=True)
        written: io.FileIO | None = None
        if stdin:
            written, their_stdin = pipe(write=True)
        else:
            their_stdin = os.open(os.devnull, os.O_RDONLY)
            given.callback(os.close, their_stdin)
        stdout, their_stdout = pipe(write=False)
        stderr, their_stderr = pipe(write=False)
        asked = _ZYGOTE.ask(
            channel=their_channel,
            control=their_control,
            lifeline=their_life,
            stdin=their_stdin,
            stdout=their_stdout,
            stderr=their_stderr,
        )
        given.close()
        channel.settimeout(_START_SECONDS)
        try:
            told = channel.recv(_MOST_SAID)
        except ConnectionResetError:
            told = b""
        if not told:
            raise _Gone(_ZYGOTE.bury(asked))
        (pid,) = _INT.unpack_from(told)
        if not pid:
            raise NotForked(told[_INT.size :].decode("utf-8", "replace"))
        channel.setblocking(False)
        undo.pop_all()
        return Front(pid, channel, lifeline, written, stdout, stderr), control


def end_zygote() -> None:
    """End the zygote of this process, if there is one. The next program gets another; those under way are killed."""
    _ZYGOTE.end()


def _happens(descriptor: int, event: int, seconds: float) -> bool:
    """Whether an event, or the end of a descriptor's other side, comes within so many seconds."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(seconds * 1000))


class _Zygote:
    """The zygote of this process, started when it is first asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    def ask(self, **descriptors: int) -> subprocess.Popen[bytes]:
        """Send a request.

        Returns:
            The process that it was sent to.

        Raises:
            NotForked, OSError: it cannot be sent.
        """
        with self._lock:
            if self._process is None or self._requests is None:
                self._process, self._requests = _start()
            try:
                socket.send_fds(self._requests, [b"f"], [descriptors[name] for name in zygote.GIVEN])
            except (BrokenPipeError, ConnectionResetError):
                raise _Gone(self._bury(self._process)) from None
            return self._process

    def bury(self, process: subprocess.Popen[bytes]) -> str:
        """Ask this process no more; how it ended."""
        with self._lock:
            return self._bury(process)

    def end(self) -> None:
        """End it, if it was started; it can be asked again."""
        with self._lock:
            if self._process is not None:
                self._bury(self._process)

    def forget(self) -> None:
        """In a process that was forked from this one: it is its parent's."""
        # Some thread, which is not in this process, may have it.
        self._lock = threading.Lock()
        if self._requests is not None:
            self._requests.close()
        if self._process is not None:
            # Nothing that this process could wait for.
            self._process.returncode = 0
            if self._process.stderr is not None:
                self._process.stderr.close()
        self._process = self._requests = None

    def _bury(self, process: subprocess.Popen[bytes]) -> str:
        printed = b""
        if process is self._process:
            if self._requests is not None:
                self._requests.close()
            self._process = self._requests = None
            process.kill()
            _, printed = process.communicate()
        said = printed[-_MOST_SAID:].decode("utf-8", "replace")
        return f"the zygote ended with {process.returncode}: {said}"


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a zygote; the process, and the socket for requests."""
    requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [executable(), *FLAGS, "-c", _BOOT, str(Path(__file__).parent), str(theirs.fileno())]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError as e:
            requests.close()
            raise NotForked(f"{executable()}: {e}") from e
    requests.settimeout(_START_SECONDS)
    return process, requests


_ZYGOTE = _Zygote()
os.register_at_fork(after_in_child=_ZYGOTE.forget)
atexit.register(end_zygote)
