"""The reward landscape of an evaluation, computed from its verdicts."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Sequence

import msgspec

from bascule.schemas.landscape import Histogram, RewardLandscape, Spread
from bascule.schemas.trajectory import Scored, Verdict
from bascule.verifiers.statistics import clustered_interval, clustered_wilson, score_interval, wilson

MAX_DISTINCT = 1000
BINS = 10


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


def landscape(groups: Sequence[Sequence[SampleFigures]], *, version: int = 2) -> RewardLandscape:
    """Compute the figures that :class:`RewardLandscape` defines, without those of a training job.

    Variance and skew are those of the population. A group without a scored sample stands in no bin of ``pass_rates``
    and is not informative. Figures of version 1 without any sample are 0, later ones are left out.

    Args:
        groups: the samples of every example that was asked for, also of those for which nothing came back (empty).
        version: of the figures; a recorded run's landscapes stay of its own.
    """
    samples = [s for g in groups for s in g]
    verdicts = [[s.verdict for s in g if isinstance(s.verdict, Scored)] for g in groups]
    scored = [v for g in verdicts for v in g]
    seen = [_group(g) for g in verdicts if g]
    rewards = [r for g in seen for r in g.rewards]
    means = [g.total / len(g.rewards) for g in seen] + [0.0] * (len(groups) - len(seen))
    mean, variance, skew = _moments(rewards)
    found = RewardLandscape(
        groups=len(groups),
        samples=len(samples),
        unscored=len(samples) - len(scored),
        score=_mean(means),
        score_interval=score_interval(means, pass_fail=set(rewards) <= {0, 1}),
        mean=mean,
        variance=variance,
        skew=skew,
        success_rate=_share(sum(g.passes for g in seen), len(scored)),
        pass_rates=_histogram([g.passes / len(g.rewards) for g in seen]),
        informative=_share(sum(g.informative for g in seen), len(groups)),
        format_failures=_share(sum(not v.well_formed for v in scored), len(scored)),
        errors=_share(sum(s.error for s in samples), len(samples)),
        prompt_tokens=_share(sum(s.prompt_tokens for s in samples), len(samples)),
        output_tokens=_share(sum(s.output_tokens for s in samples), len(samples)),
        distinct_rewards=min(MAX_DISTINCT, len(set(rewards))),
        step_rewards=sum(g.stepped for g in seen),
    )
    return found if version == 1 else _with_second(found, samples, seen)


class _Group(msgspec.Struct, frozen=True):
    """What is counted of a group with a scored sample; ``total`` is the sum of its rewards."""

    rewards: list[float]
    total: float
    passes: int
    informative: bool
    stepped: int
    steps: list[float]


def _group(scored: Sequence[Scored]) -> _Group:
    rewards = [v.reward for v in scored]
    return _Group(
        rewards=rewards,
        total=math.fsum(rewards),
        passes=sum([passed(v) for v in scored]),
        informative=len(set(rewards)) > 1,
        stepped=sum([bool(v.steps) for v in scored]),
        steps=[r for v in scored for r in v.steps],
    )


def _with_second(found: RewardLandscape, samples: Sequence[SampleFigures], seen: Sequence[_Group]) -> RewardLandscape:
    """``found`` with the figures of version 2."""
    counts = [len(g.rewards) for g in seen]
    dense = [len(g.rewards) - g.rewards.count(0) for g in seen]
    calls = sum(len(g.steps) for g in seen)
    return msgspec.structs.replace(
        found,
        density=sum(dense) / sum(counts) if seen else None,
        density_interval=clustered_wilson(dense, counts) if seen else None,
        mean_interval=clustered_interval([g.total for g in seen], counts),
        success_interval=clustered_wilson([g.passes for g in seen], counts) if seen else None,
        informative_interval=wilson(sum(g.informative for g in seen), found.groups) if found.groups else None,
        step_interval=clustered_wilson([g.stepped for g in seen], counts) if calls else None,
        step_density=(calls - sum(g.steps.count(0) for g in seen)) / calls if calls else None,
        step_calls=calls,
        tokens=spread([s.prompt_tokens + s.output_tokens for s in samples]),
        rewards=histogram([r for g in seen for r in g.rewards]),
    )


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and 95th percentile by the nearest rank; None without values."""
    if not values:
        return None
    return Spread(_mean(values), float(sorted(values)[-(-95 * len(values) // 100) - 1]))


def histogram(values: Sequence[float], bins: int = BINS) -> Histogram | None:
    """Counts over ``bins`` bins of equal width from the lowest value to the highest; None without values."""
    if not values:
        return None
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = (*(low + (high - low) * i / bins for i in range(bins)), high)
    counts = [0] * bins
    for value, count in Counter(values).items():
        # The edges themselves decide, so that rounding puts no value outside of its bin.
        counts[min(bisect.bisect_right(edges, value), bins) - 1] += count
    return Histogram(edges, tuple(counts))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _moments(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, population variance and population skewness m3 / m2^1.5 (0 for constant values)."""
    if len(set(values)) < 2:
        return (values[0] if values else 0.0), 0.0, 0.0
    mean = _mean(values)
    m2 = _mean([(v - mean) ** 2 for v in values])
    # Standardising first keeps cubes of tiny or huge deviations in range.
    deviation = math.sqrt(m2)
    return mean, m2, _mean([((v - mean) / deviation) ** 3 for v in values]) if deviation > 0 else 0.0


def _histogram(rates: Sequence[float]) -> tuple[int, ...]:
    """Counts over 0, (0,.25], (.25,.5], (.5,.75], (.75,1), 1."""
    bins = [0] * 6
    for r in rates:
        bins[0 if r == 0 else 5 if r == 1 else min(4, math.ceil(r * 4))] += 1
    return tuple(bins)
