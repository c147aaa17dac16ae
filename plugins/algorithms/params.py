"""The parameters that all algorithms have, and how an algorithm reads its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import msgspec
import msgspec.inspect

from bascule.schemas.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)


def job(**chosen: Any) -> dict[str, Any]:
    """A job's shape, its optimiser and its adapter, with the algorithm's own choices over or besides them.

    ``groups`` and ``num_generations`` are of a job that samples anew for each of its ``steps``; one that trains from
    what is logged makes one update of all of it. ``start_from`` says which adapter a job continues from: the
    ``promoted`` one, or a fresh one on the ``base``.
    """
    return {
        "steps": 40,
        "groups": 32,
        "num_generations": 8,
        "num_iterations": 1,
        "num_mini_batches": 1,
        "start_from": "promoted",
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "max_kl": 0.5,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "lora_r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.0,
        "lora_target_modules": None,
        "lora_target_parameters": [],
        "max_nodes": 2048,
        **chosen,
    }


def on_policy() -> dict[str, Any]:
    """What jobs have besides that weigh their samples by a probability ratio of policy and sampler."""
    return {
        "loss_type": "dapo",
        "max_completion_length": 256,
        "importance_cap": 2.0,
        "entropy_coef": 0.0,
        "beta": 0.0,
        "kl_estimator": "k2",
        "kl_reference": "base",
        "max_ratio": 1e4,
    }


def clipped() -> dict[str, Any]:
    """What jobs with a clipped ratio have besides."""
    return {
        **on_policy(),
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "delta": None,
        "clip_ratio_c": None,
    }


def read(kind: type[T], params: Mapping[str, Any]) -> T:
    """An algorithm's own parameters out of a job's; those that are not given have their defaults.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """
    try:
        return msgspec.convert(dict(params), kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`")
        subject = f"The parameter {name} is" if name else "The parameters are"
        raise ConfigError(
            f"{subject} not usable: {what}.",
            next_step=f"Correct it in the run's configuration{_choices(kind, name)}.",
        ) from error


def _choices(kind: type[msgspec.Struct], name: str) -> str:
    """What a parameter may be, where that is a list of words."""
    fields = cast("msgspec.inspect.StructType", msgspec.inspect.type_info(kind)).fields
    words = {f.name: f.type.values for f in fields if isinstance(f.type, msgspec.inspect.LiteralType)}
    return f": it is one of {', '.join(map(str, words[name]))}" if name in words else ""
