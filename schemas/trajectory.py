"""Trajectories: what an episode asked and was answered, token for token.

Token ids are packed little-endian int32, log-probabilities little-endian float32; in JSON both are base64. Training
uses exactly these and never re-tokenises text.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec


def _little(a: array.array[Any]) -> array.array[Any]:
    if sys.byteorder == "big":
        a.byteswap()
    return a


def pack_ids(ids: Sequence[int]) -> bytes:
    """Pack token ids as little-endian int32 (4 bytes each)."""
    return _little(array.array("i", ids)).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of :func:`pack_ids`."""
    return _little(array.array("i", data)).tolist()


def pack_floats(values: Iterable[float]) -> bytes:
    """Pack log-probabilities as little-endian float32 (4 bytes each)."""
    return _little(array.array("f", values)).tobytes()


def unpack_floats(data: bytes) -> list[float]:
    """The inverse of :func:`pack_floats`."""
    return _little(array.array("f", data)).tolist()


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a model is sampled.

    ``temperature`` 0 is greedy; the recorded log-probabilities are then those at temperature 1. There is no top-p or
    top-k: truncated sampling would make the recorded log-probabilities differ from those that training recomputes.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] = 1.0
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 64
    stop: tuple[str, ...] = ()


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sampled continuation.

    ``token_ids`` holds every sampled token, the one that ended it included; ``text`` leaves out a stop string and
    what follows it.
    """

    token_ids: bytes
    logprobs: bytes
    text: str
    finish_reason: Literal["stop", "length"] = "stop"


class ModelCall(msgspec.Struct, frozen=True, kw_only=True, tag="model", omit_defaults=True):
    """One call of an episode to the model; ``asked`` is the digest of what was asked, see the cassette engine.

    ``usage`` counts the tokens of the prompt and of all outputs where the engine gave no ids of them.
    """

    kind: Literal["chat", "completion"]
    asked: str
    prompt_ids: bytes
    outputs: tuple[Output, ...]
    sampling: Sampling
    seed: int = 0
    adapter: str | None = None
    usage: tuple[int, int] | None = None


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, tag="tool", omit_defaults=True):
    """One call of an episode to a tool of its task; ``arguments`` and ``result`` are JSON text."""

    name: str
    arguments: str
    result: str | None = None
    error: str | None = None


REFUSED: Final = "The model refused a prompt: "


class Note(msgspec.Struct, frozen=True, kw_only=True, tag="note", omit_defaults=True):
    """An intermediate output or a retry that the harness reported, or a call that the model refused.

    ``refused`` is the digest of what was asked in that call, as ``asked`` of :class:`ModelCall`; its text begins with
    :data:`REFUSED`.
    """

    text: str
    refused: str = ""


Step = ModelCall | ToolCall | Note


class EpisodeError(msgspec.Struct, frozen=True, kw_only=True):
    """Why an episode has no answer.

    ``harness`` errors (crash, timeout, limits, protocol) are the policy's failure and score as such; ``engine`` errors
    are the runtime's and leave the trajectory unscored.
    """

    kind: Literal["crash", "timeout", "output-limit", "call-limit", "protocol", "no-answer", "engine"]
    message: str


class Trajectory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All steps of one episode in order, and how it ended."""

    steps: tuple[Step, ...] = ()
    answer: str | None = None
    error: EpisodeError | None = None


#: The most that a reward may be, either way: sums and squares of such are still good to compare and to train on.
MOST_REWARD = 1e9
#: The most step rewards of a verdict: as many as an episode can have model calls.
MOST_STEPS = 4096


class Scored(msgspec.Struct, frozen=True, kw_only=True, tag="scored", omit_defaults=True):
    """A verifier's verdict.

    Attributes:
        reward: finite; what training maximises.
        passed: the pass/fail reading, where the task has one.
        well_formed: whether the answer had the form that the task asks for.
        steps: a reward for each model call of the episode, in order, besides ``reward``; empty if there are none.
    """

    reward: float
    passed: bool | None = None
    well_formed: bool = True
    steps: tuple[float, ...] = ()


class Unscored(msgspec.Struct, frozen=True, kw_only=True, tag="unscored"):
    """No verdict: the runtime or the verifier failed, not the policy. Never read as 0."""

    reason: str


Verdict = Scored | Unscored
