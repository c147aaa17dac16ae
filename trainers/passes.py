"""Passes over micro-batches: shared out among the processes, in trees that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TypeVar

import torch

from bascule.schemas.errors import TrainError
from bascule.trainers.batch import MicroBatch, Unit, micro_batches
from bascule.trainers.distributed import Ranks

T = TypeVar("T")
Packed = Callable[[int], Sequence[MicroBatch]]


def packed(units: Sequence[Unit]) -> Packed:
    """The units' micro-batches by the most nodes that one may have, packed once for all passes over them."""
    return lru_cache(maxsize=1)(partial(micro_batches, units))


class Passes:
    """Work on micro-batches that fit.

    Args:
        processes: share the work.
        max_nodes: of a micro-batch, as asked for.

    Attributes:
        processes: share the work.
        max_nodes: of a micro-batch; half of what was asked for once memory ran out.
    """

    def __init__(self, processes: Ranks, max_nodes: int) -> None:
        self.processes = processes
        self.max_nodes = max_nodes
        self._asked = max_nodes

    def each(
        self, batches: Packed, work: Callable[[int, MicroBatch, bool], T], begin: Callable[[], None] = lambda: None
    ) -> list[T]:
        """Do some work on every micro-batch, each of them on one of the processes.

        Where memory runs out, on any process, all of them begin anew with micro-batches of half the size, once in a
        job. Where the base weights are split, one process cannot leave a pass alone, so there it ends with the error
        of torch.

        Args:
            batches: on which.
            work: is given a micro-batch's index, the micro-batch and whether the work counts; what does not is done
                only because the other processes need this one for their passes.
            begin: is called before the first micro-batch, and again when all begins anew.

        Returns:
            What the work gave on all processes, in the order of the micro-batches.

        Raises:
            TrainError: memory runs out again, or the work failed, on any process.
        """
        while True:
            begin()
            found, failure = self._attempt(batches, work)
            failures = [f for f in self.processes.gather(failure) if f is not None]
            if not failures:
                every = {i: x for part in self.processes.gather(found) for i, x in part.items()}
                return [every[i] for i in sorted(every)]
            final = [f for f in failures if not isinstance(f, _OutOfMemory)]
            if final or self.max_nodes < self._asked or self._asked == 1:
                raise (final or failures)[0]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.max_nodes = self._asked // 2

    def _attempt(
        self, batches: Packed, work: Callable[[int, MicroBatch, bool], T]
    ) -> tuple[dict[int, T], TrainError | None]:
        """What this process's part of the work gave by micro-batch, and the first failure."""
        found: dict[int, T] = {}
        failure: TrainError | None = None
        batch: MicroBatch | None = None
        try:
            every = batches(self.max_nodes)
            for i, counts in self.processes.turns(len(every)):
                batch = every[i]
                try:
                    result = work(i, batch, counts)
                except TrainError as error:
                    failure = failure or error
                    if not self.processes.sharded:
                        break
                    continue
                if counts:
                    found[i] = result
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error) or self.processes.sharded:
                raise
            failure = self._over(batch)
        return found, failure

    def _over(self, batch: MicroBatch | None) -> TrainError:
        """That memory ran out, on a micro-batch or while they were packed."""
        if batch is not None and len(batch.tree.tokens) > self.max_nodes:
            return _OutOfMemory(
                f"Memory ran out on {' and '.join(batch.trajectories)}, {len(batch.tree.tokens)} nodes that no "
                f"max_nodes splits.",
                next_step="Use a larger device, or bound the length of an episode.",
            )
        return _OutOfMemory(
            f"Memory ran out, also with micro-batches of {self.max_nodes} nodes.",
            next_step=f"Set max_nodes below {self.max_nodes}, or use a larger device.",
        )


class _OutOfMemory(TrainError):
    """Smaller micro-batches may help."""


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
