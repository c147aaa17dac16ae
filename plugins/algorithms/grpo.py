"""GRPO: group-relative policy optimisation (arXiv 2402.03300, section 4.1)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from bascule.plugins.algorithm import Credit, Group, Requires, Stream
from bascule.plugins.algorithms.groups import scored, truncated
from bascule.plugins.algorithms.params import clipped, job, read


class GrpoParams(msgspec.Struct, frozen=True, kw_only=True):
    """What GRPO's credit reads.

    Attributes:
        scale_rewards: divide by the standard deviation of the ``group``, of the ``batch``, or by ``none``.
        mask_truncated_completions: samples with an output that was cut at its token limit get no credit; their rewards
            still count for their group.
    """

    scale_rewards: Literal["group", "batch", "none"] = "group"
    mask_truncated_completions: bool = False


class Grpo:
    """A_i = (R_i - mean R) / (std R + 1e-4) within a group, std with Bessel's correction, for every token of sample i.

    Assumes terminal rewards and groups sampled by the policy that is updated. A group without variance, or of one
    sample, says nothing and gets no credit. An unscored sample is left out of the mean; it is not a reward of 0.

    Variants are parameters:

    - as first published: ``loss_type: grpo``, ``epsilon_high: 0.2``, ``beta: 0.04`` with ``kl_estimator: k3``; but the
      published KL term is k3 itself, ours k3 times the ratio, whose gradient is that of the divergence
    - Dr. GRPO (arXiv 2503.20783): ``loss_type: dr_grpo``, ``scale_rewards: none``; but the constant divisor counts the
      trajectories with credit only, so groups that say nothing do not make the step smaller
    - DAPO (arXiv 2503.14476): ``loss_type: dapo``, ``epsilon_high: 0.28``, ``mask_truncated_completions: true``
    - GSPO (arXiv 2507.18071): ``importance_sampling_level: sequence``, ``loss_type: grpo``, ``epsilon: 3e-4``,
      ``epsilon_high: 4e-4``
    """

    name = "grpo"
    version = "2"
    requires = Requires(behaviour_logprobs=True, on_policy=True, group_size=2, reward_variance=True)
    streams: frozenset[Stream] = frozenset()

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of the credit, the loss and the optimiser."""
        return job(**clipped(), **msgspec.structs.asdict(GrpoParams()))

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """Advantages, in the order of the samples.

        Raises:
            ConfigError: a parameter is not usable.
        """
        own = read(GrpoParams, params)
        batch = [reward for group in groups for _, reward in scored(group)] if own.scale_rewards == "batch" else []
        scale = statistics.stdev(batch) + 1e-4 if len(batch) > 1 else 1.0
        assigned = []
        for group in groups:
            rewards = [reward for _, reward in scored(group)]
            if len(rewards) < 2 or min(rewards) == max(rewards):
                continue
            mean = statistics.fmean(rewards)
            if own.scale_rewards == "group":
                scale = statistics.stdev(rewards) + 1e-4
            assigned += [
                Credit(trajectory=s.trajectory, component="policy", advantage=(reward - mean) / scale)
                for s, reward in scored(group)
                if not (own.mask_truncated_completions and truncated(s))
            ]
        return assigned


class Grpo1(Grpo):
    """The first version: the same credit under other defaults."""

    version = "1"
    requires = Requires(behaviour_logprobs=True, on_policy=True, reward_variance=True)

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of the credit, the loss and the optimiser."""
        return {
            "scale_rewards": "group",
            "steps": 40,
            "groups": 32,
            "num_generations": 8,
            "num_iterations": 1,
            "learning_rate": 3e-4,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "max_grad_norm": 1.0,
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "beta": 0.0,
            "lora_r": 16,
            "lora_alpha": 32,
        }
