"""Several processes on one optimiser step: each computes its share of the micro-batches, all take the same step.

The processes are those that ``accelerate launch`` or ``torchrun`` starts. They hold the same adapter and the same
data, so that all there is to exchange is sums of gradients, per-token figures and failures. Under ``accelerate launch
--use_fsdp`` the layers' base weights are split among them too (FSDP2, arXiv 2304.11277); adapter, critic, embeddings
and head stay whole everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from bascule.schemas.errors import ConfigError

T = TypeVar("T")


class Ranks:
    """One process on its own: nothing to exchange.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        sharded: whether the base weights are split, so that a pass is one of all processes together.
    """

    rank = 0
    size = 1
    sharded = False

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
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        # Else transformers reads the weights in the first process only, for Accelerate's own trainer to send around.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

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
