"""Baselines, scored where everything is scored: in the scoring process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bascule.runtime.world import World
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored
from bascule.verifiers.scoring import Scorer


async def _score(scorer: Scorer, world: World, split: Split, answer: Callable[[str], str | None]) -> float:
    examples = [world.public.split(split)[p] for p in world.positions(split)]
    verdicts = [await scorer.score(split, e.id, answer(e.id)) for e in examples]
    return sum(v.reward for v in verdicts if isinstance(v, Scored)) / len(examples)


async def score_baselines(world: World, splits: Sequence[Split]) -> dict[str, dict[str, float]]:
    """Score of each of the task's baselines on each split, over the examples that the run uses."""
    async with Scorer(world.config.task.name, world.config.task.params) as scorer:
        return {
            b.name: {s: await _score(scorer, world, s, b.answers[s].get) for s in splits}
            for b in world.task.baselines(world.public)
        }


async def score_constant(world: World, answer: str) -> float:
    """What one answer to everything scores on the sealed split."""
    async with Scorer(world.config.task.name, world.config.task.params) as scorer:
        return await _score(scorer, world, "sealed", lambda _: answer)
