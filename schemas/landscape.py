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


class Spread(msgspec.Struct, frozen=True):
    """Mean and 95th percentile: the smallest value that at least 95% of the values do not exceed."""

    mean: float
    p95: float


class MeasuredEvaluation(Measured, frozen=True, kw_only=True, omit_defaults=True):
    """Measured cost of an evaluation; ``rollout`` is of one episode, in seconds."""

    rollout: Spread | None = None


class WorkMeasured(Measured, frozen=True, kw_only=True, omit_defaults=True):
    """Measured cost of work that shares its worker with other work.

    Attributes:
        share: seconds of the worker's time that it took: while k pieces of work are under way there, each takes 1/k of
            the time. None if it was not recorded.
        device: what its model computes on, ``cpu`` or a GPU's name; empty if nothing computes, or it was not recorded.
    """

    share: float | None = None
    device: str = ""


class Histogram(msgspec.Struct, frozen=True):
    """Counts over bins of equal width.

    Attributes:
        edges: one more than counts; each bin is closed below, and the last one above as well.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


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

    Landscapes of version 1 (``RunConfig.landscape``) have none of the following. Intervals are at 95%. Those over
    samples take groups as clusters, and Wilson's is taken at the effective number of samples
    (``bascule.verifiers.statistics``); ``groups``, ``samples - unscored`` and ``step_calls`` are the counts.

    Attributes:
        density: fraction of scored samples with a reward other than 0.
        density_interval, success_interval, step_interval: Wilson, of ``density``, ``success_rate`` and of the fraction
            ``step_rewards`` of the scored samples.
        informative_interval: Wilson over groups.
        mean_interval: of ``mean``, normal; None where fewer than two groups have a scored sample.
        step_density: step rewards other than 0 a model call, over the calls of the samples that have step rewards.
        step_calls: number of those calls, each of which has one reward.
        tokens: of a trajectory, prompts and outputs together.
        rewards: histogram over the scored samples, 10 bins from the lowest to the highest reward (half a unit to either
            side where they are equal).
        ess: effective sample size against the sampling policy, as a share of the tokens, in the last update of the
            training job that made the adapter, 1 where it weighs nothing; None for the base model.
        kl_to_base: estimate of the KL divergence from the base model in nats a token, of the same update; None where
            that update did not compare with the base.
        regression_drop: of an evaluation over the regression set, by how much its score is below the parent's.
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
    density: float | None = None
    density_interval: Interval | None = None
    mean_interval: Interval | None = None
    success_interval: Interval | None = None
    informative_interval: Interval | None = None
    step_interval: Interval | None = None
    step_density: float | None = None
    step_calls: int = 0
    tokens: Spread | None = None
    rewards: Histogram | None = None
    ess: float | None = None
    kl_to_base: float | None = None
    regression_drop: float | None = None
