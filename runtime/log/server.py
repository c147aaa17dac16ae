"""The embedded ``nats-server``: one per home, started by us, gone when we are.

A home holds ``server.lock`` (held while anything uses the store), ``server.json`` (how to connect), ``nats/`` (the
store, the configuration and the server's own log) and, after a start that met damage, ``nats-before-recovery/``. The
lock is inherited by the server, so that it outlives us exactly as long as the server does: two servers on one store
would corrupt it, and ``nats-server`` does not object.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import subprocess
import time
from pathlib import Path
from typing import Final

import msgspec

from bascule.runtime.log.config import LOG_ACCOUNT, MAX_FILE_STORE, configuration
from bascule.runtime.log.home import (
    POLL_SECONDS,
    Connection,
    acquire,
    attach,
    move_to_account,
    server_name,
    stored_passwords,
    unwritable,
    write_private,
)
from bascule.runtime.log.process import find_binary, spawn
from bascule.runtime.log.rescue import keep_copy, where_copied
from bascule.schemas.errors import LogError

__all__ = ["Connection", "EmbeddedServer", "attach", "find_binary"]

_READY_SECONDS: Final = 120.0


class EmbeddedServer:
    """A running ``nats-server`` that belongs to this process. Made by :meth:`start`.

    Attributes:
        not_copied: why the log's files were not copied before it started on them; None if they were, or there are none.
    """

    def __init__(self, home: Path, lock: int, binary: str, max_file_store: int) -> None:
        self.home = home
        self._lock = lock
        self._binary = binary
        self._max_file_store = max_file_store
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self.not_copied: str | None = None

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
            move_to_account(home / "nats" / "jetstream")
            server.not_copied = keep_copy(home)
            server._launch(port, stored_passwords(home))
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

        After a write error (a full disk) nats-server answers, but stores nothing until it is started again; clients see
        LogUnavailable. This tells whoever watches over it why.
        """
        try:
            lines = (self.home / "nats" / "server.log").read_text(errors="replace").splitlines()
        except OSError:
            return None
        errors = [line.split(mark, 1)[1] for line in lines for mark in ("[FTL] ", "[ERR] ") if mark in line]
        return errors[-1] if errors else None

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

    def _launch(self, port: int, passwords: dict[str, str]) -> None:
        store = self.home / "nats"
        for old in (*store.glob("*.ports"), store / "server.log"):
            old.unlink(missing_ok=True)
        name = f"bascule-{secrets.token_hex(8)}"
        text = configuration(
            store,
            name=name,
            listen=f"127.0.0.1:{port or -1}",
            identities={user: {"user": user, "password": password} for user, password in passwords.items()},
            max_file_store=self._max_file_store,
            logfile=store / "server.log",
        )
        write_private(store / "server.conf", text)
        self._process = spawn(
            [self._binary, "-c", str(store / "server.conf"), "--ports_file_dir", str(store)], store, self._lock
        )
        url = self._await_ready(name, port)
        streams = store / "jetstream" / LOG_ACCOUNT / "streams"
        self._connection = Connection(
            url=url, passwords=passwords, pid=self._process.pid, name=name, store=str(streams)
        )
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
        assert self._process is not None
        reason = self.fault() or (
            f"it ended with status {self._process.returncode} without a word, as it does when its store is damaged and "
            "it runs out of memory"
        )
        if "address already in use" in reason:
            return LogError(
                f"Port {port} on 127.0.0.1 is taken by another program.",
                next_step="Choose another port, or leave the choice to the server.",
            )
        if "no space left" in reason.lower():
            return unwritable(self.home, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        copied = where_copied(self.home, self.not_copied)
        return LogError(
            f"The embedded server on {self.home} did not start: {reason}.",
            next_step=f"Look into {log}. {copied}".strip(),
        )
