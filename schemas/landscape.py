"""The reward landscape: what an evaluation showed, in figures with counts and intervals."""

from __future__ import annotations

import msgspec


class Interval(msgspec.Struct, frozen=True):
    """A 95% interval."""

    low: float
    high: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Measured cost; left out of the decision hash, since two equal runs differ in it."""

    seconds: float = 0.0


class RewardLandscape(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Figures over the groups of one evaluation; a group is one example's samples.

    Attributes:
        groups: number of examples; the denominator of ``score``.
        samples: trajectories, scored or not.
        unscored: trajectories without a verdict; they enter no mean.
        score: mean over all examples of the mean reward of their scored samples; an example without any counts 0.
        score_interval: 95% interval of ``score`` (Wilson for pass/fail, normal over groups otherwise).
        mean, variance, skew: of the reward over scored samples.
        success_rate: fraction of scored samples that passed (reward above 0 where there is no pass/fail).
        pass_rates: histogram of groups over pass rate 0, (0,.25], (.25,.5], (.5,.75], (.75,1), 1.
        informative: fraction of groups with at least two scored samples whose rewards differ (0 for single samples).
        format_failures: fraction of scored samples whose answer was not well formed.
        errors: fraction of samples whose episode ended in an error.
        prompt_tokens, output_tokens: mean per trajectory.
        distinct_rewards: number of distinct rewards, at most 1000; 2 means pass/fail.
        step_rewards: number of scored samples whose verdict has rewards of single model calls; left out if there are
            none.
    """

    groups: int
    samples: int
    unscored: int
    score: float
    score_interval: Interval
    mean: float
    variance: float
    skew: float
    success_rate: float
    pass_rates: tuple[int, ...]
    informative: float
    format_failures: float
    errors: float
    prompt_tokens: float
    output_tokens: float
    distinct_rewards: int
    step_rewards: int = 0
