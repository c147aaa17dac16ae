"""GRPO's credit against TRL's formula, and what it leaves out."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bascule.plugins.algorithms.grpo import Grpo, Grpo1
from tests.oracles import within
from tests.plugins.algorithms.samples import by_sample, group, of, sample, turn

REWARDS = st.lists(st.none() | st.floats(-5, 5, width=16), max_size=8)
FOUR = st.lists(st.none() | st.floats(-5, 5, width=16), min_size=4, max_size=4)
BATCH = st.lists(FOUR, min_size=1, max_size=5)


def nan_std(x: torch.Tensor) -> torch.Tensor:
    """[rows, 1] standard deviations with Bessel's correction of the numbers that are not NaN."""
    count = (~x.isnan()).sum(1, keepdim=True)
    squares = (x - x.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return (squares / (count - 1)).sqrt()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(batch=BATCH)
def test_advantages_are_trls(scale: str, batch: list[list[float | None]]) -> None:
    """NaN for unscored, as TRL has it; where TRL's advantage is 0 for want of variance there is no credit."""
    rewards = torch.tensor([[math.nan if r is None else r for r in row] for row in batch], dtype=torch.float64)
    theirs = rewards - rewards.nanmean(1, keepdim=True)
    if scale == "group":
        theirs /= nan_std(rewards) + 1e-4
    if scale == "batch":
        theirs /= nan_std(rewards.view(1, -1)) + 1e-4
    groups = [group(*row, name=f"g{i}") for i, row in enumerate(batch)]
    ours = by_sample(Grpo().credit(groups, {"scale_rewards": scale}))
    for i, row in enumerate(theirs.nan_to_num(0.0).tolist()):
        for j, theirs_one in enumerate(row):
            deviation = abs(ours.get(f"g{i}-n{j}", 0.0) - theirs_one) / max(abs(theirs_one), 1.0)
            within(f"GRPO advantages, scale_rewards {scale}", "TRL's formula in float64", deviation, 1e-6)


@given(REWARDS)
def test_advantages_sum_to_zero_and_rise_with_the_reward(rewards: list[float | None]) -> None:
    advantage = by_sample(Grpo().credit([group(*rewards)], {}))
    assert sum(advantage.values()) == pytest.approx(0, abs=1e-6)
    pairs = sorted((r, advantage[f"e-n{i}"]) for i, r in enumerate(rewards) if r is not None and advantage)
    assert [a for _, a in pairs] == sorted(a for _, a in pairs)


@given(REWARDS)
def test_without_variance_there_is_no_credit(rewards: list[float | None]) -> None:
    scored = [r for r in rewards if r is not None]
    varied = len(scored) > 1 and statistics.pstdev(scored) > 0
    for scale in ("group", "batch", "none"):
        assert bool(Grpo().credit([group(*rewards)], {"scale_rewards": scale})) == varied


def test_a_constant_group_counts_for_the_batchs_deviation() -> None:
    groups = [group(1.0, 0.0, name="a"), group(9.0, 9.0, name="b")]
    credit = by_sample(Grpo().credit(groups, {"scale_rewards": "batch"}))
    assert credit["a-n0"] == pytest.approx(0.5 / (statistics.stdev([1, 0, 9, 9]) + 1e-4))
    assert set(credit) == {"a-n0", "a-n1"}


def test_cut_samples_count_for_their_group_and_get_no_credit_if_masked() -> None:
    cut = sample("cut", 0.0, [turn([1, 2]), turn([3], truncated=True)])
    played = [of(sample("a", 1.0), sample("b", 0.5), cut)]
    everything = by_sample(Grpo().credit(played, {}))
    masked = by_sample(Grpo().credit(played, {"mask_truncated_completions": True}))
    assert set(everything) == {"a", "b", "cut"}
    assert masked == {name: everything[name] for name in ("a", "b")}


@given(REWARDS)
def test_the_first_version_assigns_the_same_under_its_own_defaults(rewards: list[float | None]) -> None:
    assert Grpo1().credit([group(*rewards)], Grpo1().defaults()) == Grpo().credit([group(*rewards)], {})
    assert Grpo1().defaults()["lora_r"] == 16
    assert "loss_type" not in Grpo1().defaults()
