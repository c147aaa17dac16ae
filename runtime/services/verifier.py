"""verifier: scores trajectories in the scoring process, completes evaluations, and runs the gate."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from bascule.runtime.state import Evaluation, RunState
from bascule.runtime.world import World, seed_of
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.events import (
    CandidatePromoted,
    CandidateRejected,
    EvaluationCompleted,
    TrajectoryLogged,
    TrajectoryScored,
)
from bascule.schemas.landscape import Measured, RewardLandscape
from bascule.verifiers.gate import GATE_VERSION, gate
from bascule.verifiers.landscape import SampleFigures, landscape
from bascule.verifiers.scoring import Scorer

if TYPE_CHECKING:
    from bascule.runtime.log.protocol import WorkItem
    from bascule.runtime.runner import View

NAME = "verifier"


def decide(state: RunState, event: Recorded, world: World) -> list[Draft]:
    """An evaluation's last score completes it; a generation's last evaluation brings it before the gate."""
    data, cause = event.data, event.envelope.id
    if isinstance(data, EvaluationCompleted) and data.purpose in ("gate", "landscape"):
        return _gate(state, world, data.generation, cause)
    if not isinstance(data, TrajectoryScored):
        return []
    evaluation = state.evaluations[data.evaluation]
    if evaluation.completed is not None or not evaluation.finished:
        return []
    request = evaluation.request
    completed = EvaluationCompleted(
        evaluation=request.evaluation,
        purpose=request.purpose,
        generation=request.generation,
        split=request.split,
        landscape=landscape_of(evaluation),
        measured=Measured(seconds=sum(logged.seconds for logged in evaluation.logged.values())),
    )
    subject = subjects.evaluation_completed(state.run, request.evaluation)
    return [Draft(subject=subject, step=request.generation, cause=cause, data=completed)]


def landscape_of(evaluation: Evaluation) -> RewardLandscape:
    """The reward landscape of a finished evaluation."""
    groups: dict[int, list[SampleFigures]] = {}
    for position, sample in sorted(evaluation.trajectories()):
        logged = evaluation.logged[position, sample]
        groups.setdefault(position, []).append(
            SampleFigures(
                verdict=evaluation.verdicts[position, sample],
                error=logged.error is not None,
                prompt_tokens=logged.prompt_tokens,
                output_tokens=logged.output_tokens,
            )
        )
    return landscape(list(groups.values()))


def _gate(state: RunState, world: World, generation: int, cause: str) -> list[Draft]:
    """The gate's verdict, once both evaluations of the generation are completed, whichever came last."""
    found = [state.evaluations.get(f"g{generation:02d}-{split}") for split in ("dev", "train")]
    if any(e is None or e.completed is None for e in found):
        return []
    parent = state.best
    scores = {g: state.evaluations[f"g{g:02d}-dev"].rewards() for g in {generation, parent} if g is not None}
    promote, figures = gate(
        [r[0] for r in scores[generation].values()],
        None if parent is None else [r[0] for r in scores[parent].values()],
        config=world.config.gate,
        seed=seed_of(world.config.seed, "gate", generation),
    )
    data: CandidatePromoted | CandidateRejected
    if promote:
        data = CandidatePromoted(generation=generation, over=parent, figures=figures, gate_version=GATE_VERSION)
    else:
        assert parent is not None
        data = CandidateRejected(generation=generation, over=parent, figures=figures, gate_version=GATE_VERSION)
    return [Draft(subject=subjects.candidate_gate(state.run, generation), step=generation, cause=cause, data=data)]


class Verifier:
    """The verifier's effects: every logged trajectory gets one verdict."""

    async def run(self, view: View) -> None:
        await view.ready()
        task = view.world.config.task
        queue = await view.writer(NAME).work(view.run, NAME, [f"bascule.{view.run}.traj.*.logged"], fresh=view.fresh)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(queue.close)
            scorer = await stack.enter_async_context(Scorer(task.name, task.params))
            group = await stack.enter_async_context(asyncio.TaskGroup())
            slots = asyncio.Semaphore(256)
            while True:
                for item in await queue.next(64, 1.0):
                    await slots.acquire()
                    group.create_task(self._score(view, scorer, item)).add_done_callback(lambda _: slots.release())

    async def _score(self, view: View, scorer: Scorer, item: WorkItem) -> None:
        logged = item.event.data
        assert isinstance(logged, TrajectoryLogged)
        await view.until(lambda s: s.seq >= item.event.seq)
        evaluation = view.state.evaluations[logged.evaluation]
        if (logged.position, logged.sample) not in evaluation.verdicts:
            verdict = await scorer.score(evaluation.request.split, logged.example, logged.answer)
            data = TrajectoryScored(
                trajectory=logged.trajectory,
                evaluation=logged.evaluation,
                position=logged.position,
                sample=logged.sample,
                verdict=verdict,
            )
            subject = subjects.trajectory_scored(view.run, logged.trajectory)
            draft = Draft(subject=subject, step=item.event.envelope.step, data=data, cause=item.event.envelope.id)
            await view.append(NAME, [draft])
        await item.done()
