"""The laws of entropic advantage weighting, its guards, and its shaping by the divergence."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bascule.plugins.algorithms.entropic import Entropic, solve_beta
from bascule.schemas.errors import TrainError
from tests.oracles import within
from tests.plugins.algorithms.samples import by_sample, group, of, sample, turn

LN2 = math.log(2)
ALONE: dict[str, Any] = {"kl_coef": 0.0}
TENTHS = st.lists(st.integers(-50, 50).map(lambda n: n / 10), min_size=3, max_size=12)
VARIED = TENTHS.filter(lambda r: len(set(r)) > 1)


def advantages(rewards: list[float], **params: Any) -> list[float]:
    credit = by_sample(Entropic().credit([group(*rewards)], {**ALONE, **params}))
    return [credit[f"e-n{i}"] for i in range(len(rewards))]


@given(VARIED)
def test_the_weights_are_ln_2_from_uniform_where_that_can_be_reached(rewards: list[float]) -> None:
    solution = solve_beta(rewards)
    best = rewards.count(max(rewards))
    if best < len(rewards) / 2:
        within("entropic weights: KL from uniform", "ln 2", abs(solution.kl - LN2), 1e-9)
    else:
        within(
            "entropic weights: KL, ln 2 out of reach",
            "ln(K / m)",
            abs(solution.kl - math.log(len(rewards) / best)),
            1e-9,
        )
    assert math.fsum(solution.weights) == pytest.approx(1)
    assert solution.ess == pytest.approx(1 / sum(q * q for q in solution.weights))


@given(VARIED, st.sampled_from([1e-6, 0.5, 3.0, 1e6]), st.integers(-1000, 1000))
def test_scale_and_origin_of_the_reward_do_not_matter(rewards: list[float], scale: float, origin: int) -> None:
    moved = [scale * (r + origin) for r in rewards]
    deviation = np.abs(np.subtract(advantages(moved), advantages(rewards))).max()
    within("entropic advantages of scaled rewards", "those of the rewards", deviation, 1e-9)
    assert solve_beta(moved).beta * scale == pytest.approx(solve_beta(rewards).beta, rel=1e-6)


@given(VARIED, st.booleans())
def test_a_higher_reward_has_no_lower_advantage(rewards: list[float], centre: bool) -> None:
    ranked = sorted(zip(rewards, advantages(rewards, centre=centre), strict=True))
    assert all(b[1] - a[1] >= -1e-12 for a, b in itertools.pairwise(ranked))
    assert ranked[0][1] < ranked[-1][1]


@given(VARIED, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(rewards: list[float], shuffler: Any) -> None:
    order = list(range(len(rewards)))
    shuffler.shuffle(order)
    assert advantages([rewards[i] for i in order]) == pytest.approx([advantages(rewards)[i] for i in order])


@given(VARIED)
def test_the_weights_are_the_gradient_of_the_log_mean_exponential(rewards: list[float]) -> None:
    solution = solve_beta(rewards)
    assume(solution.beta < 1e3)

    def objective(values: np.ndarray) -> float:
        top = values.max()
        return float(top + math.log(np.exp(solution.beta * (values - top)).mean()) / solution.beta)

    for i, weight in enumerate(solution.weights):
        step = np.zeros(len(rewards))
        step[i] = 1e-4 / max(solution.beta, 1.0)
        slope = (objective(np.array(rewards) + step) - objective(np.array(rewards) - step)) / (2 * step[i])
        within("entropic weights", "finite differences of log mean exp", abs(slope - weight), 1e-6)


@given(VARIED)
def test_advantages_are_the_leave_one_out_weights(rewards: list[float]) -> None:
    """As the paper has it, e_i / Z_i - 1, with the weight bounded by K."""
    powers = np.exp(solve_beta(rewards).beta * (np.array(rewards) - max(rewards)))
    others = (powers.sum() - powers) / (len(rewards) - 1)
    theirs = np.minimum(powers / np.maximum(others, 1e-300), len(rewards)) - 1
    within("entropic advantages", "leave-one-out form", np.abs(advantages(rewards) - theirs).max(), 1e-9)


def test_one_hit_of_eight_is_as_measured_without_a_bound_and_bounded_by_the_group_with_one() -> None:
    free = advantages([1.0] + [0.0] * 7, w_max=100.0)
    assert free[0] == pytest.approx(10.8, abs=0.05)
    assert free[1:] == pytest.approx([-0.61] * 7, abs=0.005)
    bounded = advantages([1.0] + [0.0] * 7)
    assert bounded == pytest.approx([7.0, *free[1:]])
    centred = advantages([1.0] + [0.0] * 7, centre=True)
    assert sum(centred) == pytest.approx(0)
    assert centred[0] - centred[1] == pytest.approx(bounded[0] - bounded[1])


def test_where_most_share_the_best_reward_the_weights_are_those_of_the_best_alone() -> None:
    assert advantages([1.0] * 6 + [0.0] * 2) == pytest.approx([7 / 5 - 1] * 6 + [-1.0] * 2)


@pytest.mark.parametrize(
    "rewards",
    [[], [1.0], [1.0, 0.0], [1.0, 0.0, None], [0.5, 0.5, 0.5], [None, None, None, 1.0], [0.0] * 8],
)
def test_fewer_than_three_scored_samples_or_equal_rewards_say_nothing(rewards: list[float | None]) -> None:
    assert Entropic().credit([group(*rewards)], ALONE) == []


def test_equal_rewards_have_uniform_weights() -> None:
    solution = solve_beta([0.3] * 4)
    assert (solution.beta, solution.kl, solution.ess, solution.weights) == (0.0, 0.0, 4.0, (0.25,) * 4)


def test_samples_of_equal_tokens_count_once_with_their_mean_reward() -> None:
    twins = [sample(name, r, [turn([1, 2]), turn([3])]) for name, r in (("t0", 1.0), ("t1", 0.5))]
    others = [sample(f"o{i}", r) for i, r in enumerate((0.0, 0.25))]
    credit = by_sample(Entropic().credit([of(twins[0], others[0], twins[1], others[1])], ALONE))
    once = [sample("t0", 0.75), *others]
    assert credit == by_sample(Entropic().credit([of(once[0], *others)], ALONE))
    assert Entropic().credit([of(*twins, others[0])], ALONE) == []


def test_the_divergence_shifts_tokens_and_not_their_mean() -> None:
    groups = [group(1.0, 0.0, 0.5, name="a"), group(0.0, 0.0, 2.0, None, name="b"), group(1.0, 1.0, 1.0, name="c")]
    plain = by_sample(Entropic().credit(groups, ALONE))
    shaped = Entropic().credit(groups, {"kl_coef": 0.5})
    samples = {s.trajectory: s for g in groups for s in g.samples}
    drift = {
        c.trajectory: [
            b - r for t in samples[c.trajectory].turns for b, r in zip(t.behaviour, t.reference, strict=True)
        ]
        for c in shaped
    }
    everything = [d for row in drift.values() for d in row]
    mean = sum(everything) / len(everything)
    assert set(plain) == {c.trajectory for c in shaped}
    for c in shaped:
        assert c.advantage == pytest.approx([plain[c.trajectory] + 0.5 * (mean - d) for d in drift[c.trajectory]])
    shifts = [a - plain[c.trajectory] for c in shaped for a in c.advantage]  # type: ignore[union-attr]
    assert sum(shifts) == pytest.approx(0)


@pytest.mark.parametrize("missing", ["behaviour", "reference"])
def test_missing_log_probabilities_are_an_error_that_names_the_trajectory(missing: str) -> None:
    bare = msgspec.structs.replace(turn([1, 2]), **{missing: ()})
    played = of(sample("e-n7", 1.0, [bare]), sample("a", 0.0), sample("b", 0.5))
    with pytest.raises(TrainError, match=f"e-n7 has 0 {missing} log-probabilities for 2"):
        Entropic().credit([played], {})


def test_the_temperature_and_how_far_the_weights_are_from_uniform_are_kept_with_the_update() -> None:
    steep, flat = solve_beta([0.0, 0.0, 0.0, 1.0]), solve_beta([0.0, 1.0, 1.0])
    figures = Entropic().figures([group(0.0, 0.0, 0.0, 1.0), group(0.0, 1.0, 1.0), group(1.0, 1.0, 1.0)], [], {})
    assert figures == {
        "weights_beta": pytest.approx((steep.beta + flat.beta) / 2),
        "weights_kl": pytest.approx((LN2 + math.log(3 / 2)) / 2),
        "weights_ess": pytest.approx((steep.ess / 4 + flat.ess / 3) / 2),
    }
    assert Entropic().figures([group(1.0, 1.0, 1.0), group(0.0, 1.0)], [], {}) == {}
