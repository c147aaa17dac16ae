"""Intervals and paired tests against enumeration, published values and their laws."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.verifiers.statistics import (
    clustered_interval,
    clustered_wilson,
    mcnemar_exact,
    non_inferiority_exact,
    score_interval,
    sign_flip,
    wilson,
)

REWARDS = st.sampled_from([-1.0, -0.3, 0.0, 0.1, 0.1 + 0.2, 0.3, 1.0])


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert interval.low == pytest.approx(low, abs=6e-5)
    assert interval.high == pytest.approx(high, abs=6e-5)


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 500))
def test_wilson_lies_in_the_unit_interval_around_the_proportion_and_is_symmetric(a: int, b: int) -> None:
    one, other = wilson(a, a + b), wilson(b, a + b)
    assert 0 <= one.low <= one.high <= 1
    assert one.low == pytest.approx(1 - other.high)
    if a + b:
        assert one.low <= a / (a + b) <= one.high


SIZES = st.lists(st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=20)


@settings(deadline=None)
@given(SIZES)
def test_grouped_trials_count_for_no_less_than_their_groups_and_no_more_than_themselves(
    groups: list[tuple[int, int]],
) -> None:
    successes, counts = zip(*groups, strict=True)
    found = clustered_wilson(successes, counts)
    p, n = sum(successes) / sum(counts), sum(counts)
    most, least = wilson(p * n, n), wilson(p * len(groups), len(groups))
    assert least.low - 1e-12 <= found.low <= most.low + 1e-12
    assert most.high - 1e-12 <= found.high <= least.high + 1e-12
    if p in (0, 1):
        assert found == least


def test_alike_samples_of_an_example_are_one_trial_and_unlike_ones_are_many() -> None:
    alike = clustered_wilson([4, 0, 4, 0, 0, 4, 0, 0], [4] * 8)
    assert alike.low == pytest.approx(wilson(3, 8).low, abs=0.02)
    assert clustered_wilson([2] * 8, [4] * 8) == wilson(16, 32)
    assert clustered_wilson([], []) == wilson(0, 0)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_groups_of_one_sample_have_the_interval_of_single_scores(scores: list[float]) -> None:
    found, known = clustered_interval(scores, [1] * len(scores)), score_interval(scores, pass_fail=False)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((known.low, known.high), rel=1e-9, abs=1e-6)


def test_one_group_says_nothing_of_the_mean_over_groups() -> None:
    assert clustered_interval([3.0], [4]) is None
    assert clustered_interval([], []) is None


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_clustered_intervals_cover_what_they_say(alike: float) -> None:
    """Seeded draws of 60 examples of 8 samples, each a copy of the example's first with probability ``alike``."""
    rng = random.Random(7)
    inside = 0
    for _ in range(400):
        groups = []
        for _ in range(60):
            first = rng.random() < 0.3
            groups.append(sum(first if rng.random() < alike else rng.random() < 0.3 for _ in range(8)))
        found = clustered_wilson(groups, [8] * 60)
        inside += found.low <= 0.3 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_wilson_without_data_excludes_nothing_and_nonsense_is_refused() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="no proportion"):
        wilson(3, 2)


def test_the_interval_of_other_rewards_is_normal_over_examples() -> None:
    interval = score_interval([1.0, 2.0, 3.0, 6.0], pass_fail=False)
    half = 1.959963984540054 * math.sqrt((4 + 1 + 0 + 9) / 3 / 4)
    assert interval.low == pytest.approx(3 - half)
    assert interval.high == pytest.approx(3 + half)


@settings(deadline=None)
@given(st.integers(0, 8), st.integers(0, 8))
def test_mcnemar_counts_every_assignment_of_the_discordant_pairs(wins: int, losses: int) -> None:
    n = wins + losses
    reached = sum(bits.bit_count() >= wins for bits in range(2**n))
    assert mcnemar_exact(wins, losses) == float(Fraction(reached, 2**n))


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    # Upper tails of the fair binomial; 15 of 20 heads is the textbooks' .0207.
    [(0, 0, 1.0), (5, 0, 0.03125), (4, 0, 0.0625), (9, 1, 11 / 1024), (15, 5, 21700 / 2**20)],
)
def test_mcnemar_gives_known_values(wins: int, losses: int, p: float) -> None:
    assert mcnemar_exact(wins, losses) == p


def test_mcnemar_stays_exact_far_out_in_the_tail() -> None:
    assert mcnemar_exact(870, 0) == 2.0**-870
    assert mcnemar_exact(0, 870) == 1.0


