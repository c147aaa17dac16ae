"""Train again what a run trained: the same updates from the logged trajectories, compared with what was recorded.

Nothing is written. For the same inputs, thread count, number of processes, size of micro-batches and versions the
adapters are the same, byte for byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec

from bascule.plugins.algorithm import Algorithm, Group
from bascule.plugins.loader import code_hash
from bascule.plugins.registry import Registry
from bascule.runtime.log.blobs import Blobs
from bascule.runtime.log.protocol import EventLog
from bascule.runtime.services.trainer import adapter_name
from bascule.runtime.state import Evaluation, RunState
from bascule.runtime.training.backend import PROCESSES, Backend
from bascule.runtime.training.data import Records, data_digest, groups_of, load_trajectories
from bascule.runtime.training.refusals import blamed_on, refuse_infeasible, refuse_unmoved
from bascule.schemas import events as ev
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import Corrupt, NotFound, TrainError
from bascule.schemas.trajectory import Trajectory

#: What the evaluations and the configuration of a job follow from; the fold forgets nothing of these.
_FOLDED = (
    ev.RunStarted,
    ev.RunForked,
    ev.RuntimeChanged,
    ev.EpisodesRequested,
    ev.TrajectoryLogged,
    ev.TrajectoryScored,
    ev.EvaluationCompleted,
)


#: Among the metrics of an update: the size of its micro-batches, which a lack of memory halves.
MAX_NODES = "max_nodes"


@dataclass(frozen=True)
class Kept:
    """The :class:`Records` of a run in a store."""

    run: str
    log: EventLog
    blobs: Blobs


class TrainingJob(msgspec.Struct, kw_only=True):
    """What a log holds of one training job.

    Attributes:
        started: the run's start, with what was in force when it ended.
        attempts: by number; ``code`` the hash of the code of each.
        evaluations: what each iteration was trained from, as far as it is complete.
        checkpoints: by iteration.
        parent: files of the adapter that the job started from.
        failed: why it failed, if it did.
    """

    started: ev.RunStarted
    request: ev.TrainRequested
    attempts: dict[int, ev.TrainStarted] = {}
    code: dict[int, str] = {}
    evaluations: list[Evaluation] = []
    checkpoints: dict[int, ev.AdapterCheckpointed] = {}
    parent: dict[str, ev.BlobRef] | None = None
    failed: ev.TrainFailed | None = None

    def threads(self, iteration: int) -> int:
        """With how many threads, in each process, an update was computed; 0 if nobody began it."""
        attempt = self._attempt(iteration)
        return attempt.threads if attempt else 0

    def processes(self, iteration: int) -> int:
        """By how many processes an update was computed; 0 if nobody began it."""
        attempt = self._attempt(iteration)
        return _processes(attempt.versions) if attempt else 0

    def _attempt(self, iteration: int) -> ev.TrainStarted | None:
        checkpoint = self.checkpoints.get(iteration)
        return self.attempts.get(checkpoint.attempt if checkpoint else max(self.attempts, default=0))


async def find_job(run: str, events: AsyncIterator[Recorded], what: str) -> TrainingJob:
    """Gather a training job from a run's log.

    Args:
        what: its generation, or the id or the subject (with or without ``bascule.<run>.``) of its TrainRequested.

    Raises:
        NotFound: there is none; lists those that there are.
    """
    state = RunState(run=run)
    names = {what, f"bascule.{run}.{what}"}
    requests: dict[int, ev.TrainRequested] = {}
    files: dict[str, dict[str, ev.BlobRef]] = {}
    jobs: dict[int, TrainingJob] = {}
    wanted: int | None = None
    async for event in events:
        data = event.data
        if isinstance(data, _FOLDED):
            state.apply(event)
        if isinstance(data, ev.TrainRequested):
            assert state.started is not None
            requests[data.generation] = data
            parent = files.get(data.adapter) if data.adapter is not None else None
            jobs[data.generation] = TrainingJob(started=state.started, request=data, parent=parent)
            if what == str(data.generation) or event.subject in names or event.envelope.id == what:
                wanted = data.generation
        elif isinstance(data, ev.TrainStarted):
            jobs[data.generation].attempts[data.attempt] = data
            jobs[data.generation].code[data.attempt] = event.envelope.producer.hash
        elif isinstance(data, ev.AdapterCheckpointed):
            files[data.adapter] = data.files
            jobs[data.generation].checkpoints[data.iteration] = data
        elif isinstance(data, ev.TrainFailed):
            jobs[data.generation].failed = data
    if wanted is None:
        known = ", ".join(f"generation {g} ({r.algorithm})" for g, r in requests.items()) or "none"
        raise NotFound(f"The run {run} has no training job {what!r}.", next_step=f"It has: {known}.")
    job = jobs[wanted]
    for iteration in range(job.request.iterations):
        evaluation = state.evaluations.get(job.request.logged or adapter_name(wanted, iteration))
        if evaluation is None or evaluation.completed is None:
            break
        job.evaluations.append(evaluation)
    return job


class Distance(msgspec.Struct, frozen=True, kw_only=True):
    """How far two adapters are from each other, over all their numbers.

    Attributes:
        max_abs: the largest difference.
        relative_l2: L2 norm of the differences over that of the recorded one.
    """

    max_abs: float
    relative_l2: float


class Iteration(msgspec.Struct, frozen=True, kw_only=True):
    """One update, made again.

    Attributes:
        sha256: of the adapter; ``recorded`` is that of the log, None where there is nothing to compare with.
        threads: that it was computed with; ``recorded_threads`` when it was recorded, 0 if it never was.
        processes: that computed it; ``recorded_processes`` when it was recorded, 0 if it never was.
    """

    iteration: int
    trajectories: int
    sha256: str
    recorded: str | None
    threads: int
    recorded_threads: int
    processes: int
    recorded_processes: int
    metrics: dict[str, float]


class Retraining(msgspec.Struct, frozen=True, kw_only=True):
    """A training job, made again.

    Attributes:
        differing: what computed it then and computes now, by name, where they are not the same; ``max_nodes`` among
            them, if memory ran out then or now so that smaller micro-batches were computed.
        iterations: as far as the log holds what they are trained from.
        failed: why it failed, as it is recorded to have.
        survived: why it is recorded to have failed, where it does not fail now.
        same: whether every adapter is the recorded one; None if there is none to compare with.
        distance: of the last recorded adapter's remake from it, if they differ and it is kept.
    """

    run: str
    generation: int
    algorithm: str
    recorded_algorithm: str
    differing: dict[str, tuple[str, str]]
    iterations: tuple[Iteration, ...]
    failed: str | None
    survived: str | None
    same: bool | None
    distance: Distance | None

    @property
    def last(self) -> Iteration | None:
        """The last update that there is a recorded one to compare with."""
        return next((i for i in reversed(self.iterations) if i.recorded is not None), None)

    @property
    def same_threads(self) -> bool:
        """Whether every update was computed with as many threads as it was when it was recorded."""
        return all(i.threads == i.recorded_threads for i in self.iterations)

    @property
    def same_processes(self) -> bool:
        """Whether every update was computed by as many processes as it was when it was recorded."""
        return all(i.processes == i.recorded_processes for i in self.iterations)

    @property
    def same_nodes(self) -> bool:
        """Whether every update was computed in micro-batches of the size with which it was recorded."""
        return MAX_NODES not in self.differing


async def retrain(
    job: TrainingJob,
    records: Records,
    registry: Registry,
    backend: Backend,
    *,
    threads: int | None = None,
    algorithm: str | None = None,
    listener: Callable[[Iteration], None] = lambda _: None,
) -> Retraining:
    """Make a job's updates again.

    Args:
        threads: to compute with, instead of as many as were recorded.
        algorithm: another one, with the parameters that the run gives it, on the same samples.
        listener: told of each update.

    Raises:
        TrainError: the log lacks something, the data are infeasible, or an update fails that is recorded.
        Corrupt: a trajectory is not the one that was trained from.
        ConfigError: the base model is not the recorded one.
    """
    request = job.request
    other = algorithm is not None and algorithm != request.algorithm
    trainer = registry.algorithms.get(algorithm or request.algorithm, None if other else request.algorithm_version)
    if other:
        request = _asked_of(trainer, job)
    if request.adapter is not None and job.parent is None:
        raise TrainError(
            f"The log of {records.run} does not hold the adapter {request.adapter} that the job began with."
        )
    if not job.evaluations:
        raise TrainError(
            f"The log of {records.run} does not hold the samples of the first update.", next_step="Resume the run."
        )
    done: list[Iteration] = []
    failed: str | None = None
    files: dict[str, bytes] = {}
    with ThreadPoolExecutor(1, "trainer") as pool:
        loop = asyncio.get_running_loop()
        parent = None
        if job.parent is not None:
            parent = {name: await records.blobs.get(ref) for name, ref in job.parent.items()}
        opened = None
        for iteration, evaluation in enumerate(job.evaluations):
            checkpoint = None if other else job.checkpoints.get(iteration)
            used = await loop.run_in_executor(pool, backend.threads, threads or job.threads(iteration))
            try:
                trajectories, groups = await _batch(records, evaluation, checkpoint)
                # What an earlier code has let pass is made again as it was.
                first = iteration == 0 and checkpoint is None
                with blamed_on(trainer):
                    if first:
                        refuse_infeasible(trainer, request, groups)
                    if opened is None:
                        arguments = (job.started, trainer, request, parent, None)
                        opened = await loop.run_in_executor(pool, backend.open, *arguments)
                    update = await loop.run_in_executor(pool, opened.update, groups, trajectories, iteration, _silent)
                if first:
                    refuse_unmoved(trainer, groups, update)
            except TrainError as error:
                if other or checkpoint is not None or job.failed is None or str(error) != job.failed.reason:
                    raise
                failed = job.failed.reason
                break
            if checkpoint is not None:
                files = update.files
            found = Iteration(
                iteration=iteration,
                trajectories=len(trajectories),
                sha256=update.sha256,
                recorded=checkpoint.sha256 if checkpoint else None,
                threads=used,
                recorded_threads=job.threads(iteration),
                processes=_processes(backend.versions()),
                recorded_processes=job.processes(iteration),
                metrics=update.metrics,
            )
            done.append(found)
            listener(found)
    compared = [i for i in done if i.recorded is not None]
    same = all(i.recorded == i.sha256 for i in compared) if compared else None
    return Retraining(
        run=records.run,
        generation=request.generation,
        algorithm=request.algorithm,
        recorded_algorithm=job.request.algorithm,
        differing={} if other else _differing(job, trainer, backend) | _nodes(job, done),
        iterations=tuple(done),
        failed=failed,
        survived=job.failed.reason if job.failed is not None and failed is None and not other else None,
        same=same,
        distance=None if same is not False else await _distance(records, job, compared[-1], files),
    )


def _silent(figures: Mapping[str, float]) -> None:
    del figures


async def _batch(
    records: Records, evaluation: Evaluation, checkpoint: ev.AdapterCheckpointed | None
) -> tuple[dict[str, Trajectory], list[Group]]:
    trajectories = await load_trajectories(records, evaluation)
    # Without a base it is of earlier code, which took the digest otherwise.
    if checkpoint is not None and checkpoint.base and data_digest(trajectories) != checkpoint.data_digest:
        raise Corrupt(
            f"The trajectories of {evaluation.request.evaluation} are not those that {checkpoint.adapter} was trained "
            f"from (digest {data_digest(trajectories)}, recorded {checkpoint.data_digest}).",
            next_step=f"`bascule verify {records.run}` says what was changed.",
        )
    return trajectories, groups_of(evaluation, trajectories)


def _asked_of(algorithm: Algorithm, job: TrainingJob) -> ev.TrainRequested:
    """The request as it would have been made of another algorithm: as many updates, from the same start."""
    params: dict[str, Any] = {
        **algorithm.defaults(),
        **job.started.config.algorithms.get(algorithm.name, {}),
        "steps": job.request.iterations,
    }
    return msgspec.structs.replace(
        job.request, algorithm=algorithm.name, algorithm_version=algorithm.version, params=params
    )


def _differing(job: TrainingJob, algorithm: Algorithm, backend: Backend) -> dict[str, tuple[str, str]]:
    """What computed the job's last update and what computes now, where both are known and they are not the same."""
    attempt = max(job.attempts, default=0)
    then = dict(job.attempts[attempt].versions) if attempt in job.attempts else {}
    now = backend.versions()
    then |= {algorithm.name: job.request.algorithm_version, "the code of bascule": job.code.get(attempt, "")[:12]}
    now |= {algorithm.name: algorithm.version, "the code of bascule": code_hash()[:12]}
    names = [name for name in then if name != PROCESSES]
    return {name: (then[name], now[name]) for name in names if now.get(name, then[name]) != then[name]}


