"""The workbench: an author tries a harness on train items before it proposes one.

A trial is an evaluation in small: the same episodes in the same processes, the same engine and a scoring process as
rollout and the verifier have them. Its result is the result of a recorded call, its episodes are recorded nowhere.
All trials of a run draw alike, so that two harnesses on the same items differ by the harness alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from bascule.plugins.policy import Performed, TrialRequest, TrialResult
from bascule.runtime.episodes.allowed import refusal
from bascule.runtime.episodes.batch import Batch, batch_of
from bascule.runtime.episodes.broker import EpisodeSpec
from bascule.runtime.services.inference import EngineOnDemand, served_name
from bascule.runtime.services.probing import probed
from bascule.runtime.services.rollout import Episodes, harness_processes, tokens_of
from bascule.runtime.services.verifier import Scoring
from bascule.runtime.world import World, seed_of
from bascule.schemas import subjects
from bascule.schemas.errors import EngineError, HarnessError
from bascule.schemas.events import TrialCost
from bascule.schemas.harness import Harness, make_harness
from bascule.schemas.trajectory import Sampling, Scored, Trajectory, Unscored, Verdict
from bascule.verifiers.scoring import Scorer

if TYPE_CHECKING:
    from bascule.runtime.runner import View

_MESSAGE = 1000


class Workbench:
    """Tries harnesses; what that needs is opened for the first trial and kept.

    Args:
        service: in whose name the sandbox of the scorer's programs is recorded.
        episodes, scoring: as of rollout and of the verifier.
    """

    def __init__(
        self,
        view: View,
        service: str,
        *,
        episodes: Callable[[World], AbstractAsyncContextManager[Episodes]] = harness_processes,
        scoring: Callable[[str, dict[str, Any]], AbstractAsyncContextManager[Scoring]] | None = None,
    ) -> None:
        self._view = view
        self._service = service
        self._open_episodes = episodes
        self._open_scoring = scoring
        self._stack = contextlib.AsyncExitStack()
        self._episodes: Episodes | None = None
        self._scoring: Scoring | None = None
        self._engine = EngineOnDemand(view)

    async def close(self) -> None:
        """End every process that was started for trials."""
        self._episodes = self._scoring = None
        try:
            await self._stack.aclose()
        finally:
            await self._engine.close()

    async def perform(self, arguments: dict[str, Any], name: str) -> Performed:
        """Make the call ``trial``; a request that cannot be tried is the call's error.

        Args:
            name: of the call, unique in the run.

        Raises:
            BasculeError: the engine, the harness processes or the scoring process do not work; not the harness's fault.
        """
        try:
            request = msgspec.convert(arguments, TrialRequest, strict=True)
        except msgspec.ValidationError as e:
            return Performed(answer={"error": f"This is no request for a trial: {e}."})
        fault = _fault(request, len(self._view.world.public.train))
        if fault is not None:
            return Performed(answer={"error": fault})
        result, done = await self.trial(request, name)
        answer = {"result": msgspec.json.encode(result).decode()}
        return Performed(answer=answer, trial=_cost(done), device=self._engine.device)

    async def trial(self, request: TrialRequest, name: str) -> tuple[TrialResult, list[Trajectory]]:
        """Run and score every episode of a trial.

        Raises:
            BasculeError: as :meth:`perform`.
        """
        state, world = self._view.state, self._view.world
        best = state.best
        assert best is not None
        candidate = state.candidate(best)
        asked = [(position, sample) for position in request.positions for sample in range(request.samples)]
        try:
            harness = overlaid(state.harnesses[candidate.harness], world.redaction.value(request.files))
        except HarnessError as e:
            return _none(request, str(e)), []
        refused = refusal(harness.manifest, world.public)
        if refused is not None:
            return _none(request, refused), []
        episodes, scoring = await self._opened()
        seed = seed_of(world.config.seed, "trial")
        batch = batch_of(harness, world.public, "train", request.positions, key=name, seed=seed)
        # As on dev; repeated samples of a greedy model would all be one.
        temperature = world.config.evaluation.train_temperature if request.samples > 1 else 0.0
        sampling = Sampling(temperature=temperature, max_tokens=world.public.max_answer_tokens)
        run = partial(self._episode, episodes, scoring, harness, batch, candidate.adapter, sampling, name)
        try:
            done = await _all(run(position, sample) for position, sample in asked)
        finally:
            if batch is not None:
                await episodes.over(batch.key)
        return _result(request, done), [trajectory for trajectory, _ in done]

    async def _opened(self) -> tuple[Episodes, Scoring]:
        world = self._view.world
        if self._episodes is None:
            self._episodes = await self._stack.enter_async_context(self._open_episodes(world))
        if self._scoring is None:
            config = world.config
            opening = self._open_scoring or partial(Scorer, sandbox=config.sandbox)
            self._scoring = await self._stack.enter_async_context(opening(config.task.name, config.task.params))
            if isinstance(self._scoring, Scorer) and self._scoring.report is not None:
                await probed(self._view, self._service, self._scoring.report)
        return self._episodes, self._scoring

    async def _episode(
        self,
        episodes: Episodes,
        scoring: Scoring,
        harness: Harness,
        batch: Batch | None,
        adapter: str | None,
        sampling: Sampling,
        name: str,
        position: int,
        sample: int,
    ) -> tuple[Trajectory, Verdict]:
        world = self._view.world
        example = world.public.train[position]
        spec = EpisodeSpec(
            trajectory=subjects.trajectory_id(name, position, sample),
            harness=harness,
            example=example.input,
            sampling=sampling,
            seed=seed_of(world.config.seed, "trial", position, sample),
            adapter=served_name(self._view.run, adapter) if adapter else None,
            batch=batch,
        )
        trajectory = self._view.redaction.value(await episodes(spec, self._engine, partial(world.task.tools, example)))
        if trajectory.error is not None and trajectory.error.kind == "engine":
            # Not the harness's failure: the service stops, and the trial is made again after a resume.
            raise EngineError(f"The engine could not answer {spec.trajectory}: {trajectory.error.message}")
        episode = trajectory if isinstance(scoring, Scorer) and scoring.episodes else None
        verdict, _ = await scoring.opinions("train", example.id, trajectory.answer, episode, second=False)
        return trajectory, verdict


def overlaid(harness: Harness, files: dict[str, str | None]) -> Harness:
    """The harness with some files other, further or (None) gone.

    Raises:
        HarnessError: what comes of it is not usable.
    """
    merged = {name: text for name, text in {**harness.files, **files}.items() if text is not None}
    return make_harness(merged)


async def _all(episodes: Any) -> list[tuple[Trajectory, Verdict]]:
    """Every episode; the first that fails ends the others, and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(episode) for episode in episodes]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in tasks]


