"""Entropic advantage weighting with adaptive beta (TTT-Discover, arXiv 2601.16175)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from bascule.plugins.algorithm import Credit, Group, Requires, Sample, Stream
from bascule.plugins.algorithms.groups import distinct, scored, token_logprobs
from bascule.plugins.algorithms.params import job, on_policy, read

BUDGET = math.log(2)
STEEPEST = 2.0**20


class EntropicParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the credit reads.

    Attributes:
        w_max: bound on a sample's weight, which is 1 on average; None for the number of distinct samples, the most
            that a weight normalised over the whole group could be.
        centre: subtract the group's mean advantage, which leave-one-out weights leave above 0.
        kl_coef: of the divergence to the reference, token by token.
    """

    w_max: Annotated[float, msgspec.Meta(gt=1)] | None = None
    centre: bool = False
    kl_coef: Annotated[float, msgspec.Meta(ge=0)] = 0.1


class Solution(msgspec.Struct, frozen=True, kw_only=True):
    """How a group is weighted.

    Attributes:
        beta: inverse temperature, in 1 / reward; 0 where all rewards are equal.
        kl: KL divergence in nats of the weights from uniform ones, at most ln 2.
        ess: effective sample size, 1 / sum q^2.
        weights: q = softmax(beta R), the gradient of (1 / beta) log mean exp(beta R) by the rewards.
    """

    beta: float
    kl: float
    ess: float
    weights: tuple[float, ...]


class Entropic:
    """J_beta = (1 / beta) log E exp(beta R), which rises towards the best reward instead of the mean one as beta does.

    Within a group of K distinct samples beta solves KL(softmax(beta R) || uniform) = ln 2, and with e_i = exp(beta R_i)
    and Z_i the mean of e over the other samples, A_i = min(e_i / Z_i, w_max) - 1. Then, token by token, A_t += kl_coef
    (mean d - d_t) with d = log mu - log ref and its mean over all credited tokens of the batch.

    Assumes rewards on one scale whose best is worth more than their mean, sampled by the policy that is updated; scale
    and origin do not matter. Where half of a group or more shares the best reward ln 2 is out of reach and the weights
    are those of its best samples alone. Samples of equal tokens count once, with their mean reward, and the first of
    them is trained. A group of fewer than 3 distinct samples (with 2 a weight is unbounded) or without variance gets
    no credit. An unscored sample is left out; it is not a reward of 0.
    """

    name = "entropic"
    version = "1"
    requires = Requires(behaviour_logprobs=True, on_policy=True, group_size=3, reward_variance=True)
    streams: frozenset[Stream] = frozenset({"reference"})

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of the credit, the loss and the optimiser."""
        return job(
            groups=16,
            num_generations=16,
            learning_rate=1e-4,
            **on_policy(),
            **msgspec.structs.asdict(EntropicParams()),
        )

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """Advantages, in the order of the samples.

        Raises:
            ConfigError: a parameter is not usable.
            TrainError: a sample lacks log-probabilities.
        """
        own = read(EntropicParams, params)
        assigned = [pair for group in groups for pair in _weighted(group, own)]
        if not own.kl_coef:
            return [Credit(trajectory=s.trajectory, component="reinforce", advantage=a) for s, a in assigned]
        drift = [_drift(s) for s, _ in assigned]
        mean = math.fsum(d for row in drift for d in row) / max(sum(map(len, drift)), 1)
        return [
            Credit(
                trajectory=s.trajectory,
                component="reinforce",
                advantage=tuple(a + own.kl_coef * (mean - d) for d in row),
            )
            for (s, a), row in zip(assigned, drift, strict=True)
        ]

    def figures(self, groups: Sequence[Group], credit: Sequence[Credit], params: dict[str, Any]) -> dict[str, float]:
        """Means over the groups with credit: ``weights_beta``, in 1 / reward; ``weights_kl``, in nats from uniform
        weights; ``weights_ess``, as a share of the distinct samples."""
        del credit, params
        solved = [solve_beta(means) for _, means in map(_distinct_means, groups) if _varied(means)]
        if not solved:
            return {}
        return {
            "weights_beta": statistics.fmean(s.beta for s in solved),
            "weights_kl": statistics.fmean(s.kl for s in solved),
            "weights_ess": statistics.fmean(s.ess / len(s.weights) for s in solved),
        }


def solve_beta(rewards: Sequence[float]) -> Solution:
    """The beta at which the weights are ln 2 from uniform, by bisection on rewards scaled to a range of 1.

    Args:
        rewards: [K], K >= 1; finite.
    """
    top, spread = max(rewards), max(rewards) - min(rewards)
    if not spread:
        return Solution(beta=0.0, kl=0.0, ess=float(len(rewards)), weights=(1 / len(rewards),) * len(rewards))
    scaled = [(r - top) / spread for r in rewards]
    low, high = 0.0, 1.0
    while _divergence(_softmax(scaled, high)) < BUDGET and high < STEEPEST:
        low, high = high, high * 2
    if high < STEEPEST:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _divergence(_softmax(scaled, middle)) < BUDGET else (low, middle)
    weights = _softmax(scaled, high)
    return Solution(
        beta=high / spread,
        kl=_divergence(weights),
        ess=1 / math.fsum(q * q for q in weights),
        weights=tuple(weights),
    )


def _weighted(group: Group, own: EntropicParams) -> list[tuple[Sample, float]]:
    alike, means = _distinct_means(group)
    if not _varied(means):
        return []
    w_max = own.w_max or float(len(means))
    advantages = [_leave_one_out(q, len(means), w_max) - 1 for q in solve_beta(means).weights]
    centre = statistics.fmean(advantages) if own.centre else 0.0
    return [(same[0], a - centre) for same, a in zip(alike, advantages, strict=True)]


def _distinct_means(group: Group) -> tuple[list[list[Sample]], list[float]]:
    """The scored samples, those of equal tokens together, and the mean reward of each."""
    rewards = {s.trajectory: reward for s, reward in scored(group)}
    alike = distinct(s for s, _ in scored(group))
    return alike, [statistics.fmean(rewards[s.trajectory] for s in same) for same in alike]


def _varied(means: Sequence[float]) -> bool:
    return len(means) >= 3 and min(means) < max(means)


def _leave_one_out(q: float, samples: int, w_max: float) -> float:
    """e_i / Z_i of a sample whose share of the group's sum of e is ``q``, at most ``w_max``."""
    others = (1 - q) / (samples - 1)
    return q / others if q < w_max * others else w_max


def _drift(sample: Sample) -> list[float]:
    behaviour, reference = token_logprobs(sample, "behaviour"), token_logprobs(sample, "reference")
    return [b - r for b, r in zip(behaviour, reference, strict=True)]


def _softmax(scaled: Sequence[float], beta: float) -> list[float]:
    powers = [math.exp(beta * x) for x in scaled]
    total = math.fsum(powers)
    return [p / total for p in powers]


def _divergence(weights: Sequence[float]) -> float:
    return math.fsum(q * math.log(q * len(weights)) for q in weights if q > 0)
