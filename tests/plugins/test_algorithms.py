"""Credit assignment: each algorithm's definition and what it leaves out."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.plugins.algorithm import Algorithm, Credit, Group, Sample
from bascule.plugins.algorithms.best_of_n import BestOfN
from bascule.plugins.algorithms.grpo import Grpo

REWARDS = st.lists(st.none() | st.floats(-5, 5, width=16), max_size=8)


def group(*rewards: float | None, passed: tuple[bool | None, ...] = (), name: str = "e") -> Group:
    verdicts = passed or (None,) * len(rewards)
    return Group(
        example=name,
        samples=tuple(
            Sample(trajectory=f"{name}-n{i}", reward=r, passed=p, tokens=3)
            for i, (r, p) in enumerate(zip(rewards, verdicts, strict=True))
        ),
    )


def by_sample(credit: list[Credit]) -> dict[str, float]:
    return {c.trajectory: c.advantage for c in credit}


def test_grpo_centres_and_scales_by_the_bessel_standard_deviation() -> None:
    credit = Grpo().credit([group(1.0, 0.0, 0.0, 0.0)], {})
    assert [c.component for c in credit] == ["policy"] * 4
    assert by_sample(credit) == pytest.approx(
        {"e-n0": 0.75 / (0.5 + 1e-4), **{f"e-n{i}": -0.25 / (0.5 + 1e-4) for i in (1, 2, 3)}}
    )
    assert by_sample(Grpo().credit([group(1.0, 0.0, 0.0, 0.0)], {"scale_rewards": "none"}))["e-n0"] == 0.75


@given(REWARDS)
def test_grpo_leaves_unscored_samples_out_instead_of_reading_them_as_zero(rewards: list[float | None]) -> None:
    scored = [r for r in rewards if r is not None]
    with_gaps = [c.advantage for c in Grpo().credit([group(*rewards)], {})]
    assert with_gaps == [c.advantage for c in Grpo().credit([group(*scored)], {})]


@given(REWARDS)
def test_grpo_advantages_sum_to_zero_and_rise_with_the_reward(rewards: list[float | None]) -> None:
    advantage = by_sample(Grpo().credit([group(*rewards)], {}))
    assert sum(advantage.values()) == pytest.approx(0, abs=1e-6)
    pairs = sorted((r, advantage[f"e-n{i}"]) for i, r in enumerate(rewards) if r is not None and advantage)
    assert [a for _, a in pairs] == sorted(a for _, a in pairs)


@given(REWARDS)
def test_grpo_gives_no_credit_without_variance(rewards: list[float | None]) -> None:
    scored = [r for r in rewards if r is not None]
    varied = len(scored) > 1 and statistics.pstdev(scored) > 0
    assert bool(Grpo().credit([group(*rewards)], {})) == varied


def test_groups_do_not_mix() -> None:
    a, b = group(1.0, 0.0, name="a"), group(7.0, 3.0, 3.0, name="b")
    for algorithm in (Grpo(), BestOfN()):
        assert algorithm.credit([a, b], {}) == algorithm.credit([a], {}) + algorithm.credit([b], {})


@pytest.mark.parametrize(
    ("given_group", "winners"),
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
def test_best_of_n_imitates_the_winners_with_weight_one(given_group: Group, winners: list[str]) -> None:
    credit = BestOfN().credit([given_group], {"keep": 2})
    assert credit == [Credit(trajectory=t, component="imitation", advantage=1.0) for t in winners]


def test_keep_caps_the_winners_of_each_group() -> None:
    groups = [group(1.0, 1.0, 1.0, name="a"), group(1.0, 1.0, name="b")]
    assert [c.trajectory for c in BestOfN().credit(groups, {"keep": 1})] == ["a-n0", "b-n0"]


@pytest.mark.parametrize("algorithm", [Grpo(), BestOfN()])
def test_no_groups_give_no_credit_and_defaults_are_fresh(algorithm: Algorithm) -> None:
    assert algorithm.credit([], {}) == []
    defaults: dict[str, Any] = algorithm.defaults()
    defaults.clear()
    assert algorithm.defaults()
