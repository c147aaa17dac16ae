"""The sandbox protocol: a program of somebody else's is run without network, keys or sight of what it must not see."""

from __future__ import annotations

from types import TracebackType
from typing import Annotated, Literal, Protocol, Self

import msgspec

Ending = Literal["exited", "timeout", "memory", "disk", "output", "refused"]


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """What to run.

    Attributes:
        files: by relative name; they lie in the working folder, writable.
        arguments: of the Python interpreter, ``("main.py",)`` for instance.
        packages: installed distributions that it may import, those that they need included; no others are there.
        seconds: wall-clock limit; the clock is outside.
        memory_mb: of all its processes together.
        disk_mb: of its working and temporary folders together.
        processes: processes and threads at one time.
        forks: whether it may have further processes at all; threads it may have in any case.
        output_bytes: of standard output and standard error, each.
        results: names of files that are read back from the working folder, of ``result_bytes`` altogether.
        pinned: keep it on one core, the same one for every pinned program.
        devices: whether CUDA devices, where there are any, can be opened.
    """

    files: dict[str, bytes] = {}
    arguments: tuple[str, ...]
    packages: tuple[str, ...] = ()
    seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    memory_mb: Annotated[int, msgspec.Meta(ge=16)] = 1024
    disk_mb: Annotated[int, msgspec.Meta(ge=1)] = 64
    processes: Annotated[int, msgspec.Meta(ge=1)] = 32
    forks: bool = True
    output_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 20
    results: tuple[str, ...] = ()
    result_bytes: Annotated[int, msgspec.Meta(ge=0)] = 256 << 20
    pinned: bool = False
    devices: bool = False


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a program.

    Attributes:
        ending: ``exited`` by itself, or what it was stopped for; ``refused``: it could not be started, see ``stderr``.
        exit_code: status, or minus the number of the signal; None where it did not exit by itself.
        results: the files of ``Program.results`` that there are: plain files, never what a link leads to.
        seconds: wall time.
    """

    ending: Ending
    exit_code: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    results: dict[str, bytes] = {}
    seconds: float = 0.0


class Running(Protocol):
    """A program under way that is spoken with over its standard input and output. Leaving the context kills it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def write(self, data: bytes) -> None:
        """Send to standard input.

        Raises:
            EOFError: the program reads no more.
            TimeoutError: its time is up.
        """
        ...

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes of standard output.

        Raises:
            EOFError: the program is over.
            TimeoutError: its time is up.
        """
        ...

    def wait(self) -> Ran:
        """Close its standard input and wait for its end."""
        ...


class Programs(Protocol):
    """Runs programs in the sandbox; what a scorer gets. Calls block."""

    def run(self, program: Program, stdin: bytes = b"") -> Ran:
        """Run a program to its end. Nothing of it is alive afterwards."""
        ...

    def start(self, program: Program) -> Running:
        """Start a program to speak with; its standard output is only what :meth:`Running.read` reads."""
        ...
