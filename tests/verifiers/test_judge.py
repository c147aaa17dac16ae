"""What a scorer says is checked before it counts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bascule.schemas.trajectory import ModelCall, Note, Sampling, Scored, ToolCall, Trajectory, Unscored
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


@pytest.mark.parametrize("values", [{"reward": 1.1e9}, {"reward": -1e308}, {"reward": 0.0, "steps": (1e10,)}])
def test_a_reward_beyond_the_bound_is_none(values: Any) -> None:
    assert isinstance(judged(**values), Unscored)
    assert judged(reward=-1e9) == Scored(reward=-1e9)


def test_more_step_rewards_than_an_episode_can_have_calls_are_none() -> None:
    assert judged(reward=1.0, steps=(0.0,) * 4097) == Unscored(
        reason="The scorer gave 4097 step rewards; there can be 4096."
    )


class Watcher(Face):
    """Scores episodes: gives a reward for each step that it is told to."""

    def score_episode(self, split: str, example: str, episode: Trajectory) -> Any:
        del split, example
        self.seen = episode
        return self._verdict


def call() -> ModelCall:
    return ModelCall(kind="chat", asked="", prompt_ids=b"", outputs=(), sampling=Sampling())


def test_step_rewards_are_one_for_each_model_call() -> None:
    episode = Trajectory(steps=(call(), Note(text="so"), ToolCall(name="look", arguments="{}"), call()), answer="x")
    for given, fits in (((), True), ((1.0, 0.0), True), ((1.0,), False), ((1.0, 0.0, 1.0), False)):
        face = Watcher(Scored(reward=1.0, steps=given))
        verdict = judge(face, Request(id=1, split="dev", example="a", answer="x", episode=episode))
        assert face.seen == episode
        assert isinstance(verdict, Scored if fits else Unscored), given
        if isinstance(verdict, Unscored):
            assert verdict.reason == f"The scorer gave {len(given)} step rewards for 2 model calls."


def test_an_answer_that_no_harness_gave_is_an_episode_without_a_step() -> None:
    face = Watcher(Scored(reward=1.0))
    assert judge(face, Request(id=1, split="dev", example="a", answer="x")) == Scored(reward=1.0)
    assert face.seen == Trajectory(answer="x")


class Scalar:
    """A number of a library's own: converts itself, and encodes as nothing."""

    def __float__(self) -> float:
        return 0.5

    def __bool__(self) -> bool:
        return True


def test_a_librarys_scalars_come_through_as_plain_numbers() -> None:
    verdict = judged(reward=Scalar(), passed=Scalar(), well_formed=Scalar())
    assert verdict == Scored(reward=0.5, passed=True)
    assert msgspec.json.encode(verdict)


class Undecided:
    def __bool__(self) -> bool:
        raise ValueError("the truth of an array is ambiguous")


def test_what_is_neither_passed_nor_failed_leaves_the_sample_unscored() -> None:
    assert isinstance(judged(reward=1.0, passed=Undecided()), Unscored)


@pytest.mark.parametrize("steps", [(float("nan"),), (0.5, float("inf")), ("much",), None])
def test_a_step_reward_that_is_no_number_leaves_the_sample_unscored(steps: Any) -> None:
    assert isinstance(judged(reward=1.0, steps=steps), Unscored)
