"""Best-of-N behavioural cloning, also rejection-sampling fine-tuning or RAFT (arXiv 2304.06767)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from bascule.plugins.algorithm import Credit, Group, Requires, Sample, Stream
from bascule.plugins.algorithms.groups import distinct, scored, token_ids
from bascule.plugins.algorithms.params import job, read


class BestOfNParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the credit reads.

    Attributes:
        keep: winners of a group at most.
    """

    keep: Annotated[int, msgspec.Meta(ge=1)] = 2


class BestOfN:
    """Imitate the winners of each group: the samples that passed or, where the task has no pass, those at the group's
    highest reward if that is above 0; of samples with equal tokens the first, at most ``keep`` of a group, each with
    weight 1.

    Assumes that the verifier has few false positives. Needs no log-probabilities, so it fits samples of any origin. An
    unscored sample is no winner and no loser.
    """

    name = "best_of_n"
    version = "2"
    requires = Requires(winners=True)
    streams: frozenset[Stream] = frozenset()

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of the credit and the optimiser."""
        return job(
            steps=1,
            groups=64,
            num_iterations=4,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            **msgspec.structs.asdict(BestOfNParams()),
        )

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """Weights, groups in their order, a group's winners in the order of its samples.

        Raises:
            ConfigError: a parameter is not usable.
        """
        own = read(BestOfNParams, params)
        return [_imitated(same[0]) for g in groups for same in distinct(filter(token_ids, _winners(g)))[: own.keep]]


class BestOfN1(BestOfN):
    """The first version: other defaults, and samples with equal tokens are imitated each."""

    version = "1"

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
        """Weights, groups in their order, a group's winners in the order of its samples.

        Raises:
            ConfigError: a parameter is not usable.
        """
        own = read(BestOfNParams, params)
        return [_imitated(s) for g in groups for s in _winners(g)[: own.keep]]


def _imitated(sample: Sample) -> Credit:
    return Credit(trajectory=sample.trajectory, component="imitation", advantage=1.0)


def _winners(group: Group) -> list[Sample]:
    samples = scored(group)
    if any(s.passed is not None for s, _ in samples):
        return [s for s, _ in samples if s.passed]
    best = max((reward for _, reward in samples), default=0.0)
    return [s for s, reward in samples if reward == best and best > 0]
