"""What authors that try harnesses share: which train items are asked, and what a trial came to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import msgspec

from bascule.plugins.policy import CallResult, TrialResult
from bascule.plugins.task import Example
from bascule.schemas.events import ToolCalled


def outcome(result: CallResult) -> tuple[float | None, str]:
    """The score of a trial, None for one that failed, and what it ran into."""
    assert isinstance(result, ToolCalled)
    if result.result is None:
        return None, result.error or "the trial gave no result"
    found = msgspec.json.decode(result.result, type=TrialResult)
    if all(reward is None for reward in found.rewards) or found.errors >= len(found.rewards):
        return None, found.message or "no episode was scored"
    return (found.score if math.isfinite(found.score) else None), found.message


def rewards(result: CallResult, n: int) -> tuple[float, ...]:
    """The reward of each of ``n`` items, in their order; 0 where there is none."""
    assert isinstance(result, ToolCalled)
    if result.result is None:
        return (0.0,) * n
    found = msgspec.json.decode(result.result, type=TrialResult).rewards
    return tuple(reward or 0.0 for reward in found) if len(found) == n else (0.0,) * n


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
