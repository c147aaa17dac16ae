"""The zygote: a warm interpreter that forks the launcher of each program, which saves an interpreter's start for each.

A process of its own, where nothing of bascule can be imported. It has one thread, and holds nothing of a program but
one descriptor: a plan is read by the process that is forked for it. It keeps the privileges, limits and cores that
whoever started it had then, and ends with its only socket.

A request is one packet with the descriptors ``GIVEN``. The zygote answers on the first of them, a socket of packets,
the program's channel: the number of the process that it forked, or 0 and why it could not; and once that process has
ended and is waited for, its exit code, or minus the number of its signal. Until then any packet on the channel has the
process killed. All numbers are C ints.
"""

# ruff: noqa: SIM105 (contextlib would be loaded for it)
from __future__ import annotations

import _socket
import gc
import os
import select
import signal
import struct

from . import kernel, launcher, seal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

GIVEN = ("channel", "control", "lifeline", "stdin", "stdout", "stderr")
"""Descriptors of a request, in their order; ``control`` and ``lifeline`` are for :func:`launcher.main`."""

_MOST_SAID = 4000


def serve(descriptor: int) -> None:
    """Carry out requests until the socket ends.

    Args:
        descriptor: of the socket, one of packets.
    """
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    os.set_inheritable(descriptor, False)
    requests = _socket.socket(fileno=descriptor)
    wake, waker = os.pipe()
    for end in (wake, waker):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Whoever started this may have kept it back.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    # Forked processes share the pages of what is here now, as long as no collection writes to them.
    gc.disable()
    gc.freeze()
    poll = select.poll()
    for waited in (descriptor, wake):
        poll.register(waited, select.POLLIN)
    running: dict[int, int] = {}
    while True:
        for ready, _ in poll.poll():
            if ready == descriptor:
                received = _received(requests)
                if received is None:
                    return
                if (pid := _started(received)) is not None:
                    running[pid] = received[0]
                    poll.register(received[0], select.POLLIN)
            elif ready == wake:
                os.read(wake, 4096)
            elif pid := next((pid for pid, channel in running.items() if channel == ready), 0):
                if _asked(ready):
                    # Not yet waited for: the number names this process and no other.
                    os.kill(pid, signal.SIGKILL)
                else:
                    poll.unregister(ready)
        for pid, status in _ended():
            channel = running.pop(pid)
            _say(channel, struct.pack("i", os.waitstatus_to_exitcode(status)))
            try:
                poll.unregister(channel)
            except KeyError:
                pass
            os.close(channel)


def _received(requests: _socket.socket) -> list[int] | None:
    """The descriptors of the next request; None at the end of all."""
    room = _socket.CMSG_SPACE(4 * len(GIVEN))
    data, rights, _, _ = requests.recvmsg(1, room, _socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    return [number for _, _, held in rights for (number,) in struct.iter_unpack("i", held[: len(held) // 4 * 4])]


def _started(descriptors: list[int]) -> int | None:
    """Fork for a request, whose descriptors but for the channel are closed, and say so on the channel.

    Returns:
        The process id; None where there is none, and the channel is closed as well.
    """
    pid, why = 0, "no room for its descriptors"
    if len(descriptors) == len(GIVEN):
        try:
            pid = os.fork()
        except OSError as e:
            why = f"fork: {e}"
        else:
            if not pid:
                _become_launcher(*descriptors)
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    if descriptors:
        _say(descriptors[0], struct.pack("i", pid) + (b"" if pid else why.encode("utf-8", "replace")[:_MOST_SAID]))
        if not pid:
            os.close(descriptors[0])
    return pid or None


def _become_launcher(channel: int, control: int, lifeline: int, stdin: int, stdout: int, stderr: int) -> NoReturn:
    """In the process that was forked: hold nothing but what is its own, and start the program."""
    try:
        for number, descriptor in enumerate((stdin, stdout, stderr)):
            os.dup2(descriptor, number)
        # Before all else: what is open here are other programs' channels and the socket for requests.
        seal.close_all_but([control, lifeline])
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        launcher.main(_socket.socket(fileno=control), lifeline)
    finally:
        os._exit(1)


def _asked(channel: int) -> bool:
    """Whether something is asked on a channel that can be read; otherwise there is nobody who could."""
    try:
        return bool(os.read(channel, 64))
    except OSError:
        return False


def _say(channel: int, data: bytes) -> None:
    try:
        os.write(channel, data)
    except OSError:
        # Nobody is there any more.
        pass


def _ended() -> list[tuple[int, int]]:
    """Processes that have ended, and their wait statuses."""
    found = []
    try:
        while (one := os.waitpid(-1, os.WNOHANG))[0]:
            found.append(one)
    except ChildProcessError:
        pass
    return found
