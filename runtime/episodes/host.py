"""One zygote seen from the runtime: starts it, asks it for processes, buries it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path

import msgspec

from bascule.runtime.episodes import watch
from bascule.runtime.episodes.episode import Ending, Episode, Handler, Limits, Outcome, StopEpisode, cpu_seconds
from bascule.runtime.episodes.marked import kill_marked
from bascule.schemas.errors import BasculeError
from bascule.schemas.harness import Harness
from bascule.verifiers.sandbox import confine, packages
from bascule.verifiers.sandbox.confine.removal import remove_tree

_PROGRAM = Path(__file__).with_name("zygote.py")
_MARK = "BASCULE_ZYGOTE"
_HARNESSES = 64
# Bytes, seconds and numbers that the child's own limits are made of.
_RESOURCES = ("disk_bytes", "open_files", "processes")
_RESERVED = 1 << 30
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
# Without one of each, what is left is no confinement.
_LEAST = (("own root", "landlock"), ("network namespace", "seccomp"))
# The frame that a guest sends when it is prepared.
PREPARED = b'{"op":"prepared"}'
_CONFINE = Path(confine.__file__).parent
_START_SECONDS = 60.0
# An exit report is due soon after a kill; without one for this long, the zygote is stopped, or what it killed lives on.
_REPORT_SECONDS = 30.0
_KILL_SECONDS = 10.0
_WATCH_SECONDS = 0.5
# A zygote sends two reports for each episode; one that runs a harness's code may try to send without end.
_REPORTS = 64


class EpisodeProcessError(BasculeError):
    """No process for episodes can be started on this machine."""

    code = "bascule.episodes"


@functools.cache
def _sight() -> dict[str, object]:
    """What of this machine every episode reads: the interpreter and the system's libraries."""
    sight = packages.interpreter()
    readable, listed = packages.unmasked(sight)
    return {"system": sight.read_only, "masked": sight.masked, "readable": readable, "listed": listed}


class _Report(msgspec.Struct, frozen=True):
    op: str
    number: int = 0
    pid: int = 0
    status: int | None = None
    error: str | None = None
    mechanisms: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


class _Running:
    """An episode under way; ``pid`` is its first process, 0 until that is known."""

    def __init__(self, episode: Episode, exited: asyncio.Future[_Report | None], bounds: watch.Bounds) -> None:
        self.episode = episode
        self.exited = exited
        self.bounds = bounds
        self.pid = 0
        self.over: watch.Over | None = None


class _Lost(Exception):
    """The zygote is gone, and with it every episode below it."""


