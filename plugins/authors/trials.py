"""What authors that try harnesses share: which train items are asked, and what a trial came to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import msgspec

from bascule.plugins.policy import TRIAL, CallResult, CallTool, TrialRequest, TrialResult
from bascule.plugins.task import Example
from bascule.schemas.events import ToolCalled


def trial_call(request: TrialRequest) -> CallTool:
    """The call of a trial, its arguments as they are recorded."""
    return CallTool(name=TRIAL, arguments=msgspec.json.decode(msgspec.json.encode(request)))


def outcome(result: CallResult) -> tuple[float | None, str]:
    """The score of a trial, None for one that failed, and what it ran into."""
    assert isinstance(result, ToolCalled)
    if result.result is None:
        return None, result.error or "the trial gave no result"
    if (found := _read(result.result)) is None:
        return None, "its result quotes an item of the task, and is not recorded"
    if all(reward is None for reward in found.rewards) or found.errors >= len(found.rewards):
        return None, found.message or "no episode was scored"
    return (found.score if math.isfinite(found.score) else None), found.message


def rewards(result: CallResult, n: int) -> tuple[float, ...]:
    """The reward of each of ``n`` items, in their order; 0 where there is none."""
    assert isinstance(result, ToolCalled)
    found = None if result.result is None else _read(result.result)
    if found is None or len(found.rewards) != n:
        return (0.0,) * n
    return tuple(reward or 0.0 for reward in found.rewards)


def _read(result: str) -> TrialResult | None:
    """None for one that was withheld, since it quotes an item of a restricted task."""
    try:
        return msgspec.json.decode(result, type=TrialResult)
    except msgspec.DecodeError:
        return None


def ordered(train: Sequence[Example], *, salt: str) -> list[int]:
    """All positions of train in a seeded order; no two of one group as long as there are others."""

    def rank(position: int) -> bytes:
        return hashlib.sha256(f"{salt}\0{train[position].id}".encode()).digest()

    groups: dict[str, int] = {}
    turns = []
    for position in sorted(range(len(train)), key=rank):
        group = train[position].group
        groups[group] = groups.get(group, 0) + 1
        turns.append((groups[group], position))
    turns.sort(key=lambda pair: pair[0])
    return [position for _, position in turns]


def fold(train: Sequence[Example], n: int, *, salt: str) -> tuple[int, ...]:
    """``n`` positions of train, or all; no two of one group as long as there are others."""
    return tuple(sorted(ordered(train, salt=salt)[:n]))
