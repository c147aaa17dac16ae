"""The gradient of one optimiser step: losses of micro-batches, summed over them and over processes."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bascule.plugins.algorithm import Algorithm, Component, OwnLoss
from bascule.schemas.errors import TrainError
from bascule.trainers.batch import COMPONENTS, WITH_RATIO, Floats, Ints, MicroBatch, gathered, scattered
from bascule.trainers.critic import Critic
from bascule.trainers.forward import TokenFigures, token_figures
from bascule.trainers.learner import Learner, training_mode
from bascule.trainers.loss import (
    MAX_LOG_RATIO,
    LossInputs,
    LossOutputs,
    LossSums,
    add_sums,
    imitation_loss,
    own_loss,
    pair_loss,
    policy_loss,
    reinforce_loss,
    value_loss,
)
from bascule.trainers.params import TrainParams
from bascule.trainers.passes import Packed, Passes
from bascule.trainers.streams import PerToken, Streams

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
        moved: k3 estimates of KL(policy before the update || policy), in nats, over the trained tokens; 0 where the
            policy before was not known, and for a token of imitation or a pair that has become likelier.
        sums: of the losses.
    """

    loss: float
    entropy: float
    tokens: int
    moved: float
    sums: LossSums


def step_gradient(
    batches: Packed,
    streams: Streams,
    objective: Objective,
    learner: Learner,
    passes: Passes,
    seed: tuple[int, ...],
) -> tuple[StepSums, Streams]:
    """Set the gradients of adapter and critic to those of one optimiser step, the same bits on every process.

    Args:
        batches: of the step.
        streams: what its losses need.
        objective: gives the losses.
        learner: its gradients are written.
        passes: over the micro-batches, on all processes.
        seed: of the step's dropout; each micro-batch's is drawn from it and the micro-batch's index.

    Returns:
        The sums, and the streams for later steps on the same batch: with the policy's log-probabilities of this one,
        where they were not known and there are later steps.

    Raises:
        TrainError: a loss is not finite or lacks its stream, a token's ratio is over ``max_ratio``, or memory ran out.
    """
    trained = [*learner.adapter_parameters(), *learner.critic_parameters()]

    def clear() -> None:
        for p in trained:
            p.grad = None

    keep = streams.policy is None and objective.params.num_iterations > 1

    def backward(index: int, batch: MicroBatch, counts: bool) -> tuple[StepSums, Floats | None]:
        with training_mode(learner, len(batch.tree.tokens), _drawn(*seed, index)):
            now = token_figures(learner.base, batch, entropy_gradient=objective.params.entropy_coef > 0)
            old = _before(now, batch, streams)
            try:
                outputs = losses(now, old, batch, streams, objective, learner.critic)
                loss = torch.stack([o.loss for o in outputs]).sum()
            except TrainError:
                if passes.processes.sharded:  # the other processes wait in this pass
                    (0 * now.logprobs.sum()).backward()  # type: ignore[no-untyped-call]
                raise
            (loss if counts else 0 * loss).backward()  # type: ignore[no-untyped-call]
        entropy = float(now.entropy.detach().sum(dtype=torch.float64))
        moved = (now.logprobs.detach() - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        # Tokens of imitation and pairs were chosen to become likelier; of those, what becomes less likely counts.
        moved = torch.where(_with_ratio(batch, old.device), moved, moved.clamp(max=0))
        sums = StepSums(
            loss=float(loss.detach()),
            entropy=entropy,
            tokens=len(batch.target),
            moved=float((torch.expm1(moved) - moved).sum(dtype=torch.float64)),
            sums=add_sums(o.sums for o in outputs),
        )
        return sums, old.cpu().numpy().astype(np.float64) if keep else None

    found = passes.each(batches, backward, clear)
    every = [sums for sums, _ in found]
    if passes.processes.size > 1:
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        passes.processes.add([p.grad for p in trained if p.grad is not None])
    total = StepSums(
        loss=math.fsum(s.loss for s in every),
        entropy=math.fsum(s.entropy for s in every),
        tokens=sum(s.tokens for s in every),
        moved=math.fsum(s.moved for s in every),
        sums=add_sums(s.sums for s in every),
    )
    first = [old for _, old in found if old is not None]
    return total, replace(streams, policy=scattered(batches(passes.max_nodes), first)) if first else streams


def _drawn(*numbers: int) -> int:
    """A seed for torch's generators."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=7).digest())


def _with_ratio(batch: MicroBatch, device: torch.device) -> Tensor:
    """[M] which tokens are of a component that compares the policy with the sampler."""
    return torch.from_numpy(np.isin(batch.component, [COMPONENTS.index(c) for c in WITH_RATIO])).to(device)


def _before(now: TokenFigures, batch: MicroBatch, streams: Streams) -> Tensor:
    """[M] the policy's log-probabilities before the update: those of this very pass where no others are known."""
    if streams.policy is None:
        return now.logprobs.detach()
    return torch.from_numpy(gathered(streams.policy, batch)).to(now.logprobs.device, torch.float32)


def losses(
    now: TokenFigures, old: Tensor, batch: MicroBatch, streams: Streams, objective: Objective, critic: Critic | None
) -> list[LossOutputs]:
    """The losses of one micro-batch with gradient: of each component that it has, and the critic's.

    Args:
        now: figures of its M tokens.
        old: [M] the policy's log-probabilities before the update.
        batch: the micro-batch.
        streams: what the losses need besides.
        objective: gives them.
        critic: if there is one.

    Raises:
        TrainError: as :func:`step_gradient`.
    """
    device = now.logprobs.device

    def floats(values: Floats) -> Tensor:
        return torch.from_numpy(values).to(device, torch.float32)

    def ints(values: Ints) -> Tensor:
        return torch.from_numpy(values).to(device)

    params = objective.params
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
        loss = value_loss(critic(now.hidden[ints(known)]), before, returns, weight, params)
        outputs.append(LossOutputs(loss, LossSums()))
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
            return _own_loss(inputs, objective)


def _own_loss(inputs: LossInputs, objective: Objective) -> LossOutputs:
    if not isinstance(objective.algorithm, OwnLoss):
        raise TrainError(f"The algorithm {objective.algorithm.name} gives credit for a loss of its own and has none.")
    per_token = objective.algorithm.token_loss(inputs, copy.deepcopy(objective.given))
    return own_loss(objective.algorithm.name, inputs, per_token, objective.params)


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


def moved_between(before: PerToken, after: PerToken) -> float:
    """Mean over the tokens of how much their log-probability has changed, in nats; one token counts at most 20.

    Tokens whose log-probability before is not known (NaN) are left out; it is NaN without any other. No estimate of a
    divergence, but steady where there are few tokens: k3 of them may be that of a single one which has become likely.
    """
    found = [np.clip(np.abs(after[t] - before[t]), 0, MAX_LOG_RATIO) for t in before]
    known = np.concatenate(found)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else math.nan


def check_moved(moved: float, step: int, max_kl: float, times: float = 1.0) -> None:
    """Refuse to go on where an update has run away from the policy that it began with.

    Args:
        moved: mean over tokens of an estimate of KL(policy before the update || policy), or of the change of their
            log-probability, in nats.
        step: of the update, from 0; the one that finds it so.
        max_kl: the parameter.
        times: the bound is so many times ``max_kl``; more than 1 for a change.

    Raises:
        TrainError: it is over the bound.
    """
    if moved > times * max_kl:
        raise TrainError(
            f"Optimiser step {step} of the update finds the policy {moved:.3g} nats from where the update began, "
            f"over the bound of {times * max_kl:g} that follows from max_kl = {max_kl:g}.",
            next_step="Lower learning_rate, num_iterations or num_mini_batches, or raise max_kl.",
            figures={"kl_update": moved, "step": float(step)},
        )


def _check_ratio(old: Tensor, behaviour: Tensor, batch: MicroBatch, bound: float) -> None:
    """Refuse tokens that the sampler can hardly have drawn from this policy.

    Raises:
        TrainError: a probability ratio of policy and sampler, or its inverse, is over ``bound``.
    """
    drift = (old - behaviour).abs()[_with_ratio(batch, old.device)]
    worst = math.exp(min(float(drift.max()), 700.0)) if drift.numel() else 1.0
    if worst > bound:
        raise TrainError(
            f"A token's probability differs between sampler and trainer by a factor of {worst:.3g}, over the bound "
            f"max_ratio = {bound:g}.",
            next_step=_SAME_POLICY,
            figures={"ratio": worst},
        )
