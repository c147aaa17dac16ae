"""Several processes on one optimiser step: each computes its share of the micro-batches, all take the same step.

The processes are those that ``accelerate launch`` or ``torchrun`` starts. They hold the same adapter and the same
data, so that all there is to exchange is sums of gradients, per-token figures and failures. Under ``accelerate launch
--use_fsdp`` the layers' base weights are split among them too (FSDP2, arXiv 2304.11277); adapter, critic, embeddings
and head stay whole everywhere.

Only the first process reads and writes a log. What it opens and updates (:class:`LedJob`) it tells the others, which
do the same (:func:`follow`).
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bascule.schemas.errors import BasculeError, ConfigError, OutOfStep

if TYPE_CHECKING:
    from bascule.plugins.algorithm import Group
    from bascule.schemas.trajectory import Trajectory
    from bascule.trainers.jobs import Job, Progress, Update

T = TypeVar("T")

#: The first process may have nothing to do for weeks, while episodes run.
WAIT = timedelta(days=365)


class Ranks:
    """One process on its own: nothing to exchange.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        sharded: whether the base weights are split, so that a pass is one of all processes together.
        in_step: whether all processes still do the same.
    """

    rank = 0
    size = 1
    sharded = False
    in_step = True

    def turns(self, count: int) -> Iterator[tuple[int, bool]]:
        """Which of ``count`` pieces of work this process does, and whether the piece counts.

        Pieces go round. Where the base weights are split every process makes equally many passes: one that has run
        out of pieces does the last one over, which does not count.
        """
        for first in range(0, count, self.size):
            mine = first + self.rank
            if mine < count or self.sharded:
                yield min(mine, count - 1), mine < count

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, the same bits everywhere."""

    def gather(self, value: T) -> list[T]:
        """What every process gave, in the order of ranks."""
        return [value]

    def told(self, value: T) -> T:
        """What the first process gives, in all; the others wait for it as long as it takes."""
        return value

    def shard(self, model: Any) -> None:
        """Split the frozen weights of the model's layers among the processes, where that was asked for.

        Raises:
            ConfigError: the model does not say what its layers are.
        """


class _Launched(Ranks):
    def __init__(self) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if self._device == "cuda" else "gloo")
        atexit.register(self._leave)
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self._orders = torch.distributed.new_group(backend="gloo", timeout=WAIT)
        # Else transformers reads the weights in the first process only, for Accelerate's own trainer to send around.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

    def _leave(self) -> None:
        """End the threads of the groups, which must not meet the end of the interpreter; they do so unreferenced."""
        del self._orders
        torch.distributed.destroy_process_group()

    def add(self, tensors: Iterable[Tensor]) -> None:
        parts = list(tensors)
        flat = torch.cat([t.reshape(-1) for t in parts])
        torch.distributed.all_reduce(flat)
        for part, total in zip(parts, torch.split(flat, [t.numel() for t in parts]), strict=True):
            part.copy_(total.view_as(part))

    def gather(self, value: T) -> list[T]:
        out: list[T | None] = [None] * self.size
        torch.distributed.all_gather_object(out, value)
        return out  # type: ignore[return-value]

    def told(self, value: T) -> T:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self._orders)
        return box[0]

    def shard(self, model: Any) -> None:
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        kinds = set(getattr(model, "_no_split_modules", None) or ())
        layers = [m for m in model.modules() if type(m).__name__ in kinds]
        if not layers:
            raise ConfigError(
                f"The model type {model.config.model_type!r} does not say what its layers are, so its weights cannot "
                "be split among processes.",
                next_step="Launch without --use_fsdp.",
            )
        mesh = init_device_mesh(self._device, (self.size,))
        split = {p for layer in layers for p in layer.parameters() if not p.requires_grad}
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=set(layer.parameters()) - split)
        decoder = model.get_decoder()
        fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - split)


@cache
def ranks() -> Ranks:
    """The processes that this one was launched with."""
    return _Launched() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Ranks()


def in_step(work: Callable[[], T]) -> T:
    """Do what every process does now; where it fails with an error of ours in one, it fails in all.

    Raises:
        BasculeError: of the first process in which it failed.
        OutOfStep: among several processes, something else went wrong in one.
    """
    result, failures = _tried(work)
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]


