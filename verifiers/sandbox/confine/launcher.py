"""Start one program, confined. Runs in an interpreter of its own, where nothing of bascule can be imported.

Confined, it sends a descriptor of its working folder over a socket and waits for a byte, so that files can be put
there; then it becomes the program, which closes the socket. A failure is sent as text.
"""

from __future__ import annotations

import _socket
import os
import sys

from . import seal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

FOLDER = b"folder"


def main(control: _socket.socket, plan: dict[str, Any]) -> NoReturn:
    """Become the program.

    Args:
        control: the socket; the class below ``socket.socket``, whose module has many imports.
        plan: of :func:`seal.seal`, with ``arguments`` and ``environment``.
    """
    try:
        os.set_inheritable(control.fileno(), False)
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
