"""The algorithm protocol: who assigns credit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

Requirement = Literal["behaviour_logprobs", "reward_variance", "winners", "on_policy"]


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One scored trajectory of a group, as credit assignment sees it.

    Attributes:
        trajectory: its id.
        reward: None if unscored; never to be read as 0.
        passed: pass/fail, where the task has it.
        tokens: number of sampled tokens.
    """

    trajectory: str
    reward: float | None
    passed: bool | None
    tokens: int


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The samples of one example under one harness and one adapter."""

    example: str
    samples: tuple[Sample, ...]


class Credit(msgspec.Struct, frozen=True, kw_only=True):
    """What one trajectory's sampled tokens are trained with.

    Attributes:
        trajectory: its id.
        component: ``policy`` (advantage times clipped ratio) or ``imitation`` (weighted cross-entropy).
        advantage: per sampled token the same scalar; for ``imitation`` the weight, >= 0.
    """

    trajectory: str
    component: Literal["policy", "imitation"]
    advantage: float


class Algorithm(Protocol):
    """An algorithm on the one training loop.

    Attributes:
        name: as chosen by policies, e.g. ``grpo``.
        version: changes when its maths does.
        requires: what must hold of the data before it may be chosen.
    """

    name: str
    version: str
    requires: frozenset[Requirement]

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters under the field's names (TRL, verl) with their defaults."""
        ...

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """Assign credit; pure. Trajectories without credit are not trained on."""
        ...
