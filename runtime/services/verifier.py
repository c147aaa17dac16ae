"""verifier: scores trajectories in the scoring process, completes evaluations, and runs the gate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from bascule.runtime.metering import Meter
from bascule.runtime.services.gating import judge
from bascule.runtime.services.probing import probed
from bascule.runtime.state import Evaluation, RunState
from bascule.runtime.work import work_off
from bascule.runtime.world import World
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.events import (
    EvaluationCompleted,
    Split,
    TrajectoryLogged,
    TrajectoryScored,
)
from bascule.schemas.landscape import MeasuredEvaluation, RewardLandscape, WorkMeasured
from bascule.schemas.trajectory import Scored, Trajectory, Verdict
from bascule.verifiers.landscape import SampleFigures, landscape, spread
from bascule.verifiers.scoring import Scorer
from bascule.verifiers.scoring_process import fitting

if TYPE_CHECKING:
    from bascule.runtime.runner import View

NAME = "verifier"


def decide(state: RunState, event: Recorded, world: World) -> list[Draft]:
    """An evaluation's last score completes it; a generation's last evaluation brings it before the gate."""
    data, cause = event.data, event.envelope.id
    if isinstance(data, EvaluationCompleted) and data.purpose in ("gate", "landscape"):
        return judge(state, world, data.generation, cause)
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
        landscape=landscape_of(state, evaluation, world.config.landscape),
        measured=_measured(evaluation, world.config.landscape),
    )
    subject = subjects.evaluation_completed(state.run, request.evaluation)
    return [Draft(subject=subject, step=request.generation, cause=cause, data=completed)]


def _measured(evaluation: Evaluation, version: int) -> MeasuredEvaluation:
    seconds = [logged.seconds for logged in evaluation.logged.values()]
    return MeasuredEvaluation(seconds=sum(seconds), rollout=spread(seconds) if version > 1 else None)


def landscape_of(state: RunState, evaluation: Evaluation, version: int) -> RewardLandscape:
    """The reward landscape of a finished evaluation, with what the training of its adapter came to."""
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
    found = landscape(list(groups.values()), version=version)
    if version == 1:
        return found
    ess, kl_to_base = _trained(state, evaluation.request.adapter)
    drop = _drop(state, evaluation, found.score)
    return msgspec.structs.replace(found, ess=ess, kl_to_base=kl_to_base, regression_drop=drop)


def _drop(state: RunState, evaluation: Evaluation, score: float) -> float | None:
    """By how much an evaluation over the regression set is below that of the parent; None for any other."""
    if evaluation.request.split != "regression":
        return None
    parent = state.candidate(evaluation.request.generation).parent
    before = None if parent is None else state.evaluations.get(f"g{parent:02d}-regression")
    return None if before is None or before.completed is None else before.completed.landscape.score - score


def _trained(state: RunState, adapter: str | None) -> tuple[float | None, float | None]:
    """Of the last update of the job that made an adapter: ESS, and KL to the base; None for what it did not measure."""
    jobs = (step.training for step in state.steps.values() if step.training is not None)
    job = next((job for job in jobs if job.last is not None and job.last.adapter == adapter), None)
    if job is None or job.last is None:
        return None, None
    # An update that compared with nothing records a divergence of 0.
    kl = job.last.metrics.get("kl_reference") or None
    return job.last.metrics.get("ess"), kl if job.request.params.get("kl_reference") == "base" else None


class Scoring(Protocol):
    """What gives a verdict on an answer."""

    async def opinions(
        self, split: Split, example: str, answer: str | None, episode: Trajectory | None = None, *, second: bool = True
    ) -> tuple[Verdict, Verdict | None]: ...


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
        scoring = (
            self._scoring
            if self._scoring is not None
            else partial(Scorer, sandbox=config.sandbox, second=config.second)
        )
        async with scoring(config.task.name, config.task.params) as scorer:
            if isinstance(scorer, Scorer) and scorer.report is not None:
                await probed(view, NAME, scorer.report)
            await work_off(
                view,
                NAME,
                f"bascule.{view.run}.traj.*.logged",
                partial(self._score, view, scorer, Meter(view.clock)),
                slots=256,
                batch=64,
            )

    async def _score(self, view: View, scorer: Scoring, meter: Meter, event: Recorded) -> None:
        logged = event.data
        assert isinstance(logged, TrajectoryLogged)
        evaluation = view.state.evaluations[logged.evaluation]
        if evaluation.completed is not None or (logged.position, logged.sample) in evaluation.verdicts:
            return
        split = evaluation.request.split
        # What levers see of train is the first verifier's alone.
        second = view.world.config.second is not None and split != "train"
        started = view.clock()
        with meter.share() as share:
            if isinstance(scorer, Scorer) and scorer.episodes:
                episode = await _episode(view, logged)
                verdict, opinion = await scorer.opinions(split, logged.example, logged.answer, episode, second=second)
            else:
                verdict, opinion = await scorer.opinions(split, logged.example, logged.answer, second=second)
                if isinstance(verdict, Scored) and verdict.steps:
                    verdict = fitting(verdict, await _episode(view, logged))
        data = TrajectoryScored(
            trajectory=logged.trajectory,
            evaluation=logged.evaluation,
            position=logged.position,
            sample=logged.sample,
            verdict=verdict,
            second=opinion,
            measured=WorkMeasured(seconds=view.clock() - started, share=share.seconds),
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