@settings(deadline=None)
@given(st.lists(REWARDS, max_size=9))
def test_sign_flip_counts_every_flip_exactly(differences: list[float]) -> None:
    exact = [Fraction(d).limit_denominator(1000) for d in differences]
    flips = [sum(s * d for s, d in zip(signs, exact, strict=True)) for signs in _signs(len(exact))]
    expected = Fraction(sum(f >= sum(exact) for f in flips), len(flips))
    assert sign_flip(differences, seed=0) == float(expected)


def test_differences_that_are_the_same_in_decimals_tie() -> None:
    candidate, parent = [0.8, 0.5, 0.5, 0.9, 0.7, 0.9], [0.6, 0.3, 0.7, 0.6, 0.5, 0.7]
    differences = [c - p for c, p in zip(candidate, parent, strict=True)]
    assert len(set(differences)) > 3, "as floats 2 tenths are not always the same"
    assert sign_flip(differences, seed=0) == sign_flip([2, 2, -2, 3, 2, 2], seed=0)
    assert sign_flip([1 / 3, 1 / 3, 1 / 3, -1], seed=0) == sign_flip([1, 1, 1, -3], seed=0)


def _signs(n: int) -> list[tuple[int, ...]]:
    return list(itertools.product((1, -1), repeat=n))


@settings(deadline=None)
@given(st.integers(0, 8), st.integers(0, 8))
def test_on_pass_fail_the_two_tests_agree(wins: int, losses: int) -> None:
    assert sign_flip([1.0] * wins + [-1.0] * losses, seed=0) == mcnemar_exact(wins, losses)


def test_sampled_flips_come_near_the_exact_value_and_follow_their_seed() -> None:
    differences = [1.0] * 20 + [-1.0] * 10 + [0.0] * 100
    exact = mcnemar_exact(20, 10)
    p = sign_flip(differences, seed=5)
    assert p == sign_flip(differences, seed=5)
    assert p != sign_flip(differences, seed=6)
    assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / 9999)


def test_sampled_flips_never_give_zero() -> None:
    assert sign_flip([1.0 + i / 64 for i in range(40)], seed=1, resamples=99) == 1 / 100


def test_under_the_null_p_is_rarely_small() -> None:
    rng = random.Random(3)
    ps = [sign_flip([rng.gauss(0, 1) for _ in range(20)], seed=i, resamples=199) for i in range(300)]
    # At level .05 the number of false alarms is Binomial(300, .05): mean 15, standard deviation 3.8.
    assert 4 <= sum(p <= 0.05 for p in ps) <= 28


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_difference_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        sign_flip([1.0, value], seed=0)


def _chances(n: int, win: float, lose: float) -> dict[tuple[int, int], float]:
    """Of wins and losses among ``n`` pairs."""
    found = {}
    for w in range(n + 1):
        for x in range(n - w + 1):
            ways = math.comb(n, w) * math.comb(n - w, x)
            found[w, x] = ways * win**w * lose**x * (1 - win - lose) ** (n - w - x)
    return found


def test_what_is_worse_by_the_margin_is_rarely_found_no_worse() -> None:
    n, margin = 14, 0.2
    p = {c: non_inferiority_exact(*c, n, margin=margin) for c in _chances(n, 0.0, 0.0)}
    assert min(p.values()) < 0.05
    for differ in (0.2, 0.22, 0.3, 0.5, 0.8, 1.0):
        chances = _chances(n, (differ - margin) / 2, (differ + margin) / 2)
        for level in (0.05, 0.2):
            assert sum(chance for c, chance in chances.items() if p[c] < level) <= level


def test_no_pair_that_differs_among_many_shows_that_it_is_no_worse_and_among_few_does_not() -> None:
    assert non_inferiority_exact(0, 0, 300, margin=0.02) < 0.05
    assert non_inferiority_exact(0, 0, 50, margin=0.02) > 0.05
    assert non_inferiority_exact(0, 0, 0, margin=0.02) == 1.0


def test_a_wider_margin_and_more_wins_make_it_easier() -> None:
    assert non_inferiority_exact(5, 5, 100, margin=0.1) < non_inferiority_exact(5, 5, 100, margin=0.05)
    assert non_inferiority_exact(7, 5, 100, margin=0.05) < non_inferiority_exact(5, 5, 100, margin=0.05)
    assert non_inferiority_exact(5, 7, 100, margin=0.05) > non_inferiority_exact(5, 5, 100, margin=0.05)


@pytest.mark.parametrize(("wins", "losses", "n", "margin"), [(3, 3, 5, 0.1), (-1, 0, 5, 0.1), (1, 1, 5, 0.0)])
def test_impossible_counts_and_margins_are_refused(wins: int, losses: int, n: int, margin: float) -> None:
    with pytest.raises(ValueError, match=r"not counts|no margin"):
        non_inferiority_exact(wins, losses, n, margin=margin)
