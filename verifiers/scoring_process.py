"""The scoring process: the only one that opens a task's private face.

Run as ``python -P -m bascule.verifiers.scoring_process PARENT_PID CHANNEL``. Frames on standard input and output: first
:class:`Open`, answered by :class:`Ready` or :class:`~bascule.verifiers.frames.Refused`, then any number of
:class:`Request`, each answered by a :class:`Reply` in the same order. It ends with its input or parent. ``CHANNEL`` is
the socket on which a server runs programs for it, where its task's scorer needs that.

Only verdicts leave it. An exception's text may quote the truth, so only its class and place are told. Where it is
started as root it opens the private face as root, and then becomes a user of its own
(:mod:`bascule.verifiers.privileges`).
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec

from bascule.plugins.canary import Canaries, canary_key
from bascule.plugins.loader import plugins
from bascule.plugins.task import PrivateFace, RunsPrograms, ScoresEpisodes
from bascule.schemas.errors import BasculeError
from bascule.schemas.events import Split
from bascule.schemas.run import PluginChoice
from bascule.schemas.trajectory import MOST_REWARD, MOST_STEPS, ModelCall, Scored, Trajectory, Unscored, Verdict
from bascule.verifiers.frames import Refused, frame, own_streams, read_frame, where
from bascule.verifiers.privileges import die_with, drop, shield
from bascule.verifiers.sandbox.served import ServedPrograms

#: What one verdict takes at most, unless a private face has an attribute ``seconds`` that says otherwise.
VERDICT_SECONDS = 60.0
#: Canaries that stand in the process's environment, besides those in its memory.
IN_ENVIRONMENT = 8


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """Which task's private face to open, and which second verifier beside it."""

    task: str
    params: dict[str, Any]
    second: PluginChoice | None = None


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The private face is open.

    Attributes:
        programs: it runs programs, and waits for a server of them.
        episodes: it, or the second verifier, scores whole episodes, not answers.
        seconds: the most that one verdict takes, both verifiers' together.
        uid: whose process it is now.
    """

    programs: bool = False
    episodes: bool = False
    seconds: float = VERDICT_SECONDS
    uid: int = 0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Score one answer; ``id`` comes back with the verdict. ``episode`` is there where a face scores episodes.

    Attributes:
        second: the second verifier is asked as well.
    """

    id: int
    split: Split
    example: str
    answer: str | None
    episode: Trajectory | None = None
    second: bool = False


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on the request of that id; ``second`` is the second verifier's, where it was asked."""

    id: int
    verdict: Verdict
    second: Verdict | None = None


def judge(face: PrivateFace, request: Request) -> Verdict:
    """The task's verdict, checked; whatever goes wrong in a scorer is Unscored, never a reward."""
    try:
        if isinstance(face, ScoresEpisodes):
            # An answer that no harness gave, a baseline's for instance, is an episode without a step.
            episode = request.episode if request.episode is not None else Trajectory(answer=request.answer)
            verdict = face.score_episode(request.split, request.example, episode)
        else:
            verdict = face.score(request.split, request.example, request.answer)
    except (Exception, SystemExit, KeyboardInterrupt) as e:
        # Both would end the process, which has a session of its own and no terminal: the scorer itself raised them.
        return Unscored(reason=f"The scorer failed: {where(e)}.")
    if isinstance(verdict, Unscored):
        return verdict
    if not isinstance(verdict, Scored):
        return Unscored(reason=f"The scorer returned a {type(verdict).__name__}, which is no verdict.")
    try:
        if len(verdict.steps) > MOST_STEPS:
            return Unscored(reason=f"The scorer gave {len(verdict.steps)} step rewards; there can be {MOST_STEPS}.")
        reward, *steps = map(float, (verdict.reward, *verdict.steps))
        # A scorer's numpy scalars would not encode.
        passed = None if verdict.passed is None else bool(verdict.passed)
        well_formed = bool(verdict.well_formed)
    except (TypeError, ValueError, OverflowError) as e:
        return Unscored(reason=f"The scorer gave a reward that is no number: {type(e).__name__}.")
    odd = [r for r in (reward, *steps) if not math.isfinite(r)]
    if odd:
        return Unscored(reason=f"The scorer gave the reward {odd[0]}, which is not finite.")
    if any(abs(r) > MOST_REWARD for r in (reward, *steps)):
        return Unscored(reason=f"The scorer gave a reward beyond {MOST_REWARD:,.0f}, which is the most there can be.")
    checked = Scored(reward=reward, passed=passed, well_formed=well_formed, steps=tuple(steps))
    return checked if request.episode is None else fitting(checked, request.episode)


