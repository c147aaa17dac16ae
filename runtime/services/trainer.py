"""trainer: turns a training request and scored trajectories into adapters, one checkpoint an iteration."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from bascule.plugins.algorithm import Algorithm, Group, OwnTraining, Sample, Turn
from bascule.runtime.log.blobs import Blobs
from bascule.runtime.log.protocol import EventLog, Fence
from bascule.runtime.log.telemetry import Line, step_subject
from bascule.runtime.services import proposals
from bascule.runtime.state import Evaluation, RunState, Training
from bascule.runtime.world import World, seeded
from bascule.schemas import subjects
from bascule.schemas.codec import canonical
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import ConfigError, Conflict, Corrupt, LogError, NotFound, OutOfStep, TrainError
from bascule.schemas.events import (
    AdapterCheckpointed,
    AdapterPublished,
    RunStarted,
    TrainFailed,
    TrainRequested,
    TrainStarted,
    TrajectoryLogged,
)
from bascule.schemas.landscape import Measured
from bascule.schemas.trajectory import ModelCall, Scored, Trajectory, unpack_floats, unpack_ids
from bascule.trainers.feasible import unmet

if TYPE_CHECKING:
    from bascule.runtime.runner import View
    from bascule.trainers.jobs import Job, Progress, Update

NAME = "trainer"
#: Among the versions of a start: how many processes computed, where they were several.
PROCESSES = "processes"
T = TypeVar("T")


class OtherInstallation(ConfigError):
    """This machine lacks what the run computes with: a person has to put it back, and no job is to blame."""

    code = "bascule.config.other_installation"


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


def groups_of(evaluation: Evaluation, trajectories: Mapping[str, Trajectory]) -> list[Group]:
    """The trajectories of an evaluation with their verdicts, by example, as credit assignment sees them.

    Raises:
        TrainError: a verdict has step rewards, and not one for each model call.
    """
    samples: dict[int, list[Sample]] = {}
    for position, sample in sorted(evaluation.trajectories()):
        name = subjects.trajectory_id(evaluation.request.evaluation, position, sample)
        verdict = evaluation.verdicts[position, sample]
        scored = verdict if isinstance(verdict, Scored) else None
        turns = _turns(name, trajectories[name], scored.steps if scored else ())
        samples.setdefault(position, []).append(
            Sample(
                trajectory=name,
                reward=scored.reward if scored else None,
                passed=scored.passed if scored else None,
                tokens=sum(len(t.token_ids) for t in turns),
                turns=turns,
            )
        )
    examples = evaluation.examples
    return [Group(example=examples[p], samples=tuple(s)) for p, s in samples.items()]


def _turns(name: str, trajectory: Trajectory, rewards: Sequence[float]) -> tuple[Turn, ...]:
    """The sampled outputs in the order of time; a call's step reward stands at its last output."""
    calls = [s for s in trajectory.steps if isinstance(s, ModelCall)]
    if rewards and len(rewards) != len(calls):
        raise TrainError(
            f"The verdict on the trajectory {name} has {len(rewards)} step rewards, and its episode made "
            f"{len(calls)} model calls.",
            next_step="The task's verifier is to give one for each call, or none.",
        )
    turns = []
    for number, call in enumerate(calls):
        for output in call.outputs:
            ids, behaviour = unpack_ids(output.token_ids), unpack_floats(output.logprobs)
            known = len(behaviour) == len(ids) and all(map(math.isfinite, behaviour))
            turns.append(
                Turn(
                    token_ids=tuple(ids),
                    behaviour=tuple(behaviour) if known else (),
                    truncated=output.finish_reason == "length",
                    reward=rewards[number] if rewards and output is call.outputs[-1] else None,
                )
            )
    return tuple(turns)


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
            data_digest=data_digest(trajectories),
            metrics=_finite({"reward": mean_reward(evaluation), **update.metrics}),
            measured=Measured(seconds=view.clock() - started),
            base=begun.model_digest,
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
        self._job, self._generation = None, -1
        failed = TrainFailed(
            generation=training.request.generation,
            attempt=self._attempt,
            reason=str(error),
            figures=_finite(error.figures),
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


class Backend(Protocol):
    """What computes updates."""

    def check(self, started: RunStarted) -> None:
        """Look for what the run computes with, before an attempt is recorded.

        Raises:
            OtherInstallation: it is not here.
        """
        ...

    def threads(self, wanted: int) -> int:
        """Set the compute threads of the calling thread, 0 for the default; how many there are."""
        ...

    def versions(self) -> dict[str, str]:
        """What computes, by name; the device; how many processes, if they are several."""
        ...

    def open(
        self,
        started: RunStarted,
        algorithm: Algorithm,
        request: TrainRequested,
        parent: Mapping[str, bytes] | None,
        state: bytes | None,
    ) -> Job:
        """A job on the run's base model that continues from ``parent``, and from ``state`` if it was under way."""
        ...


class TorchBackend:
    """Updates with torch, which is imported when they begin; by all processes where this is the first of several."""

    def check(self, started: RunStarted) -> None:
        _base_folder(started)

    def threads(self, wanted: int) -> int:
        import torch

        if wanted:
            torch.set_num_threads(wanted)
        return torch.get_num_threads()

    def versions(self) -> dict[str, str]:
        import torch

        from bascule.trainers.distributed import ranks

        cuda = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}"
        found = {name: version(name) for name in ("peft", "torch", "transformers")} | {"device": device}
        return found if ranks().size == 1 else found | {PROCESSES: str(ranks().size)}

    def open(
        self,
        started: RunStarted,
        algorithm: Algorithm,
        request: TrainRequested,
        parent: Mapping[str, bytes] | None,
        state: bytes | None,
    ) -> Job:
        from bascule.trainers.distributed import LedJob, ranks

        if ranks().size == 1:
            return _opened(lambda: algorithm, started, request, parent, state)
        return LedJob(
            lambda: _opened(lambda: algorithm, started, request, parent, state),
            (algorithm.name, algorithm.version, started, request, parent, state),
        )


