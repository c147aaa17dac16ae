"""PPO: proximal policy optimisation with a learned critic (arXiv 1707.06347; for language models arXiv 1909.08593)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from bascule.plugins.algorithm import Credit, Group, Requires, Sample, Stream
from bascule.plugins.algorithms.gae import gae, turn_discounts
from bascule.plugins.algorithms.groups import scored, token_logprobs, token_values
from bascule.plugins.algorithms.params import clipped, job, read

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]


class PpoParams(msgspec.Struct, frozen=True, kw_only=True):
    """What PPO's credit reads.

    Attributes:
        kl_coef: of the k1 estimate of the divergence to the reference, taken from each token's reward.
        gamma: discount.
        discount: from one ``token`` to the next, or from one ``turn`` to the next and 1 inside a turn.
        lam: of generalised advantage estimation.
        whiten_advantages: to mean 0 and variance 1 over all tokens of the batch.
    """

    kl_coef: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    gamma: Unit = 1.0
    discount: Literal["token", "turn"] = "turn"
    lam: Unit = 1.0
    whiten_advantages: bool = True


class Ppo:
    """r_t = -kl_coef (log pi_t - log ref_t), plus a turn's own reward at its last token and the trajectory's reward at
    the last of all; generalised advantage estimation (:mod:`bascule.plugins.algorithms.gae`) over the critic's values;
    advantages whitened as verl does, (A - mean) / sqrt(var + 1e-8) with Bessel's correction; the returns A + V, from
    before whitening, train the critic. The loss is the clipped ratio, with a dual clip (arXiv 1912.09729).

    Assumes a critic that explains some of the rewards. A fresh one says 0 everywhere, and as long as it explains
    nothing the advantages are what the formula gives for that: whitened discounted returns, a baseline of the whole
    batch. ``critic_warmup`` trains it alone for some iterations first. An unscored sample is left out.
    """

    name = "ppo"
    version = "1"
    requires = Requires(behaviour_logprobs=True, on_policy=True)
    streams: frozenset[Stream] = frozenset({"policy", "reference", "values"})

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of the credit, the losses and the optimiser."""
        return job(
            num_iterations=2,
            num_mini_batches=2,
            **{**clipped(), "epsilon_high": 0.2, "clip_ratio_c": 3.0},
            **msgspec.structs.asdict(PpoParams()),
            target_kl=None,
            horizon=10_000.0,
            vf_coef=0.1,
            cliprange_value=0.2,
            critic_learning_rate=1e-3,
            critic_warmup=0,
        )

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """Advantages and returns of each token, in the order of the samples.

        Raises:
            ConfigError: a parameter is not usable.
            TrainError: a sample lacks log-probabilities or values.
        """
        own = read(PpoParams, params)
        samples = [(s, reward) for group in groups for s, reward in scored(group) if any(t.token_ids for t in s.turns)]
        estimates = [
            gae(_rewards(s, reward, own.kl_coef), token_values(s), _discounts(s, own), own.lam) for s, reward in samples
        ]
        advantages = [a for a, _ in estimates]
        if own.whiten_advantages:
            advantages = whiten(advantages)
        return [
            Credit(trajectory=s.trajectory, component="policy", advantage=tuple(a), returns=tuple(returns))
            for (s, _), a, (_, returns) in zip(samples, advantages, estimates, strict=True)
        ]


def whiten(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """All numbers to mean 0 and variance 1 over all rows, (x - mean) / sqrt(var + 1e-8) with Bessel's correction."""
    count = sum(map(len, rows))
    mean = math.fsum(x for row in rows for x in row) / max(count, 1)
    variance = math.fsum((x - mean) ** 2 for row in rows for x in row) / max(count - 1, 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


def _rewards(sample: Sample, reward: float, kl_coef: float) -> list[float]:
    policy, reference = token_logprobs(sample, "policy"), token_logprobs(sample, "reference")
    rewards = [-kl_coef * (p - r) for p, r in zip(policy, reference, strict=True)]
    end = 0
    for turn in sample.turns:
        end += len(turn.token_ids)
        rewards[max(end - 1, 0)] += turn.reward or 0.0
    rewards[-1] += reward
    return rewards


def _discounts(sample: Sample, own: PpoParams) -> list[float]:
    lengths = [len(turn.token_ids) for turn in sample.turns]
    return turn_discounts(lengths, own.gamma) if own.discount == "turn" else [own.gamma] * sum(lengths)
