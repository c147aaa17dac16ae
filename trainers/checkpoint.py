"""A training job's whole state as one blob: adapter, critic, AdamW's moments, counters. The round trip is exact.

The blob is a safetensors file; its metadata holds the counters and the base model's digest. Nothing else is state:
dropout is drawn from the seed and the number of the step, and the order of a batch follows from the trajectories' ids.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from bascule.schemas.errors import TrainError
from bascule.trainers.base_model import digest_of
from bascule.trainers.lora import adapter_tensors, set_adapter_tensors
from bascule.trainers.tensorfile import read_tensors, write_tensors

if TYPE_CHECKING:
    from peft import PeftModel

_FORMAT = "bascule.checkpoint.2"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Counters:
    """Where a job stands.

    Attributes:
        iteration: number of updates done.
        optimizer_step: number of optimiser steps done, which the learning rate's schedule counts.
        seed: of the adapter's first weights.
        kl_coef: coefficient of the KL divergence in the reward, which a controller may have moved.
        max_nodes: of a micro-batch, halved once memory ran out.
    """

    iteration: int
    optimizer_step: int
    seed: int
    kl_coef: float = 0.0
    max_nodes: int = 0


def write_checkpoint(
    model: PeftModel, critic: torch.nn.Module | None, optimizer: torch.optim.Optimizer, counters: Counters
) -> bytes:
    """Serialise a job; the same state gives the same bytes."""
    tensors = {f"adapter/{key}": value for key, value in adapter_tensors(model).items()}
    if critic is not None:
        tensors |= {f"critic/{key}": value for key, value in critic.state_dict().items()}
    for name, parameter in _trained(model, critic):
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{key}/{name}": state[key] for key in _MOMENTS if key in state}
    metadata = {"format": _FORMAT, "counters": json.dumps(asdict(counters), sort_keys=True)}
    digest = digest_of(model.get_base_model())
    return write_tensors(tensors, {**metadata, **({"base": digest} if digest else {})})


def read_checkpoint(
    model: PeftModel, critic: torch.nn.Module | None, optimizer: torch.optim.Optimizer, data: bytes, seed: int
) -> Counters:
    """Put a job back where :func:`write_checkpoint` left it; learning rates come from the schedule, not from here.

    Raises:
        TrainError: the blob is damaged, of another format, or of a job with another base model, rank, critic or
            seed; nothing was changed then.
    """
    tensors, metadata = read_tensors(data, "The checkpoint")
    if metadata.get("format") != _FORMAT:
        raise TrainError(f"The checkpoint has the format {metadata.get('format')!r}, not {_FORMAT}.")
    try:
        counters = Counters(**json.loads(metadata.get("counters", "")))
    except (ValueError, TypeError) as error:
        raise TrainError("The checkpoint has no readable counters.") from error
    base, own_base = metadata.get("base"), digest_of(model.get_base_model())
    if base and own_base and base != own_base:
        raise TrainError(
            f"The checkpoint is of a job on the base model {base[:12]}, not on this one, {own_base[:12]}.",
            next_step="Put back the base model that the job began with.",
        )
    if counters.seed != seed:
        raise TrainError(f"The checkpoint is of a job with seed {counters.seed}, not {seed}.")
    adapter, values = _under("adapter/", tensors), _under("critic/", tensors)
    moments = {k: v for k, v in tensors.items() if k.partition("/")[0] in _MOMENTS}
    own = {} if critic is None else critic.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in values.items()}:
        raise TrainError("The checkpoint's critic does not fit this algorithm and base model.")
    parameters = dict(_trained(model, critic))
    known = {key.partition("/")[2] for key in moments}
    if not known <= set(parameters) or set(moments) != {f"{key}/{name}" for key in _MOMENTS for name in known}:
        raise TrainError("The checkpoint's optimiser state does not fit this base model.")
    for name in sorted(known):
        if {tuple(moments[f"{key}/{name}"].shape) for key in _MOMENTS[:2]} != {tuple(parameters[name].shape)}:
            raise TrainError(f"The checkpoint's optimiser state does not fit the shape of {name}.")
    set_adapter_tensors(model, adapter)
    if critic is not None:
        critic.load_state_dict(values)
    optimizer.state.clear()
    for name in known:
        device = parameters[name].device
        optimizer.state[parameters[name]] = {key: moments[f"{key}/{name}"].to(device) for key in _MOMENTS}
    return counters


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _trained(model: PeftModel, critic: torch.nn.Module | None) -> list[tuple[str, torch.nn.Parameter]]:
    found = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if critic is not None:
        found += [(f"critic.{name}", parameter) for name, parameter in critic.named_parameters()]
    return sorted(found)
