"""What a job has computed, how far apart two of them are, and passes that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bascule.trainers.loop import TrainJob
from bascule.trainers.tensorfile import read_tensors
from tests.trainers.bandit import PARAMS

EXACT: dict[str, Any] = {
    **PARAMS,
    "max_grad_norm": 1e9,
    "epsilon": 0.02,
    "epsilon_high": 0.02,
    "learning_rate": 1e-2,
    "max_kl": 99.0,
}
Gradients = dict[str, Tensor]


def gradients(job: TrainJob) -> Gradients:
    """The adapter's, of the last optimiser step."""
    return {n: p.grad.clone() for n, p in job.model.named_parameters() if p.grad is not None}


def apart(got: Gradients, wanted: Gradients) -> float:
    """Largest difference of two gradients, as a share of the largest entry."""
    assert set(got) == set(wanted)
    largest = max(float(w.abs().max()) for w in wanted.values())
    assert largest > 0
    return max(float((got[n] - w).abs().max()) for n, w in wanted.items()) / largest


def adapter(job: TrainJob) -> dict[str, Tensor]:
    """As it stands, under PEFT's keys."""
    tensors, _ = read_tensors(job.adapter_files()["adapter_model.safetensors"], "test")
    return tensors


def limit_nodes(job: TrainJob, nodes: int, error: Callable[[], BaseException]) -> RemovableHandle:
    """From now on, passes over larger trees fail."""

    def check(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] > nodes:
            raise error()

    return decoder(job).register_forward_pre_hook(check, with_kwargs=True)


def decoder(job: TrainJob) -> torch.nn.Module:
    """The base model but for its output embedding; it runs once in every pass."""
    base: Any = job.model.get_base_model()
    return base.get_decoder()
