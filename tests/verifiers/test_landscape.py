"""The landscape's figures on groups that can be counted by hand, and its laws."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.schemas.landscape import RewardLandscape
from bascule.schemas.trajectory import Scored, Unscored
from bascule.verifiers.landscape import SampleFigures, landscape
from bascule.verifiers.statistics import wilson

LOST = Unscored(reason="the scorer crashed")


def sample(reward: float | None, *, well_formed: bool = True, error: bool = False, tokens: int = 4) -> SampleFigures:
    verdict = LOST if reward is None else Scored(reward=reward, well_formed=well_formed)
    return SampleFigures(verdict=verdict, error=error, prompt_tokens=10 * tokens, output_tokens=tokens)


GROUPS = st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0, None]).map(sample), max_size=6), max_size=8)


def test_the_figures_of_a_small_evaluation() -> None:
    found = landscape(
        [
            [sample(1.0), sample(0.0, well_formed=False), sample(0.0), sample(0.0)],
            [sample(1.0), sample(1.0), sample(None), sample(1.0)],
            [sample(0.0, error=True, tokens=12)],
            [],
        ]
    )
    assert (found.groups, found.samples, found.unscored) == (4, 9, 1)
    assert found.score == (0.25 + 1 + 0 + 0) / 4
    assert found.score_interval == wilson(1.25, 4)
    assert (found.mean, found.variance, found.skew) == (0.5, 0.25, 0.0)
    assert found.success_rate == 0.5
    assert found.pass_rates == (1, 1, 0, 0, 0, 1)
    assert found.informative == 0.25
    assert found.format_failures == 1 / 8
    assert found.errors == 1 / 9
    assert (found.prompt_tokens, found.output_tokens) == ((80 * 4 + 120) / 9, (8 * 4 + 12) / 9)
    assert found.distinct_rewards == 2


@pytest.mark.parametrize(("passes", "index"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3), (7, 4), (8, 5)])
def test_pass_rates_fall_into_bins_closed_above(passes: int, index: int) -> None:
    found = landscape([[sample(float(i < passes)) for i in range(8)]])
    assert [i for i, n in enumerate(found.pass_rates) if n] == [index]


def test_pass_and_fail_come_from_the_verdict_before_the_reward() -> None:
    verdicts = [Scored(reward=0.9, passed=False), Scored(reward=-1.0, passed=True), Scored(reward=0.2)]
    found = landscape([[SampleFigures(verdict=v)] for v in verdicts])
    assert found.success_rate == 2 / 3


def test_skew_is_the_populations_third_standardised_moment() -> None:
    p = 0.1
    found = landscape([[sample(float(i < 10))] for i in range(100)])
    assert found.skew == pytest.approx((1 - 2 * p) / math.sqrt(p * (1 - p)))


def test_continuous_rewards_get_a_normal_interval_over_groups() -> None:
    found = landscape([[sample(0.5), sample(1.5)], [sample(3.0)]])
    assert (found.score, found.distinct_rewards) == (2.0, 3)
    assert found.score_interval.high - 2.0 == pytest.approx(1.959963984540054 * math.sqrt(2.0 / 2))


def test_an_evaluation_without_a_verdict_scores_zero_over_all_its_groups() -> None:
    found = landscape([[sample(None)]] * 3)
    assert (found.score, found.unscored, found.informative, found.pass_rates) == (0.0, 3, 0.0, (0,) * 6)


@settings(deadline=None)
@given(GROUPS, st.integers(0, 99))
def test_order_does_not_matter_and_every_figure_is_finite(groups: list[list[SampleFigures]], seed: int) -> None:
    found = landscape(groups)
    rng = random.Random(seed)
    shuffled = rng.sample([rng.sample(g, len(g)) for g in groups], len(groups))
    assert _numbers(landscape(shuffled)) == pytest.approx(_numbers(found))
    assert all(math.isfinite(x) for x in _numbers(found))
    assert found.score_interval.low <= found.score + 1e-12
    assert found.score <= found.score_interval.high + 1e-12
    assert msgspec.json.decode(msgspec.json.encode(found), type=RewardLandscape) == found


def _numbers(found: RewardLandscape) -> list[float]:
    values = msgspec.to_builtins(found)
    return [*values.pop("pass_rates"), *values.pop("score_interval").values(), *values.values()]


def test_step_rewards_are_counted_and_leave_no_trace_where_there_are_none() -> None:
    """Landscapes of earlier code have no such figure, and replaying them must give their bytes."""
    stepped = SampleFigures(verdict=Scored(reward=1.0, steps=(0.25, 0.75)))
    assert landscape([[stepped, sample(1.0)], [stepped, sample(None)]]).step_rewards == 2
    assert "step_rewards" not in msgspec.to_builtins(landscape([[sample(1.0), sample(None)]]))
