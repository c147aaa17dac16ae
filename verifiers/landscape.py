"""The reward landscape of an evaluation, computed from its verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from bascule.schemas.landscape import RewardLandscape
from bascule.schemas.trajectory import Scored, Verdict
from bascule.verifiers.statistics import score_interval

MAX_DISTINCT = 1000


class SampleFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One trajectory as the landscape sees it.

    Attributes:
        verdict: None for a trajectory that was never scored; counts as unscored.
        error: whether its episode ended in an error.
    """

    verdict: Verdict | None
    error: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0


def passed(verdict: Scored) -> bool:
    """The pass/fail reading; reward above 0 where the task has none."""
    return verdict.reward > 0 if verdict.passed is None else verdict.passed


def landscape(groups: Sequence[Sequence[SampleFigures]]) -> RewardLandscape:
    """Compute the figures that :class:`RewardLandscape` defines.

    Variance and skew are those of the population. A group without a scored sample stands in no bin of ``pass_rates``
    and is not informative. Figures without any sample are 0.

    Args:
        groups: the samples of every example that was asked for, also of those for which nothing came back (empty).
    """
    samples = [s for g in groups for s in g]
    verdicts = [[s.verdict for s in g if isinstance(s.verdict, Scored)] for g in groups]
    scored = [v for g in verdicts for v in g]
    rewards = [v.reward for v in scored]
    means = [_mean([v.reward for v in g]) for g in verdicts]
    mean, variance, skew = _moments(rewards)
    return RewardLandscape(
        groups=len(groups),
        samples=len(samples),
        unscored=len(samples) - len(scored),
        score=_mean(means),
        score_interval=score_interval(means, pass_fail=all(r in (0, 1) for r in rewards)),
        mean=mean,
        variance=variance,
        skew=skew,
        success_rate=_mean([float(passed(v)) for v in scored]),
        pass_rates=_histogram([_mean([float(passed(v)) for v in g]) for g in verdicts if g]),
        informative=_mean([float(len({v.reward for v in g}) > 1) for g in verdicts]),
        format_failures=_mean([float(not v.well_formed) for v in scored]),
        errors=_mean([float(s.error) for s in samples]),
        prompt_tokens=_mean([s.prompt_tokens for s in samples]),
        output_tokens=_mean([s.output_tokens for s in samples]),
        distinct_rewards=min(MAX_DISTINCT, len(set(rewards))),
        step_rewards=sum(bool(v.steps) for v in scored),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _moments(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, population variance and population skewness m3 / m2^1.5 (0 for constant values)."""
    if len(set(values)) < 2:
        return (values[0] if values else 0.0), 0.0, 0.0
    mean = _mean(values)
    m2 = _mean([(v - mean) ** 2 for v in values])
    # Standardising first keeps cubes of tiny or huge deviations in range.
    spread = math.sqrt(m2)
    return mean, m2, _mean([((v - mean) / spread) ** 3 for v in values]) if spread > 0 else 0.0


def _histogram(rates: Sequence[float]) -> tuple[int, ...]:
    """Counts over 0, (0,.25], (.25,.5], (.5,.75], (.75,1), 1."""
    bins = [0] * 6
    for r in rates:
        bins[0 if r == 0 else 5 if r == 1 else min(4, math.ceil(r * 4))] += 1
    return tuple(bins)
