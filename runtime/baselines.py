"""Baselines, scored where everything is scored: in the scoring process."""

from __future__ import annotations

from collections.abc import Sequence

from bascule.runtime.world import World
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored
from bascule.verifiers.scoring import Scorer


async def score_baselines(world: World, splits: Sequence[Split]) -> dict[str, dict[str, float]]:
    """Score of each of the task's baselines on each split, over the examples that the run uses."""
    public = world.public
    scores: dict[str, dict[str, float]] = {}
    async with Scorer(world.config.task.name, world.config.task.params) as scorer:
        for baseline in world.task.baselines(public):
            by_split = scores.setdefault(baseline.name, {})
            for split in splits:
                examples = [public.split(split)[p] for p in world.positions(split)]
                verdicts = [await scorer.score(split, e.id, baseline.answers[split].get(e.id)) for e in examples]
                total = sum(v.reward for v in verdicts if isinstance(v, Scored))
                by_split[split] = total / len(examples)
    return scores
