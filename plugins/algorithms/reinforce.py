"""REINFORCE with the KL divergence to the base in the reward, and RLOO (arXiv 2402.14740)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from bascule.plugins.algorithm import Credit, Group, Requires, Sample, Stream
from bascule.plugins.algorithms.groups import scored, token_logprobs
from bascule.plugins.algorithms.params import job, on_policy, read


class ReinforceParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the credit reads.

    Attributes:
        kl_coef: of the k1 estimate of the divergence to the reference, summed over the trajectory.
        baseline: mean of the group's other samples (``loo``), mean of the ``batch``, or ``none``.
        normalize_advantages: to mean 0 and standard deviation 1 over the batch.
        reward_clip_range: bounds on the reward, before the divergence is subtracted; None for none.
    """

    kl_coef: Annotated[float, msgspec.Meta(ge=0)] = 0.05
    baseline: Literal["loo", "batch", "none"] = "loo"
    normalize_advantages: bool = False
    reward_clip_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.reward_clip_range is not None and not self.reward_clip_range[0] < self.reward_clip_range[1]:
            raise ValueError(f"reward_clip_range {list(self.reward_clip_range)} is not a lower and a higher bound")


class Reinforce:
    """R'_i = R_i - kl_coef sum_t (log pi_t - log ref_t); A_i = R'_i - b_i for every token of sample i. The baseline b_i
    is the mean R' of the group's other samples (RLOO), the batch's mean, or 0; with ``normalize_advantages`` then
    (A - mean) / (std + 1e-4) over the batch, std with Bessel's correction.

    Assumes samples of the policy that is updated, and outputs of similar length: the divergence is a sum, so it grows
    with the length and a high ``kl_coef`` shortens answers. The reference is the model without an adapter unless
    ``kl_reference`` says otherwise; ``target_kl`` lets ``kl_coef`` adapt. With ``loo`` a group of one sample, or one in
    which all R' are equal, says nothing and gets no credit. An unscored sample is left out; it is not a reward of 0.
    """

    name = "reinforce"
    version = "1"
    requires = Requires(behaviour_logprobs=True, on_policy=True, group_size=2)
    streams: frozenset[Stream] = frozenset({"policy", "reference"})

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of the credit, the loss and the optimiser."""
        return job(
            **on_policy(),
            **msgspec.structs.asdict(ReinforceParams()),
            target_kl=None,
            horizon=10_000.0,
        )

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """Advantages, in the order of the samples.

        Raises:
            ConfigError: a parameter is not usable.
            TrainError: a sample lacks log-probabilities.
        """
        own = read(ReinforceParams, params)
        rows = [[(s.trajectory, _reward(s, reward, own)) for s, reward in scored(group)] for group in groups]
        if own.baseline == "loo":
            advantages = [pair for row in rows for pair in _leave_one_out(row)]
        else:
            advantages = [pair for row in rows for pair in row]
        if own.baseline == "batch":
            advantages = _centred(advantages)
        if own.normalize_advantages:
            scale = statistics.stdev(a for _, a in advantages) + 1e-4 if len(advantages) > 1 else 1.0
            advantages = [(trajectory, a / scale) for trajectory, a in _centred(advantages)]
        return [Credit(trajectory=t, component="reinforce", advantage=a) for t, a in advantages]


def _reward(sample: Sample, reward: float, own: ReinforceParams) -> float:
    if own.reward_clip_range is not None:
        low, high = own.reward_clip_range
        reward = max(low, min(high, reward))
    if not own.kl_coef:
        return reward
    policy, reference = token_logprobs(sample, "policy"), token_logprobs(sample, "reference")
    return reward - own.kl_coef * math.fsum(p - r for p, r in zip(policy, reference, strict=True))


def _leave_one_out(rewards: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    if len({r for _, r in rewards}) < 2:
        return []
    total = math.fsum(r for _, r in rewards)
    return [(trajectory, r - (total - r) / (len(rewards) - 1)) for trajectory, r in rewards]


def _centred(rewards: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    mean = math.fsum(r for _, r in rewards) / max(len(rewards), 1)
    return [(trajectory, r - mean) for trajectory, r in rewards]
