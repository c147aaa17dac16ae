"""The gradient of one optimiser step: losses of micro-batches, summed over them and over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bascule.plugins.algorithm import Algorithm, Component, OwnLoss
from bascule.schemas.errors import TrainError
from bascule.trainers.batch import COMPONENTS, WITH_RATIO, Floats, Ints, MicroBatch, gathered
from bascule.trainers.critic import Critic
from bascule.trainers.forward import TokenFigures, token_figures
from bascule.trainers.learner import Learner, training_mode
from bascule.trainers.loss import (
    LossInputs,
    LossOutputs,
    LossSums,
    add_sums,
    imitation_loss,
    pair_loss,
    policy_loss,
    reinforce_loss,
    value_loss,
)
from bascule.trainers.params import TrainParams
from bascule.trainers.passes import Packed, Passes
from bascule.trainers.streams import Streams

_SAME_POLICY = "Check that the engine serves this job's current adapter."


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        params: of the shared losses.
        algorithm: may have a loss of its own.
        given: the job's parameters, which that one reads.
    """

    params: TrainParams
    algorithm: Algorithm
    given: dict[str, Any]


@dataclass(frozen=True)
class StepSums:
    """Of an optimiser step or a part of it.

    Attributes:
        loss: of all components, as it is minimised.
        entropy: in nats, over the trained tokens.
        tokens: that were trained.
        sums: of the losses.
    """

    loss: float
    entropy: float
    tokens: int
    sums: LossSums


def step_gradient(
    batches: Packed,
    streams: Streams,
    objective: Objective,
    learner: Learner,
    passes: Passes,
    seed: tuple[int, ...],
) -> StepSums:
    """Set the gradients of adapter and critic to those of one optimiser step, the same bits on every process.

    Args:
        batches: of the step.
        streams: what its losses need.
        objective: gives the losses.
        learner: its gradients are written.
        passes: over the micro-batches, on all processes.
        seed: of the step's dropout; each micro-batch's is drawn from it and the micro-batch's index.

    Raises:
        TrainError: a loss is not finite or lacks its stream, a token's ratio is over ``max_ratio``, or memory ran out.
    """
    trained = [*learner.adapter_parameters(), *learner.critic_parameters()]

    def clear() -> None:
        for p in trained:
            p.grad = None

    def backward(index: int, batch: MicroBatch, counts: bool) -> StepSums:
        with training_mode(learner, len(batch.tree.tokens), hash((*seed, index)) % 2**63):
            now = token_figures(learner.base, batch, entropy_gradient=objective.params.entropy_coef > 0)
            try:
                outputs = losses(now, batch, streams, objective, learner.critic)
                loss = torch.stack([o.loss for o in outputs]).sum()
            except TrainError:
                if passes.processes.sharded:  # the other processes wait in this pass
                    (0 * now.logprobs.sum()).backward()  # type: ignore[no-untyped-call]
                raise
            (loss if counts else 0 * loss).backward()  # type: ignore[no-untyped-call]
        entropy = float(now.entropy.detach().sum(dtype=torch.float64))
        return StepSums(float(loss.detach()), entropy, len(batch.target), add_sums(o.sums for o in outputs))

    every = passes.each(batches, backward, clear)
    if passes.processes.size > 1:
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        passes.processes.add([p.grad for p in trained if p.grad is not None])
    return StepSums(
        math.fsum(s.loss for s in every),
        math.fsum(s.entropy for s in every),
        sum(s.tokens for s in every),
        add_sums(s.sums for s in every),
    )