def follow() -> None:
    """In a process that was launched beside the first: compute with it what it computes, until it is done.

    Raises:
        OutOfStep: a process ended by itself.
    """
    from bascule.trainers import distributed

    distributed.follow(lambda name, version, *more: _opened(lambda: _installed(name, version), *more))


def _installed(name: str, version: str) -> Algorithm:
    """The algorithm that the first process computes with.

    Raises:
        OtherInstallation: there is none, or only another version.
    """
    from bascule.plugins.loader import plugins

    try:
        found = plugins().registry.algorithms.get(name, version)
    except ConfigError as e:
        raise OtherInstallation(e.message, next_step=e.next_step) from e
    if found.version != version:
        raise OtherInstallation(
            f"One process computes with {name} {version}, another has {found.version}.",
            next_step="Install the same plugins on every machine of the launch.",
        )
    return found


def _opened(
    algorithm: Callable[[], Algorithm],
    started: RunStarted,
    request: TrainRequested,
    parent: Mapping[str, bytes] | None,
    state: bytes | None,
) -> Job:
    from bascule.trainers.distributed import in_step
    from bascule.trainers.jobs import open_job

    # In step before they open, since opening may be a thing of all processes together.
    found, folder = in_step(lambda: (algorithm(), _base_folder(started)))
    return open_job(found, folder, request.params, request.seed, parent, state)


def _base_folder(started: RunStarted) -> Path:
    """Of the run's base model.

    Raises:
        OtherInstallation: there is none, or it is another one.
    """
    from bascule.trainers.base_model import model_digest, resolve_model

    model = started.config.model
    try:
        folder = resolve_model(model)
    except ConfigError as e:
        raise OtherInstallation(e.message, next_step=e.next_step) from e
    digest = model_digest(folder)
    if started.model_digest not in ("", digest):
        raise OtherInstallation(
            f"The model {model!r} is not the one that the run started with (digest {digest}, recorded "
            f"{started.model_digest}).",
            next_step="Put the recorded model back; a run keeps its model.",
        )
    return folder


def refuse_infeasible(algorithm: Algorithm, request: TrainRequested, groups: Sequence[Group]) -> None:
    """Refuse a job whose first data do not meet what the algorithm requires, before anything is computed.

    Raises:
        TrainError: says which requirement failed on which data; or the algorithm gives no sampled token credit, as far
            as it can say so without a model; or the job would train from the same logged data again and again.
    """
    if request.logged is not None and request.iterations > 1:
        raise TrainError(
            f"{request.iterations} iterations are asked for on the logged samples of {request.logged}, which would be "
            "the same ones each time.",
            next_step="Ask for one iteration, with more num_iterations to pass over the samples again.",
        )
    reasons = unmet(algorithm.requires, groups)
    if reasons:
        raise _infeasible(algorithm, groups, ". ".join(reasons))
    if algorithm.streams or isinstance(algorithm, OwnTraining):
        return
    tokens = {s.trajectory: s.tokens for g in groups for s in g.samples}
    trained = [{c.trajectory, c.rejected} - {None} for c in algorithm.credit(groups, request.params)]
    if not any(all(tokens.get(t or "", 0) for t in unit) for unit in trained):
        raise _infeasible(algorithm, groups, _NO_CREDIT)


