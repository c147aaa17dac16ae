"""Frames between processes of the verifier: a 4-byte big-endian length and that many bytes of one encoded message."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

import msgspec

MAX_FRAME = 64 * 1024 * 1024
HEADER = 4
T = TypeVar("T")


def with_length(body: bytes, limit: int = MAX_FRAME) -> bytes:
    """A message with its length in front.

    Raises:
        ValueError: it is over ``limit`` bytes.
    """
    if len(body) > limit:
        raise ValueError(f"A message of {len(body)} bytes is over the limit of {limit}.")
    return len(body).to_bytes(HEADER, "big") + body


def frame(message: msgspec.Struct) -> bytes:
    """One message as JSON with its length in front.

    Raises:
        ValueError: it is over 64 MiB.
    """
    return with_length(msgspec.json.encode(message))


def read_body(stream: BinaryIO, limit: int = MAX_FRAME) -> bytes | None:
    """The next message's bytes; None at the end of the stream, also within a message and before one over ``limit``."""
    header = stream.read(HEADER)
    size = int.from_bytes(header, "big")
    if len(header) < HEADER or size > limit:
        return None
    body = stream.read(size)
    return body if len(body) == size else None


def read_frame(stream: BinaryIO, type_: type[T]) -> T | None:
    """The next JSON message, or None at the end of the stream.

    Raises:
        msgspec.DecodeError: it is no ``type_``.
    """
    body = read_body(stream)
    return None if body is None else msgspec.json.decode(body, type=type_)


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """A process cannot do what it was started for."""

    message: str
    next_step: str | None = None


class Lost(Exception):
    """A process crashed, hung or spoke nonsense; says which of them."""


#: Seconds that a process has to end in after its output has.
_END = 5.0


class FramedProcess:
    """A process that answers each frame on its standard input with one on its standard output.

    Args:
        name: what it is called in reasons, ``the scoring process`` for instance.
        arguments: of the interpreter.
        grace: seconds that it has to put away what it made when it is ended; 0: it is killed at once.
    """

    def __init__(self, name: str, arguments: Sequence[str], *, grace: float = 0.0) -> None:
        self.name = name
        self._grace = grace
        self._arguments = tuple(arguments)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process else None

    async def start(self, environment: Mapping[str, str], channel: socket.socket) -> None:
        """Start it with this process's id and the descriptor of ``channel``, which it inherits, as last arguments."""
        # Its own session keeps a terminal's interrupt away, so that what is under way at a drain is finished.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, *self._arguments, str(os.getpid()), str(channel.fileno())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            pass_fds=(channel.fileno(),),
        )

    async def ask(self, data: bytes, type_: Any, seconds: float) -> Any:
        """Send one frame and read one; on any failure, being cancelled included, the process is gone.

        Raises:
            Lost: with the reason.
        """
        try:
            async with asyncio.timeout(seconds):
                return msgspec.json.decode(await self._exchange(data), type=type_)
        except TimeoutError:
            await self.kill()
            raise Lost(f"{self.name} gave no answer within {seconds:g} s.") from None
        except (OSError, EOFError, msgspec.DecodeError) as e:
            try:
                status = None if isinstance(e, msgspec.DecodeError) else await self._ended()
            finally:
                await self.kill()
            how = f"broke its protocol ({type(e).__name__})" if status is None else f"ended by itself ({_said(status)})"
            raise Lost(f"{self.name} {how}.") from e
        except BaseException:
            # The answer may still come: a process that owes one must not meet the next request.
            await self.kill()
            raise

    async def _exchange(self, data: bytes) -> bytes:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EOFError
        process.stdin.write(data)
        await process.stdin.drain()
        size = int.from_bytes(await process.stdout.readexactly(HEADER), "big")
        if size > MAX_FRAME:
            raise EOFError
        return await process.stdout.readexactly(size)

    async def _ended(self) -> int | None:
        """How the process ended, where it did so without being told to."""
        if self._process is None:
            return None
        try:
            async with asyncio.timeout(_END):
                return await self._process.wait()
        except TimeoutError:
            return None

    async def kill(self) -> None:
        """End it, if it runs, and wait for that."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        cancelled: asyncio.CancelledError | None = None
        if self._grace and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(self._grace):
                    await process.wait()
            except TimeoutError:
                pass
            except asyncio.CancelledError as e:
                cancelled = e
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # A killed process ends at once. Were a cancelled wait to leave it, its transport would outlive the loop.
        while process.returncode is None:
            try:
                await process.wait()
            except asyncio.CancelledError as e:
                cancelled = e
        if cancelled is not None:
            raise cancelled


def _said(status: int) -> str:
    """An exit status in words; negative ones are signals."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def where(error: BaseException) -> str:
    """Class of an exception and the place it was raised at, without its text, which may quote a truth."""
    frames = traceback.extract_tb(error.__traceback__)
    last = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + last


def own_streams() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output as descriptors of their own, for the frames; the standard ones become the null device.

    What somebody's code prints in this process goes nowhere then, least of all into a frame or a log.
    """
    sink = os.fdopen(os.dup(1), "wb")
    source = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "r+b") as null:
        for standard in (0, 1, 2):
            os.dup2(null.fileno(), standard)
    return source, sink
