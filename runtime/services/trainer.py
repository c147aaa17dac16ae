"""trainer: turns a training request and scored trajectories into adapters, one checkpoint an iteration."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from bascule.runtime.log.protocol import Fence
from bascule.runtime.log.telemetry import Line, step_subject
from bascule.runtime.services import budgets, proposals
from bascule.runtime.state import Evaluation, RunState, Training
from bascule.runtime.training.backend import Backend, TorchBackend
from bascule.runtime.training.data import data_digest, groups_of, load_trajectories, mean_reward
from bascule.runtime.training.refusals import blamed_on, refuse_infeasible, refuse_unmoved
from bascule.runtime.world import World, seeded
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import Conflict, NotFound, TrainError
from bascule.schemas.events import (
    AdapterCheckpointed,
    AdapterPublished,
    TrainFailed,
    TrainRequested,
    TrainStarted,
)
from bascule.schemas.landscape import Measured

if TYPE_CHECKING:
    from bascule.runtime.runner import View
    from bascule.trainers.jobs import Job, Progress

NAME = "trainer"
T = TypeVar("T")


def adapter_name(generation: int, iteration: int) -> str:
    return f"g{generation:02d}-i{iteration:03d}"


def decide(state: RunState, event: Recorded, world: World) -> list[Draft]:
    """The episodes of each iteration, and after the last one, or the last that the budget allows, the adapter as a
    candidate."""
    data, cause = event.data, event.envelope.id
    if isinstance(data, TrainRequested) and data.logged is None:
        return _iteration(state, world, data, 0, data.adapter, cause)
    if not isinstance(data, AdapterCheckpointed):
        return []
    training = state.training(data.generation)
    if training is None:
        return []
    request = training.request
    if data.iteration + 1 < request.iterations and not budgets.over(state, "weights"):
        return _iteration(state, world, request, data.iteration + 1, data.adapter, cause)
    published = AdapterPublished(
        generation=data.generation,
        adapter=data.adapter,
        files=data.files,
        sha256=data.sha256,
        parent_adapter=request.adapter,
        iterations=data.iteration + 1,
    )
    if data.base:  # earlier code recorded no base, and published without these
        published = msgspec.structs.replace(
            published, data_digest=data.data_digest, metrics=data.metrics, base=data.base
        )
    return [
        Draft(
            subject=subjects.train_outcome(state.run, data.generation),
            step=data.generation,
            cause=cause,
            data=published,
        ),
        *proposals.candidate(
            state,
            world,
            generation=data.generation,
            harness=request.harness,
            adapter=data.adapter,
            parent=request.parent,
            lever="weights",
            algorithm=request.algorithm,
            cause=cause,
        ),
    ]


def _iteration(
    state: RunState, world: World, request: TrainRequested, iteration: int, adapter: str | None, cause: str
) -> list[Draft]:
    """Each pass over the train split is a new seeded order; an iteration takes the next distinct ``groups`` of them."""
    train = list(world.positions("train"))
    size = min(request.groups, len(train))
    positions: list[int] = []
    place = iteration * size
    while len(positions) < size:
        epoch, offset = divmod(place, len(train))
        order = seeded(request.seed, "epoch", epoch).sample(train, len(train))
        positions += [p for p in order[offset:] if p not in positions][: size - len(positions)]
        place = (epoch + 1) * len(train)
    return proposals.episodes(
        state,
        world,
        evaluation=adapter_name(request.generation, iteration),
        purpose="training",
        generation=request.generation,
        split="train",
        positions=positions,
        samples=request.samples,
        temperature=request.temperature,
        harness=request.harness,
        adapter=adapter,
        cause=cause,
    )


def next_evaluation(state: RunState, training: Training) -> Evaluation | None:
    """The completed evaluation that the next update trains from, None while it is not there yet."""
    request = training.request
    name = request.logged or adapter_name(request.generation, training.iterations)
    evaluation = state.evaluations.get(name)
    return evaluation if evaluation is not None and evaluation.completed is not None else None


def open_training(state: RunState) -> Training | None:
    for _, step in sorted(state.steps.items()):
        if step.training is not None and step.training.open:
            return step.training
    return None


class Trainer:
    """The trainer's effects. At most one job of a run is open at a time.

    Args:
        backend: what computes the updates; torch unless a test says otherwise.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        self._backend = backend or TorchBackend()
        # One thread for everything of a job: torch's thread count is a setting of the thread that computes.
        self._thread = ThreadPoolExecutor(1, "trainer")
        self._job: Job | None = None
        self._begin: tuple[dict[str, bytes] | None, bytes | None] = (None, None)
        self._generation = -1
        self._head = 0
        self._attempt = 0
        self._lost: set[int] = set()

    async def run(self, view: View) -> None:
        async for state in view.changes():
            training = open_training(state)
            if training is None:
                self._job = None  # a job that its budget ended has updates left that nobody asks for
            if training is None or training.request.generation in self._lost:
                continue
            if training.iterations >= training.request.iterations:
                continue
            evaluation = next_evaluation(view.state, training)
            if evaluation is None:
                continue
            if self._generation != training.request.generation:
                try:
                    await self._start(view, training, evaluation)
                except Conflict as e:
                    # The job has moved on unseen, be it by an append of a process before this one that came in late.
                    # Whether it still wants an attempt shows once that is folded.
                    view.logger.warning("training.not_started", generation=training.request.generation, error=str(e))
                continue
            try:
                await self._iterate(view, training, evaluation)
            except Conflict as e:
                # A newer attempt owns the job now. Starting another would only take it away from that one.
                view.logger.warning("training.superseded", generation=training.request.generation, error=str(e))
                self._lost.add(training.request.generation)
                self._job = None

    async def _start(self, view: View, training: Training, evaluation: Evaluation) -> None:
        request, begun = training.request, view.state.started
        assert begun is not None
        await self._compute(self._backend.check, begun)
        # What is fetched is as of this moment, and so is the fence: the fold moves on meanwhile.
        attempt, iterations, head = training.attempts + 1, training.iterations, training.head
        # Before the append, since a damaged blob stops the service, which must not leave an attempt behind each time.
        self._begin, gone = (None, None), None
        try:
            self._begin = await _beginning(view, training)
        except NotFound as e:
            gone = e
        started = TrainStarted(
            generation=request.generation,
            attempt=attempt,
            resumed_after=iterations,
            threads=await self._compute(self._backend.threads, view.world.config.threads),
            versions=self._backend.versions(),
        )
        draft = Draft(
            subject=subjects.train_started(view.run, request.generation, attempt),
            step=request.generation,
            data=started,
            cause=training.request_id,
            attempt=attempt,
        )
        recorded = await view.append(NAME, [draft], fence=self._fence(view, request.generation, head))
        if recorded[0].duplicate:
            raise Conflict(f"The training job of generation {request.generation} was started by another trainer.")
        self._attempt, self._head = attempt, recorded[0].seq
        self._job = None
        self._generation = request.generation
        if gone is not None:  # and no other attempt has moved on, or the append would have been refused
            lost = TrainError(
                f"The training job of generation {request.generation} cannot begin from what is kept: {gone.message}",
                next_step=gone.next_step,
            )
            await self._fail(view, training, evaluation, lost)

    async def _compute(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _fence(self, view: View, generation: int, head: int) -> Fence:
        return Fence(filter=subjects.train_aggregate(view.run, generation), seq=head)

    async def _iterate(self, view: View, training: Training, evaluation: Evaluation) -> None:
        request, iteration = training.request, training.iterations
        begun = view.state.started
        assert begun is not None
        algorithm = view.world.algorithm(request.algorithm)
        started: float | None = None
        try:
            trajectories = await load_trajectories(view, evaluation)
            with blamed_on(algorithm):
                groups = groups_of(evaluation, trajectories)
                if iteration == 0:
                    # A later batch may say nothing, as when all its rewards are equal, and the one after it something.
                    await self._compute(refuse_infeasible, algorithm, request, groups)
                if self._job is None:
                    self._job = await self._compute(self._backend.open, begun, algorithm, request, *self._begin)
                    self._begin = (None, None)
                if training.attempts > self._attempt:
                    raise Conflict(
                        f"The training job of generation {request.generation} was taken over by another trainer."
                    )
                view.logger.info("update.started", generation=request.generation, iteration=iteration)
                started = view.clock()
                tell = _telling(view, request.generation, self._attempt, iteration)
                update = await self._compute(self._job.update, groups, trajectories, iteration, tell)
            if iteration == 0:
                refuse_unmoved(algorithm, groups, update)
        except TrainError as e:
            if e.__cause__ is not None:
                view.logger.error("update.failed", generation=request.generation, iteration=iteration, exc_info=e)
            await self._fail(view, training, evaluation, e, 0.0 if started is None else view.clock() - started)
            return
        put = view.blobs.put
        files = {n: await put(d, _media_type(n)) for n, d in update.files.items()}
        data = AdapterCheckpointed(
            generation=request.generation,
            iteration=iteration,
            attempt=self._attempt,
            adapter=adapter_name(request.generation, iteration),
            files=files,
            sha256=update.sha256,
            state=await put(update.state),
            data_digest=data_digest(trajectories),
            metrics=_finite({"reward": mean_reward(evaluation), **update.metrics}),
            measured=Measured(seconds=view.clock() - started),
            base=begun.model_digest,
            probe=update.probe,
        )
        superseded = training.last
        await self._record(view, training, evaluation, data)
        if iteration + 1 == request.iterations:
            self._job = None
        if superseded is None:
            return
        # Nobody samples with it any more: the next one exists because its episodes are done. One that changed nothing
        # has the very files of a published adapter, which stay. What a crash leaves here is found as garbage.
        published = (s.training.published for s in view.state.steps.values() if s.training and s.training.published)
        kept = {ref for p in published for ref in p.files.values()} | {*data.files.values(), data.state}
        for ref in {*superseded.files.values(), superseded.state} - kept:
            await view.blobs.discard(ref)

    async def _fail(
        self, view: View, training: Training, evaluation: Evaluation, error: TrainError, seconds: float = 0.0
    ) -> None:
        self._job, self._generation = None, -1
        failed = TrainFailed(
            generation=training.request.generation,
            attempt=self._attempt,
            reason=str(error),
            figures=_finite(error.figures),
            measured=Measured(seconds=seconds),
        )
        await self._record(view, training, evaluation, failed)

    async def _record(
        self, view: View, training: Training, evaluation: Evaluation, data: AdapterCheckpointed | TrainFailed
    ) -> None:
        generation = training.request.generation
        if isinstance(data, AdapterCheckpointed):
            subject = subjects.adapter_checkpointed(view.run, generation, data.iteration)
        else:
            subject = subjects.train_outcome(view.run, generation)
        draft = Draft(subject=subject, step=generation, data=data, cause=evaluation.completed_id, attempt=self._attempt)
        recorded = await view.append(NAME, [draft], fence=self._fence(view, generation, self._head))
        if recorded[0].duplicate:
            raise Conflict(f"{subject} was recorded by another attempt.")
        self._head = recorded[0].seq
        await view.until(lambda s: s.seq >= self._head)


async def _beginning(view: View, training: Training) -> tuple[dict[str, bytes] | None, bytes | None]:
    """The files of the adapter that a job continues from, and its last checkpoint; None where it has none.

    Raises:
        NotFound: one of them is not there any more.
        Corrupt: one of them is not what was recorded.
    """
    get, adapter = view.blobs.get, training.request.adapter
    refs = view.state.adapters[adapter].files if adapter is not None else None
    state = await get(training.last.state) if training.last else None
    return None if refs is None else {name: await get(ref) for name, ref in refs.items()}, state


def _telling(view: View, generation: int, attempt: int, iteration: int) -> Progress:
    """What the thread that computes calls with the figures of each optimiser step; it does not wait for them to go."""
    loop = asyncio.get_running_loop()
    telemetry, subject = view.writer(NAME).telemetry, step_subject(view.run, generation)

    def tell(figures: Mapping[str, float]) -> None:
        time = datetime.now(UTC).isoformat()
        line = Line(subject=subject, time=time, attempt=attempt, iteration=iteration, figures=_finite(figures))
        asyncio.run_coroutine_threadsafe(telemetry.send(line), loop)

    return tell


def _media_type(file: str) -> str:
    return "application/json" if file.endswith(".json") else "application/x-safetensors"


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Without what JSON cannot hold; the reason of a failure says in words that something was no number."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}
