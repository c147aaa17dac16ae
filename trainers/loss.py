"""The losses of the one training loop, as pure functions of flat token tensors.

Every component is a sum over trained tokens divided by one denominator, which is computed once for the whole
optimiser step. So the result does not depend on how tokens are split into micro-batches, on padding, or on order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from bascule.schemas.errors import TrainError


@dataclass(frozen=True)
class LossInputs:
    """Tokens of one component in one micro-batch; all tensors have the same shape, usually [M].

    Attributes:
        logprobs: of the policy that is trained, with gradient.
        old: of the same policy at the start of the update, without gradient.
        behaviour: as recorded when the token was sampled.
        advantage: of the token's trajectory; a weight >= 0 for imitation.
        mask: true where the token was sampled by the policy; elsewhere the values are ignored, NaN included.
        reference: of the base model, where a KL penalty needs it.
    """

    logprobs: Tensor
    old: Tensor
    behaviour: Tensor
    advantage: Tensor
    mask: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class PolicyParams:
    """Bounds and coefficients of the policy loss.

    Attributes:
        epsilon: the ratio is clipped below at 1 - epsilon.
        epsilon_high: and above at 1 + epsilon_high (DAPO, arXiv 2503.14476).
        importance_cap: C of truncated importance sampling.
        beta: coefficient of the KL divergence to the base model.
    """

    epsilon: float = 0.2
    epsilon_high: float = 0.28
    importance_cap: float = 2.0
    beta: float = 0.0


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, which add up over micro-batches.

    Attributes:
        tokens: trained tokens.
        clipped: tokens at which the clip cuts the gradient.
        importance: truncated importance weights.
        importance_squared: their squares.
        kl_behaviour: k3 estimates of KL(behaviour || old).
        kl_reference: k2 estimates of the KL divergence to the base model.
    """

    tokens: float = 0.0
    clipped: float = 0.0
    importance: float = 0.0
    importance_squared: float = 0.0
    kl_behaviour: float = 0.0
    kl_reference: float = 0.0


@dataclass(frozen=True)
class LossOutputs:
    """A micro-batch's share of the loss (a scalar with gradient), and its sums."""

    loss: Tensor
    sums: LossSums


def policy_loss(inputs: LossInputs, params: PolicyParams, denominator: float) -> LossOutputs:
    """The clipped surrogate of PPO (arXiv 1707.06347, equation 7) with truncated importance sampling.

    Per token ``w * max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon_high))`` with ratio ``r = exp(logprobs - old)`` and
    ``w = min(exp(old - behaviour), C)``, which corrects for a sampler that is not the trainer. The KL penalty is k2 =
    ``(reference - logprobs)^2 / 2``: as a loss, unlike k1 and k3, it has the divergence's own gradient.

    Args:
        inputs: the tokens.
        params: bounds and coefficients.
        denominator: number of policy tokens in the whole optimiser step; at least 1 is used.

    Raises:
        TrainError: the loss is not finite.
    """
    mask = inputs.mask
    logprobs, old = _keep(inputs.logprobs, mask), _keep(inputs.old, mask).detach()
    behaviour, advantage = _keep(inputs.behaviour, mask), _keep(inputs.advantage, mask)
    ratio = torch.exp(logprobs - old)
    clipped_ratio = ratio.clamp(1 - params.epsilon, 1 + params.epsilon_high)
    importance = torch.exp(old - behaviour).clamp(max=params.importance_cap) * mask
    surrogate = torch.maximum(-advantage * ratio, -advantage * clipped_ratio)
    per_token = importance * surrogate
    kl_reference = torch.zeros_like(old)
    if inputs.reference is not None:
        kl_reference = (_keep(inputs.reference, mask) - logprobs) ** 2 / 2
        per_token = per_token + params.beta * kl_reference
    loss = _finite((per_token * mask).sum() / max(denominator, 1.0), "policy")
    drift = (old - behaviour).clamp(-20, 20)
    with torch.no_grad():
        sums = LossSums(
            tokens=_total(mask),
            clipped=_total((-advantage * clipped_ratio > -advantage * ratio) & mask),
            importance=_total(importance),
            importance_squared=_total(importance**2),
            kl_behaviour=_total((torch.exp(drift) - 1 - drift) * mask),
            kl_reference=_total(kl_reference * mask),
        )
    return LossOutputs(loss, sums)


def imitation_loss(inputs: LossInputs, denominator: float) -> LossOutputs:
    """Weighted cross-entropy: the sum of ``-weight * logprobs``.

    Args:
        inputs: the tokens; only ``logprobs``, ``advantage`` and ``mask`` are read.
        denominator: sum of the weights of all imitation tokens in the optimiser step; at least 1 is used.

    Raises:
        TrainError: the loss is not finite.
    """
    mask = inputs.mask
    per_token = -_keep(inputs.advantage, mask) * _keep(inputs.logprobs, mask)
    loss = _finite(per_token.sum() / max(denominator, 1.0), "imitation")
    return LossOutputs(loss, LossSums(tokens=_total(mask)))


def add_sums(parts: Iterable[LossSums]) -> LossSums:
    """Add up the sums of micro-batches."""
    rows = [astuple(part) for part in parts]
    return LossSums(*(sum(column) for column in zip(*rows, strict=True))) if rows else LossSums()


def effective_sample_size(sums: LossSums) -> float:
    """ESS of the importance weights as a share of the policy tokens: 1 if on-policy, near 0 if the data are stale."""
    return sums.importance**2 / (sums.tokens * sums.importance_squared) if sums.importance_squared else 1.0


def _keep(values: Tensor, mask: Tensor) -> Tensor:
    """Zero outside the mask; unlike multiplication this stops NaN, in the gradient too."""
    return torch.where(mask, values, torch.zeros_like(values))


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _finite(loss: Tensor, component: str) -> Tensor:
    if not bool(torch.isfinite(loss)):
        raise TrainError(
            f"The {component} loss is {float(loss.detach())}.",
            next_step="Lower learning_rate, or look for log-probabilities of minus infinity in the trajectories.",
        )
    return loss
