"""Feasibility: each requirement is refused on data that do not meet it, by name, and on no others."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bascule.plugins.algorithm import Group, Requires, Sample, Turn
from bascule.trainers.feasible import unmet

ALL = Requires(
    behaviour_logprobs=True, on_policy=True, group_size=3, reward_variance=True, winners=True, pairs=True,
    step_rewards=True,
)  # fmt: skip
NAMES = tuple(name for name in Requires.__struct_fields__ if name != "on_policy")


def sample(number: int, **values: Any) -> Sample:
    turn = Turn(token_ids=(1, 2), behaviour=(-0.5, -1.0), reward=0.25)
    fields = {"reward": float(number % 2), "passed": number % 2 == 1, "turns": (turn,), **values}
    return Sample(trajectory=f"g01-i000-{number // 4:04d}-n{number % 4}", tokens=2, **fields)


def groups(**values: Any) -> list[Group]:
    return [Group(example=f"e{g}", samples=tuple(sample(4 * g + n, **values) for n in range(4))) for g in range(3)]


def alone(name: str) -> Requires:
    return msgspec.structs.replace(Requires(), **{name: getattr(ALL, name)})


TURN = Turn(token_ids=(1, 2), behaviour=(-0.5, -1.0))
BROKEN: dict[str, tuple[list[Group], str]] = {
    "behaviour_logprobs": (
        groups(turns=(Turn(token_ids=(1, 2), reward=1.0),)),
        "12 of 12 samples have none, e.g. g01-i000-0000-n0",
    ),
    "group_size": (
        [Group(example="a", samples=(sample(0), sample(1), sample(2, reward=None)))],
        "none of 1 groups has 3 scored samples; the largest has 2",
    ),
    "reward_variance": (groups(reward=1.0), "the rewards differ in none of 3 groups"),
    "winners": (groups(passed=False), "none of 12 samples passed"),
    "pairs": (groups(reward=0.0), "in none of 3 groups"),
    "step_rewards": (groups(turns=(TURN, TURN)), "none of 24 model calls has one"),
}


def test_data_that_meet_everything_are_feasible_for_all() -> None:
    assert unmet(ALL, groups()) == ()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_required_and_not_met_is_named_with_the_data_and_nothing_else_is(name: str) -> None:
    data, figure = BROKEN[name]
    (reason,) = unmet(alone(name), data)
    assert reason.startswith(f"{name}: ")
    assert figure in reason
    assert unmet(Requires(), data) == ()
    assert unmet(alone(name), groups()) == ()


def test_one_sample_without_log_probabilities_is_found_among_many() -> None:
    bad = (Turn(token_ids=(1, 2), behaviour=(-0.5, float("nan"))),)
    data = groups()
    data[1] = Group(example="e1", samples=(sample(4), sample(5, turns=bad), sample(6), sample(7)))
    (reason,) = unmet(alone("behaviour_logprobs"), data)
    assert reason == "behaviour_logprobs: 1 of 12 samples have none, e.g. g01-i000-0001-n1"


def test_an_unscored_sample_is_neither_a_winner_nor_a_lower_reward() -> None:
    data = [Group(example="a", samples=(sample(0, reward=None, passed=None), sample(1, reward=1.0, passed=True)))]
    assert unmet(alone("pairs"), data)[0].startswith("pairs: ")
    assert unmet(alone("winners"), [Group(example="a", samples=(sample(0), sample(1, reward=None)))])


def test_without_pass_or_fail_a_reward_above_0_wins() -> None:
    assert unmet(alone("winners"), groups(passed=None)) == ()
    assert unmet(alone("winners"), groups(passed=None, reward=-1.0))


@pytest.mark.parametrize("data", [[], groups(reward=None), groups(turns=())])
def test_data_without_a_scored_sampled_token_are_feasible_for_nothing(data: list[Group]) -> None:
    assert len(unmet(Requires(), data)) == 1
