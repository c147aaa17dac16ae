"""The gate by version 2 of its rules: a guard of dev, cheaper candidates, and what speaks against a candidate."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from bascule.schemas.events import GateFigures
from bascule.schemas.run import GateConfig
from bascule.verifiers.gate import gate, reported_score

N = 100
CONFIG = GateConfig()
OPEN = GateConfig(guard="none")
THRIFTY = GateConfig(margin=0.02, cheaper=0.2)
COUNTS = st.tuples(st.integers(0, 30), st.integers(0, 30))
Pair = tuple[list[float | None], list[float | None]]


def pair(wins: int, losses: int, n: int = N) -> Pair:
    """Rewards of a candidate and its parent; half of the rest both pass."""
    rest = n - wins - losses
    both: list[float | None] = [float(i % 2) for i in range(rest)]
    return [*[1.0] * wins, *[0.0] * losses, *both], [*[0.0] * wins, *[1.0] * losses, *both]


CLEAR = pair(20, 2)
NO_CHANGE = pair(3, 3)


def reason(figures: GateFigures) -> str:
    assert isinstance(figures.reason, str)
    return figures.reason


def reported(figures: GateFigures) -> float:
    assert figures.guard is not UNSET
    return figures.guard.reported


def test_a_significant_gain_within_the_step_is_rejected_and_one_above_it_promoted() -> None:
    assert gate(*pair(6, 0), config=OPEN, seed=0)[0]
    promote, figures = gate(*pair(6, 0), config=CONFIG, seed=0)
    assert not promote
    assert figures.p is not None
    assert figures.p < CONFIG.alpha
    assert "not above the guard's" in reason(figures)
    # McNemar's z: 7 / sqrt(7) = 2.65 and 8 / sqrt(8) = 2.83 with a step of 2.75.
    assert [gate(*pair(w, 0), config=CONFIG, seed=0)[0] for w in (7, 8)] == [False, True]


def test_a_step_of_nothing_leaves_the_paired_test() -> None:
    ladder = GateConfig(step=0.0)
    for wins in range(9):
        for losses in range(9):
            assert (
                gate(*pair(wins, losses), config=ladder, seed=0)[0] == gate(*pair(wins, losses), config=OPEN, seed=0)[0]
            )


def test_a_rejected_candidate_is_reported_as_its_parent_was() -> None:
    candidate, parent = pair(5, 1)
    _, figures = gate(candidate, parent, config=CONFIG, seed=0, reported=0.3)
    assert reported_score(figures) == 0.3
    _, figures = gate(candidate, parent, config=CONFIG, seed=0)
    assert reported_score(figures) == figures.parent_score


def test_a_promoted_candidate_is_reported_with_its_score() -> None:
    promote, figures = gate(*CLEAR, config=CONFIG, seed=0, reported=0.3)
    assert promote
    assert reported_score(figures) == figures.score
    assert "better on dev" in reason(figures)


def test_the_first_candidate_and_the_first_rules_have_no_guard() -> None:
    promote, figures = gate(CLEAR[0], None, config=CONFIG, seed=0)
    assert promote
    assert reported_score(figures) == figures.score
    promote, figures = gate(*pair(6, 0), config=GateConfig(version=1), seed=0, second=pair(0, 20), costs=(1, 2))
    assert promote
    assert (figures.reason, figures.guard, figures.second, figures.cheaper) == (UNSET, UNSET, UNSET, UNSET)


@settings(deadline=None)
@given(COUNTS, st.sampled_from([CONFIG, THRIFTY, GateConfig(guard="none", margin=0.1)]))
def test_another_win_never_takes_a_promotion_away(counts: tuple[int, int], config: GateConfig) -> None:
    wins, losses = counts
    before = gate(*pair(wins, losses), config=config, seed=0, costs=(1.0, 2.0))[0]
    after = gate(*pair(wins + 1, losses), config=config, seed=0, costs=(1.0, 2.0))[0]
    assert after >= before


@settings(deadline=None)
@given(COUNTS, st.sampled_from(["none", "ladder", "thresholdout"]), st.integers(0, 999))
def test_never_are_both_directions_promoted(counts: tuple[int, int], guard: str, seed: int) -> None:
    config = GateConfig(guard=guard, noise=2.0)  # type: ignore[arg-type]
    candidate, parent = pair(*counts)
    one = gate(candidate, parent, config=config, seed=seed)[0]
    other = gate(parent, candidate, config=config, seed=seed)[0]
    assert not (one and other)


@settings(deadline=None, max_examples=25)
@given(COUNTS, st.randoms(use_true_random=False))
def test_the_order_of_examples_does_not_matter(counts: tuple[int, int], rng: random.Random) -> None:
    candidate, parent = pair(*counts)
    order = list(range(N))
    rng.shuffle(order)
    moved = [candidate[i] for i in order], [parent[i] for i in order]
    assert gate(*moved, config=CONFIG, seed=1) == gate(candidate, parent, config=CONFIG, seed=1)


def test_the_noise_of_thresholdout_comes_from_the_seed_alone() -> None:
    config = GateConfig(guard="thresholdout", noise=0.5)
    found = [gate(*pair(14, 4), config=config, seed=seed) for seed in range(40)]
    assert found == [gate(*pair(14, 4), config=config, seed=seed) for seed in range(40)]
    assert {promote for promote, _ in found} == {True, False}
    scores = {reported(figures) for promote, figures in found if promote}
    assert len(scores) > 1


def test_thresholdout_without_noise_is_the_ladder() -> None:
    config = GateConfig(guard="thresholdout", noise=0.0)
    for wins in range(5, 12):
        ladder, thresholdout = (gate(*pair(wins, 1), config=c, seed=0) for c in (CONFIG, config))
        assert ladder[0] == thresholdout[0]
        assert reported(ladder[1]) == reported(thresholdout[1])


def test_a_cheaper_candidate_that_is_no_worse_is_promoted() -> None:
    candidate, parent = pair(3, 3, 400)
    promote, figures = gate(candidate, parent, config=THRIFTY, seed=0, costs=(70.0, 100.0), reported=0.45)
    assert promote
    assert "30% fewer tokens" in reason(figures)
    assert reported_score(figures) == 0.45, "it is not better"
    assert figures.cheaper is not UNSET
    assert figures.cheaper.p < 0.05


@pytest.mark.parametrize(
    ("config", "costs", "counts"),
    [
        pytest.param(CONFIG, (70.0, 100.0), (3, 3), id="off by default"),
        pytest.param(THRIFTY, (85.0, 100.0), (3, 3), id="not cheap enough"),
        pytest.param(THRIFTY, (0.0, 0.0), (3, 3), id="nothing known of costs"),
        pytest.param(THRIFTY, (70.0, 100.0), (3, 11), id="maybe worse by the margin"),
        pytest.param(THRIFTY, None, (3, 3), id="no costs"),
    ],
)
def test_another_is_not(config: GateConfig, costs: tuple[float, float] | None, counts: tuple[int, int]) -> None:
    assert not gate(*pair(*counts, 400), config=config, seed=0, costs=costs)[0]


def test_graded_rewards_have_their_test_of_being_no_worse() -> None:
    parent = [0.5] * 50
    promote, figures = gate([0.49] * 50, parent, config=THRIFTY, seed=0, costs=(1.0, 2.0))
    assert promote
    assert reported_score(figures) == figures.score, "a lower score is not hidden"
    assert not gate([0.47] * 50, parent, config=THRIFTY, seed=0, costs=(1.0, 2.0))[0]


def test_a_significant_drop_on_the_regression_set_rejects() -> None:
    promote, figures = gate(*CLEAR, config=CONFIG, seed=0, regression=pair(0, 5))
    assert not promote
    assert "regression" in reason(figures)
    assert figures.regression is not UNSET
    assert (figures.regression.losses, figures.regression.p_worse) == (5, 1 / 32)
    assert reported_score(figures) == figures.parent_score
    assert gate(*CLEAR, config=CONFIG, seed=0, regression=pair(0, 4))[0]
    assert gate(*CLEAR, config=CONFIG, seed=0, regression=pair(9, 0))[0]


def test_a_regression_rejects_a_cheaper_candidate_too() -> None:
    costs = (50.0, 100.0)
    assert gate(*pair(3, 3, 400), config=THRIFTY, seed=0, costs=costs)[0]
    assert not gate(*pair(3, 3, 400), config=THRIFTY, seed=0, costs=costs, regression=pair(0, 5))[0]


def test_a_gain_that_is_gone_in_another_form_is_brittle() -> None:
    promote, figures = gate(*CLEAR, config=CONFIG, seed=0, perturbed=pair(3, 3, 50))
    assert not promote
    assert "brittle" in reason(figures)
    # +0.18 on dev: half of it is 4.5 of 50.
    assert not gate(*CLEAR, config=CONFIG, seed=0, perturbed=pair(4, 0, 50))[0]
    assert gate(*CLEAR, config=CONFIG, seed=0, perturbed=pair(5, 0, 50))[0]


def test_a_cheaper_candidate_has_no_gain_that_could_be_brittle() -> None:
    found = gate(*pair(3, 3, 400), config=THRIFTY, seed=0, costs=(1.0, 2.0), perturbed=NO_CHANGE)
    assert found[0]


def test_a_loss_by_the_second_verifier_blocks() -> None:
    promote, figures = gate(*CLEAR, config=CONFIG, seed=0, second=pair(1, 9))
    assert not promote
    assert "worse by the second verifier" in reason(figures)


def test_a_gain_that_the_second_verifier_does_not_see_blocks() -> None:
    promote, figures = gate(*CLEAR, config=CONFIG, seed=0, second=NO_CHANGE)
    assert not promote
    assert "no gain by the second verifier" in reason(figures)
    assert figures.second is not UNSET
    assert figures.second.divergence == pytest.approx(0.18)
    assert 0 < figures.second.interval.low < 0.18 < figures.second.interval.high


def test_a_second_verifier_that_agrees_or_cannot_tell_does_not_block() -> None:
    assert gate(*CLEAR, config=CONFIG, seed=0, second=CLEAR)[0]
    few: Pair = ([1.0, *[None] * (N - 1)], [0.0, *[None] * (N - 1)])
    promote, figures = gate(*CLEAR, config=CONFIG, seed=0, second=few)
    assert promote
    assert figures.second is not UNSET
    assert figures.second.pairs == 1


def test_what_was_not_measured_is_no_figure() -> None:
    _, figures = gate(*CLEAR, config=CONFIG, seed=0)
    assert (figures.regression, figures.perturbed, figures.second, figures.cheaper) == (UNSET,) * 4


def test_nothing_that_speaks_for_a_candidate_promotes_what_dev_does_not() -> None:
    assert not gate(*NO_CHANGE, config=CONFIG, seed=0, regression=CLEAR, perturbed=CLEAR, second=CLEAR)[0]


@pytest.mark.parametrize("name", ["regression", "perturbed", "second"])
def test_unlike_positions_cannot_be_compared(name: str) -> None:
    with pytest.raises(ValueError, match="positions"):
        gate(*CLEAR, config=CONFIG, seed=0, **{name: ([1.0], [1.0, 0.0])})
