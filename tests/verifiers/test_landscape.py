"""The landscape's figures on groups that can be counted by hand, and its laws."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.schemas.landscape import RewardLandscape
from bascule.schemas.trajectory import Scored, Unscored
from bascule.verifiers.landscape import SampleFigures, histogram, landscape, spread
from bascule.verifiers.statistics import clustered_wilson, wilson

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
    return list(_flat(msgspec.to_builtins(found)))


def _flat(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _flat(inner)
    else:
        yield value


def test_step_rewards_are_counted_and_leave_no_trace_where_there_are_none() -> None:
    """Landscapes of earlier code have no such figure, and replaying them must give their bytes."""
    stepped = SampleFigures(verdict=Scored(reward=1.0, steps=(0.25, 0.75)))
    assert landscape([[stepped, sample(1.0)], [stepped, sample(None)]]).step_rewards == 2
    assert "step_rewards" not in msgspec.to_builtins(landscape([[sample(1.0), sample(None)]]))


NEW = {
    "density", "density_interval", "mean_interval", "success_interval", "informative_interval", "step_interval",
    "step_density", "step_calls", "tokens", "rewards", "ess", "kl_to_base", "regression_drop",
}  # fmt: skip


@settings(deadline=None)
@given(GROUPS)
def test_a_landscape_of_version_one_has_no_trace_of_later_figures(groups: list[list[SampleFigures]]) -> None:
    first, second = (msgspec.to_builtins(landscape(groups, version=v)) for v in (1, 2))
    assert not NEW & set(first)
    assert {k: v for k, v in second.items() if k not in NEW} == first


def stepped(reward: float, *steps: float) -> SampleFigures:
    return SampleFigures(verdict=Scored(reward=reward, passed=reward > 0.5, steps=steps), prompt_tokens=1)


def test_the_figures_of_version_two_by_hand() -> None:
    found = landscape(
        [
            [stepped(1.0, 0.5, 0.0, 0.5), stepped(0.0, 0.0)],
            [stepped(0.25), sample(None, tokens=10)],
            [sample(0.0), sample(0.0)],
            [],
        ]
    )
    assert found.density == 2 / 5
    assert found.density_interval == clustered_wilson([1, 1, 0], [2, 1, 2])
    assert found.success_interval == clustered_wilson([1, 0, 0], [2, 1, 2])
    assert found.informative_interval == wilson(1, 4)
    assert (found.step_rewards, found.step_calls, found.step_density) == (2, 4, 0.5)
    assert found.step_interval == clustered_wilson([2, 0, 0], [2, 1, 2])
    assert found.tokens is not None
    assert (found.tokens.mean, found.tokens.p95) == ((1 + 1 + 1 + 110 + 44 + 44) / 6, 110)
    assert found.rewards is not None
    assert found.rewards.counts == (3, 0, 1, 0, 0, 0, 0, 0, 0, 1)
    assert found.rewards.edges == pytest.approx([i / 10 for i in range(11)])


def test_what_nothing_was_seen_of_is_left_out() -> None:
    empty = landscape([[], []])
    assert (empty.density, empty.density_interval, empty.mean_interval, empty.rewards) == (None, None, None, None)
    assert (empty.tokens, empty.step_density, empty.step_interval) == (None, None, None)
    assert empty.informative_interval == wilson(0, 2)
    unscored = landscape([[sample(None)]])
    assert unscored.tokens is not None
    assert unscored.density is None
    assert landscape([[sample(0.0)]]).density == 0.0
    assert landscape([[sample(1.0), sample(0.0)]]).mean_interval is None, "one example says nothing of others"


REWARDS = st.lists(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=6), min_size=2, max_size=12)


@settings(deadline=None)
@given(REWARDS)
def test_the_interval_of_the_mean_is_that_of_the_linearised_ratio(groups: list[list[float]]) -> None:
    """Each sample's residual, summed within its group, as survey sampling has it."""
    found = landscape([[sample(r) for r in g] for g in groups])
    values = np.concatenate([np.array(g) for g in groups])
    residuals = np.array([np.sum(np.array(g) - values.mean()) for g in groups])
    variance = residuals @ residuals * len(groups) / (len(groups) - 1) / len(values) ** 2
    assert found.mean_interval is not None
    scale = 1e-9 * float(np.abs(values).max()) + 1e-12
    assert found.mean_interval.high - found.mean == pytest.approx(
        1.959963984540054 * variance**0.5, rel=1e-9, abs=scale
    )
    assert found.mean - found.mean_interval.low == pytest.approx(1.959963984540054 * variance**0.5, rel=1e-9, abs=scale)


FLOATS = st.lists(st.floats(-1e9, 1e9) | st.sampled_from([0.0, 1.0, 0.1, 0.3, 1 / 3]), min_size=1, max_size=60)


@settings(deadline=None)
@given(FLOATS)
def test_moments_density_and_percentile_are_numpys(values: list[float]) -> None:
    found, array = landscape([[sample(v)] for v in values]), np.array(values)
    assert found.mean == pytest.approx(array.mean(), rel=1e-9, abs=1e-6)
    assert found.variance == pytest.approx(array.var(), rel=1e-9, abs=1e-6)
    assert found.density == np.count_nonzero(array) / len(array)
    spread_ = spread(values)
    assert spread_ is not None
    assert spread_.p95 == np.percentile(array, 95, method="inverted_cdf")


@settings(deadline=None)
@given(FLOATS)
def test_every_reward_is_in_the_bin_whose_edges_hold_it(values: list[float]) -> None:
    found = histogram(values)
    assert found is not None
    assert len(found.edges) == 11
    assert list(found.edges) == sorted(found.edges)
    held = [
        sum(a <= v < b or (i == 9 and v == b) for v in values)
        for i, (a, b) in enumerate(zip(found.edges, found.edges[1:], strict=False))
    ]
    assert list(found.counts) == held
    assert sum(held) == len(values)
    assert found.edges[0] <= min(values) <= max(values) <= found.edges[-1]
    expected = np.histogram_bin_edges(np.array(values), 10)
    assert list(found.edges) == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-6)


@settings(deadline=None)
@given(GROUPS)
def test_each_interval_holds_its_figure(groups: list[list[SampleFigures]]) -> None:
    found = landscape(groups)
    scored = found.samples - found.unscored
    pairs = [
        (found.density, found.density_interval),
        (found.success_rate, found.success_interval),
        (found.informative, found.informative_interval),
        (found.mean, found.mean_interval),
        (found.step_rewards / max(scored, 1), found.step_interval),
    ]
    for value, interval in pairs:
        if interval is not None:
            assert value is not None
            assert interval.low - 1e-12 <= value <= interval.high + 1e-12
