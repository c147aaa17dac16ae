"""One zygote seen from the runtime: starts it, asks it for processes, buries it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import msgspec

from bascule.runtime.episodes.child import remove_tree
from bascule.runtime.episodes.episode import Episode, Handler, Limits, Outcome
from bascule.schemas.errors import BasculeError
from bascule.schemas.harness import Harness

_PROGRAM = Path(__file__).with_name("zygote.py")
_MARK = "BASCULE_ZYGOTE"
_HARNESSES = 64
_RESOURCES = ("cpu_seconds", "file_bytes", "memory_bytes", "open_files")
_START_SECONDS = 60.0
# An exit report is due within about a second of a kill; without one for this long, the zygote is stopped or stuck.
_REPORT_SECONDS = 30.0
_KILL_SECONDS = 10.0


class EpisodeProcessError(BasculeError):
    """No process for episodes can be started on this machine."""

    code = "bascule.episodes"


class _Report(msgspec.Struct, frozen=True):
    op: str
    number: int = 0
    status: int | None = None
    error: str | None = None


class _Lost(Exception):
    """The zygote is gone, and with it every episode below it."""


class ZygoteHost:
    """One zygote process, from start to burial, and the episodes below it."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, folder: Path, mark: str) -> None:
        self.alive = True
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._control = control
        self._folder = folder
        self._mark = mark
        self._ready: asyncio.Future[bool] = self._loop.create_future()
        self._numbers = itertools.count(1)
        self._running: dict[int, tuple[Episode, asyncio.Future[_Report | None]]] = {}
        self._known: OrderedDict[str, None] = OrderedDict()
        self._sending = asyncio.Lock()
        control.setblocking(False)
        self._loop.add_reader(control, self._on_report)

    @classmethod
    async def spawn(cls) -> ZygoteHost:
        """Start a zygote. It ends with the calling thread, which must be the event loop's.

        Raises:
            EpisodeProcessError: it does not start.
        """
        folder = Path(tempfile.mkdtemp(prefix="bascule-episodes-"))
        mark = secrets.token_hex(16)
        # The whole environment of every episode: nothing of ours is inherited. One hash seed, so that the order of a
        # set does not differ between two runs of a harness; -I would ignore it, so its parts are given one by one.
        environment = {_MARK: mark, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, (folder / "stderr").open("wb") as stderr:
                arguments = [str(_PROGRAM), str(theirs.fileno()), str(os.getpid()), str(folder)]
                process = subprocess.Popen(
                    [sys.executable, "-P", "-s", "-S", "-B", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    pass_fds=(theirs.fileno(),),
                    env=environment,
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as e:
            ours.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise EpisodeProcessError(f"The episode process did not start: {e}.") from e
        host = cls(process, ours, folder, mark)
        ready, said = False, ""
        try:
            async with asyncio.timeout(_START_SECONDS):
                ready = await host._ready
        except TimeoutError:
            pass
        finally:
            if not ready:
                with contextlib.suppress(OSError):
                    said = (folder / "stderr").read_text(errors="replace")[-2000:].strip()
                await host.close()
        if not ready:
            raise EpisodeProcessError(
                f"The episode process did not start: {said or 'no reason given'}.",
                next_step=f"Check that {sys.executable} runs.",
            )
        return host

    async def run(self, harness: Harness, opening: bytes, handler: Handler, limits: Limits) -> Outcome:
        """Run one episode; when this returns or raises, nothing of the episode is alive."""
        number = next(self._numbers)
        channel, theirs = socket.socketpair()
        output, printing = os.pipe()
        episode = Episode(channel, output, limits)
        exited: asyncio.Future[_Report | None] = self._loop.create_future()
        self._running[number] = episode, exited
        try:
            try:
                await self._start(number, harness, limits, (theirs.fileno(), printing))
            finally:
                theirs.close()
                os.close(printing)
            ending = await episode.converse(opening, handler)
            if ending == "exited" and not await episode.wait(exited):
                ending = "timeout"
            report = await self._finish(number, exited)
        except _Lost:
            report = None
        finally:
            try:
                if not exited.done():
                    await self._finish(number, exited)
            finally:
                self._running.pop(number, None)
                episode.close()
        if report is None:
            return Outcome(ending="lost", seconds=episode.seconds)
        if report.error is not None or ending == "unavailable":
            return Outcome(ending="unavailable", output=report.error or episode.printed)
        return Outcome(ending=ending, exit_code=report.status, output=episode.printed, seconds=episode.seconds)

    async def close(self) -> None:
        """End the zygote and everything below it, and remove its folder."""
        # It ends when this end of its control socket is closed, and cleans up; if it does not, it is killed.
        self._lose(kill=False)
        await asyncio.to_thread(self._bury)

    async def _start(self, number: int, harness: Harness, limits: Limits, descriptors: tuple[int, int]) -> None:
        digest = harness.digest
        async with self._sending:
            if digest not in self._known:
                memory = os.memfd_create("harness")
                try:
                    with os.fdopen(memory, "wb", closefd=False) as file:
                        file.write(msgspec.json.encode(harness.files))
                    await self._send({"op": "harness", "digest": digest}, (memory,))
                finally:
                    os.close(memory)
            self._known[digest] = None
            self._known.move_to_end(digest)
            if len(self._known) > _HARNESSES:
                await self._send({"op": "forget", "digest": self._known.popitem(last=False)[0]})
            allowed = {name: getattr(limits, name) for name in _RESOURCES}
            await self._send({"op": "start", "number": number, "digest": digest, "limits": allowed}, descriptors)

    async def _finish(self, number: int, exited: asyncio.Future[_Report | None]) -> _Report | None:
        """See to it that the episode is over, and return its report; None if that is lost."""
        if not exited.done():
            with contextlib.suppress(_Lost):
                async with self._sending:
                    await self._send({"op": "kill", "number": number})
        try:
            async with asyncio.timeout(_REPORT_SECONDS):
                return await asyncio.shield(exited)
        except TimeoutError:
            self._lose()
            return None

    async def _send(self, message: dict[str, object], descriptors: tuple[int, ...] = ()) -> None:
        data = msgspec.json.encode(message)
        while self.alive:
            try:
                socket.send_fds(self._control, [data], descriptors)
            except BlockingIOError:
                await self._writable()
            except OSError:
                self._lose()
            else:
                return
        raise _Lost

    async def _writable(self) -> None:
        writable = asyncio.Event()
        self._loop.add_writer(self._control, writable.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await writable.wait()
        finally:
            if self.alive:
                self._loop.remove_writer(self._control)

    def _on_report(self) -> None:
        while self.alive:
            try:
                data = self._control.recv(65536)
                report = msgspec.json.decode(data, type=_Report) if data else None
            except BlockingIOError:
                return
            except (OSError, msgspec.DecodeError):
                report = None
            if report is None:
                self._lose()
            elif report.op == "ready" and not self._ready.done():
                self._ready.set_result(True)
            elif report.number in self._running:
                self._end(report.number, report)

    def _end(self, number: int, report: _Report | None) -> None:
        episode, exited = self._running[number]
        if not exited.done():
            exited.set_result(report)
            episode.hang_up()

    def _lose(self, *, kill: bool = True) -> None:
        """Give up on the process. Idempotent."""
        if not self.alive:
            return
        self.alive = False
        self._loop.remove_reader(self._control)
        self._loop.remove_writer(self._control)
        self._control.close()
        if kill:
            self._process.kill()
        if not self._ready.done():
            self._ready.set_result(False)
        for number in list(self._running):
            self._end(number, None)

    def _bury(self) -> None:
        try:
            self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        kill_marked(f"{_MARK}={self._mark}".encode())
        with contextlib.suppress(OSError):
            remove_tree(str(self._folder))


def kill_marked(mark: bytes) -> None:
    """Kill every process whose initial environment holds ``mark``: what a zygote that was killed left behind."""
    found = True
    deadline = time.monotonic() + _KILL_SECONDS
    while found and time.monotonic() < deadline:
        found = False
        for name in os.listdir("/proc"):
            if not name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    os.kill(int(name), signal.SIGKILL)
                    found = True
