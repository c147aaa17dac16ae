"""REINFORCE's credit against TRL's RLOO formula, its baselines, and the divergence in the reward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bascule.plugins.algorithm import Group
from bascule.plugins.algorithms.reinforce import Reinforce
from bascule.schemas.errors import ConfigError
from tests.oracles import within
from tests.plugins.algorithms.samples import by_sample, group

FOUR = st.lists(st.none() | st.floats(-5, 5, width=16), min_size=4, max_size=4)
BATCH = st.lists(FOUR, min_size=1, max_size=5)


def divergence(groups: list[Group]) -> torch.Tensor:
    """[groups, samples] log-ratios of policy and reference, summed over the tokens."""
    return torch.tensor(
        [[sum(sum(t.policy) - sum(t.reference) for t in s.turns) for s in g.samples] for g in groups],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("clip", [None, [-1.0, 2.0]])
@given(batch=BATCH, kl_coef=st.sampled_from([0.05, 1.0]))
def test_leave_one_out_advantages_are_trls(
    normalize: bool, clip: list[float] | None, batch: list[list[float | None]], kl_coef: float
) -> None:
    """NaN for unscored, as TRL has it; where TRL's is 0 because a group has one scored sample there is no credit."""
    groups = [group(*row, name=f"g{i}") for i, row in enumerate(batch)]
    rewards = torch.tensor([[math.nan if r is None else r for r in row] for row in batch], dtype=torch.float64)
    if clip is not None:
        rewards = rewards.clamp(*clip)
    rewards = rewards - kl_coef * divergence(groups)
    count = (~rewards.isnan()).sum(1, keepdim=True)
    theirs = rewards - (rewards.nansum(1, keepdim=True) - rewards) / (count - 1)
    told = theirs[~theirs.isnan()]
    if normalize and len(told) > 1:
        theirs = (theirs - told.mean()) / (told.std() + 1e-4)
    params = {"kl_coef": kl_coef, "normalize_advantages": normalize, "reward_clip_range": clip}
    ours = by_sample(Reinforce().credit(groups, params))
    assert set(ours) == {
        f"g{i}-n{j}" for i, row in enumerate(theirs.tolist()) for j, a in enumerate(row) if not math.isnan(a)
    }
    for name, advantage in ours.items():
        i, j = name[1:].split("-n")
        oracle = float(theirs[int(i), int(j)])
        deviation = abs(advantage - oracle) / max(abs(oracle), 1.0)
        within(f"RLOO advantages, normalised {normalize}", "TRL's formula in float64", deviation, 1e-6)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("loo", {"a-n0": 0.5, "a-n1": -1.0, "a-n2": 0.5}),
        ("batch", {"a-n0": 0.0, "a-n1": -1.0, "a-n2": 0.0, "b-n0": 1.0}),
        ("none", {"a-n0": 1.0, "a-n1": 0.0, "a-n2": 1.0, "b-n0": 2.0}),
    ],
)
def test_the_baseline_is_the_other_samples_or_the_batch_or_none(baseline: str, expected: dict[str, float]) -> None:
    groups = [group(1.0, 0.0, 1.0, None, name="a"), group(2.0, None, name="b")]
    credit = Reinforce().credit(groups, {"kl_coef": 0.0, "baseline": baseline})
    assert by_sample(credit) == pytest.approx(expected)
    assert {c.component for c in credit} == {"reinforce"}


def test_a_group_of_equal_rewards_says_nothing_but_of_its_divergence() -> None:
    assert Reinforce().credit([group(1.0, 1.0)], {"kl_coef": 0.0}) == []
    equal = [group(1.0, 1.0)]
    kl = divergence(equal)[0]
    credit = by_sample(Reinforce().credit(equal, {"kl_coef": 0.5}))
    assert credit["e-n0"] == pytest.approx(float(-0.5 * (kl[0] - kl[1])))
    assert credit["e-n1"] == pytest.approx(-credit["e-n0"])


def test_the_divergence_is_subtracted_at_the_present_coefficient() -> None:
    groups = [group(1.0, 0.0)]
    for kl_coef in (0.0, 0.05, 2.0):
        credit = by_sample(Reinforce().credit(groups, {"baseline": "none", "kl_coef": kl_coef}))
        expected = torch.tensor([1.0, 0.0]) - kl_coef * divergence(groups)[0]
        assert list(credit.values()) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("params", [{"baseline": "ema"}, {"kl_coef": -1.0}, {"reward_clip_range": [1.0]}])
def test_unknown_values_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(params))):
        Reinforce().credit([], params)