def _nodes(job: TrainingJob, done: list[Iteration]) -> dict[str, tuple[str, str]]:
    """The sizes of the micro-batches of the first update for which they were others than now, where both are known."""
    for iteration in done:
        checkpoint = job.checkpoints.get(iteration.iteration)
        then, now = (m.get(MAX_NODES) for m in (checkpoint.metrics if checkpoint else {}, iteration.metrics))
        if then is not None and now is not None and then != now:
            return {MAX_NODES: (f"{then:.0f}", f"{now:.0f}")}
    return {}


def _processes(versions: Mapping[str, str]) -> int:
    return int(versions.get(PROCESSES, "1"))


async def _distance(records: Records, job: TrainingJob, last: Iteration, files: Mapping[str, bytes]) -> Distance | None:
    """Of an adapter from the recorded one; None if only the events of that are left."""
    try:
        recorded = {n: await records.blobs.get(r) for n, r in job.checkpoints[last.iteration].files.items()}
    except NotFound:
        return None
    return await asyncio.to_thread(distance, files, recorded)


def distance(files: Mapping[str, bytes], recorded: Mapping[str, bytes]) -> Distance | None:
    """How far an adapter is from a recorded one; None if they are not of the same shape.

    Raises:
        TrainError: the weights of one cannot be read.
    """
    from bascule.trainers.lora import WEIGHTS
    from bascule.trainers.tensorfile import read_tensors

    ours, theirs = (read_tensors(f[WEIGHTS], WEIGHTS)[0] for f in (files, recorded))
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return None
    gaps = [(ours[k].double() - theirs[k].double()).flatten() for k in sorted(ours)]
    norm = sum(float(t.double().square().sum()) for t in theirs.values()) ** 0.5
    return Distance(
        max_abs=max(float(g.abs().max()) for g in gaps),
        relative_l2=sum(float(g.square().sum()) for g in gaps) ** 0.5 / max(norm, 1e-30),
    )
