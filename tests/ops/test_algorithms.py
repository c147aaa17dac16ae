"""What the benchmark of the algorithms says of its arms."""

from __future__ import annotations

import pytest

from ops.bench.algorithms import Arm, verdict

WORSE, BETTER = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0, 1.0, 0.0)


def _arm(before: tuple[float | None, ...], after: tuple[float | None, ...], failure: str = "") -> Arm:
    return Arm(before=before, after=after, kl=0.1, tokens=1, trajectories=1, seconds=1.0, failure=failure)


def test_items_of_all_seeds_are_one_test() -> None:
    assert verdict("ppo", [_arm(WORSE, BETTER)]).startswith("FAIL ppo: dev 0.167 -> 0.833; p = 0.062 (4 better, 0 ")
    assert verdict("ppo", [_arm(WORSE, BETTER), _arm(BETTER, BETTER)]).startswith("FAIL ppo: dev 0.167 -> 0.833; 0.833")
    assert verdict("ppo", [_arm(WORSE, BETTER)] * 2).startswith("ok ppo: ")


def test_a_pair_is_an_item_of_one_seed() -> None:
    assert "(1 better, 1 worse)" in verdict("dpo", [_arm((1.0, 0.0), (0.0, 1.0)), _arm((0.0,), (0.0,))])


@pytest.mark.parametrize(
    "arms",
    [
        pytest.param([_arm(BETTER, WORSE)] * 9, id="worse"),
        pytest.param([_arm(BETTER, BETTER)] * 9, id="the same"),
        pytest.param([_arm(WORSE, BETTER)] * 9 + [_arm(WORSE, (), "kl")], id="one job failed"),
        pytest.param([_arm(WORSE, (None,) * 6)] * 9, id="unscored"),
    ],
)
def test_no_improvement_fails(arms: list[Arm]) -> None:
    assert verdict("grpo", arms).startswith("FAIL grpo: ")
