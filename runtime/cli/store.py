"""Where a user's log and blobs are, and how a command gets at them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import platformdirs

from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import LogError, LogUnavailable, NotFound
from bascule.schemas.subjects import token

if TYPE_CHECKING:
    from bascule.runtime.log.blobs import BlobStore
    from bascule.runtime.log.protocol import EventLog


def home_folder(given: Path | None) -> Path:
    """``--home``, BASCULE_HOME, or the user's data folder."""
    if given is not None:
        return given.expanduser().absolute()
    found = os.environ.get("BASCULE_HOME")
    return Path(found).absolute() if found else Path(platformdirs.user_data_dir("bascule"))


@dataclass(frozen=True)
class Store:
    """An open log with its blobs.

    Attributes:
        owner: whether this process runs the embedded server, and so is the only one that serves its runs.
    """

    home: Path
    log: EventLog
    owner: bool

    def blobs(self, run: str) -> BlobStore:
        """The blobs of one run: no run can discard what another needs."""
        from bascule.runtime.log.blobs import BlobStore

        return BlobStore(self.home / "blobs" / token(run))

    async def events(self, run: str) -> list[Recorded]:
        """All events of a run.

        Raises:
            NotFound: there is no such run; lists those there are.
        """
        found = [e async for e in self.log.read(f"bascule.{token(run)}.>")]
        if not found:
            known = ", ".join([r async for r in self.runs()]) or "none yet"
            raise NotFound(f"There is no run {run!r} in {self.home}.", next_step=f"Runs: {known}.")
        return found

    async def runs(self) -> AsyncIterator[str]:
        """Names of all runs, oldest first."""
        async for event in self.log.read("bascule.*.run.run.started"):
            yield event.envelope.run


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside a group, however deep; the error itself if it is none."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


@asynccontextmanager
async def open_store(home: Path, *, url: str | None = None, exclusive: bool = False) -> AsyncIterator[Store]:
    """Open the log: at ``url``, else the embedded server that runs on ``home``, else one started for this command.

    Args:
        exclusive: refuse if another process already runs the embedded server.

    Raises:
        LogError: the store is taken, not writable, or cannot be reached.
    """
    from bascule.runtime.log.nats import NatsLog
    from bascule.runtime.log.server import EmbeddedServer, attach

    server: EmbeddedServer | None = None
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("nats", "tls") or not parts.hostname:
            raise LogError(
                f"{url!r} is not the address of a NATS server.", next_step="Use nats://[user:password@]host:port."
            )
        address = f"{parts.scheme}://{parts.hostname}:{parts.port or 4222}"
        user = unquote(parts.username) if parts.username else None
        password = unquote(parts.password) if parts.password else None
        log = await NatsLog.connect(address, user=user, password=password)
    else:
        running = None if exclusive else await asyncio.to_thread(attach, home)
        if running is None:
            server = await asyncio.to_thread(EmbeddedServer.start, home)
            running = server.connection
        try:
            log = await NatsLog.connect(running.url, user=running.user, password=running.password)
        except BaseException:
            if server is not None:
                server.stop()
            raise
    try:
        yield Store(home, log, owner=server is not None)
    except Exception as error:
        fault = server.fault() if server is not None else None
        if fault is not None and any(isinstance(e, LogUnavailable) for e in leaves(error)):
            raise LogError(
                f"The log in {home} cannot be written: {fault}.",
                next_step="If the disk is full, free some space; then `bascule resume RUN`. Nothing recorded is lost.",
            ) from error
        raise
    finally:
        await log.close()
        if server is not None:
            await asyncio.to_thread(server.stop)
