"""Hyperparameters of the training loop, under the names that TRL and verl use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from bascule.schemas.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class TrainParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the loop reads of an algorithm's parameters; the others are the algorithm's own.

    Attributes:
        learning_rate: peak of the schedule.
        lr_scheduler_type: over ``steps * num_iterations`` optimiser steps.
        warmup_steps: optimiser steps of linear warm-up.
        steps: on-policy iterations of the job.
        groups: train examples of one iteration.
        num_generations: samples of each of them.
        num_iterations: optimiser steps on each iteration's batch.
        max_grad_norm: bound on the norm of all gradients.
        weight_decay: of AdamW.
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        adam_epsilon: of AdamW.
        epsilon: the ratio is clipped below at 1 - epsilon.
        epsilon_high: and above at 1 + epsilon_high.
        importance_cap: C of truncated importance sampling.
        beta: coefficient of the KL divergence to the base model.
        lora_r: rank.
        lora_alpha: the adapter is scaled by ``lora_alpha / lora_r``.
        max_nodes: tokens of one micro-batch's tree.
        max_kl: bound on the mean KL divergence of the sampler from the policy before an update.
        max_ratio: bound on any token's probability ratio of policy and sampler, or its inverse, before an update.
    """

    learning_rate: Positive = 2e-4
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    steps: Count = 1
    groups: Count = 32
    num_generations: Count = 8
    num_iterations: Count = 1
    max_grad_norm: Positive = 1.0
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    adam_beta1: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.999
    adam_epsilon: Positive = 1e-8
    epsilon: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.2
    epsilon_high: Annotated[float, msgspec.Meta(ge=0)] = 0.28
    importance_cap: Positive = 2.0
    beta: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    lora_r: Count = 16
    lora_alpha: Positive = 32.0
    max_nodes: Count = 2048
    max_kl: Positive = 0.5
    max_ratio: Positive = 1e4


def train_params(params: Mapping[str, Any]) -> TrainParams:
    """Read and check the loop's hyperparameters; other keys are ignored.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """
    try:
        return msgspec.convert(dict(params), TrainParams)
    except msgspec.ValidationError as error:
        raise ConfigError(f"A training hyperparameter is not usable: {error}.") from error


def scheduled_rate(params: TrainParams, step: int) -> float:
    """The learning rate of optimiser step ``step`` (from 0); it falls to 0 just after the last one."""
    total = params.steps * params.num_iterations
    rate = params.learning_rate * min(1.0, (step + 1) / max(params.warmup_steps, 1))
    progress = min(step / total, 1.0)
    if params.lr_scheduler_type == "linear":
        return rate * (1 - progress)
    if params.lr_scheduler_type == "cosine":
        return rate * (1 + math.cos(math.pi * progress)) / 2
    return rate
