"""Successive halving: the budget is kept, the best of few items go on, and equal ones stay in order."""

from __future__ import annotations

import pytest

from bascule.plugins.authors.halving import Round, Standing, excess, kept, rounds


def test_every_round_has_the_better_half_and_about_its_share_of_the_budget() -> None:
    plan = rounds(12, budget=480, items=1000)
    assert plan == [Round(12, 9), Round(6, 17), Round(3, 30), Round(2, 40)]
    assert all(110 < part.items * (part.entrants + 1) <= 120 for part in plan)


@pytest.mark.parametrize("entrants", [1, 2, 3, 7, 12, 64])
@pytest.mark.parametrize("budget", [1, 50, 480])
def test_the_budget_is_kept_but_for_one_item_a_round(entrants: int, budget: int) -> None:
    plan = rounds(entrants, budget=budget, items=1000)
    assert plan[0].entrants == entrants
    assert plan[-1].entrants <= 2
    assert all(part.items == 1 or part.items * (part.entrants + 1) * len(plan) <= budget for part in plan)


def test_no_more_items_are_asked_than_there_are() -> None:
    assert rounds(12, budget=480, items=20) == [Round(12, 9), Round(6, 11)]
    assert rounds(3, budget=480, items=1) == [Round(3, 1)]


def test_the_best_are_kept_and_of_equal_ones_the_first() -> None:
    found = [Standing(entrant=i, rewards=r) for i, r in enumerate([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])]
    assert [s.entrant for s in kept(found, 2)] == [1, 2]
    assert [s.entrant for s in kept(found, 1)] == [2]


def test_the_excess_is_that_on_the_same_items() -> None:
    mean, error = excess((1.0, 1.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0))
    assert mean == 0.5
    assert error == pytest.approx((1 / 3) ** 0.5 / 2)
    assert excess((1.0, 1.0), (0.0, 0.0)) == (1.0, 0.0)
    assert excess((1.0,), (0.0,)) == (1.0, 1.0), "one item tells nothing"
