"""PPO's credit: where rewards stand, what is discounted, and what whitening leaves."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bascule.plugins.algorithm import Credit, Turn
from bascule.plugins.algorithms.ppo import Ppo, whiten
from bascule.schemas.errors import TrainError
from tests.oracles import within
from tests.plugins.algorithms.samples import group, of, sample, turn

PLAIN = {"kl_coef": 0.0, "whiten_advantages": False}
ROWS = st.lists(st.lists(st.floats(-5, 5, width=16), max_size=5), max_size=5)


def plain(*rewards: float | None) -> list[Turn]:
    """Turns of two tokens each with values 0, and the policy at the reference."""
    zeros = (0.0, 0.0)
    return [Turn(token_ids=(1, 2), policy=zeros, reference=zeros, values=zeros, reward=r) for r in rewards]


def one(credit: list[Credit]) -> Credit:
    assert len(credit) == 1
    return credit[0]


def test_a_turns_reward_is_at_its_last_token_and_the_trajectorys_at_the_last_of_all() -> None:
    played = of(sample("a", 4.0, plain(1.0, None, 0.5)))
    credit = one(Ppo().credit([played], {**PLAIN, "gamma": 0.0, "discount": "token"}))
    assert credit.advantage == (0.0, 1.0, 0.0, 0.0, 0.0, 4.5)
    assert credit.component == "policy"


@pytest.mark.parametrize(
    ("discount", "returns"),
    [("turn", (1.0, 1.0, 2.0, 2.0, 4.0, 4.0)), ("token", (0.125, 0.25, 0.5, 1.0, 2.0, 4.0))],
)
def test_the_discount_counts_turns_or_tokens(discount: str, returns: tuple[float, ...]) -> None:
    played = of(sample("a", 4.0, plain(None, None, None)))
    credit = one(Ppo().credit([played], {**PLAIN, "gamma": 0.5, "discount": discount}))
    assert credit.returns == returns
    assert credit.advantage == returns


def test_the_reward_of_a_call_without_tokens_goes_to_the_token_before_it() -> None:
    played = of(sample("a", 0.0, [*plain(None), turn([], reward=3.0), *plain(None)]))
    assert one(Ppo().credit([played], {**PLAIN, "gamma": 0.0, "discount": "token"})).advantage == (0, 3.0, 0, 0)


def test_every_token_pays_for_its_own_divergence() -> None:
    drifting = turn([5, 6, 7])
    params = {"kl_coef": 0.5, "whiten_advantages": False, "gamma": 0.0, "discount": "token"}
    credit = one(Ppo().credit([of(sample("a", 2.0, [drifting]))], params))
    k1 = [p - r for p, r in zip(drifting.policy, drifting.reference, strict=True)]
    expected = [-0.5 * k - v for k, v in zip(k1, drifting.values, strict=True)]
    expected[-1] += 2.0
    assert credit.advantage == pytest.approx(expected)
    assert credit.returns == pytest.approx([-0.5 * k1[0], -0.5 * k1[1], 2.0 - 0.5 * k1[2]])


def test_returns_are_those_from_before_whitening() -> None:
    groups = [group(1.0, 0.0, name="a"), group(0.25, name="b")]
    white, raw = (Ppo().credit(groups, {"whiten_advantages": w}) for w in (True, False))
    assert [c.returns for c in white] == [c.returns for c in raw]
    assert [c.advantage for c in white] == [tuple(row) for row in whiten([c.advantage for c in raw])]  # type: ignore[misc]


def test_a_cold_critic_gives_the_whitened_returns() -> None:
    groups = [of(sample("a", 1.0, plain(None)), sample("b", 0.0, plain(None)))]
    first, second = (c.advantage for c in Ppo().credit(groups, {}))
    half = 0.5 / math.sqrt(1 / 3 + 1e-8)
    assert first == pytest.approx((half, half))
    assert second == pytest.approx((-half, -half))


@given(ROWS)
def test_whitening_is_that_of_the_masked_tensor(rows: list[list[float]]) -> None:
    """verl's masked whitening: mean and Bessel-corrected variance over the mask; padding is no part of either."""
    ours = [x for row in whiten(rows) for x in row]
    assert len(ours) == sum(map(len, rows))
    if len(ours) > 1:
        padded = torch.full((len(rows), 5), 1e3, dtype=torch.float64)
        mask = torch.zeros(len(rows), 5, dtype=torch.bool)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
            mask[i, : len(row)] = True
        flat = padded[mask]
        theirs = (flat - flat.mean()) * torch.rsqrt(flat.var() + 1e-8)
        within(
            "whitened advantages",
            "masked tensor form in float64",
            float((theirs - torch.tensor(ours, dtype=torch.float64)).abs().max()),
            1e-6,
        )
    else:
        assert ours == [0.0] * len(ours)


def test_a_sample_without_tokens_gets_no_credit() -> None:
    assert [c.trajectory for c in Ppo().credit([of(sample("a", 1.0, []), sample("b", 0.0))], {})] == ["b"]


@pytest.mark.parametrize("missing", ["policy", "reference", "values"])
def test_a_stream_that_is_not_there_is_an_error_that_names_the_trajectory(missing: str) -> None:
    turns = (msgspec.structs.replace(turn([1]), **{missing: ()}),)
    with pytest.raises(TrainError, match=f"e-n7 has 0 {missing}.* for 1 sampled"):
        Ppo().credit([of(sample("e-n7", 1.0, turns))], {})