def _tried(work: Callable[[], T]) -> tuple[T | None, list[BasculeError]]:
    own: BasculeError | None = None
    result: T | None = None
    everyone = ranks()
    with _stepping(everyone):
        try:
            result = work()
        except OutOfStep:
            raise
        except BasculeError as error:
            own = error
        return result, [f for f in everyone.gather(own) if f is not None]


@contextmanager
def _stepping(everyone: Ranks) -> Iterator[None]:
    """What is not foreseen happens in one process alone, and the others wait for it in vain."""
    try:
        yield
    except OutOfStep:
        raise
    except Exception as error:
        if everyone.size == 1:
            raise
        everyone.in_step = False
        raise OutOfStep(
            f"Process {everyone.rank} of {everyone.size} cannot go on: {type(error).__name__}: {error}",
            next_step="Another process may have failed before it. Launch all of them again.",
        ) from error


class _Order(NamedTuple):
    """What all processes do next.

    Attributes:
        job: its number; one that is not among those that the process has is to be opened.
        alive: the jobs that are still wanted.
        threads: to compute with.
        arguments: of opening or of the update.
    """

    job: int
    alive: frozenset[int]
    threads: int
    arguments: tuple[Any, ...]


_turn = threading.Lock()
_numbers = itertools.count()
_alive: WeakValueDictionary[int, LedJob] = WeakValueDictionary()


class LedJob:
    """A job of the first process that all processes have: they open it and make its updates together.

    Jobs of several threads take turns. When one is let go of here, it is so in all processes.

    Args:
        open_job: opens it in this process.
        arguments: with which it is opened in the others.

    Raises:
        BasculeError: it cannot be opened, in any process.
        OutOfStep: a process ended.
    """

    def __init__(self, open_job: Callable[[], Job], arguments: tuple[Any, ...]) -> None:
        self._number = next(_numbers)
        self._job = self._everywhere(open_job, arguments)

    def update(
        self,
        groups: Sequence[Group],
        trajectories: Mapping[str, Trajectory],
        iteration: int,
        progress: Progress,
    ) -> Update:
        """Train on one batch; as :meth:`Job.update`.

        Raises:
            TrainError: the data or the figures do not allow it.
            OutOfStep: a process ended.
        """
        arguments = (groups, trajectories, iteration)
        return self._everywhere(lambda: self._job.update(*arguments, progress), arguments)

    def _everywhere(self, work: Callable[[], T], arguments: tuple[Any, ...]) -> T:
        everyone = ranks()
        with _turn:
            _alive[self._number] = self
            order = _Order(self._number, frozenset(_alive), torch.get_num_threads(), arguments)
            with _stepping(everyone):
                everyone.told(order)
            return in_step(work)


@contextmanager
def leading() -> Iterator[None]:
    """In the first process: the others follow until the end of this."""
    everyone = ranks()
    try:
        yield
    finally:
        with _turn:
            if everyone.in_step:
                with _stepping(everyone):
                    everyone.told(None)


def follow(open_job: Callable[..., Job]) -> None:
    """In any other process: do what the first one does, until it is done. What it is told of, this says nothing of.

    Args:
        open_job: opens a job, given what the first process says of it.

    Raises:
        OutOfStep: the first process ended otherwise, or something went wrong in any.
    """
    everyone = ranks()
    jobs: dict[int, Job] = {}
    while (order := _next_order(everyone)) is not None:
        torch.set_num_threads(order.threads)
        jobs = {n: job for n, job in jobs.items() if n in order.alive}
        _obey(order, jobs, open_job)


def _next_order(everyone: Ranks) -> _Order | None:
    with _stepping(everyone):
        return everyone.told(None)


def _obey(order: _Order, jobs: dict[int, Job], open_job: Callable[..., Job]) -> None:
    known = jobs.get(order.job)
    if known is not None:
        groups, trajectories, iteration = order.arguments
        _tried(lambda: known.update(groups, trajectories, iteration, lambda _: None))
        return
    opened, _ = _tried(lambda: open_job(*order.arguments))
    if opened is not None:
        jobs[order.job] = opened
