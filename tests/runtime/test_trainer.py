"""The trainer's effects without a model: a job that cannot even open fails for good, and says why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View
from bascule.runtime.services import trainer
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft
from bascule.schemas.errors import TrainError
from bascule.schemas.landscape import Measured
from bascule.schemas.trajectory import Sampling, Scored
from bascule.verifiers.landscape import SampleFigures, landscape


class Unopenable:
    """A backend whose jobs do not open."""

    def threads(self, wanted: int) -> int:
        return 1

    def open(self, *_: object) -> trainer.Job:
        raise TrainError("The parent adapter has another rank.")


async def test_a_job_that_does_not_open_fails_once_instead_of_starting_for_ever(
    make_view: Callable[[MemoryLog], View], started_log: MemoryLog
) -> None:
    scored = Scored(reward=1.0, passed=True, well_formed=True)
    found = landscape([[SampleFigures(verdict=scored, error=False, prompt_tokens=1, output_tokens=1)]])
    requested = ev.EpisodesRequested(
        evaluation="g00-train", purpose="landscape", generation=0, split="train", shard=0, shards=1, positions=(0,),
        examples=("a",), samples=1, sampling=Sampling(), seed=1, harness="h",
    )  # fmt: skip
    completed = ev.EvaluationCompleted(
        evaluation="g00-train", purpose="landscape", generation=0, split="train", landscape=found, measured=Measured()
    )
    asked = ev.TrainRequested(
        generation=1, algorithm="best_of_n", algorithm_version="1", params={}, iterations=1, groups=1, samples=1,
        temperature=1.0, parent=0, harness="h", logged="g00-train",
    )  # fmt: skip
    drafts: list[tuple[str, ev.Data]] = [
        (subjects.episodes_requested("small", "g00-train", 0), requested),
        (subjects.evaluation_completed("small", "g00-train"), completed),
        (subjects.train_requested("small", 1), asked),
    ]
    view = make_view(started_log)
    for subject, data in drafts:
        await view.append("feedback", [Draft(subject=subject, step=1, data=data)])
    effects = trainer.Trainer(Unopenable())
    tasks = [asyncio.create_task(view.follow([])), asyncio.create_task(effects.run(view))]
    async for event in started_log.follow("bascule.small.train.g01.outcome"):
        assert isinstance(event.data, ev.TrainFailed)
        assert "another rank" in event.data.reason
        break
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    starts = [e async for e in started_log.read("bascule.small.train.>") if isinstance(e.data, ev.TrainStarted)]
    assert len(starts) == 1
