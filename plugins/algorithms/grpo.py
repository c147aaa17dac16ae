"""GRPO: group-relative policy optimisation (arXiv 2402.03300, section 4.1; no std: Dr. GRPO, arXiv 2503.20783)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bascule.plugins.algorithm import Credit, Group, Requirement


class Grpo:
    """A_i = (R_i - mean R) / (std R + 1e-4) within a group, std with Bessel's correction; ``scale_rewards: none`` omits
    the division. Assumes terminal rewards and groups sampled by the policy that is updated.

    A group without variance, or of one sample, says nothing and gets no credit. An unscored sample is left out of the
    mean; it is not a reward of 0.
    """

    name = "grpo"
    version = "1"
    requires: frozenset[Requirement] = frozenset({"behaviour_logprobs", "reward_variance", "on_policy"})

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

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """Advantages, in the order of the samples."""
        assigned = []
        for group in groups:
            scored = [(s.trajectory, s.reward) for s in group.samples if s.reward is not None]
            rewards = [reward for _, reward in scored]
            if len(rewards) < 2 or min(rewards) == max(rewards):
                continue
            mean = statistics.fmean(rewards)
            scale = 1.0 if params.get("scale_rewards") == "none" else statistics.stdev(rewards) + 1e-4
            assigned += [Credit(trajectory=t, component="policy", advantage=(r - mean) / scale) for t, r in scored]
        return assigned
