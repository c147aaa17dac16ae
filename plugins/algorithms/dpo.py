"""DPO: direct preference optimisation (arXiv 2305.18290) on pairs built from logged groups."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Annotated, Any, Literal

import msgspec

from bascule.plugins.algorithm import Credit, Group, Requires, Sample, Stream
from bascule.plugins.algorithms.groups import scored, token_ids, truncated
from bascule.plugins.algorithms.params import job, read


class DpoParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the building of pairs reads.

    Attributes:
        pairs_per_group: 1 for best over worst; 2 for best over the median sample as well.
        margin: the preferred sample's reward is higher by more than this.
        beta: how far the policy may go from the reference for a preference; the loss reads it.
        max_similarity: pairs whose tokens are more alike than this (ratio of matching tokens, 0 to 1) are left out.
    """

    pairs_per_group: Literal[1, 2] = 1
    margin: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    beta: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    max_similarity: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.95


class Dpo:
    """-log sigmoid(beta ((log pi_w - log ref_w) - (log pi_l - log ref_l))) with sums over the sampled tokens of the
    preferred trajectory w and the rejected one l of one group; ``pair_loss: ipo`` is arXiv 2310.12036.

    Assumes that the verifier ranks the samples of one example rightly; how much better one is does not matter beyond
    ``margin``. Needs no log-probabilities of the sampler, so it trains from what is logged, whoever sampled it. Ties,
    unscored samples, samples without tokens or cut at a token limit (their end was not chosen) and pairs of nearly the
    same tokens (they lower the likelihood of both, arXiv 2402.13228) make no pair.
    """

    name = "dpo"
    version = "1"
    requires = Requires(pairs=True)
    streams: frozenset[Stream] = frozenset()

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of the pairs, the loss and the optimiser."""
        return job(
            steps=1,
            groups=64,
            num_iterations=2,
            num_mini_batches=4,
            learning_rate=1e-4,
            **msgspec.structs.asdict(DpoParams()),
            pair_loss="sigmoid",
            label_smoothing=0.0,
            kl_reference="base",
        )

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """Pairs, groups in their order.

        Raises:
            ConfigError: a parameter is not usable.
        """
        own = read(DpoParams, params)
        return [
            Credit(trajectory=preferred.trajectory, component="pair", advantage=1.0, rejected=other.trajectory)
            for group in groups
            for preferred, other in _pairs(group, own)
        ]

    def figures(self, groups: Sequence[Group], credit: Sequence[Credit], params: dict[str, Any]) -> dict[str, float]:
        """``pairs``, and ``pair_reward_gap``: the mean by which the preferred sample's reward is higher."""
        del params
        rewards = {s.trajectory: reward for group in groups for s, reward in scored(group)}
        gaps = [rewards[c.trajectory] - rewards[c.rejected] for c in credit if c.rejected is not None]
        return {"pairs": float(len(gaps)), "pair_reward_gap": statistics.fmean(gaps)} if gaps else {}


def _pairs(group: Group, own: DpoParams) -> list[tuple[Sample, Sample]]:
    usable = [(s, reward) for s, reward in scored(group) if token_ids(s) and not truncated(s)]
    ranked = sorted(usable, key=lambda pair: -pair[1])
    if len(ranked) < 2:
        return []
    best, top = ranked[0]
    rejected = [ranked[-1]]
    if own.pairs_per_group == 2 and len(ranked) > 2:
        rejected.append(ranked[len(ranked) // 2])
    return [(best, s) for s, reward in rejected if top - reward > own.margin and not _alike(best, s, own)]


def _alike(one: Sample, other: Sample, own: DpoParams) -> bool:
    a, b = token_ids(one), token_ids(other)
    if a == b:
        return True
    match = SequenceMatcher(None, a, b, autojunk=False)
    return match.quick_ratio() > own.max_similarity and match.ratio() > own.max_similarity