def _fault(request: TrialRequest, train: int) -> str | None:
    """Why a request cannot be tried; None if it can."""
    if not request.positions or request.samples < 1:
        return "A trial needs a train item and a sample."
    odd = [p for p in request.positions if not 0 <= p < train]
    if odd:
        return f"There is no train item {odd[0]}; there are {train}."
    return "A trial asks each train item once." if len(set(request.positions)) < len(request.positions) else None


def _none(request: TrialRequest, message: str) -> TrialResult:
    """The result of a harness that cannot run at all."""
    n = len(request.positions)
    return TrialResult(score=0.0, n=n, errors=n * request.samples, message=message[:_MESSAGE])


def _cost(done: list[Trajectory]) -> TrialCost:
    tokens = [tokens_of(trajectory) for trajectory in done]
    return TrialCost(
        rollouts=len(done), prompt_tokens=sum(p for p, _ in tokens), output_tokens=sum(o for _, o in tokens)
    )


def _result(request: TrialRequest, done: list[tuple[Trajectory, Verdict]]) -> TrialResult:
    rewards = tuple(verdict.reward if isinstance(verdict, Scored) else None for _, verdict in done)
    errors = [trajectory.error.message for trajectory, _ in done if trajectory.error is not None]
    unscored = [verdict.reason for _, verdict in done if isinstance(verdict, Unscored)]
    return TrialResult(
        score=sum(reward or 0.0 for reward in rewards) / len(rewards),
        n=len(request.positions),
        errors=len(errors),
        unscored=len(unscored),
        message=next(iter([*errors, *unscored]), "")[:_MESSAGE],
        rewards=rewards,
    )
