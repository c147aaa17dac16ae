"""The scoring process: the only one that opens a task's private face.

Run as ``python -P -m bascule.verifiers.scoring_process PARENT_PID``. Frames on standard input and output are a 4-byte
big-endian length and that many bytes of JSON: first :class:`Open`, answered by :class:`Ready` or :class:`Refused`, then
any number of :class:`Request`, each answered by a :class:`Reply` in the same order. It ends with its input or parent.

Only verdicts leave it. An exception's text may quote the truth, so only its class and place are told.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import msgspec

from bascule.plugins.loader import plugins
from bascule.plugins.task import PrivateFace
from bascule.schemas.errors import BasculeError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Unscored, Verdict

MAX_FRAME = 64 * 1024 * 1024
_HEADER = 4
_PR_SET_PDEATHSIG = 1
T = TypeVar("T")


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """Which task's private face to open."""

    task: str
    params: dict[str, Any]


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The private face is open."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The private face cannot be opened."""

    message: str
    next_step: str | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Score one answer; ``id`` comes back with the verdict."""

    id: int
    split: Split
    example: str
    answer: str | None


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on the request of that id."""

    id: int
    verdict: Verdict


def frame(message: msgspec.Struct) -> bytes:
    """Encode one message with its length in front.

    Raises:
        ValueError: it is over 64 MiB.
    """
    body = msgspec.json.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"A message of {len(body)} bytes is over the limit of {MAX_FRAME}.")
    return len(body).to_bytes(_HEADER, "big") + body


def read_frame(stream: BinaryIO, type_: type[T]) -> T | None:
    """The next message, or None at the end of the stream, also within a message."""
    header = stream.read(_HEADER)
    if len(header) < _HEADER:
        return None
    size = int.from_bytes(header, "big")
    body = stream.read(size)
    return msgspec.json.decode(body, type=type_) if len(body) == size else None


def where(error: BaseException) -> str:
    """Class of an exception and the place it was raised at, without its text."""
    frames = traceback.extract_tb(error.__traceback__)
    last = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + last


def judge(face: PrivateFace, request: Request) -> Verdict:
    """The task's verdict, checked; whatever goes wrong in a scorer is Unscored, never a reward."""
    try:
        verdict = face.score(request.split, request.example, request.answer)
    except Exception as e:
        return Unscored(reason=f"The scorer failed: {where(e)}.")
    if isinstance(verdict, Unscored):
        return verdict
    if not isinstance(verdict, Scored):
        return Unscored(reason=f"The scorer returned a {type(verdict).__name__}, which is no verdict.")
    try:
        reward, *steps = map(float, (verdict.reward, *verdict.steps))
    except (TypeError, ValueError, OverflowError) as e:
        return Unscored(reason=f"The scorer gave a reward that is no number: {type(e).__name__}.")
    odd = [r for r in (reward, *steps) if not math.isfinite(r)]
    if odd:
        return Unscored(reason=f"The scorer gave the reward {odd[0]}, which is not finite.")
    # A scorer's numpy scalars would not encode.
    passed = None if verdict.passed is None else bool(verdict.passed)
    return Scored(reward=reward, passed=passed, well_formed=bool(verdict.well_formed), steps=tuple(steps))


def serve(source: BinaryIO, sink: BinaryIO, open_face: Callable[[str, dict[str, Any]], PrivateFace]) -> None:
    """Answer frames until the source ends."""

    def send(message: msgspec.Struct) -> None:
        sink.write(frame(message))
        sink.flush()

    opening = read_frame(source, Open)
    if opening is None:
        return
    try:
        face = open_face(opening.task, opening.params)
    except BasculeError as e:
        send(Refused(message=e.message, next_step=e.next_step))
        return
    except Exception as e:
        send(Refused(message=f"The private face of the task {opening.task!r} does not open: {where(e)}."))
        return
    send(Ready())
    while (request := read_frame(source, Request)) is not None:
        send(Reply(id=request.id, verdict=judge(face, request)))


def open_private(task: str, params: dict[str, Any]) -> PrivateFace:
    """Open the private face of an installed task."""
    return plugins().registry.tasks.get(task)(params).private()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux: the end of standard input ends it too
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request reached the kernel
        os._exit(1)


def main(open_face: Callable[[str, dict[str, Any]], PrivateFace] = open_private) -> None:
    die_with(int(sys.argv[1]))
    # The protocol gets a descriptor of its own: what a scorer prints goes nowhere, least of all into a frame or a log.
    sink = os.fdopen(os.dup(1), "wb")
    source = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "r+b") as null:
        for standard in (0, 1, 2):
            os.dup2(null.fileno(), standard)
    with contextlib.suppress(BrokenPipeError):
        serve(source, sink, open_face)


if __name__ == "__main__":
    main()
