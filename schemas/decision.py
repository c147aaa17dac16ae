"""What a lever decision records: the options, their scores, the reasons and the evidence."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Lever = Literal["harness", "weights", "stop"]


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that could have been chosen.

    Attributes:
        lever: the lever; ``algorithm`` is set for weights.
        feasible: whether everything that it requires is there.
        score: the policy's preference among feasible options, higher is better; ``None`` if infeasible.
        reasons: why this score, or which requirement failed on which figure.
    """

    lever: Lever
    algorithm: str | None = None
    feasible: bool = True
    score: float | None = None
    reasons: tuple[str, ...] = ()


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that the decision looked at, and the event that it stands in: its subject without ``bascule.<run>.``."""

    name: str
    value: float
    event: str


class LeverDecision(msgspec.Struct, frozen=True, kw_only=True):
    """A policy's answer."""

    lever: Lever
    algorithm: str | None = None
    params: dict[str, Any] = {}
    reasons: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    evidence: tuple[Evidence, ...] = ()
