"""A training job in memory: what it is asked to train from, and a backend that computes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
import torch

from bascule.plugins.algorithm import Group
from bascule.runtime.runner import View
from bascule.runtime.services import trainer
from bascule.runtime.training.backend import OtherInstallation
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft
from bascule.schemas.errors import TrainError
from bascule.schemas.landscape import Measured, MeasuredEvaluation
from bascule.schemas.trajectory import (
    ModelCall,
    Output,
    Sampling,
    Scored,
    Trajectory,
    Verdict,
    pack_floats,
    pack_ids,
)
from bascule.trainers.jobs import Update
from bascule.trainers.lora import WEIGHTS, adapter_hash
from bascule.trainers.tensorfile import write_tensors
from bascule.verifiers.landscape import SampleFigures, landscape

RUN, NAME = "small", "g00-train"
WIN = Scored(reward=1.0, passed=True)


def output(*ids: int, **values: Any) -> Output:
    return Output(token_ids=pack_ids(ids), text="", **{"logprobs": pack_floats([-0.5] * len(ids)), **values})


def call(*outputs: Output) -> ModelCall:
    return ModelCall(kind="chat", asked="", prompt_ids=pack_ids([1]), outputs=outputs, sampling=Sampling())


ONE = Trajectory(steps=(call(output(7, 8)),))


class Backend:
    """Whose updates do nothing, or fail: with an error of the job's, or with a given exception.

    Their adapter is one number: the trained samples, and the threads as noise.

    Attributes:
        opened: how often a job was opened, ``asked`` what of it last.
        groups: what was last trained from.
        version: of what computes.
    """

    def __init__(
        self,
        *,
        opens: str | Exception = "",
        updates: str | Exception = "",
        version: str = "1",
        lacks: str = "",
        metrics: Mapping[str, float] = MappingProxyType({"loss": 0.5}),
    ) -> None:
        self.opened = 0
        self.asked: ev.TrainRequested | None = None
        self.groups: list[Group] = []
        self.version = version
        self._opens, self._updates, self._lacks = opens, updates, lacks
        self._metrics = dict(metrics)
        self._threads = 0

    def check(self, started: Any) -> None:
        if self._lacks:
            raise OtherInstallation(self._lacks)

    def threads(self, wanted: int) -> int:
        self._threads = wanted or 1
        return self._threads

    def versions(self) -> dict[str, str]:
        return {"torch": self.version}

    def open(self, started: Any, algorithm: Any, request: ev.TrainRequested, parent: Any, state: Any) -> Backend:
        del started, algorithm, parent, state
        self.opened += 1
        self.asked = request
        if self._opens:
            raise self._opens if isinstance(self._opens, Exception) else TrainError(self._opens)
        return self

    def update(self, groups: Sequence[Group], trajectories: Any, iteration: int, progress: Any) -> Update:
        self.groups = list(groups)
        if isinstance(self._updates, Exception):
            raise self._updates
        if self._updates:
            raise TrainError(self._updates, figures={"kl": 0.75, "loss": float("nan")})
        progress({"loss": 0.5, "grad_norm": float("inf")})
        number = sum(len(g.samples) for g in groups) + self._threads / 8
        files = {WEIGHTS: write_tensors({"a": torch.tensor([number, 4.0])}, {})}
        return Update(files, adapter_hash(files), b"state", dict(self._metrics))


async def group(
    view: View, evaluation: str, samples: Sequence[tuple[Trajectory, Verdict]], *, blobs: bool = False
) -> list[ev.BlobRef]:
    """Record a completed evaluation of one example with these samples."""
    figures = [SampleFigures(verdict=verdict, output_tokens=2) for _, verdict in samples]
    requested = ev.EpisodesRequested(
        evaluation=evaluation, purpose="landscape", generation=0, split="train", shard=0, shards=1, positions=(0,),
        examples=("a",), samples=len(samples), sampling=Sampling(), seed=1, harness="h",
    )  # fmt: skip
    drafts: list[tuple[str, ev.Data]] = [(subjects.episodes_requested(RUN, evaluation, 0), requested)]
    refs = []
    for n, (trajectory, verdict) in enumerate(samples):
        name = subjects.trajectory_id(evaluation, 0, n)
        where: dict[str, Any] = {"body": trajectory}
        if blobs:
            refs.append(await view.blobs.put(msgspec.json.encode(trajectory), "application/json"))
            where = {"blob": refs[-1]}
        logged = ev.TrajectoryLogged(
            trajectory=name, evaluation=evaluation, example="a", position=0, sample=n, answer=None, error=None,
            prompt_tokens=1, output_tokens=2, measured=Measured(), **where,
        )  # fmt: skip
        scored = ev.TrajectoryScored(trajectory=name, evaluation=evaluation, position=0, sample=n, verdict=verdict)
        drafts += [(subjects.trajectory_logged(RUN, name), logged), (subjects.trajectory_scored(RUN, name), scored)]
    completed = ev.EvaluationCompleted(
        evaluation=evaluation, purpose="landscape", generation=0, split="train", landscape=landscape([figures]),
        measured=MeasuredEvaluation(),
    )  # fmt: skip
    for subject, data in (*drafts, (subjects.evaluation_completed(RUN, evaluation), completed)):
        await view.append("verifier", [Draft(subject=subject, step=1, data=data)])
    return refs


async def asked(
    view: View, samples: Sequence[tuple[Trajectory, Verdict]], *, blobs: bool = False, **values: Any
) -> list[ev.BlobRef]:
    """Record a request to train from one logged group of these samples."""
    refs = await group(view, NAME, samples, blobs=blobs)
    fields: dict[str, Any] = {
        "algorithm": "best_of_n",
        "iterations": 1,
        "logged": NAME,
        "algorithm_version": "1",
        **values,
    }
    request = ev.TrainRequested(
        generation=1, groups=1, samples=1, temperature=1.0, parent=0, harness="h", **{"params": {}, **fields}
    )  # fmt: skip
    await view.append("feedback", [Draft(subject=subjects.train_requested(RUN, 1), step=1, data=request)])
    return refs


async def outcome(view: View, backend: Backend, subject: str = "outcome") -> ev.Data:
    """What the trainer records under the job's ``subject``, or the error that it stops with."""
    tasks = [
        asyncio.create_task(view.follow([])),
        asyncio.create_task(trainer.Trainer(backend).run(view)),
        asyncio.create_task(_first(view, subject)),
    ]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    done = next(task for task in reversed(tasks) if task.done())
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    found = done.result()
    assert isinstance(found, ev.Data)
    return found


async def _first(view: View, subject: str) -> Any:
    return (await anext(view.log.follow(f"bascule.{RUN}.train.g01.{subject}"))).data


async def recorded(view: View, kind: type[ev.Data]) -> int:
    return len([e async for e in view.log.read(f"bascule.{RUN}.train.>") if isinstance(e.data, kind)])
