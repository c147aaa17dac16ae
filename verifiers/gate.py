"""The promotion gate: a candidate replaces its parent only if a paired test on the same examples says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from bascule.schemas.events import GateFigures
from bascule.schemas.run import GateConfig
from bascule.verifiers.statistics import mcnemar_exact, score_interval, sign_flip

GATE_VERSION = "1"
#: Of a decision in which the candidate lacks a verdict that its parent has; version 1 left such positions out. A
#: candidate can see to it that it is not scored where it is bad, so that must never pay.
UNSCORED_VERSION = "2"


class PairedTest(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison of two candidates on the same examples.

    Attributes:
        test: exact McNemar if all rewards of the pairs are 0 or 1, otherwise the sign-flip permutation test.
        wins, losses: examples on which the candidate is better or worse.
        p: one-sided, for "the candidate is better"; 1 without a pair that differs.
        better: whether the candidate is better at all: more wins than losses, or the larger mean.
    """

    test: Literal["mcnemar-exact", "paired-sign-flip"]
    wins: int
    losses: int
    p: float
    better: bool


def score(rewards: Sequence[float | None]) -> float:
    """Mean reward over all positions; an unscored position adds nothing and stays in the denominator."""
    return math.fsum(r for r in rewards if r is not None) / len(rewards) if rewards else 0.0


def paired_test(candidate: Sequence[float | None], parent: Sequence[float | None], *, seed: int) -> PairedTest:
    """Compare by position. One that the parent has no verdict for is no pair.

    Where only the candidate has none it counts 0, and never as better than its parent.

    Raises:
        ValueError: the two were not measured on the same number of positions.
    """
    if len(candidate) != len(parent):
        raise ValueError(f"The candidate has {len(candidate)} positions and its parent {len(parent)}.")
    pairs = [(min(0.0, p) if c is None else c, p) for c, p in zip(candidate, parent, strict=True) if p is not None]
    wins = sum(c > p for c, p in pairs)
    losses = sum(c < p for c, p in pairs)
    if all(r in (0, 1) for pair in pairs for r in pair):
        return PairedTest(
            test="mcnemar-exact", wins=wins, losses=losses, p=mcnemar_exact(wins, losses), better=wins > losses
        )
    differences = [c - p for c, p in pairs]
    return PairedTest(
        test="paired-sign-flip",
        wins=wins,
        losses=losses,
        p=sign_flip(differences, seed=seed),
        better=math.fsum(differences) > 0,
    )


def gate_version(candidate: Sequence[float | None], parent: Sequence[float | None] | None) -> str:
    """The version of the rules that a decision between these needs."""
    missing = any(c is None and p is not None for c, p in zip(candidate, parent or (), strict=False))
    return UNSCORED_VERSION if missing else GATE_VERSION


def gate(
    candidate: Sequence[float | None], parent: Sequence[float | None] | None, *, config: GateConfig, seed: int
) -> tuple[bool, GateFigures]:
    """Whether to promote, and the figures that say why.

    Args:
        candidate: reward by position in the split; None is unscored. Several samples are given as their mean.
        parent: the promoted candidate's rewards on the same positions; None for the first candidate, which has
            nothing to be compared with and is promoted.
        config: the level ``alpha``.
        seed: of the permutation test; used with more than 16 pairs that differ in a reward other than 0 and 1.

    Raises:
        ValueError: the two were not measured on the same number of positions.
    """
    values = [r if r is not None else 0.0 for r in candidate]
    interval = score_interval(values, pass_fail=all(v in (0, 1) for v in values))
    if parent is None:
        return True, GateFigures(test="first", score=score(candidate), score_interval=interval)
    result = paired_test(candidate, parent, seed=seed)
    return result.better and result.p < config.alpha, GateFigures(
        test=result.test,
        score=score(candidate),
        score_interval=interval,
        parent_score=score(parent),
        wins=result.wins,
        losses=result.losses,
        p=result.p,
        alpha=config.alpha,
    )