def losses(
    now: TokenFigures, batch: MicroBatch, streams: Streams, objective: Objective, critic: Critic | None
) -> list[LossOutputs]:
    """The losses of one micro-batch with gradient: of each component that it has, and the critic's.

    Where the policy does not move during an update, its log-probabilities before are those of this very pass.

    Raises:
        TrainError: as :func:`step_gradient`.
    """
    device = now.logprobs.device

    def floats(values: Floats) -> Tensor:
        return torch.from_numpy(values).to(device, torch.float32)

    def ints(values: Ints) -> Tensor:
        return torch.from_numpy(values).to(device)

    params = objective.params
    old = now.logprobs.detach() if streams.policy is None else floats(gathered(streams.policy, batch))
    reference = None if streams.reference is None else floats(gathered(streams.reference, batch))
    behaviour = floats(batch.behaviour)
    _check_ratio(old, behaviour, batch, params.max_ratio)
    outputs = []
    for code, component in enumerate(COMPONENTS):
        chosen = np.flatnonzero(batch.component == code)
        if not len(chosen):
            continue
        at = ints(chosen)
        inputs = LossInputs(
            logprobs=now.logprobs[at],
            old=old[at],
            behaviour=behaviour[at],
            advantage=floats(batch.advantage[chosen]),
            weight=floats(batch.weight[chosen]),
            sequence=ints(batch.sequence[chosen]),
            sequences=int(batch.sequence[chosen].max()) + 1,
            reference=None if reference is None else reference[at],
            entropy=now.entropy[at] if params.entropy_coef > 0 else None,
        )
        outputs.append(_component_loss(component, inputs, objective))
    if streams.values is not None and critic is not None:
        known = np.flatnonzero(np.isfinite(batch.returns))
        before = floats(gathered(streams.values, batch)[known])
        returns, weight = floats(batch.returns[known]), floats(batch.value_weight[known])
        outputs.append(value_loss(critic(now.hidden[ints(known)]), before, returns, weight, params))
    return outputs


def _component_loss(component: Component, inputs: LossInputs, objective: Objective) -> LossOutputs:
    match component:
        case "policy":
            return policy_loss(inputs, objective.params)
        case "reinforce":
            return reinforce_loss(inputs, objective.params)
        case "imitation":
            return imitation_loss(inputs)
        case "pair":
            return pair_loss(inputs, objective.params)
        case "own":
            return _own_loss(inputs, objective.algorithm, objective.given)


def _own_loss(inputs: LossInputs, algorithm: Algorithm, given: dict[str, Any]) -> LossOutputs:
    if not isinstance(algorithm, OwnLoss):
        raise TrainError(f"The algorithm {algorithm.name} gives credit for a loss of its own and has none.")
    per_token = algorithm.token_loss(inputs, given)
    if per_token.shape != inputs.weight.shape:
        raise TrainError(
            f"The loss of {algorithm.name} has the shape {tuple(per_token.shape)} for {len(inputs.weight)} tokens, "
            "not one for each.",
        )
    loss = (inputs.weight * per_token).sum()
    if not bool(torch.isfinite(loss)):
        raise TrainError(f"The loss of {algorithm.name} is {float(loss.detach())}.")
    return LossOutputs(loss, LossSums())


def check_kl(kl: float, params: TrainParams) -> None:
    """Refuse samples of another policy.

    Args:
        kl: mean over tokens of an estimate of KL(sampler || policy) before the update, in nats.
        params: ``max_kl`` is read.

    Raises:
        TrainError: it is over the bound.
    """
    if kl > params.max_kl:
        raise TrainError(
            f"The sampler's policy is {kl:.3g} nats (KL) from the trainer's, over the bound max_kl = "
            f"{params.max_kl:g}.",
            next_step=_SAME_POLICY,
            figures={"kl": kl},
        )


def _check_ratio(old: Tensor, behaviour: Tensor, batch: MicroBatch, bound: float) -> None:
    """Refuse tokens that the sampler can hardly have drawn from this policy.

    Raises:
        TrainError: a probability ratio of policy and sampler, or its inverse, is over ``bound``.
    """
    ratio = np.isin(batch.component, [COMPONENTS.index(c) for c in WITH_RATIO])
    drift = (old - behaviour).abs()[torch.from_numpy(ratio).to(old.device)]
    worst = math.exp(min(float(drift.max()), 700.0)) if drift.numel() else 1.0
    if worst > bound:
        raise TrainError(
            f"A token's probability differs between sampler and trainer by a factor of {worst:.3g}, over the bound "
            f"max_ratio = {bound:g}.",
            next_step=_SAME_POLICY,
            figures={"ratio": worst},
        )
