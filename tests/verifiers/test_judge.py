"""What a scorer says is checked before it counts."""

from __future__ import annotations

from typing import Any

import pytest

from bascule.schemas.trajectory import Scored, Unscored
from bascule.verifiers.scoring_process import Request, judge


class Face:
    def __init__(self, verdict: Any) -> None:
        self._verdict = verdict

    def score(self, split: str, example: str, answer: str | None) -> Any:
        del split, example, answer
        return self._verdict


def judged(**values: Any) -> Any:
    return judge(Face(Scored(**values)), Request(id=1, split="train", example="a", answer="x"))


def test_step_rewards_come_through_as_numbers() -> None:
    assert judged(reward=1, steps=(1, True, 0.5)) == Scored(reward=1.0, steps=(1.0, 1.0, 0.5))
    assert judged(reward=1.0) == Scored(reward=1.0)


@pytest.mark.parametrize("steps", [(float("nan"),), (0.5, float("inf")), ("much",), None])
def test_a_step_reward_that_is_no_number_leaves_the_sample_unscored(steps: Any) -> None:
    assert isinstance(judged(reward=1.0, steps=steps), Unscored)
