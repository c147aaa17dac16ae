"""The losses of the one training loop, as pure functions of flat token tensors.

Every token comes with its ``weight``: its share of the whole optimiser step under the chosen average. A loss is the sum
of weight times token loss, so it does not depend on how tokens are split into micro-batches, on padding, or on order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bascule.schemas.errors import TrainError
from bascule.trainers.params import TrainParams

#: Differences of log-probabilities, in nats, are taken as at most this in the k3 estimate, which is their exponential.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class LossInputs:
    """M sampled tokens of one component in one micro-batch, of S whole trajectories.

    Attributes:
        logprobs: [M] of the policy that is trained, with gradient.
        old: [M] of the same policy at the start of the update, without gradient.
        behaviour: [M] as recorded when the token was sampled; NaN where unknown, for imitation and pairs only.
        advantage: [M]; for imitation and pairs a weight >= 0.
        weight: [M] share of the token in the optimiser step.
        sequence: [M] which trajectory a token is of, 0 to S - 1; of pair k the preferred one is 2k, the other 2k + 1.
        sequences: S.
        reference: [M] of the reference model, where the loss needs it.
        entropy: [M] of the next-token distribution, with gradient, where there is an entropy bonus.
    """

    logprobs: Tensor
    old: Tensor
    behaviour: Tensor
    advantage: Tensor
    weight: Tensor
    sequence: Tensor
    sequences: int
    reference: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens and pairs, which add up over micro-batches and components.

    Attributes:
        tokens: tokens with an importance weight; those of imitation and pairs have none.
        clipped: tokens at which a bound on the ratio cuts the gradient.
        importance: truncated importance weights.
        importance_squared: their squares.
        kl_behaviour: k3 estimates of KL(behaviour || old), in nats.
        kl_reference: estimates of the KL divergence to the reference by ``kl_estimator``, in nats; 0 without one.
        pairs: pairs of trajectories.
        pair_accuracy: pairs whose preferred trajectory gained more over the reference than the other.
        pair_margin: by how much it did, times beta (the difference of DPO's implicit rewards).
    """

    tokens: float = 0.0
    clipped: float = 0.0
    importance: float = 0.0
    importance_squared: float = 0.0
    kl_behaviour: float = 0.0
    kl_reference: float = 0.0
    pairs: float = 0.0
    pair_accuracy: float = 0.0
    pair_margin: float = 0.0


@dataclass(frozen=True)
class LossOutputs:
    """A micro-batch's share of the loss (a scalar with gradient), and its sums."""

    loss: Tensor
    sums: LossSums


def policy_loss(inputs: LossInputs, params: TrainParams) -> LossOutputs:
    """The clipped surrogate of PPO (arXiv 1707.06347, equation 7) with truncated importance sampling.

    Per token ``w max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon_high)) + beta KL - entropy_coef H``. The weight
    ``w = min(exp(old - behaviour), importance_cap)`` is a constant that corrects for a sampler that is not the trainer.

    At ``importance_sampling_level`` ``token`` the ratio is ``r = exp(logprobs - old)``. At ``sequence`` its value is
    the exponential of the mean of ``logprobs - old`` over the trajectory, and its gradient that value times the
    gradient of the token's own log-probability (GSPO-token, arXiv 2507.18071). Where A, w and the token's share are
    constant in a trajectory, that is the gradient of GSPO.

    ``delta`` bounds r in the unclipped term (two-sided clip, arXiv 2505.07291), ``clip_ratio_c`` bounds the loss at
    ``-A * clip_ratio_c`` where A < 0 (dual clip, arXiv 1912.09729).

    Args:
        inputs: the tokens of whole trajectories.
        params: bounds and coefficients.

    Raises:
        TrainError: the loss is not finite, or a regulariser lacks its stream.
    """
    advantage = inputs.advantage
    ratio = torch.exp(_log_ratio(inputs, params.importance_sampling_level))
    bounded = ratio if params.delta is None else ratio.clamp(max=params.delta)
    clipped = ratio.clamp(1 - params.epsilon, 1 + params.epsilon_high)
    surrogate = torch.maximum(-advantage * bounded, -advantage * clipped)
    if params.clip_ratio_c is not None:
        dual = torch.minimum(surrogate, -advantage * params.clip_ratio_c)
        surrogate = torch.where(advantage < 0, dual, surrogate)
    importance = torch.exp(inputs.old - inputs.behaviour).clamp(max=params.importance_cap)
    return _regularized("policy", inputs, params, importance * surrogate, importance, surrogate != -advantage * ratio)


