"""verifier: scores trajectories in the scoring process, completes evaluations, and runs the gate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from bascule.runtime.services.probing import probed
from bascule.runtime.state import Evaluation, RunState
from bascule.runtime.work import work_off
from bascule.runtime.world import World, seed_of
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.events import (
    CandidatePromoted,
    CandidateRejected,
    EvaluationCompleted,
    Split,
    TrajectoryLogged,
    TrajectoryScored,
)
from bascule.schemas.landscape import Measured, RewardLandscape
from bascule.schemas.trajectory import Scored, Trajectory, Verdict
from bascule.verifiers.gate import gate, gate_version
from bascule.verifiers.landscape import SampleFigures, landscape
from bascule.verifiers.scoring import Scorer
from bascule.verifiers.scoring_process import fitting

if TYPE_CHECKING:
    from bascule.runtime.runner import View

NAME = "verifier"


def decide(state: RunState, event: Recorded, world: World) -> list[Draft]:
    """An evaluation's last score completes it; a generation's last evaluation brings it before the gate."""
    data, cause = event.data, event.envelope.id
    if isinstance(data, EvaluationCompleted) and data.purpose in ("gate", "landscape"):
        return _gate(state, world, data.generation, cause)
    if not isinstance(data, TrajectoryScored):
        return []
    evaluation = state.evaluations.get(data.evaluation)
    if evaluation is None or evaluation.completed is not None or not evaluation.finished:
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
    candidate = [r[0] for r in scores[generation].values()]
    before = None if parent is None else [r[0] for r in scores[parent].values()]
    seed = seed_of(world.config.seed, "gate", generation)
    promote, figures = gate(candidate, before, config=world.config.gate, seed=seed)
    version = gate_version(candidate, before)
    data: CandidatePromoted | CandidateRejected
    if promote:
        data = CandidatePromoted(generation=generation, over=parent, figures=figures, gate_version=version)
    else:
        assert parent is not None
        data = CandidateRejected(generation=generation, over=parent, figures=figures, gate_version=version)
    return [Draft(subject=subjects.candidate_gate(state.run, generation), step=generation, cause=cause, data=data)]


class Scoring(Protocol):
    """What gives a verdict on an answer."""

    async def score(self, split: Split, example: str, answer: str | None) -> Verdict: ...


class Verifier:
    """The verifier's effects: every logged trajectory gets one verdict.

    Args:
        scoring: opens what scores a task, given its name and parameters; by default processes of its own, with what the
            run demands of the sandbox.
    """

    def __init__(
        self, scoring: Callable[[str, dict[str, Any]], AbstractAsyncContextManager[Scoring]] | None = None
    ) -> None:
        self._scoring = scoring

    async def run(self, view: View) -> None:
        await view.ready()
        config = view.world.config
        scoring = self._scoring if self._scoring is not None else partial(Scorer, sandbox=config.sandbox)
        async with scoring(config.task.name, config.task.params) as scorer:
            if isinstance(scorer, Scorer) and scorer.report is not None:
                await probed(view, NAME, scorer.report)
            await work_off(
                view, NAME, f"bascule.{view.run}.traj.*.logged", partial(self._score, view, scorer), slots=256, batch=64
            )

    async def _score(self, view: View, scorer: Scoring, event: Recorded) -> None:
        logged = event.data
        assert isinstance(logged, TrajectoryLogged)
        evaluation = view.state.evaluations[logged.evaluation]
        if evaluation.completed is not None or (logged.position, logged.sample) in evaluation.verdicts:
            return
        split = evaluation.request.split
        if isinstance(scorer, Scorer) and scorer.episodes:
            verdict = await scorer.score(split, logged.example, logged.answer, await _episode(view, logged))
        else:
            verdict = await scorer.score(split, logged.example, logged.answer)
            if isinstance(verdict, Scored) and verdict.steps:
                verdict = fitting(verdict, await _episode(view, logged))
        data = TrajectoryScored(
            trajectory=logged.trajectory,
            evaluation=logged.evaluation,
            position=logged.position,
            sample=logged.sample,
            verdict=verdict,
        )
        subject = subjects.trajectory_scored(view.run, logged.trajectory)
        draft = Draft(subject=subject, step=event.envelope.step, data=data, cause=event.envelope.id)
        await view.append(NAME, [draft])


async def _episode(view: View, logged: TrajectoryLogged) -> Trajectory:
    """How a logged answer came about.

    Raises:
        BasculeError: its blob is not there or damaged.
        ValueError: the event holds neither it nor its blob.
    """
    if logged.body is not None:
        return logged.body
    if logged.blob is None:
        raise ValueError(f"{logged.trajectory} was logged without its steps")
    return msgspec.json.decode(await view.blobs.get(logged.blob), type=Trajectory)