def refuse_unmoved(algorithm: Algorithm, groups: Sequence[Group], update: Update) -> None:
    """Refuse the adapter of a job's first update if that took no optimiser step, and so has changed nothing.

    Raises:
        TrainError: it took none.
    """
    if 0 in (update.metrics.get("optimizer_steps"), update.metrics.get("trained_tokens")):
        raise _infeasible(algorithm, groups, _NO_CREDIT)


_NO_CREDIT = "No sample got credit"


def _infeasible(algorithm: Algorithm, groups: Sequence[Group], why: str) -> TrainError:
    samples = [s for g in groups for s in g.samples]
    scored = [s for s in samples if s.reward is not None]
    return TrainError(
        f"The algorithm {algorithm.name} cannot train from these data. {why}.",
        next_step="Choose another algorithm, or other samples.",
        figures={"groups": len(groups), "samples": len(samples), "scored": len(scored)},
    )


@contextmanager
def blamed_on(algorithm: Algorithm) -> Iterator[None]:
    """Let whatever goes wrong in opening or updating a job fail the job, and not the service.

    Raises:
        TrainError: names the algorithm, and an error that is none of ours by its type.
        LogError: as it is; nothing is wrong with the job.
        OutOfStep: as it is.
        OtherInstallation: as it is.
    """
    try:
        yield
    except (TrainError, LogError, OutOfStep, OtherInstallation):
        raise
    except Exception as e:
        raise TrainError(
            f"The algorithm {algorithm.name} {algorithm.version} failed with {type(e).__name__}: {_text(e)}.",
            next_step="The trainer's own log has the traceback.",
        ) from e


def _text(error: Exception) -> str:
    """What an error says, as far as it is recorded."""
    return str(error)[:2000].rstrip(".")


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Without what JSON cannot hold; the reason of a failure says in words that something was no number."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def mean_reward(evaluation: Evaluation) -> float:
    """Of the scored trajectories; 0 if there is none."""
    rewards = [v.reward for v in evaluation.verdicts.values() if isinstance(v, Scored)]
    return sum(rewards) / len(rewards) if rewards else 0.0


class Records(Protocol):
    """A run's events and blobs."""

    @property
    def run(self) -> str: ...

    @property
    def log(self) -> EventLog: ...

    @property
    def blobs(self) -> Blobs: ...


async def load_trajectories(records: Records, evaluation: Evaluation) -> dict[str, Trajectory]:
    """The recorded trajectories of an evaluation, by id, from the log and its blobs.

    Raises:
        TrainError: one of them is not there any more.
        Corrupt: one of them is not what was recorded.
    """
    name = evaluation.request.evaluation
    found: dict[str, Trajectory] = {}

    async def one(trajectory: str) -> None:
        recorded = await records.log.get(subjects.trajectory_logged(records.run, trajectory))
        if recorded is None or not isinstance(recorded.data, TrajectoryLogged):
            raise TrainError(f"The trajectory {trajectory} is scored but not in the log.", next_step=_VERIFY)
        found[trajectory] = await _body(records, recorded.data)

    ids = [subjects.trajectory_id(name, *key) for key in evaluation.trajectories()]
    for i in range(0, len(ids), 64):
        await asyncio.gather(*(one(t) for t in ids[i : i + 64]))
    return {t: found[t] for t in sorted(found)}


async def _body(records: Records, logged: TrajectoryLogged) -> Trajectory:
    """The steps of a logged trajectory, inline or from its blob."""
    if logged.body is not None:
        return logged.body
    assert logged.blob is not None
    try:
        return msgspec.json.decode(await records.blobs.get(logged.blob), type=Trajectory)
    except NotFound as e:
        raise TrainError(f"The trajectory {logged.trajectory} is gone: {e.message}", next_step=e.next_step) from e
    except Corrupt as e:
        raise Corrupt(f"The trajectory {logged.trajectory} is altered: {e.message}", next_step=e.next_step) from e


def data_digest(trajectories: Mapping[str, Trajectory]) -> str:
    """Digest of what an update was trained from: ids and steps of the trajectories.

    Adapters are left out: their names hold that of the run, and digests of runs are compared.
    """
    h = hashlib.blake2b(digest_size=16)
    for name, trajectory in sorted(trajectories.items()):
        steps = [msgspec.structs.replace(s, adapter=None) if isinstance(s, ModelCall) else s for s in trajectory.steps]
        h.update(name.encode() + b"\0" + canonical(msgspec.structs.replace(trajectory, steps=tuple(steps))))
    return h.hexdigest()


_VERIFY = "`bascule verify RUN` says what else is missing."
