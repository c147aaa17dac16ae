"""Hyperparameters of the training loop, under the names that TRL and verl use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from bascule.plugins.algorithms.params import read

Count = Annotated[int, msgspec.Meta(ge=1)]
Whole = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Above = Annotated[float, msgspec.Meta(gt=1)]


class TrainParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the loop reads of an algorithm's parameters; the others are the algorithm's own.

    Attributes:
        start_from: the adapter that a job continues from: that of the promoted candidate, or none.
        learning_rate: peak of the schedule.
        lr_scheduler_type: over ``steps * num_iterations * num_mini_batches`` optimiser steps.
        warmup_steps: optimiser steps of linear warm-up.
        steps: on-policy iterations of the job.
        groups: train examples of one iteration.
        num_generations: samples of each of them.
        num_iterations: passes over each iteration's batch.
        num_mini_batches: optimiser steps of a pass; a group is never split.
        max_grad_norm: bound on the norm of all gradients of the adapter, and of the critic's.
        weight_decay: of AdamW.
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        adam_epsilon: of AdamW.
        loss_type: how token losses are averaged: ``dapo`` (over all tokens of the optimiser step), ``grpo`` (over each
            trajectory's tokens, then over trajectories), ``dr_grpo`` (sum over trajectories * max_completion_length);
            trajectories without credit are in none of these divisors.
        max_completion_length: constant divisor of ``dr_grpo``.
        importance_sampling_level: the ratio of each token, or of the whole trajectory (GSPO, arXiv 2507.18071).
        epsilon: the ratio is clipped below at 1 - epsilon.
        epsilon_high: and above at 1 + epsilon_high (DAPO, arXiv 2503.14476).
        delta: upper bound on the ratio in the term that is not clipped (TRL's two-sided clip); None for none.
        clip_ratio_c: bound c of the dual clip (arXiv 1912.09729) for negative advantages; None for none.
        importance_cap: C of truncated importance sampling.
        beta: coefficient of the KL divergence to the reference in the loss; for pairs, DPO's beta.
        kl_estimator: in the loss ``k2``, or ``k3`` times the ratio; both have the divergence's own gradient.
        kl_reference: the model without an adapter, or the adapter that the job continued from.
        entropy_coef: of the entropy bonus.
        kl_coef: of the KL divergence in the reward, for algorithms that put it there; where it adapts, at first.
        target_kl: the controller of arXiv 1909.08593 moves ``kl_coef`` towards this divergence; None keeps it fixed.
        horizon: trajectories over which the controller moves it.
        vf_coef: of the critic's loss.
        cliprange_value: the critic's estimate is clipped to this distance from its old one.
        critic_learning_rate: of the critic, which is trained by its own loss alone.
        critic_warmup: iterations at first that train the critic only.
        pair_loss: ``sigmoid`` (DPO) or ``ipo`` (arXiv 2310.12036).
        label_smoothing: probability that a pair is the wrong way round (cDPO).
        lora_r: rank.
        lora_alpha: the adapter is scaled by ``lora_alpha / lora_r``.
        lora_dropout: in the passes with gradient of imitation and pairs; a loss with a probability ratio takes none,
            for the ratio would not be 1 where the policy has not moved.
        lora_target_modules: last names of the adapted modules; None for all linear layers but the output embedding.
        lora_target_parameters: names of adapted parameters that are no layers, as the experts of gpt-oss.
        max_nodes: tokens of one micro-batch's tree.
        max_kl: bound on the mean KL divergence of the sampler from the policy before an update, and of that policy from
            the one that an update of several optimiser steps has reached (of tokens that imitation and pairs chose,
            those that became less likely); after the last step log-probabilities may have changed 4 times so much on
            average.
        max_ratio: bound on any token's probability ratio of policy and sampler, or its inverse, before an update.
    """

    start_from: Literal["promoted", "base"] = "promoted"
    learning_rate: Positive = 2e-4
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Whole = 0
    steps: Count = 1
    groups: Count = 32
    num_generations: Count = 8
    num_iterations: Count = 1
    num_mini_batches: Count = 1
    max_grad_norm: Positive = 1.0
    weight_decay: NotNegative = 0.0
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Positive = 1e-8
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    max_completion_length: Count = 256
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: Share = 0.2
    epsilon_high: NotNegative = 0.28
    delta: Above | None = None
    clip_ratio_c: Above | None = None
    importance_cap: Positive = 2.0
    beta: NotNegative = 0.0
    kl_estimator: Literal["k2", "k3"] = "k2"
    kl_reference: Literal["base", "promoted"] = "base"
    entropy_coef: NotNegative = 0.0
    kl_coef: NotNegative = 0.0
    target_kl: Positive | None = None
    horizon: Positive = 10_000.0
    vf_coef: NotNegative = 0.1
    cliprange_value: Positive = 0.2
    critic_learning_rate: Positive = 1e-3
    critic_warmup: Whole = 0
    pair_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.0
    lora_r: Count = 32
    lora_alpha: Positive = 64.0
    lora_dropout: Share = 0.0
    lora_target_modules: tuple[str, ...] | None = None
    lora_target_parameters: tuple[str, ...] = ()
    max_nodes: Count = 2048
    max_kl: Positive = 0.5
    max_ratio: Positive = 1e4


def train_params(params: Mapping[str, Any]) -> TrainParams:
    """Read and check the loop's hyperparameters; other keys are ignored.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """
    return read(TrainParams, params)


def scheduled_rate(params: TrainParams, step: int) -> float:
    """The learning rate of optimiser step ``step`` (from 0).

    ``linear`` and ``cosine`` reach 0 at step ``steps * num_iterations * num_mini_batches``, the first that a job whose
    updates all have their steps does not take. An update without credit takes none, one of fewer groups than
    ``num_mini_batches`` takes fewer, and the rate ends higher then.
    """
    total = params.steps * params.num_iterations * params.num_mini_batches
    rate = params.learning_rate * min(1.0, (step + 1) / max(params.warmup_steps, 1))
    progress = min(step / total, 1.0)
    if params.lr_scheduler_type == "linear":
        return rate * (1 - progress)
    if params.lr_scheduler_type == "cosine":
        return rate * (1 + math.cos(math.pi * progress)) / 2
    return rate
