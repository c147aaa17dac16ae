"""Training jobs behind one door: those of the loop, and those of algorithms that train by themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bascule.plugins.algorithm import Algorithm, Group, OwnTraining, Trained, TrainWork
from bascule.schemas.errors import TrainError
from bascule.schemas.events import AdapterProbe
from bascule.schemas.trajectory import Trajectory

if TYPE_CHECKING:
    from bascule.trainers.loop import TrainJob

Progress = Callable[[dict[str, float]], None]
_MEASURED = ("seconds",)


@dataclass(frozen=True)
class Update:
    """What an update leaves.

    Attributes:
        files: the adapter in PEFT's layout.
        sha256: over the files.
        state: to continue from.
        metrics: figures that depend on the inputs alone.
        probe: what an engine that serves the adapter must say of a fixed text.
    """

    files: dict[str, bytes]
    sha256: str
    state: bytes
    metrics: dict[str, float]
    probe: AdapterProbe | None = None


class Job(Protocol):
    """A training job under way."""

    def update(
        self, groups: Sequence[Group], trajectories: Mapping[str, Trajectory], iteration: int, progress: Progress
    ) -> Update:
        """Train on one batch; tell ``progress`` the figures of every optimiser step.

        Raises:
            TrainError: the data or the figures do not allow it. The job is not usable afterwards.
        """
        ...


def open_job(
    algorithm: Algorithm,
    base_folder: Path,
    params: Mapping[str, Any],
    seed: int,
    parent: Mapping[str, bytes] | None = None,
    state: bytes | None = None,
) -> Job:
    """A job that continues from the adapter files of ``parent``, and from ``state`` if it was under way.

    Raises:
        ConfigError: a parameter or the base model is not usable.
        TrainError: the parent or the state is not usable.
    """
    if isinstance(algorithm, OwnTraining):
        return _OwnJob(algorithm, base_folder, dict(params), seed, parent, state)
    from bascule.trainers.loop import TrainJob

    job = TrainJob(base_folder, algorithm, params, seed, parent)
    if state is not None:
        job.restore(state)
    return _LoopJob(job)


class _LoopJob:
    def __init__(self, job: TrainJob) -> None:
        self._job = job

    def update(
        self, groups: Sequence[Group], trajectories: Mapping[str, Trajectory], iteration: int, progress: Progress
    ) -> Update:
        metrics = self._job.update(groups, trajectories, iteration, progress)
        done = Trained(self._job.adapter_files(), self._job.checkpoint(), metrics.figures())
        return _update(done, self._job.probe())


class _OwnJob:
    def __init__(
        self,
        algorithm: OwnTraining,
        base: Path,
        params: dict[str, Any],
        seed: int,
        parent: Mapping[str, bytes] | None,
        state: bytes | None,
    ) -> None:
        self._algorithm = algorithm
        self._base = base
        self._params = params
        self._seed = seed
        self._adapter: Mapping[str, bytes] | None = parent
        self._state: bytes | None = None
        if state is not None:
            self._adapter, self._state = _unpacked(state)

    def update(
        self, groups: Sequence[Group], trajectories: Mapping[str, Trajectory], iteration: int, progress: Progress
    ) -> Update:
        done = self._algorithm.train(
            TrainWork(
                base=self._base,
                params=self._params,
                seed=self._seed,
                iteration=iteration,
                groups=groups,
                trajectories=trajectories,
                adapter=self._adapter,
                state=self._state,
            )
        )
        progress(done.metrics)
        self._adapter, self._state = done.files, done.state
        from bascule.trainers.probe import probe_files, probe_ids

        probe = probe_files(self._base, done.files, probe_ids(self._base))
        return _update(Trained(done.files, _packed(done), done.metrics), probe)


def _update(done: Trained, probe: AdapterProbe) -> Update:
    from bascule.trainers.lora import adapter_hash, check_adapter

    check_adapter(done.files)
    metrics = {k: v for k, v in done.metrics.items() if k not in _MEASURED}
    return Update(done.files, adapter_hash(done.files), done.state, metrics, probe)


def _packed(done: Trained) -> bytes:
    """The adapter's files and the algorithm's own state, one after the other behind their names and lengths."""
    parts = {**{f"adapter/{name}": data for name, data in done.files.items()}, "state": done.state}
    return b"".join(f"{name} {len(parts[name])}\n".encode() + parts[name] for name in sorted(parts))


def _unpacked(data: bytes) -> tuple[dict[str, bytes], bytes]:
    parts: dict[str, bytes] = {}
    rest = data
    while rest:
        head, _, rest = rest.partition(b"\n")
        match = re.fullmatch(rb"(\S+) (\d{1,18})", head)
        if match is None or len(rest) < int(match[2]):
            raise TrainError("The checkpoint is cut short or is of another algorithm.")
        length = int(match[2])
        parts[match[1].decode("utf-8", "replace")], rest = rest[:length], rest[length:]
    if "state" not in parts:
        raise TrainError("The checkpoint is cut short or is of another algorithm.")
    state = parts.pop("state")
    return {name.removeprefix("adapter/"): part for name, part in parts.items()}, state
