"""trainer: turns a training request and scored trajectories into adapters, one checkpoint an iteration."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from bascule.plugins.algorithm import Credit, Group, Sample
from bascule.runtime.log.protocol import Fence
from bascule.runtime.services import proposals
from bascule.runtime.state import Evaluation, RunState, Training
from bascule.runtime.world import World, seeded
from bascule.schemas import subjects
from bascule.schemas.codec import canonical
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import Conflict, TrainError
from bascule.schemas.events import (
    AdapterCheckpointed,
    AdapterPublished,
    TrainFailed,
    TrainRequested,
    TrainStarted,
    TrajectoryLogged,
)
from bascule.schemas.landscape import Measured
from bascule.schemas.trajectory import Scored, Trajectory

if TYPE_CHECKING:
    from bascule.runtime.runner import View
    from bascule.trainers.loop import TrainJob

NAME = "trainer"
T = TypeVar("T")


def adapter_name(generation: int, iteration: int) -> str:
    return f"g{generation:02d}-i{iteration:03d}"


def decide(state: RunState, event: Recorded, world: World) -> list[Draft]:
    """The episodes of each iteration, and after the last one the adapter as a candidate."""
    data, cause = event.data, event.envelope.id
    if isinstance(data, TrainRequested) and data.logged is None:
        return _iteration(state, world, data, 0, data.adapter, cause)
    if not isinstance(data, AdapterCheckpointed):
        return []
    training = state.training(data.generation)
    if training is None:
        return []
    request = training.request
    if data.iteration + 1 < request.iterations:
        return _iteration(state, world, request, data.iteration + 1, data.adapter, cause)
    published = AdapterPublished(
        generation=data.generation,
        adapter=data.adapter,
        files=data.files,
        sha256=data.sha256,
        parent_adapter=request.adapter,
        iterations=request.iterations,
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


def groups_of(evaluation: Evaluation) -> list[Group]:
    """The scored trajectories of an evaluation, by example, as credit assignment sees them."""
    samples: dict[int, list[Sample]] = {}
    for position, sample in sorted(evaluation.trajectories()):
        verdict = evaluation.verdicts[position, sample]
        scored = verdict if isinstance(verdict, Scored) else None
        samples.setdefault(position, []).append(
            Sample(
                trajectory=subjects.trajectory_id(evaluation.request.evaluation, position, sample),
                reward=scored.reward if scored else None,
                passed=scored.passed if scored else None,
                tokens=evaluation.logged[position, sample].output_tokens,
            )
        )
    examples = evaluation.examples
    return [Group(example=examples[p], samples=tuple(s)) for p, s in samples.items()]


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
        self._generation = -1
        self._head = 0
        self._attempt = 0
        self._lost: set[int] = set()

    async def run(self, view: View) -> None:
        async for state in view.changes():
            training = open_training(state)
            if training is None or training.request.generation in self._lost:
                continue
            if training.iterations >= training.request.iterations:
                continue
            evaluation = next_evaluation(view.state, training)
            if evaluation is None:
                continue
            if self._generation != training.request.generation:
                try:
                    await self._start(view, training)
                except Conflict as e:
                    # The job has moved on unseen, be it by an append of a process before this one that came in late.
                    # Whether it still wants an attempt shows once that is folded.
                    view.logger.warning("training.not_started", generation=training.request.generation, error=str(e))
                except TrainError as e:
                    await self._fail(view, training, evaluation, e)
                continue
            try:
                await self._iterate(view, training, evaluation)
            except Conflict as e:
                # A newer attempt owns the job now. Starting another would only take it away from that one.
                view.logger.warning("training.superseded", generation=training.request.generation, error=str(e))
                self._lost.add(training.request.generation)

    async def _start(self, view: View, training: Training) -> None:
        request = training.request
        attempt = training.attempts + 1
        started = TrainStarted(
            generation=request.generation,
            attempt=attempt,
            resumed_after=training.iterations,
            threads=await self._compute(self._backend.threads, view.world.config.threads),
        )
        draft = Draft(
            subject=subjects.train_started(view.run, request.generation, attempt),
            step=request.generation,
            data=started,
            cause=training.request_id,
            attempt=attempt,
        )
        recorded = await view.append(NAME, [draft], fence=self._fence(view, request.generation, training.head))
        if recorded[0].duplicate:
            raise Conflict(f"The training job of generation {request.generation} was started by another trainer.")
        self._attempt, self._head = attempt, recorded[0].seq
        get = view.blobs.get
        state = await get(training.last.state) if training.last else None
        parent = None
        if request.adapter is not None:
            refs = view.state.adapters[request.adapter].files
            parent = {name: await get(ref) for name, ref in refs.items()}
        self._job = await self._compute(self._backend.open, view.world.config.model, request, parent, state)
        self._generation = request.generation

    async def _compute(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _fence(self, view: View, generation: int, head: int) -> Fence:
        return Fence(filter=subjects.train_aggregate(view.run, generation), seq=head)

    async def _iterate(self, view: View, training: Training, evaluation: Evaluation) -> None:
        request, iteration = training.request, training.iterations
        trajectories = await load_trajectories(view, evaluation)
        if training.attempts > self._attempt:
            raise Conflict(f"The training job of generation {request.generation} was taken over by another trainer.")
        view.logger.info("update.started", generation=request.generation, iteration=iteration)
        started = view.clock()
        try:
            credit = view.plugins.registry.algorithms.get(request.algorithm).credit(
                groups_of(evaluation), request.params
            )
            assert self._job is not None
            update = await self._compute(self._job.update, trajectories, credit, iteration)
        except TrainError as e:
            await self._fail(view, training, evaluation, e)
            return
        put = view.blobs.put
        files = {n: await put(d, "application/x-safetensors") for n, d in update.files.items()}
        data = AdapterCheckpointed(
            generation=request.generation,
            iteration=iteration,
            attempt=self._attempt,
            adapter=adapter_name(request.generation, iteration),
            files=files,
            sha256=update.sha256,
            state=await put(update.state, "application/x-safetensors"),
            data_digest=_digest(trajectories),
            metrics={"reward": _mean_reward(evaluation), **update.metrics},
            measured=Measured(seconds=view.clock() - started),
        )
        superseded = training.last
        await self._record(view, training, evaluation, data)
        if superseded is None:
            return
        # Nobody samples with it any more: the next one exists because its episodes are done. One that changed nothing
        # has the very files of a published adapter, which stay. What a crash leaves here is found as garbage.
        published = (s.training.published for s in view.state.steps.values() if s.training and s.training.published)
        kept = {ref for p in published for ref in p.files.values()} | {*data.files.values(), data.state}
        for ref in {*superseded.files.values(), superseded.state} - kept:
            await view.blobs.discard(ref)

    async def _fail(self, view: View, training: Training, evaluation: Evaluation, error: TrainError) -> None:
        self._generation = -1
        failed = TrainFailed(generation=training.request.generation, attempt=self._attempt, reason=str(error))
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


@dataclass(frozen=True)
class Update:
    """What an update leaves: the adapter, the state to continue from, and figures."""

    files: dict[str, bytes]
    sha256: str
    state: bytes
    metrics: dict[str, float]


def _mean_reward(evaluation: Evaluation) -> float:
    rewards = [v.reward for v in evaluation.verdicts.values() if isinstance(v, Scored)]
    return sum(rewards) / len(rewards) if rewards else 0.0


class Job(Protocol):
    """A training job under way."""

    def update(self, trajectories: dict[str, Trajectory], credit: list[Credit], iteration: int) -> Update: ...


class Backend(Protocol):
    """What computes updates."""

    def threads(self, wanted: int) -> int:
        """Set the compute threads of the calling thread, 0 for the default; how many there are."""
        ...

    def open(self, model: str, request: TrainRequested, parent: dict[str, bytes] | None, state: bytes | None) -> Job:
        """A job that continues from the files of ``parent``, and from ``state`` if it was under way."""
        ...


class TorchBackend:
    """LoRA updates with torch, which is imported when a job opens."""

    def threads(self, wanted: int) -> int:
        import torch

        if wanted:
            torch.set_num_threads(wanted)
        return torch.get_num_threads()

    def open(self, model: str, request: TrainRequested, parent: dict[str, bytes] | None, state: bytes | None) -> Job:
        from bascule.trainers.base_model import resolve_model
        from bascule.trainers.loop import TrainJob

        job = TrainJob(resolve_model(model), request.params, request.seed, parent)
        if state is not None:
            job.restore(state)
        return _TorchJob(job)


class _TorchJob:
    def __init__(self, job: TrainJob) -> None:
        self._job = job

    def update(self, trajectories: dict[str, Trajectory], credit: list[Credit], iteration: int) -> Update:
        from bascule.trainers.lora import adapter_hash

        found = self._job.update(trajectories, credit, iteration)
        files = self._job.adapter_files()
        metrics = {k: float(v) for k, v in asdict(found).items() if k != "seconds"}
        return Update(files, adapter_hash(files), self._job.checkpoint(), metrics)


async def load_trajectories(view: View, evaluation: Evaluation) -> dict[str, Trajectory]:
    """The recorded trajectories of an evaluation, by id, from the log and its blobs."""
    name = evaluation.request.evaluation
    found: dict[str, Trajectory] = {}

    async def one(trajectory: str) -> None:
        recorded = await view.log.get(subjects.trajectory_logged(view.run, trajectory))
        if recorded is None or not isinstance(recorded.data, TrajectoryLogged):
            raise TrainError(f"The trajectory {trajectory} is scored but not in the log.")
        found[trajectory] = await body_of(view, recorded.data)

    ids = [subjects.trajectory_id(name, *key) for key in evaluation.trajectories()]
    for i in range(0, len(ids), 64):
        await asyncio.gather(*(one(t) for t in ids[i : i + 64]))
    return {t: found[t] for t in sorted(found)}


async def body_of(view: View, logged: TrajectoryLogged) -> Trajectory:
    """The steps of a logged trajectory, inline or from its blob."""
    if logged.body is not None:
        return logged.body
    assert logged.blob is not None
    return msgspec.json.decode(await view.blobs.get(logged.blob), type=Trajectory)


def _digest(trajectories: dict[str, Trajectory]) -> str:
    h = hashlib.blake2b(digest_size=16)
    for name, trajectory in trajectories.items():
        h.update(name.encode() + b"\0" + canonical(trajectory))
    return h.hexdigest()
