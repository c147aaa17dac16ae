"""The gate's laws, by the first rules: the paired test alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.schemas.run import GateConfig
from bascule.verifiers.gate import gate, gate_version, paired_test, score

CONFIG = GateConfig(version=1)
REWARD = st.sampled_from([0.0, 1.0, None])
GRADED = st.sampled_from([0.0, 0.25, 0.5, 1.0, None])
PAIRS = st.one_of(
    st.lists(st.tuples(REWARD, REWARD), min_size=1, max_size=14),
    st.lists(st.tuples(GRADED, GRADED), min_size=1, max_size=14),
)


def test_the_first_candidate_is_promoted_whatever_it_scores() -> None:
    promote, figures = gate([0.0, None], None, config=CONFIG, seed=0)
    assert promote
    assert (figures.test, figures.score, figures.p) == ("first", 0.0, None)


@settings(deadline=None)
@given(PAIRS)
def test_never_are_both_directions_promoted(pairs: list[tuple[float | None, float | None]]) -> None:
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    one, forward = gate(a, b, config=CONFIG, seed=0)
    other, backward = gate(b, a, config=CONFIG, seed=0)
    assert not (one and other)
    assert forward.wins <= backward.losses
    assert backward.wins <= forward.losses
    if None not in (*a, *b):
        assert (forward.wins, forward.losses) == (backward.losses, backward.wins)
    assert (forward.score, forward.parent_score) == (backward.parent_score, backward.score)
    assert forward.p is not None
    assert backward.p is not None
    assert forward.p + backward.p >= 1, "one-sided values of both directions share the ties"


@settings(deadline=None)
@given(st.lists(GRADED, min_size=1, max_size=30))
def test_an_identical_candidate_is_rejected(rewards: list[float | None]) -> None:
    promote, figures = gate(rewards, rewards, config=CONFIG, seed=0)
    assert not promote
    assert figures.p == 1.0


def test_five_wins_without_a_loss_are_enough_at_five_percent_and_four_are_not() -> None:
    assert gate([1.0] * 5 + [0.0] * 95, [0.0] * 100, config=CONFIG, seed=0)[0]
    assert not gate([1.0] * 4 + [0.0] * 96, [0.0] * 100, config=CONFIG, seed=0)[0]
    assert gate([1.0] * 4 + [0.0] * 96, [0.0] * 100, config=GateConfig(version=1, alpha=0.07), seed=0)[0]


def test_a_worse_candidate_is_rejected_even_where_alpha_would_allow_it() -> None:
    assert not gate([0.0, 1.0, 0.0], [1.0, 0.0, 1.0], config=GateConfig(version=1, alpha=0.99), seed=0)[0]


def test_a_position_that_the_parent_has_no_verdict_for_is_no_pair_but_stays_in_the_denominator() -> None:
    candidate = [1.0, None, 1.0, 0.0]
    parent = [0.0, 0.0, None, 0.0]
    _, figures = gate(candidate, parent, config=CONFIG, seed=0)
    assert (figures.score, figures.parent_score) == (0.5, 0.0)
    assert (figures.wins, figures.losses, figures.p) == (1, 0, 0.5)
    assert figures.score_interval.low < 0.5 < figures.score_interval.high


def test_a_candidate_cannot_win_by_losing_its_verdicts() -> None:
    parent = [1.0] * 20
    promote, figures = gate([None] * 20, parent, config=CONFIG, seed=0)
    assert not promote
    assert (figures.score, figures.losses, figures.p) == (0.0, 20, 1.0)


def test_being_unscored_where_one_would_lose_pays_no_more_than_losing() -> None:
    parent = [0.0] * 5 + [1.0]
    scored = gate([1.0] * 5 + [0.0], parent, config=CONFIG, seed=0)
    unscored = gate([1.0] * 5 + [None], parent, config=CONFIG, seed=0)
    assert scored == unscored
    assert not scored[0]


def test_being_unscored_is_never_better_than_a_parent_that_was_punished() -> None:
    _, figures = gate([None, 1.0], [-1.0, 0.5], config=CONFIG, seed=0)
    assert (figures.wins, figures.losses) == (1, 0)


def test_a_decision_names_the_rules_that_it_needed() -> None:
    assert gate_version([1.0, None], [0.0, None], CONFIG) == gate_version([1.0], None, CONFIG) == "1"
    assert gate_version([1.0, None], [0.0, 0.0], CONFIG) == "2"
    assert gate_version([1.0, None], [0.0, 0.0], GateConfig()) == gate_version([1.0], None, GateConfig()) == "3"


def test_other_rewards_than_pass_and_fail_are_compared_by_their_size() -> None:
    candidate = [0.5] * 10 + [0.0]
    parent = [0.25] * 10 + [0.5]
    result = paired_test(candidate, parent, seed=0)
    assert result.test == "paired-sign-flip"
    assert (result.wins, result.losses, result.better) == (10, 1, True)
    # 56 flips reach the sum with the loss turned into a win (at most two wins lost), one without.
    assert result.p == 57 / 2**11


def test_many_small_wins_do_not_outweigh_a_large_loss() -> None:
    promote, figures = gate([0.1] * 10 + [-9.0], [0.0] * 11, config=GateConfig(version=1, alpha=0.99), seed=0)
    assert figures.wins > figures.losses
    assert not promote


def test_candidates_measured_on_different_positions_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="positions"):
        paired_test([1.0], [1.0, 0.0], seed=0)


def test_no_positions_score_zero() -> None:
    assert score([]) == 0.0
