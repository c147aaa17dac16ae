"""Where a user's log and blobs are, and how a command gets at them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import BasculeError, ConfigError, Corrupt, LogError, LogUnavailable, NotFound
from bascule.schemas.subjects import token

if TYPE_CHECKING:
    from bascule.runtime.log.access import Access
    from bascule.runtime.log.anchor import Anchor
    from bascule.runtime.log.blobs import Blobs
    from bascule.runtime.log.guard import Watch
    from bascule.runtime.log.link import Link
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
        log: as the user that reads and, from the command line, asks for things.
        owner: whether this process runs the embedded server, and so is the only one that serves its runs.
        writers: the log as each user may write it, connected when it is used; empty if there is one user for all.
        not_copied: why the log's files were not copied before the server started on them.
    """

    home: Path
    log: EventLog
    owner: bool
    writers: Mapping[str, EventLog]
    not_copied: str | None = None
    _watches: dict[str, Watch] = field(default_factory=dict)

    def admin(self) -> EventLog:
        """The log as the user who may write whole runs."""
        return self.writers.get("admin", self.log)

    @cached_property
    def anchor(self) -> Anchor:
        """What the log must not be behind."""
        from bascule.runtime.log.anchor import Anchor

        return Anchor.of_home(self.home)

    async def rule_out_damage(self, *, foreseen: bool) -> None:
        """See whether what was read and made somebody fail is not what was recorded.

        Args:
            foreseen: it failed with an error that says why; then only what is anchored is looked into.

        Raises:
            Corrupt: it is not.
        """
        from bascule.runtime.log.guard import rule_out_damage, rule_out_gaps

        async with self._located():
            for watch in self._watches.values():
                await rule_out_damage(watch, self.log)
        if self._watches and not foreseen:
            await rule_out_gaps(self.log, self.anchor.read().missing)

    @asynccontextmanager
    async def _located(self) -> AsyncIterator[None]:
        """Make an error that says that the log is damaged say also where."""
        from bascule.runtime.log.guard import located

        try:
            yield
        except Corrupt as error:
            raise await located(error, self.log) from error

    async def guard(self) -> None:
        """Refuse a log that has a gap or ends before its anchor.

        One that is whole needs no copy of how it was before the server started on it.

        Raises:
            Corrupt: naming the first sequence that is wrong, and where that copy is.
        """
        from bascule.runtime.log.guard import check_extent
        from bascule.runtime.log.rescue import drop_copy, where_copied

        anchored = self.anchor.read()  # before the log, which is ahead of it at any time
        try:
            async with self._located():
                check_extent(await self.log.extent(), anchored, self.anchor.path)
        except Corrupt as error:
            copied = where_copied(self.home, self.not_copied)
            raise Corrupt(error.message, next_step=f"{copied} {error.next_step or ''}".strip()) from error
        if self.owner:
            await asyncio.to_thread(drop_copy, self.home, anchored)

    async def guard_runs(self) -> None:
        """Refuse a log that does not give out the start of a run that its anchor knows.

        Raises:
            Corrupt: naming the run.
        """
        async for _ in self.runs():
            pass

    def blobs(self, run: str) -> Blobs:
        """The blobs of one run, in the home or, if BASCULE_BLOBS is ``nats``, on the broker.

        No run can discard what another needs.

        Raises:
            ConfigError: BASCULE_BLOBS is something else.
        """
        if link := self._blob_link():
            from bascule.runtime.log.object_blobs import ObjectBlobs

            return ObjectBlobs(link, run)
        from bascule.runtime.log.blobs import FileBlobs

        return FileBlobs(self.home / "blobs" / token(run))

    async def blob_runs(self) -> list[str]:
        """Names of the runs that blobs are kept for, also of such that the log does not know."""
        if link := self._blob_link():
            from bascule.runtime.log.bucket import Bucket

            return sorted({name.partition("/")[0] for name in await Bucket(link).names()})
        folder = self.home / "blobs"
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    def _blob_link(self) -> Link | None:
        """The connection to the broker if blobs are kept there, None if in the home."""
        chosen = os.environ.get("BASCULE_BLOBS", "folder")
        if chosen not in ("folder", "nats"):
            raise ConfigError(f"BASCULE_BLOBS is {chosen!r}.", next_step="Set it to folder or to nats, or unset it.")
        if chosen == "folder":
            return None
        from bascule.runtime.log.nats import NatsLog

        assert isinstance(self.log, NatsLog)
        return self.log.link

    async def read(self, run: str) -> AsyncIterator[Recorded]:
        """The events of a run, in order, one at a time.

        Raises:
            NotFound: there is no such run; lists those there are.
            Corrupt: it is not the run that was anchored.
        """
        from bascule.runtime.log.guard import Watch, rule_out_gaps

        anchored = self.anchor.read()
        watch = self._watches[run] = Watch(run, anchored.heads.get(run))
        async with self._located():
            async for event in self.log.read(f"bascule.{token(run)}.>"):
                watch.add(event)
                yield event
            watch.finish()
        if watch.chain.count == 0:
            await rule_out_gaps(self.log, anchored.missing)
            known = ", ".join([r async for r in self.runs()]) or "none yet"
            raise NotFound(f"There is no run {run!r} in {self.home}.", next_step=f"Runs: {known}.")

    async def events(self, run: str) -> list[Recorded]:
        """All events of a run at once; see :meth:`read`."""
        return [event async for event in self.read(run)]

    async def runs(self) -> AsyncIterator[str]:
        """Names of all runs, oldest first.

        Raises:
            Corrupt: at the end, if the anchor knows one whose start the log does not give out.
        """
        from bascule.runtime.log.guard import known_runs

        async with self._located():
            async for run in known_runs(self.log, self.anchor.read(), self.anchor.path):
                yield run


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside a group, however deep; the error itself if it is none."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