def reinforce_loss(inputs: LossInputs, params: TrainParams) -> LossOutputs:
    """REINFORCE with a truncated importance weight: per token ``-w A logprobs + beta KL - entropy_coef H``.

    ``w = min(exp(logprobs - behaviour), importance_cap)`` is a constant, so that unlike a clipped ratio it never cuts
    a token's gradient (CISPO, arXiv 2506.13585).

    Args:
        inputs: the tokens.
        params: ``importance_cap``, ``beta``, ``kl_estimator`` and ``entropy_coef`` are read.

    Raises:
        TrainError: the loss is not finite, or a regulariser lacks its stream.
    """
    importance = torch.exp(inputs.logprobs.detach() - inputs.behaviour).clamp(max=params.importance_cap)
    per_token = -importance * inputs.advantage * inputs.logprobs
    return _regularized("reinforce", inputs, params, per_token, importance, torch.zeros_like(importance))


def imitation_loss(inputs: LossInputs) -> LossOutputs:
    """Weighted cross-entropy: per token ``-advantage * logprobs``, with ``advantage`` a weight >= 0.

    Args:
        inputs: the tokens; ``logprobs``, ``advantage`` and ``weight`` are read.

    Raises:
        TrainError: the loss is not finite.
    """
    loss = -(inputs.weight * inputs.advantage * inputs.logprobs).sum()
    return LossOutputs(_finite(loss, "imitation"), LossSums())


def pair_loss(inputs: LossInputs, params: TrainParams) -> LossOutputs:
    """Direct preference optimisation, from the gain ``h = sum(logprobs - reference)`` of each trajectory.

    ``sigmoid`` (DPO, arXiv 2305.18290, equation 7; with ``label_smoothing`` e cDPO) is, for the difference d of the
    gains of the preferred trajectory and the other, ``-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)``. ``ipo``
    (arXiv 2310.12036, equation 17) is ``(d - 1 / (2 beta))^2`` with gains per token, so that beta does not depend on
    length.

    Args:
        inputs: the tokens of whole pairs; every trajectory has at least one. ``advantage * weight`` is the pair's
            share of the optimiser step and is the same at all of its tokens.
        params: ``pair_loss``, ``beta`` and ``label_smoothing`` are read.

    Raises:
        TrainError: the loss is not finite, or there is no reference.
    """
    reference = _given(inputs.reference, "the pair loss", "the reference's log-probabilities")
    pairs = inputs.sequences // 2
    gain = _by_sequence(inputs.logprobs - reference, inputs)
    weight = inputs.weight * inputs.advantage
    share = weight.new_zeros(inputs.sequences).scatter(0, inputs.sequence, weight).view(pairs, 2)[:, 0]
    difference = _difference(gain, pairs)
    margin = params.beta * difference
    if params.pair_loss == "ipo":
        gain_per_token = gain / _by_sequence(torch.ones_like(inputs.logprobs), inputs)
        per_pair = (_difference(gain_per_token, pairs) - 1 / (2 * params.beta)) ** 2
    else:
        smooth = params.label_smoothing
        per_pair = -(1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin)
    loss = _finite((share * per_pair).sum(), "pair")
    accuracy, margins = _totals(difference > 0, margin)
    return LossOutputs(loss, LossSums(pairs=float(pairs), pair_accuracy=accuracy, pair_margin=margins))


def own_loss(name: str, inputs: LossInputs, per_token: Tensor, params: TrainParams) -> LossOutputs:
    """The loss [M] that the algorithm ``name`` brought, with what is known of the samples besides.

    Raises:
        TrainError: the loss is not finite, or not one for each token.
    """
    if per_token.shape != inputs.weight.shape:
        raise TrainError(
            f"The loss of {name} has the shape {tuple(per_token.shape)} for {len(inputs.weight)} tokens, not one for "
            "each."
        )
    loss = _finite((inputs.weight * per_token).sum(), name)
    importance = torch.exp(inputs.old - inputs.behaviour).clamp(max=params.importance_cap)
    none = torch.zeros_like(importance)
    return LossOutputs(loss, _ratio_sums(inputs, importance, none, none))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, weight: Tensor, params: TrainParams) -> Tensor:
    """The critic's clipped squared error (arXiv 2005.12729), times ``vf_coef``.

    Per token ``0.5 * max((V - R)^2, (V_old + clip(V - V_old, -cliprange_value, cliprange_value) - R)^2)``.

    Args:
        values: [N] the critic's estimates V, with gradient.
        old_values: [N] its estimates at the start of the update.
        returns: [N] what it is to predict.
        weight: [N] share of the token in the optimiser step.
        params: ``vf_coef`` and ``cliprange_value`` are read.

    Raises:
        TrainError: the loss is not finite.
    """
    bound = params.cliprange_value
    error = (values - returns) ** 2
    clipped_error = (old_values + (values - old_values).clamp(-bound, bound) - returns) ** 2
    loss = params.vf_coef * (weight * torch.maximum(error, clipped_error) / 2).sum()
    return _finite(loss, "value")


