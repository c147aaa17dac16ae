"""Which pairs are built from a logged group."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.plugins.algorithm import Group
from bascule.plugins.algorithms.dpo import Dpo
from tests.plugins.algorithms.samples import group, of, sample, turn

REWARDS = st.lists(st.none() | st.floats(-5, 5, width=16), max_size=8)
LONG = list(range(100))


def pairs(played: Group, **params: Any) -> list[tuple[str, str]]:
    credit = Dpo().credit([played], params)
    assert all(c.component == "pair" and c.advantage == 1.0 and c.rejected is not None for c in credit)
    return [(c.trajectory.removeprefix("e-"), str(c.rejected).removeprefix("e-")) for c in credit]


@pytest.mark.parametrize(
    ("rewards", "one", "two"),
    [
        ((0.0, 1.0, 0.5), [("n1", "n0")], [("n1", "n0"), ("n1", "n2")]),
        ((1.0, 0.0), [("n0", "n1")], [("n0", "n1")]),
        ((1.0, 1.0, 0.0), [("n0", "n2")], [("n0", "n2")]),
        ((1.0, 0.0, 0.0), [("n0", "n2")], [("n0", "n2"), ("n0", "n1")]),
        ((0.1, 0.4, 0.2, 0.3, 0.0), [("n1", "n4")], [("n1", "n4"), ("n1", "n2")]),
        ((0.1, 0.4, 0.2, 0.0), [("n1", "n3")], [("n1", "n3"), ("n1", "n0")]),
        ((0.5, 0.5, 0.5), [], []),
        ((None, 1.0, None, 0.5), [("n1", "n3")], [("n1", "n3")]),
        ((None, 1.0), [], []),
        ((-1.0, -2.0), [("n0", "n1")], [("n0", "n1")]),
        ((), [], []),
    ],
)
def test_the_best_is_preferred_to_the_worst_and_to_the_median(
    rewards: tuple[float | None, ...], one: list[tuple[str, str]], two: list[tuple[str, str]]
) -> None:
    assert pairs(group(*rewards)) == one
    assert pairs(group(*rewards), pairs_per_group=2) == two


@given(REWARDS, st.sampled_from([1, 2]), st.sampled_from([0.0, 0.5, 2.0]))
def test_every_pair_is_of_two_samples_with_the_better_first_by_the_margin(
    rewards: list[float | None], count: int, margin: float
) -> None:
    played = group(*rewards)
    reward = {s.trajectory: s.reward for s in played.samples}
    found = Dpo().credit([played], {"pairs_per_group": count, "margin": margin})
    assert len({(c.trajectory, c.rejected) for c in found}) == len(found) <= count
    for c in found:
        better, worse = reward[c.trajectory], reward[str(c.rejected)]
        assert better is not None
        assert worse is not None
        assert better - worse > margin


def test_the_margin_must_be_exceeded() -> None:
    played = group(1.0, 0.5, 0.0)
    assert pairs(played, pairs_per_group=2, margin=0.5) == [("n0", "n2")]
    assert pairs(played, margin=1.0) == []


def test_cut_samples_and_samples_without_tokens_are_in_no_pair() -> None:
    cut = sample("cut", 9.0, [turn([1, 2]), turn([3], truncated=True)])
    silent = sample("silent", -9.0, [])
    assert pairs(of(cut, silent, sample("a", 1.0), sample("b", 0.0))) == [("a", "b")]
    assert pairs(of(cut, silent, sample("a", 1.0))) == []


@pytest.mark.parametrize(
    ("other", "limit", "kept"),
    [
        (LONG, 1.0, False),
        ([*LONG[:99], 7000], 0.95, False),
        ([*LONG[:99], 7000], 0.995, True),
        (LONG[50:] + LONG[:50], 0.95, True),
        ([n + 1000 for n in LONG], 0.0, True),
        ([n + 1000 for n in LONG[:99]] + [99], 0.0, False),
    ],
)
def test_pairs_of_nearly_equal_tokens_are_left_out(other: list[int], limit: float, kept: bool) -> None:
    """The ratio is 0.99 for one other token of 100, and 0.5 for the same tokens in another order."""
    played = of(sample("a", 1.0, [turn(LONG[:40]), turn(LONG[40:])]), sample("b", 0.0, [turn(other)]))
    assert pairs(played, max_similarity=limit) == ([("a", "b")] if kept else [])


def test_the_pairs_and_their_margin_are_kept_with_the_update() -> None:
    played = [group(0.0, 1.0, 0.5), group(0.5, 0.5, name="f"), group(0.25, 0.75, name="g")]
    assert Dpo().figures(played, Dpo().credit(played, {}), {}) == {"pairs": 2.0, "pair_reward_gap": 0.75}
    assert Dpo().figures(played, [], {}) == {}