@asynccontextmanager
async def open_store(
    home: Path,
    *,
    url: str | None = None,
    credentials: Path | None = None,
    user: str | None = None,
    exclusive: bool = False,
    start: bool = True,
    guarded: bool = True,
    writes: bool = False,
) -> AsyncIterator[Store]:
    """Open the log: at ``url``, else the embedded server that runs on ``home``, else one started for this command.

    Args:
        credentials: a file with what the users log in with at ``url``.
        user: who reads; one that commands use if it is None.
        exclusive: refuse if another process already runs the embedded server.
        start: whether an embedded server may be started.
        guarded: refuse a log that has a gap or ends before its anchor.
        writes: refuse also one that does not know each run that its anchor knows; as ``exclusive`` does.

    Raises:
        Corrupt: the log is not what its anchor knows.
        NotPermitted: the server refuses a user.
        LogError: the store is taken, not writable, or cannot be reached.
    """
    from bascule.runtime.log.access import embedded_access, remote_access
    from bascule.runtime.log.permissions import ADMIN, CLI, READER
    from bascule.runtime.log.server import EmbeddedServer, attach

    server: EmbeddedServer | None = None
    store: Store | None = None
    async with AsyncExitStack() as stack:
        if url is not None:
            access = remote_access(url, credentials)
        else:
            running = None if exclusive else await asyncio.to_thread(attach, home)
            if running is None and not start:
                raise LogError(
                    f"No server runs on {home}.", next_step="Start `bascule broker`, or name a server with --url."
                )
            if running is None:
                server = await asyncio.to_thread(EmbeddedServer.start, home)
                stack.push_async_callback(asyncio.to_thread, server.stop)
                running = server.connection
            access = embedded_access(running)
        try:
            if server is not None:
                await (await access.connect(ADMIN)).close()  # makes the streams
            reader = user or next((u for u in (CLI, READER, ADMIN) if access.has(u)), CLI)
            log = await access.connect(reader)
            stack.push_async_callback(log.close)
            store = Store(
                home,
                log,
                owner=server is not None,
                writers=_writers(access, reader, log, stack),
                not_copied=server.not_copied if server is not None else None,
            )
            if guarded:
                await store.guard()
            elif store.owner:
                with suppress(Corrupt):
                    await store.guard()
            if guarded and (writes or exclusive):
                await store.guard_runs()
            yield store
        except Exception as error:
            fault = server.fault() if server is not None else None
            if fault is not None and any(isinstance(e, LogUnavailable) for e in leaves(error)):
                raise LogError(
                    f"The log in {home} cannot be written: {fault}.",
                    next_step="If the disk is full, free some space; then `bascule resume RUN`. "
                    "Nothing recorded is lost.",
                ) from error
            found = [*leaves(error)]
            if store is not None and not any(isinstance(e, Corrupt | LogUnavailable) for e in found):
                # An exit code is an answer, no failure.
                foreseen = any(isinstance(e, BasculeError) or hasattr(e, "exit_code") for e in found)
                await store.rule_out_damage(foreseen=foreseen)
            raise


def _writers(access: Access, reader: str, log: EventLog, stack: AsyncExitStack) -> dict[str, EventLog]:
    from bascule.runtime.log.lazy import LazyLog
    from bascule.runtime.log.permissions import USERS

    if access.credentials is None:
        return {}
    writers = {user: LazyLog(partial(access.connect, user)) for user in USERS if user != reader}
    for writer in writers.values():
        stack.push_async_callback(writer.close)
    return {**writers, reader: log}