def add_sums(parts: Iterable[LossSums]) -> LossSums:
    """Add up the sums of micro-batches and components."""
    rows = [astuple(part) for part in parts]
    return LossSums(*(sum(column) for column in zip(*rows, strict=True))) if rows else LossSums()


def effective_sample_size(sums: LossSums) -> float:
    """ESS of the importance weights as a share of the tokens: 1 if on-policy, near 0 if the data are stale."""
    return sums.importance**2 / (sums.tokens * sums.importance_squared) if sums.importance_squared else 1.0


def _log_ratio(inputs: LossInputs, level: Literal["token", "sequence"]) -> Tensor:
    log_ratio = inputs.logprobs - inputs.old
    if level == "token":
        return log_ratio
    total = _by_sequence(log_ratio.detach(), inputs)
    tokens = _by_sequence(torch.ones_like(log_ratio), inputs)
    return (total / tokens)[inputs.sequence] + (inputs.logprobs - inputs.logprobs.detach())


def _regularized(
    component: str, inputs: LossInputs, params: TrainParams, per_token: Tensor, importance: Tensor, clipped: Tensor
) -> LossOutputs:
    """Add ``beta * KL - entropy_coef * entropy`` to each token's loss, and sum.

    With ``d = reference - logprobs`` the KL term is k2 = ``d^2 / 2``, or k3 = ``exp(d) - d - 1`` (d within
    :data:`MAX_LOG_RATIO`) times the token's ratio (arXiv 2512.02556). Of the usual estimators only these
    two, as a loss, have the divergence's own gradient; k1's is 0 in expectation, and bare k3's is another one.
    """
    kl = torch.zeros_like(importance)
    if inputs.reference is not None:
        difference = inputs.reference - inputs.logprobs
        if params.kl_estimator == "k2":
            kl = difference**2 / 2
        else:
            kl = _k3(difference) * torch.exp(inputs.logprobs - inputs.old)
    if params.beta > 0:
        _given(inputs.reference, f"the {component} loss with beta > 0", "the reference's log-probabilities")
        per_token = per_token + params.beta * kl
    if params.entropy_coef > 0:
        entropy = _given(inputs.entropy, f"the {component} loss with entropy_coef > 0", "the entropy")
        per_token = per_token - params.entropy_coef * entropy
    loss = _finite((inputs.weight * per_token).sum(), component)
    return LossOutputs(loss, _ratio_sums(inputs, importance, clipped, kl))


def _ratio_sums(inputs: LossInputs, importance: Tensor, clipped: Tensor, kl: Tensor) -> LossSums:
    sums = _totals(clipped, importance, importance**2, _k3(inputs.old - inputs.behaviour), kl)
    return LossSums(float(importance.numel()), *sums)


def _k3(difference: Tensor) -> Tensor:
    bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(bounded) - bounded


def _by_sequence(values: Tensor, inputs: LossInputs) -> Tensor:
    """[S] sums of [M] values over each trajectory's tokens."""
    return values.new_zeros(inputs.sequences).index_add(0, inputs.sequence, values)


def _difference(gain: Tensor, pairs: int) -> Tensor:
    """[S / 2] by how much the preferred trajectory's is more than the other's."""
    preferred, other = gain.view(pairs, 2).unbind(1)
    return preferred - other


def _totals(*values: Tensor) -> list[float]:
    return [float(v) for v in torch.stack([v.detach().sum(dtype=torch.float64) for v in values]).tolist()]


def _given(stream: Tensor | None, where: str, what: str) -> Tensor:
    if stream is None:
        raise TrainError(
            f"{where[0].upper()}{where[1:]} needs {what}, and none were computed.",
            next_step="Set the coefficient to 0, or let the loop compute them.",
        )
    return stream


def _finite(loss: Tensor, component: str) -> Tensor:
    if not bool(torch.isfinite(loss)):
        raise TrainError(
            f"The {component} loss is {float(loss.detach())}.",
            next_step="Lower learning_rate, or look for log-probabilities of minus infinity in the trajectories.",
        )
    return loss
