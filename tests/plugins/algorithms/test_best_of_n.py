"""Whom best-of-N imitates."""

from __future__ import annotations

import pytest

from bascule.plugins.algorithm import Credit, Group
from bascule.plugins.algorithms.best_of_n import BestOfN, BestOfN1
from tests.plugins.algorithms.samples import group, of, sample, turn


@pytest.mark.parametrize("algorithm", [BestOfN(), BestOfN1()])
@pytest.mark.parametrize(
    ("played", "winners"),
    [
        (group(1.0, 0.0, 1.0, passed=(True, False, True)), ["e-n0", "e-n2"]),
        (group(0.9, 0.2, passed=(False, True)), ["e-n1"]),
        (group(0.9, 0.2, passed=(False, False)), []),
        (group(0.2, 0.7, 0.7), ["e-n1", "e-n2"]),
        (group(0.0, 0.0), []),
        (group(-1.0, -2.0), []),
        (group(None, 0.5), ["e-n1"]),
        (group(None, None, passed=(True, None)), []),
        (group(1.0, 1.0, 1.0, 1.0), ["e-n0", "e-n1"]),
        (group(), []),
    ],
)
def test_winners_are_imitated_with_weight_one(algorithm: BestOfN, played: Group, winners: list[str]) -> None:
    credit = algorithm.credit([played], {"keep": 2})
    assert credit == [Credit(trajectory=t, component="imitation", advantage=1.0) for t in winners]


def test_keep_caps_the_winners_of_each_group() -> None:
    groups = [group(1.0, 1.0, 1.0, name="a"), group(1.0, 1.0, name="b")]
    assert [c.trajectory for c in BestOfN().credit(groups, {"keep": 1})] == ["a-n0", "b-n0"]


def test_winners_of_equal_tokens_are_imitated_once_and_leave_room_for_others() -> None:
    """Two turns or one: what was sampled is the same. The first version imitated each."""
    played = of(
        sample("a", 1.0, [turn([1, 2]), turn([3])]),
        sample("b", 1.0, [turn([1, 2, 3])]),
        sample("c", 1.0, [turn([1, 2])]),
    )
    assert [c.trajectory for c in BestOfN().credit([played], {"keep": 2})] == ["a", "c"]
    assert [c.trajectory for c in BestOfN1().credit([played], {"keep": 2})] == ["a", "b"]


def test_a_winner_without_tokens_takes_nobody_s_place() -> None:
    played = of(sample("a", 1.0, [turn([])]), sample("b", 1.0, [turn([1])]))
    assert [c.trajectory for c in BestOfN().credit([played], {"keep": 1})] == ["b"]
