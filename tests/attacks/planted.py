"""Things to find, all of this test's own: sealed answers, a process that holds them, doors to knock at."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bascule.plugins.canary import canary, canary_key, private_folder
from bascule.plugins.tasks.truths import kept_truths

TASK = "attacked"
VARIABLE = "BASCULE_CACHED_ANSWERS"
_KEEPER = """
import os, sys
truths = open(sys.argv[1], "rb")
held = truths.read()
address = id(held) + bytes.__basicsize__ - 1
os.chdir(os.path.dirname(sys.argv[1]))
print(truths.fileno(), address, len(held), flush=True)
sys.stdin.read()
"""


class Doors:
    """Listeners, and what was said to them."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path) -> None:
        self._listeners: list[socket.socket] = []
        self.given: dict[str, Any] = {"abstract": f"bascule-attacked-{secrets.token_hex(8)}"}
        # The path of a socket is short, and a folder's may be long.
        place = Path(stack.enter_context(_short_folder(folder)))
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("dns", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("unix", socket.AF_UNIX, socket.SOCK_STREAM, str(place / "socket")),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, "\0" + self.given["abstract"]),
        ):
            listener = stack.enter_context(socket.socket(family, kind))
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen(64)
            listener.setblocking(False)
            self._listeners.append(listener)
            if family == socket.AF_INET:
                self.given[name] = listener.getsockname()[1]
            elif name == "unix":
                self.given["unix"] = str(place / "socket")
                (place / "socket").chmod(0o777)

    def heard(self) -> bytes:
        """What was said since the last time; a connection alone is something, too."""
        found = b""
        for listener in self._listeners:
            with contextlib.suppress(BlockingIOError):
                while True:
                    if listener.type == socket.SOCK_DGRAM:
                        found += listener.recv(65536)
                        continue
                    with listener.accept()[0] as connection:
                        connection.settimeout(60)
                        found += b"connection "
                        while part := connection.recv(65536):
                            found += part
        return found


@contextlib.contextmanager
def _short_folder(folder: Path) -> Iterator[str]:
    import shutil
    import tempfile

    del folder
    path = tempfile.mkdtemp(prefix="b-", dir="/tmp")
    try:
        os.chmod(path, 0o755)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Planted:
    """What was planted.

    Attributes:
        given: what an attack is told, who has to find the way alone.
        descriptor: of the sealed answers, open here and inheritable.
        heard: what was said to the listeners since the last call.
    """

    def __init__(self, given: dict[str, Any], descriptor: int, heard: Callable[[], bytes]) -> None:
        self.given = given
        self.descriptor = descriptor
        self.heard = heard


@contextlib.contextmanager
def cache(folder: Path) -> Iterator[None]:
    """A cache of the test's own, for this process and what it starts; what was fetched once is there."""
    before = os.environ.get("BASCULE_CACHE")
    real = Path(before) if before else Path.home() / ".cache" / "bascule"
    own = folder / "cache"
    own.mkdir(exist_ok=True)
    for name in ("wheels", "tasks"):
        if (real / name).is_dir() and not (own / name).exists():
            (own / name).mkdir()
            for file in (real / name).iterdir():
                (own / name / file.name).symlink_to(file)
    os.environ["BASCULE_CACHE"] = str(own)
    try:
        yield
    finally:
        if before is None:
            del os.environ["BASCULE_CACHE"]
        else:
            os.environ["BASCULE_CACHE"] = before


@contextlib.contextmanager
def planted(folder: Path) -> Iterator[Planted]:
    """Plant everything; nothing of it is left afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cache(folder))
        kept_truths(TASK, f"{TASK}-1", lambda: {"dev": {"d-1": "right"}, "sealed": {"s-1": "right"}})
        truths = private_folder() / f"{TASK}-1.jsonl"
        token = canary(canary_key(), TASK, "sealed", "s-1")
        descriptor = os.open(truths, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        os.set_inheritable(descriptor, True)
        os.environ[VARIABLE] = token
        stack.callback(os.environ.pop, VARIABLE)
        keeper = subprocess.Popen(
            [sys.executable, "-S", "-s", "-c", _KEEPER, str(truths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={VARIABLE: token},
        )
        stack.callback(_end, keeper)
        assert keeper.stdout is not None
        number, address, length = map(int, keeper.stdout.readline().split())
        doors = Doors(stack, folder)
        given = {
            "truths": str(truths),
            "keeper": keeper.pid,
            "runtime": os.getpid(),
            "descriptor": number,
            "address": address,
            "length": length,
            **doors.given,
        }
        yield Planted(given, descriptor, doors.heard)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