def fitting(verdict: Verdict, episode: Trajectory) -> Verdict:
    """``verdict``, unless its step rewards are not one for each model call of the episode; then Unscored."""
    if not isinstance(verdict, Scored) or not verdict.steps:
        return verdict
    calls = sum(isinstance(step, ModelCall) for step in episode.steps)
    if len(verdict.steps) == calls:
        return verdict
    return Unscored(reason=f"The scorer gave {len(verdict.steps)} step rewards for {calls} model calls.")


class _Judge:
    """Verdicts of an open private face, and what its programs have to do with them."""

    def __init__(self, face: PrivateFace, programs: ServedPrograms | None) -> None:
        self._face = face
        self._programs = programs if isinstance(face, RunsPrograms) else None
        self._unusable: str | None = None
        if isinstance(face, RunsPrograms):
            try:
                if self._programs is None:
                    raise ValueError("no channel")
                face.use(self._programs)
            except Exception as e:
                self._unusable = f"The scorer cannot run programs: {where(e)}."

    def verdict(self, request: Request) -> Verdict:
        if self._unusable is not None:
            return Unscored(reason=self._unusable)
        if self._programs is None:
            return judge(self._face, request)
        self._programs.failure = None
        verdict = judge(self._face, request)
        # A scorer may take a program that could not be run for one that failed.
        return verdict if self._programs.failure is None else Unscored(reason=self._programs.failure)


OpenFaces = Callable[[Open], tuple[PrivateFace, ...]]
"""Opens the task's private face and, behind it, the second verifier where one is asked for."""


def serve(source: BinaryIO, sink: BinaryIO, open_faces: OpenFaces, channel: socket.socket | None = None) -> None:
    """Answer frames until the source ends or the server of programs is gone."""

    def send(message: msgspec.Struct) -> None:
        sink.write(frame(message))
        sink.flush()

    opening = read_frame(source, Open)
    if opening is None:
        return
    try:
        faces = open_faces(opening)
        ready = Ready(
            programs=any(isinstance(face, RunsPrograms) for face in faces),
            episodes=any(isinstance(face, ScoresEpisodes) for face in faces),
            seconds=sum(float(getattr(face, "seconds", VERDICT_SECONDS)) for face in faces),
            uid=drop(),
        )
    except BasculeError as e:
        send(Refused(message=e.message, next_step=e.next_step))
        return
    except Exception as e:
        send(Refused(message=f"The private face of the task {opening.task!r} does not open: {where(e)}."))
        return
    send(ready)
    programs = ServedPrograms(channel) if ready.programs and channel is not None else None
    first, *second = [_Judge(face, programs) for face in faces]
    while (request := read_frame(source, Request)) is not None:
        verdict = first.verdict(request)
        opinion = second[0].verdict(request) if second and request.second else None
        if programs is not None and programs.lost:
            return  # no verdict: the request is made again to the next process, with a new server of programs
        send(Reply(id=request.id, verdict=verdict, second=opinion))


_planted: list[Canaries] = []


def open_private(opening: Open) -> tuple[PrivateFace, ...]:
    """Open the private face of an installed task, with canaries in this process's memory and environment.

    Raises:
        BasculeError: there is no such task or second verifier, or one of them does not open.
    """
    registry = plugins().registry
    opened = registry.tasks.get(opening.task)(opening.params)
    canaries = Canaries.of(canary_key(), opening.task, opened.public())
    _planted.append(canaries)
    for number, token in enumerate(list(canaries.tokens)[:IN_ENVIRONMENT]):
        os.environ[f"BASCULE_TRUTH_{number}"] = token
    if opening.second is None:
        return (opened.private(),)
    return opened.private(), registry.verifiers.get(opening.second.name)(opened, opening.second.params)


def main(open_faces: OpenFaces = open_private) -> None:
    die_with(int(sys.argv[1]))
    shield()
    channel = socket.socket(fileno=int(sys.argv[2]))
    channel.set_inheritable(False)
    source, sink = own_streams()
    with contextlib.suppress(BrokenPipeError):
        serve(source, sink, open_faces, channel)


if __name__ == "__main__":
    main()
