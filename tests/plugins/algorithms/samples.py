"""Small groups for the algorithms' tests: every sample with tokens, log-probabilities and values of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from bascule.plugins.algorithm import Credit, Group, Sample, Turn


def turn(token_ids: Sequence[int], seed: object = 0, *, reward: float | None = None, truncated: bool = False) -> Turn:
    """A turn whose log-probabilities and values are drawn from ``seed``."""
    draw = random.Random(f"{seed}-{token_ids}")
    streams = [tuple(draw.uniform(-3, 0) for _ in token_ids) for _ in range(4)]
    return Turn(
        token_ids=tuple(token_ids),
        behaviour=streams[0],
        policy=streams[1],
        reference=streams[2],
        values=streams[3],
        truncated=truncated,
        reward=reward,
    )


def sample(
    trajectory: str, reward: float | None, turns: Sequence[Turn] | None = None, passed: bool | None = None
) -> Sample:
    """A sample; without ``turns`` it has two, of 3 and 2 tokens that no other sample has."""
    if turns is None:
        draw = random.Random(trajectory)
        turns = [turn([draw.randrange(10**6) for _ in range(n)], trajectory) for n in (3, 2)]
    return Sample(
        trajectory=trajectory,
        reward=reward,
        passed=passed,
        tokens=sum(len(t.token_ids) for t in turns),
        turns=tuple(turns),
    )


def group(*rewards: float | None, passed: Sequence[bool | None] = (), name: str = "e") -> Group:
    """A group of samples ``{name}-n0``, ``{name}-n1`` and so on."""
    verdicts = passed or (None,) * len(rewards)
    samples = [sample(f"{name}-n{i}", r, passed=p) for i, (r, p) in enumerate(zip(rewards, verdicts, strict=True))]
    return Group(example=name, samples=tuple(samples))


def of(*samples: Sample, name: str = "e") -> Group:
    """A group of these samples."""
    return Group(example=name, samples=samples)


def without_unscored(groups: Sequence[Group]) -> list[Group]:
    """The same groups with nothing in the place of unscored samples."""
    return [msgspec.structs.replace(g, samples=tuple(s for s in g.samples if s.reward is not None)) for g in groups]


def by_sample(credit: Sequence[Credit]) -> dict[str, float]:
    """The advantages by trajectory, where there is one number for all tokens."""
    assert all(isinstance(c.advantage, float) for c in credit)
    return {c.trajectory: c.advantage for c in credit if isinstance(c.advantage, float)}
