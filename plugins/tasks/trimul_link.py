"""The scoring process's side of a worker: see ``trimul_worker.py``. The clock is here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bascule.plugins.sandbox import Program, Programs, Running
from bascule.plugins.tasks.trimul_cases import Case

#: Read at once: the scoring process may have no right to read it later.
WORKER = Path(__file__).with_name("trimul_worker.py").read_bytes()
REPLY_BYTES = 512
MEMORY_MB = 4096


class Lost(Exception):
    """A worker ended, hung or spoke nonsense."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself; of a candidate's only ``ok``, ``why`` and the digest matter, and may be lies.

    Attributes:
        cpu: processor time of the call, s.
        peak: floating-point operations a second of its core.
        tick: least step of its clock of processor time, s.
    """

    ok: bool
    why: Annotated[str, msgspec.Meta(max_length=REPLY_BYTES)] = ""
    sha256: Annotated[str, msgspec.Meta(max_length=64)] = ""
    cpu: float = 0.0
    peak: float = 0.0
    tick: float = 0.0


def program(kernel: str, mode: str, *, seconds: float, packages: tuple[str, ...] = ("torch", "numpy")) -> Program:
    """The program that serves ``kernel``: one core, no further processes.

    Args:
        mode: ``reference``, ``candidate``, or ``interpret`` for Triton's interpreter.
    """
    return Program(
        files={"worker.py": WORKER, "kernel.py": kernel.encode()},
        arguments=("worker.py", "kernel.py", mode),
        packages=packages,
        seconds=seconds,
        memory_mb=MEMORY_MB,
        forks=False,
        pinned=True,
    )


class Worker:
    """A worker under way. Every method raises :class:`Lost`, whatever the worker does."""

    def __init__(self, running: Running, clock: Callable[[], float]) -> None:
        self._running = running
        self._clock = clock

    def ready(self) -> Reply:
        """Wait until it has torch; nothing of the kernel's has run by then."""
        return self._reply()

    def loaded(self) -> Reply:
        """Wait until it has loaded the kernel."""
        return self._reply()

    def prepare(self, case: Case, seed: int, *, check: bool) -> None:
        """Have it make the inputs of a call; with ``check`` it looks whether the kernel changes them."""
        spec: dict[str, Any] = {"seed": seed, "check": check, **msgspec.to_builtins(case)}
        self._send(b"P" + msgspec.json.encode(spec))
        if not self._reply().ok:
            raise Lost("the worker made no inputs")

    def go(self, vectors: bytes) -> tuple[Reply, float]:
        """Have it call the kernel.

        Args:
            vectors: scale and shift of the channels of ``x``, float32.

        Returns:
            Its reply, and the seconds from the moment before the vectors were sent until it had committed itself.
        """
        before = self._clock()
        self._send(b"G" + vectors)
        reply = self._reply()
        return reply, self._clock() - before

    def output(self, case: Case, digest: str) -> bytes:
        """The output's bytes, which must be those that it committed itself to."""
        self._send(b"O")
        data = self._read(case.output_bytes)
        if hashlib.sha256(data).hexdigest() != digest:
            raise Lost("the output is another than when the clock stopped")
        return data

    def _send(self, body: bytes) -> None:
        try:
            self._running.write(len(body).to_bytes(4, "big") + body)
        except (EOFError, TimeoutError) as e:
            raise Lost(f"the program is over ({type(e).__name__})") from e

    def _read(self, size: int) -> bytes:
        try:
            return self._running.read(size)
        except (EOFError, TimeoutError) as e:
            raise Lost(f"the program is over ({type(e).__name__})") from e

    def _reply(self) -> Reply:
        try:
            return msgspec.json.decode(self._read(REPLY_BYTES), type=Reply)
        except msgspec.MsgspecError as e:
            raise Lost("the program did not keep to the protocol") from e


def started(programs: Programs, asked: Program, clock: Callable[[], float]) -> tuple[Running, Worker]:
    """Start a worker; leaving the :class:`Running` kills it."""
    running = programs.start(asked)
    running.__enter__()
    return running, Worker(running, clock)
