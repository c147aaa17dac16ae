"""Best-of-N behavioural cloning, also rejection-sampling fine-tuning or RAFT (arXiv 2304.06767)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bascule.plugins.algorithm import Credit, Group, Requirement, Sample


class BestOfN:
    """Imitate the winners of each group: the samples that passed or, where the task has no pass, those at the group's
    highest reward if that is above 0; at most ``keep`` of a group, each with weight 1.

    Assumes that the verifier has few false positives. Needs no log-probabilities, so it fits samples of any origin.
    """

    name = "best_of_n"
    version = "1"
    requires: frozenset[Requirement] = frozenset({"winners"})

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of the credit and the optimiser."""
        return {
            "keep": 2,
            "steps": 1,
            "groups": 64,
            "num_generations": 8,
            "num_iterations": 4,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 1.0,
            "lora_r": 16,
            "lora_alpha": 32,
        }

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """Weights, groups in their order, a group's winners in the order of its samples."""
        keep = int(params.get("keep", self.defaults()["keep"]))
        return [
            Credit(trajectory=s.trajectory, component="imitation", advantage=1.0)
            for g in groups
            for s in _winners(g)[:keep]
        ]


def _winners(group: Group) -> list[Sample]:
    scored = [s for s in group.samples if s.reward is not None]
    if any(s.passed is not None for s in scored):
        return [s for s in scored if s.passed]
    best = max((s.reward for s in scored if s.reward is not None), default=0.0)
    return [s for s in scored if s.reward == best and best > 0]