class ZygoteHost:
    """One zygote process, from start to burial, and the episodes below it.

    Attributes:
        alive: whether it takes episodes.
        unsafe: nothing is confined.
        mechanisms, missing: what confines its episodes, and what cannot, with the reason.
        over: of what its processes together used more than they may, so that it was ended.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], control: socket.socket, folder: Path, mark: str, *, guest: bool
    ) -> None:
        self.alive = True
        self.over: watch.Over | None = None
        self.unsafe = False
        self.mechanisms: tuple[str, ...] = ()
        self.missing: tuple[str, ...] = ()
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._control = control
        self._folder = folder
        self._mark = mark
        self._guest = guest
        self._ready: asyncio.Future[bool] = self._loop.create_future()
        self._numbers = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self._known: OrderedDict[str, None] = OrderedDict()
        self._sending = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._strange = 0
        self._prepared: watch.Bounds | None = None
        control.setblocking(False)
        self._loop.add_reader(control, self._on_report)

    @classmethod
    async def spawn(cls, *, unsafe: bool = False, without: tuple[str, ...] = (), guest: bool = False) -> ZygoteHost:
        """Start a zygote. It ends with the calling thread, which must be the event loop's.

        Args:
            unsafe: its episodes are not confined.
            without: mechanisms that are not to be used, as ``available`` in ``verifiers/sandbox/confine`` names them.
            guest: it is to confine itself and then run code of one harness (:meth:`prepare`); so nothing that it says
                is trusted.

        Raises:
            EpisodeProcessError: it does not start, or its episodes cannot be confined.
        """
        folder = Path(tempfile.mkdtemp(prefix="bascule-episodes-"))
        mark = secrets.token_hex(16)
        # The whole environment of every episode: nothing of ours is inherited. One hash seed, so that the order of a
        # set does not differ between two runs of a harness; -I would ignore it, so its parts are given one by one.
        # One thread each: the threads of a numerical library would not outlive a fork, and their locks would.
        environment = {_MARK: mark, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}
        environment |= dict.fromkeys(_THREADS, "1")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = {"mark": mark, "folder": str(folder), "confine": str(_CONFINE), "unsafe": unsafe, "without": without}
        try:
            (folder / "settings.json").write_bytes(msgspec.json.encode({**own, **_sight()}))
            with theirs, (folder / "stderr").open("wb") as stderr:
                # The mark is among the arguments too: these may be read where the environment may not.
                arguments = [str(_PROGRAM), str(theirs.fileno()), str(os.getpid()), str(folder), mark]
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
        host = cls(process, ours, folder, mark, guest=guest)
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
        if not unsafe and not all(any(m in host.mechanisms for m in either) for either in _LEAST):
            await host.close()
            raise EpisodeProcessError(
                f"Harnesses cannot be confined on this machine: {'; '.join(host.missing)}.",
                next_step="Enable user namespaces or Landlock, or run with --unsafe-no-sandbox, which marks results.",
            )
        host.unsafe = unsafe
        return host

    @property
    def seals_guests(self) -> bool:
        """Whether the episodes of a guest can be sealed off from one another, and each ended with all its processes."""
        here = set(self.mechanisms)
        told = os.path.exists(f"/proc/self/task/{threading.get_native_id()}/children")
        return self.unsafe or ({"landlock", "seccomp"} <= here and (told or "process namespace" in here))

    async def run(self, harness: Harness, opening: bytes, handler: Handler, limits: Limits) -> Outcome:
        """Run one episode; when this returns or raises, nothing of the episode is alive."""
        number = next(self._numbers)
        given = self._given(harness)
        channel, theirs = socket.socketpair()
        output, printing = os.pipe()
        running = _Running(Episode(channel, output, limits), self._loop.create_future(), self._bounds(number, limits))
        episode, exited = running.episode, running.exited
        self._running[number] = running
        self._watch()
        ending: Ending = "lost"
        try:
            try:
                await self._start("start", number, harness, given, limits, (theirs.fileno(), printing))
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
            await asyncio.to_thread(self._ended)
        if running.over is not None and (report is None or ending != "stopped"):
            return Outcome(ending=running.over, seconds=episode.seconds)
        if report is None and not (self._guest and ending in ("stopped", "timeout", "output-limit")):
            return Outcome(ending="lost", seconds=episode.seconds)
        if report is None:
            # What a guest says last is not needed: it is over with all that was in it.
            return Outcome(ending=ending, output=episode.printed, seconds=episode.seconds)
        if report.error is not None or ending == "unavailable":
            # A guest is the harness's own: it had what it needs to fork.
            said = report.error or episode.printed
            return Outcome(ending="exited" if self._guest else "unavailable", exit_code=report.status, output=said)
        return Outcome(ending=ending, exit_code=report.status, output=episode.printed, seconds=episode.seconds)

    async def prepare(self, harness: Harness, opening: bytes, limits: Limits) -> Outcome | None:
        """Have a guest confine itself and run ``prepare``; from then on its episodes are forked from there.

        Args:
            opening: JSON object with ``data`` and ``seed``.

        Returns:
            How it ended, where it did not come to its end; it is no use then.
        """
        given = self._given(harness)
        channel, theirs = socket.socketpair()
        output, printing = os.pipe()
        seconds = limits.prepare_seconds
        own = msgspec.structs.replace(limits, seconds=seconds, overall_seconds=seconds + _START_SECONDS)
        running = _Running(Episode(channel, output, own), self._loop.create_future(), self._bounds(0, limits))
        episode = running.episode
        self._running[0] = running
        self._watch()

        ending: Ending = "exited"

        async def done(frame: bytes) -> bytes | None:
            if frame == PREPARED:
                raise StopEpisode
            return None

        try:
            with contextlib.suppress(_Lost):
                try:
                    await self._start("prepare", 0, harness, given, own, (theirs.fileno(), printing))
                finally:
                    theirs.close()
                    os.close(printing)
                ending = await episode.converse(opening, done)
            if ending == "stopped" and self.alive:
                self._prepared = running.bounds
                return None
            if running.over is not None:
                return Outcome(ending=running.over, during="prepare")
            if ending != "exited":
                self._lose()
            # It counts as running until its status is known, or its end would be taken for one that is to be hastened.
            code = await asyncio.to_thread(self._ended)
        finally:
            self._running.pop(0, None)
            episode.close()
        return Outcome(ending=ending, exit_code=code, output=episode.printed, seconds=episode.seconds, during="prepare")

    async def close(self) -> None:
        """End the zygote and everything below it, and remove its folder."""
        # It ends when this end of its control socket is closed, and cleans up; if it does not, it is killed.
        self._lose(kill=self._guest)
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(self._bury)

    def _given(self, harness: Harness) -> bytes:
        """A harness as the zygote takes it; empty if it has it.

        Raises:
            ConfigError: a package that it imports is not installed here.
        """
        if harness.digest in self._known:
            return b""
        mounts = packages.distributions(tuple(harness.manifest.packages))
        bases = {source.removesuffix(target.removeprefix(packages.PACKAGES)) for source, target in mounts}
        return msgspec.json.encode({"files": harness.files, "mounts": mounts, "bases": sorted(bases)})

    async def _start(
        self, op: str, number: int, harness: Harness, given: bytes, limits: Limits, descriptors: tuple[int, int]
    ) -> None:
        digest = harness.digest
        async with self._sending:
            if given and digest not in self._known:
                memory = os.memfd_create("harness")
                try:
                    with os.fdopen(memory, "wb", closefd=False) as file:
                        file.write(given)
                    await self._send({"op": "harness", "digest": digest}, (memory,))
                finally:
                    os.close(memory)
            self._known[digest] = None
            self._known.move_to_end(digest)
            if len(self._known) > _HARNESSES:
                await self._send({"op": "forget", "digest": self._known.popitem(last=False)[0]})
            allowed = {name: getattr(limits, name) for name in _RESOURCES}
            allowed["cpu_seconds"] = cpu_seconds(limits.seconds)
            allowed["address_bytes"] = limits.memory_bytes
            if harness.manifest.packages:
                # Libraries reserve more than they use; what is used is watched from here.
                allowed["address_bytes"] = 2 * limits.memory_bytes + _RESERVED
            await self._send({"op": op, "number": number, "digest": digest, "limits": allowed}, descriptors)

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
        for _ in range(_REPORTS):
            if not self.alive:
                return
            try:
                data = self._control.recv(65536)
                report = msgspec.json.decode(data, type=_Report) if data else None
            except BlockingIOError:
                return
            except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                report = None
            if report is None:
                # A guest that ends while it prepares is waited for: it still has to say by what.
                self._lose(kill=not self._guest or 0 not in self._running)
            else:
                self._heed(report)

    def _heed(self, report: _Report) -> None:
        running = self._running.get(report.number)
        if report.op == "ready" and not self._ready.done():
            self.mechanisms, self.missing = report.mechanisms, report.missing
            self._ready.set_result(True)
        elif running is None:
            self._strange += 1
            if self._guest and self._strange > _REPORTS:
                self._lose()
        elif report.op == "started":
            running.pid = report.pid
        elif report.op == "exit":
            self._end(report.number, report)

    def _end(self, number: int, report: _Report | None) -> None:
        running = self._running[number]
        if not running.exited.done():
            running.exited.set_result(report)
            running.episode.hang_up()

    def _watch(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = self._loop.create_task(self._look())

    async def _look(self) -> None:
        """Now and then, while something runs: end what uses more than it may."""
        due: list[int] = []
        while self.alive and self._running:
            await asyncio.sleep(_WATCH_SECONDS)
            fronted = "process namespace" in self.mechanisms
            over, due = await asyncio.to_thread(watch.over, self._watched(), due, fronted=fronted)
            if self._guest and over and self.alive:
                self.over = over[self._process.pid]
                for running in self._running.values():
                    running.over = self.over
                self._lose()
                return
            for number, running in list(self._running.items()):
                if running.pid in over:
                    running.over = over[running.pid]
                    with contextlib.suppress(_Lost):
                        async with self._sending:
                            await self._send({"op": "kill", "number": number})

    def _watched(self) -> dict[int, watch.Bounds]:
        if not self._guest:
            return {r.pid: r.bounds for r in self._running.values() if r.pid and r.over is None}
        own = [self._prepared] if self._prepared is not None else []
        own += [r.bounds for r in self._running.values()]
        return {self._process.pid: watch.together(*own)} if own else {}

    def _bounds(self, number: int, limits: Limits) -> watch.Bounds:
        return watch.bounds(limits, self.mechanisms, f"{self._folder}/{number}", guest=number == 0)

    def _lose(self, *, kill: bool = True) -> None:
        """Give up on the process. Idempotent."""
        if not self.alive:
            return
        self.alive = False
        self._loop.remove_reader(self._control)
        self._loop.remove_writer(self._control)
        self._control.close()
        if kill:
            self._kill()
        if not self._ready.done():
            self._ready.set_result(False)
        for number in list(self._running):
            self._end(number, None)

    def _kill(self) -> None:
        if not self._guest:
            self._process.kill()
        elif self._process.poll() is None:
            # Where a guest has no process namespace, all that it started is in its group.
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _ended(self) -> int:
        """Status of the process, which is over, or should be."""
        try:
            return self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
            return self._process.wait()

    def _bury(self) -> None:
        self._ended()
        kill_marked(self._mark.encode(), _KILL_SECONDS)
        remove_tree(str(self._folder))
