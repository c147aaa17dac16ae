"""Whether scored data meet what an algorithm requires: asked before any compute, answered with the data at fault."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bascule.plugins.algorithm import Group, Requires, Sample


def unmet(requires: Requires, groups: Sequence[Group]) -> tuple[str, ...]:
    """Which requirements fail on which data, a reason each; empty if the algorithm may train from ``groups``.

    Whatever is required, there must be a scored sample, and a sampled token to train. ``on_policy`` cannot be seen in
    the data: who samples anew for every iteration meets it.
    """
    samples = [s for g in groups for s in g.samples]
    scored = [s for s in samples if s.reward is not None]
    if not scored:
        return (f"scored: 0 of {len(samples)} samples are",)
    if not any(t.token_ids for s in scored for t in s.turns):
        return (f"tokens: none was sampled in {len(scored)} scored samples",)
    rewards = [[s.reward for s in g.samples if s.reward is not None] for g in groups]
    counting = [r for r in rewards if len(r) >= requires.group_size]
    varied = [r for r in counting if min(r) < max(r)]
    largest = max(map(len, rewards))
    size = f"{requires.group_size} scored samples; the largest has {largest}"
    found = []
    if requires.behaviour_logprobs and (without := [s.trajectory for s in scored if _without_logprobs(s)]):
        found.append(f"behaviour_logprobs: {len(without)} of {len(scored)} samples have none, e.g. {without[0]}")
    if not counting:
        found.append(f"group_size: none of {len(groups)} groups has {size}")
    elif requires.reward_variance and not varied:
        found.append(f"reward_variance: the rewards differ in none of {len(counting)} groups")
    if requires.winners and not any(map(_won, scored)):
        found.append(f"winners: none of {len(scored)} samples passed or, without pass/fail, has a reward above 0")
    if requires.pairs and not any(min(r) < max(r) for r in rewards if r):
        found.append(f"pairs: one sample is ranked above another in none of {len(groups)} groups")
    if requires.step_rewards and not any(t.reward is not None for s in scored for t in s.turns):
        found.append(f"step_rewards: none of {sum(len(s.turns) for s in scored)} model calls has one")
    return tuple(found)


def _without_logprobs(sample: Sample) -> bool:
    return any(len(t.behaviour) != len(t.token_ids) or not all(map(math.isfinite, t.behaviour)) for t in sample.turns)


def _won(sample: Sample) -> bool:
    return (sample.reward or 0.0) > 0 if sample.passed is None else sample.passed
