"""Start one program, confined. Runs in a process that was forked for it, where nothing of bascule can be imported.

It gets the plan over a socket. Confined, it sends a descriptor of its working folder over it and waits for a byte, so
that files can be put there; then it becomes the program, which closes the socket. A failure is sent as text.
"""

from __future__ import annotations

import _socket
import marshal
import os
import sys

from . import seal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

FOLDER = b"folder"
LENGTH = 4
"""Bytes of the length, big-endian, that comes before a plan."""


def main(control: _socket.socket, lifeline: int) -> NoReturn:
    """Become the program.

    Args:
        control: the socket; the class below ``socket.socket``, whose module has many imports. The plan that comes over
            it is that of :func:`seal.seal`, by :mod:`marshal`, with ``arguments`` and ``environment``.
        lifeline: descriptor, for the plan.
    """
    try:
        os.set_inheritable(control.fileno(), False)
        plan = marshal.loads(_exactly(control, int.from_bytes(_exactly(control, LENGTH), "big")))  # noqa: S302
        plan["lifeline"] = lifeline
        seal.seal(plan, [control.fileno()])
        folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        rights = folder.to_bytes(4, sys.byteorder)
        control.sendmsg([FOLDER], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        os.close(folder)
        if control.recv(1):
            os.execve(plan["arguments"][0], plan["arguments"], plan["environment"])  # noqa: S606
    except Exception as e:
        control.sendall(f"{type(e).__name__}: {e}".encode("utf-8", "replace"))
    finally:
        os._exit(1)


def _exactly(control: _socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = control.recv(size - len(data))
        if not part:
            # Whoever wanted a program is gone.
            os._exit(1)
        data += part
    return data
