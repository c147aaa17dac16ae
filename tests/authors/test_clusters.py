"""What an author is shown of the promoted harness's episodes."""

from __future__ import annotations

from bascule.plugins.authors.clusters import evidence_text
from bascule.plugins.policy import TrainEvidence
from bascule.plugins.task import Example
from tests.authors.test_operators import asked


def episode(number: int, asked_for: object, reward: float = 0.0) -> TrainEvidence:
    return TrainEvidence(
        trajectory=f"g00-train-{number:04d}-n0",
        example=Example(id=f"e{number}", group=f"e{number}", input={"question": asked_for}),
        truth="2",
        reward=reward,
        answer="3",
        error=None,
    )


def test_what_is_too_large_takes_no_room_from_the_others() -> None:
    evidence = [
        episode(0, ["huge"] * 5000),
        *(episode(i, f"{i} + 1") for i in range(1, 20)),
        episode(20, "20 + 1", 1.0),
    ]
    told = evidence_text(asked(evidence=tuple(evidence)), 8000)
    assert "huge" not in told
    assert "19 + 1" in told
    assert "20 + 1" in told
    assert "Of 21 episodes of the present harness on train, 20 failed" in told
    assert len(told) < 8000
