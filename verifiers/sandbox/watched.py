"""A program under way, watched from outside: its clock, memory, disk and output.

A process stays in front of the program (:func:`confine.seal.seal`): when it has ended, nothing of the program is alive.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from bascule.plugins.sandbox import Ending, Program, Ran
from bascule.verifiers.sandbox import folder, processes
from bascule.verifiers.sandbox.front import Front

_TICK = 0.05
_DISK_EVERY = 5
_GRACE = 10.0
_PIECE = 1 << 16
_MIB = 1 << 20


class Started(msgspec.Struct, frozen=True):
    """A program that is about to run.

    Attributes:
        process: the one in front.
        folder: descriptor of the working folder.
        ours: how many of the processes below ``process`` are not the program's.
        used: bytes on its disk, in a time that is bounded whatever lies there; more than ``disk`` where that cannot
            be told.
        disk: how many there may be.
        release: gives back what was taken for it; raises nothing.
    """

    process: Front
    folder: int
    ours: int
    used: Callable[[], int]
    disk: int
    release: Callable[[], object]


class Watched:
    """One program, from its start to its burial. It is a :class:`bascule.plugins.sandbox.Running`."""

    def __init__(self, started: Started, program: Program) -> None:
        self._started = started
        self._program = program
        self._ending: Ending | None = None
        self._since = time.monotonic()
        self._deadline = self._since + program.seconds
        self._seconds = 0.0
        self._caught: dict[int, bytearray] = {}
        self._stdin = b""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._stopping: float | None = None
        self._thread: threading.Thread | None = None
        self._ran: Ran | None = None
        for stream in (started.process.stdin, started.process.stdout, started.process.stderr):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)

    def run(self, stdin: bytes) -> Ran:
        """Watch it in this thread to its end."""
        self._stdin = stdin
        self._catch(self._started.process.stdout)
        try:
            self._watch()
        finally:
            ran = self._bury()
        return ran

    def talk(self) -> Self:
        """Watch it in a thread of its own; standard input and output are the caller's."""
        self._thread = threading.Thread(target=self._watch, name="bascule-sandbox", daemon=True)
        self._thread.start()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ran is None:
            self._stop(None)
            self._join()

    def write(self, data: bytes) -> None:
        stream = self._started.process.stdin
        if stream is None or stream.closed:
            raise EOFError("The program reads no more.")
        view = memoryview(data)
        while view:
            self._in_time()
            try:
                view = view[os.write(stream.fileno(), view[:_PIECE]) :]
            except BlockingIOError:
                self._until(stream.fileno(), select.POLLOUT)
            except OSError:
                self._in_time()
                raise EOFError("The program reads no more.") from None

    def read(self, size: int) -> bytes:
        stream = self._started.process.stdout
        data = bytearray()
        while len(data) < size:
            if stream is None or stream.closed:
                raise EOFError("The program is over.")
            try:
                part = os.read(stream.fileno(), min(size - len(data), _PIECE))
            except BlockingIOError:
                self._in_time()
                self._until(stream.fileno(), select.POLLIN)
                continue
            if not part:
                self._in_time()
                raise EOFError("The program is over.")
            data += part
        return bytes(data)

    def wait(self) -> Ran:
        if self._ran is None:
            process = self._started.process
            if process.stdin is not None:
                process.stdin.close()
            # Nobody reads it any more, and it must not hold the program up.
            while process.stdout is not None and not self._ended.is_set():
                try:
                    if not os.read(process.stdout.fileno(), _PIECE):
                        break
                except BlockingIOError:
                    self._until(process.stdout.fileno(), select.POLLIN)
                except OSError:
                    break
        return self._join()

    def _join(self) -> Ran:
        if self._thread is not None:
            self._thread.join()
        return self._ran if self._ran is not None else self._bury()

    def _in_time(self) -> None:
        if self._ending == "timeout":
            raise TimeoutError(f"The program had {self._program.seconds:g} s.")

    def _until(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        poll.poll(_TICK * 1000)

    def _catch(self, stream: object) -> None:
        if stream is not None:
            self._caught[stream.fileno()] = bytearray()  # type: ignore[attr-defined]

    def _watch(self) -> None:
        """Until the process in front has ended, whatever happens here."""
        self._catch(self._started.process.stderr)
        try:
            self._loop()
        finally:
            # Also after an interrupt: a program is never left alone.
            while self._started.process.poll() is None:
                self._stop(None)
                if self._started.process.wait(_GRACE) is None:
                    self._started.process.kill()
            self._seconds = time.monotonic() - self._since
            for descriptor in self._caught:
                self._drain(descriptor)
            self._ended.set()

    def _loop(self) -> None:
        process = self._started.process
        poll = select.poll()
        for descriptor in self._caught:
            poll.register(descriptor, select.POLLIN)
        feeding = process.stdin if self._thread is None else None
        view = memoryview(self._stdin)
        if feeding is not None:
            poll.register(feeding.fileno(), select.POLLOUT)
        poll.register(process, select.POLLIN)
        ticks = 0
        tick = time.monotonic() + _TICK
        while process.poll() is None:
            now = time.monotonic()
            for descriptor, _ in poll.poll(max(0.0, min(tick, self._deadline) - now) * 1000):
                if feeding is not None and descriptor == feeding.fileno():
                    view = self._feed(descriptor, view)
                    if not view:
                        poll.unregister(descriptor)
                        feeding.close()
                        feeding = None
                elif descriptor == process.fileno():
                    if process.poll() is None:
                        # Nobody will tell of its end: it is to come now.
                        poll.unregister(descriptor)
                        self._stop(None)
                elif not self._take(descriptor):
                    poll.unregister(descriptor)
            now = time.monotonic()
            if now >= self._deadline:
                self._stop("timeout")
            if now >= tick:
                tick = now + _TICK
                ticks += 1
                self._measure(disk=ticks % _DISK_EVERY == 0)
            if self._stopping is not None:
                self._deadline = now + _TICK
                if now - self._stopping > _GRACE:
                    process.kill()

    def _feed(self, descriptor: int, view: memoryview) -> memoryview:
        try:
            return view[os.write(descriptor, view[:_PIECE]) :]
        except BlockingIOError:
            return view
        except OSError:
            return memoryview(b"")

    def _take(self, descriptor: int) -> bool:
        """Take what was printed; False at its end."""
        try:
            part = os.read(descriptor, _PIECE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        caught = self._caught[descriptor]
        room = self._program.output_bytes - len(caught)
        caught += part[:room]
        if len(part) > room:
            self._stop("output")
        return bool(part)

    def _drain(self, descriptor: int) -> None:
        # Everything is dead: what there is comes at once, and then the end.
        while True:
            try:
                part = os.read(descriptor, _PIECE)
            except OSError:
                return
            if not part:
                return
            caught = self._caught[descriptor]
            room = self._program.output_bytes - len(caught)
            caught += part[:room]
            if len(part) > room:
                self._ending = self._ending or "output"
                return

    def _measure(self, *, disk: bool) -> None:
        pids = processes.below(self._started.process.pid)[self._started.ours :]
        most = self._program.memory_mb * _MIB
        if processes.resident(pids) > most and processes.proportional(pids) > most:
            self._stop("memory")
        if disk and self._started.used() > self._started.disk:
            self._stop("disk")

    def _stop(self, ending: Ending | None) -> None:
        """Let everything be killed. The first reason is the one that counts."""
        with self._lock:
            if self._stopping is not None:
                return
            self._stopping = time.monotonic()
            self._ending = self._ending or ending
            self._started.process.stop()

    def _bury(self) -> Ran:
        process = self._started.process
        ending, results = self._ending, {}
        try:
            full = self._started.used() >= self._started.disk
            if ending is None and full and process.returncode != 0:
                ending = "disk"
            try:
                results = folder.take(self._started.folder, self._program.results, self._program.result_bytes)
            except folder.TooLarge:
                ending = ending or "output"
        finally:
            process.close()
            os.close(self._started.folder)
            self._started.release()
        caught = list(self._caught.values())
        self._ran = Ran(
            ending=ending or "exited",
            exit_code=process.returncode if ending is None else None,
            stdout=bytes(caught[0]) if len(caught) > 1 else b"",
            stderr=bytes(caught[-1]) if caught else b"",
            results=results,
            seconds=self._seconds,
        )
        return self._ran


class Refused:
    """A program that could not be started, as a :class:`bascule.plugins.sandbox.Running`."""

    def __init__(self, ran: Ran) -> None:
        self._ran = ran

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def write(self, data: bytes) -> None:
        raise EOFError("The program did not start.")

    def read(self, size: int) -> bytes:
        raise EOFError("The program did not start.")

    def wait(self) -> Ran:
        return self._ran
