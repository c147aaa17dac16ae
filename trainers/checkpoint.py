"""A training job's whole state as one blob: adapter, AdamW's moments, counters. The round trip is exact.

The blob is a safetensors file; its metadata holds the counters. Nothing else is state: there is no dropout, and the
order of a batch follows from the trajectories' ids.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from bascule.schemas.errors import TrainError
from bascule.trainers.lora import adapter_tensors, set_adapter_tensors
from bascule.trainers.tensorfile import read_tensors, write_tensors

if TYPE_CHECKING:
    from peft import PeftModel

_FORMAT = "bascule.checkpoint.1"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Counters:
    """Where a job stands.

    Attributes:
        iteration: number of updates done.
        optimizer_step: number of optimiser steps done, which the learning rate's schedule counts.
        seed: of the adapter's first weights.
    """

    iteration: int
    optimizer_step: int
    seed: int


def write_checkpoint(model: PeftModel, optimizer: torch.optim.Optimizer, counters: Counters) -> bytes:
    """Serialise a job; the same state gives the same bytes."""
    tensors = {f"adapter/{key}": value for key, value in adapter_tensors(model).items()}
    for name, parameter in _trained(model):
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{key}/{name}": state[key] for key in _MOMENTS if key in state}
    return write_tensors(tensors, {"format": _FORMAT, "counters": json.dumps(asdict(counters), sort_keys=True)})


def read_checkpoint(model: PeftModel, optimizer: torch.optim.Optimizer, data: bytes, seed: int) -> Counters:
    """Put a job back where :func:`write_checkpoint` left it; learning rates come from the schedule, not from here.

    Raises:
        TrainError: the blob is damaged, of another format, or of a job with another base model, rank or
            seed; nothing was changed then.
    """
    tensors, metadata = read_tensors(data, "The checkpoint")
    try:
        counters = Counters(**json.loads(metadata.get("counters", "")))
    except (ValueError, TypeError) as error:
        raise TrainError("The checkpoint has no readable counters.") from error
    if metadata.get("format") != _FORMAT:
        raise TrainError(f"The checkpoint has the format {metadata.get('format')!r}, not {_FORMAT}.")
    if counters.seed != seed:
        raise TrainError(f"The checkpoint is of a job with seed {counters.seed}, not {seed}.")
    prefix = "adapter/"
    adapter = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    moments = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
    parameters = dict(_trained(model))
    expected = {f"{key}/{name}" for key in _MOMENTS for name in parameters}
    if set(moments) not in (set(), expected):
        raise TrainError("The checkpoint's optimiser state does not fit this base model.")
    for name, parameter in parameters.items():
        shapes = {tuple(moments[f"{key}/{name}"].shape) for key in _MOMENTS[:2] if moments}
        if shapes - {tuple(parameter.shape)}:
            raise TrainError(f"The checkpoint's optimiser state does not fit the shape of {name}.")
    set_adapter_tensors(model, adapter)
    optimizer.state.clear()
    if moments:
        for name, parameter in parameters.items():
            # AdamW keeps its own step counter on the CPU unless it is fused.
            optimizer.state[parameter] = {
                key: moments[f"{key}/{name}"].to("cpu" if key == "step" else parameter.device) for key in _MOMENTS
            }
    return counters


def _trained(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    return sorted((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
