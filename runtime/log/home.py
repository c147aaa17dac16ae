"""A home folder: its lock, and how to reach the server that runs on it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Final

import msgspec

from bascule.runtime.log.config import LOG_ACCOUNT
from bascule.runtime.log.disk import durable_write, sync_folder
from bascule.runtime.log.permissions import ADMIN, USERS
from bascule.schemas.errors import LogError

POLL_SECONDS: Final = 0.002
_LOCK_SECONDS: Final = 5.0


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a running embedded server.

    Attributes:
        url: ``nats://127.0.0.1:<port>``.
        passwords: of each of our users; of these ``user`` is the one who may do everything.
        pid: of the server itself.
        name: the server's name for this start; tells it from another one on a reused port.
        store: the folder of the streams, by name.
    """

    url: str
    passwords: dict[str, str]
    pid: int
    name: str
    store: str = ""

    @property
    def user(self) -> str:
        return ADMIN

    @property
    def password(self) -> str:
        return self.passwords[ADMIN]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


def attach(home: Path) -> Connection | None:
    """How to connect to the server that runs on ``home``, None if there is none. Takes no lock."""
    try:
        connection = msgspec.json.decode((home / "server.json").read_bytes(), type=Connection)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return connection if server_name(connection.port) == connection.name else None


def acquire(home: Path) -> int:
    """The locked file descriptor of ``server.lock``, with our pid in it."""
    fd = os.open(home / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
            # A dead holder's server is about to follow it.
            if _is_alive(holder) or time.monotonic() > deadline:
                os.close(fd)
                raise LogError(
                    f"{home} is in use by another process (pid {holder or 'unknown'}).",
                    next_step="Wait for its end, stop it, or choose another home.",
                ) from None
            time.sleep(POLL_SECONDS)
        except BaseException:
            os.close(fd)
            raise
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def stored_passwords(home: Path) -> dict[str, str]:
    """A password for each user: those in ``server.json`` if a crash left it there, so that clients that wait can
    reconnect; else new ones."""
    try:
        left = msgspec.json.decode((home / "server.json").read_bytes(), type=Connection).passwords
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        left = {}
    return {user: left.get(user) or secrets.token_urlsafe(32) for user in USERS}


def move_to_account(streams: Path) -> None:
    """Move a log that was made before there were accounts to where the server looks for it now."""
    old, new = streams / "$G", streams / LOG_ACCOUNT
    if old.is_dir() and not new.exists():
        old.rename(new)


def server_name(port: int) -> str | None:
    """The name in the greeting of the NATS server on ``port``; None if nothing answers like one."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as s, s.makefile("rb") as f:
            greeting = f.readline(65536)
        info = json.loads(greeting.removeprefix(b"INFO "))
        return str(info["server_name"]) if info.get("jetstream") else None
    except (OSError, ValueError, LookupError):
        return None


def write_private(path: Path, text: str) -> None:
    """Put a file for its owner alone in place, as a whole and for good."""
    durable_write(path, text.encode())
    sync_folder(path.parent)


def unwritable(home: Path, e: OSError) -> LogError:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return LogError(f"The disk of {home} is full.", next_step="Free some space and start again; nothing is lost.")
    return LogError(
        f"{home} cannot be used as a home: {e.strerror} ({e.filename or home}).",
        next_step="Choose a folder that you can write to.",
    )
