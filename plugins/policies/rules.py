"""The policy ``rules``: feasibility first, then a published table of scores with thresholds as parameters.

Lever: harness edits while they help; weights once ``patience`` edits in a row were not promoted (the sequence of
arXiv:2605.27276, section 6.2), or when the last generation has come and weights were never tried.

Algorithm: what an algorithm requires is held against the landscape over train; of those that are feasible, the
highest score wins. Thresholds are parameters, scores are not:

=========  =====================================================  =====  ==================================  =========
algorithm  preferred where                                        score  elsewhere                           score
=========  =====================================================  =====  ==================================  =========
reinforce  a regression is to be feared: with the newest job the  0.92   the KL divergence to the base is    0.28
           score on the regression set fell by more than                 held down, at the cost of speed
           ``regression`` and one standard error, or the KL
           divergence to the base is over ``max_base_kl``
ppo        the verifier rewards single model calls in at least    0.9    its critic learns from few steps    0.24
           ``step_rewards`` of the samples, and at least                 or from the last reward alone
           ``step_density`` of those rewards are not 0
reinforce  at least ``continuous`` rewards are distinct, and      0.86   as above
           their skew is over ``skew``
entropic   rewards are more than pass and fail, and their skew    0.85   few high rewards to weigh up, or    0.22
           is over ``skew``                                              ranks
grpo       at least ``informative`` of the groups have differing  0.8    in proportion to their share        below 0.6
           rewards
dpo        the task's rewards are ranks, and it says so           0.75   rewards say more than ranks         0.26
best_of_n  the start is cold: success below ``cold_success`` and  0.7    winners to clone, no cold start     0.35
           informative groups below ``cold_informative``
=========  =====================================================  =====  ==================================  =========

The rows are those that arXiv:2605.27276 publishes, but for two that ``ops/bench/selector.py`` speaks against, with a
tiny model and equally many samples: where rewards are continuous and skewed, reinforce, which keeps their distances,
found better answers on average than entropic, which is made for the best one, also at the same learning rate; where
they are ranks, grpo, which samples anew and scales each group's rewards, was better than one update on pairs. What is
published comes next there.

``trl-grpo`` trains as grpo does, with TRL, and is taken only where the parameter ``algorithm`` asks for it.

Every job since the last promotion of an algorithm's halves its score, so that another one has its turn, but not at
once: while it is feasible and its jobs leave adapters, an algorithm is kept for ``min_updates`` jobs in a row, after
that as long as its jobs are promoted, and else until another one scores higher by more than ``margin``. It has the best
score of all algorithms then, so that keeping it does not change which lever is pulled. A regression that is to be
feared ends the keeping: the next job is a careful one.

Algorithms of other plugins are judged as the built-in one that requires the same: winners as best_of_n, differing
rewards as grpo, pairs as dpo, anything else as reinforce where no regression is to be feared.

What decides for grpo is not the pass rate p but how often a group is informative, I(p, G) = 1 - p^G - (1 - p)^G:
group-relative advantages are worth little below I = 0.3. At a cold start, with hardly a success, cloning the few
verified winners is the safer step. Without any success, and where all rewards are equal, nothing is feasible.

The table is that of version 3. Version 2 kept no algorithm, measured no risk and knew of no ranks: its reinforce and
dpo are never preferred, and its ppo does not ask for ``step_density``. Version 1 knew grpo and best_of_n only. Runs
that are pinned to either are decided as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from bascule.plugins.params import read_params
from bascule.plugins.policies.evidence import (
    FIRST,
    SECOND,
    THIRD,
    evidence,
    failures,
    jobs_in_a_row,
    on_regression_set,
    plateau,
    promoted,
)
from bascule.plugins.policies.feasibility import check_named, no_harness, only, unmet
from bascule.plugins.policy import AlgorithmInfo, CallResult, Generation, PolicyInput, PolicyStart
from bascule.schemas.decision import LeverDecision, Option
from bascule.schemas.landscape import Interval, RewardLandscape

Version = Literal["1", "2", "3"]
VERSION: Version = "3"
_FIGURES = {"1": FIRST, "2": SECOND, "3": THIRD}
#: One-sided p of a difference of one standard error: a hint is enough to be careful.
_ONE_ERROR = 0.16
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Thresholds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of the table.

    Attributes:
        patience: harness edits in a row without promotion that count as a plateau.
        informative: fraction of informative groups from which group-relative advantages are preferred.
        cold_success, cold_informative: below both, the start is cold and winners are cloned.
        step_rewards: fraction of samples with rewards of single model calls from which a critic is preferred.
        skew: of the rewards, over which the few high ones are weighed up.
        continuous: distinct rewards from which they count as continuous.
        step_density: fraction of those rewards that are not 0, from which they tell a critic enough.
        regression: fall of the score on the regression set above which a regression is to be feared.
        max_base_kl: KL divergence to the base, in nats a token, above which it is as well.
        min_updates: jobs in a row that an algorithm is kept for.
        margin: by how much another one's score must be higher after that.
        stop_below: no feasible option scoring at least this ends the run.
        algorithm: pull weights with this one where it is feasible, whichever the table prefers.
    """

    patience: Annotated[int, msgspec.Meta(ge=1)] = 1
    informative: Fraction = 0.30
    cold_success: Fraction = 0.05
    cold_informative: Fraction = 0.10
    step_rewards: Fraction = 0.20
    step_density: Fraction = 0.20
    skew: float = 1.0
    continuous: Annotated[int, msgspec.Meta(ge=3)] = 32
    regression: Fraction = 0.02
    max_base_kl: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    min_updates: Annotated[int, msgspec.Meta(ge=1)] = 2
    margin: Fraction = 0.05
    stop_below: Fraction = 0.15
    algorithm: str | None = None


def make(params: dict[str, Any], version: Version = VERSION) -> Rules:
    """Build the policy.

    Raises:
        ConfigError: a threshold is unknown or out of range.
    """
    return Rules(read_params(params, Thresholds, "The policy rules"), version)


class Rules:
    """See the module's docstring."""

    name = "rules"

    def __init__(self, thresholds: Thresholds, version: Version) -> None:
        self.thresholds = thresholds
        self.version: str = version
        self._rules: Version = version
        self.named: tuple[str, ...] = () if thresholds.algorithm is None else (thresholds.algorithm,)

    def check(self, given: PolicyStart) -> None:
        """Refuse an algorithm by name that is not there, or that the run could never use."""
        for algorithm in self.named:
            check_named(self.name, algorithm, given)

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> LeverDecision:
        """Score every option, and take the best feasible one."""
        del results  # asks for no calls
        t = self.thresholds
        seen = evidence(given, _FIGURES[self._rules])
        options = [_harness(given, t), *algorithm_options(self.name, given, t, self._rules)]
        feasible = [o for o in options if o.feasible]
        top = max(feasible, key=lambda o: o.score or 0.0, default=None)
        if given.generation > given.max_generations:
            reasons: tuple[str, ...] = (f"all {given.max_generations} generations are used",)
            return LeverDecision(lever="stop", reasons=reasons, options=tuple(options), evidence=seen)
        if top is None or (top.score or 0.0) < t.stop_below:
            reasons = ("nothing feasible is expected to help",)
            return LeverDecision(lever="stop", reasons=reasons, options=tuple(options), evidence=seen)
        return LeverDecision(
            lever=top.lever, algorithm=top.algorithm, reasons=top.reasons, options=tuple(options), evidence=seen
        )


def algorithm_options(
    policy: str, given: PolicyInput, t: Thresholds, version: Version = VERSION, *, scheduled: bool = False
) -> list[Option]:
    """Every algorithm as an option, by the table; where one is asked for by name, the others are out.

    Args:
        policy: who asks, for the message.
        scheduled: the lever is chosen otherwise, and no score is raised for its sake.

    Raises:
        ConfigError: there is no algorithm of that name.
    """
    best = promoted(given)
    options = [_weights(given, best, a, t, version, scheduled=scheduled) for a in given.algorithms]
    if t.algorithm is not None:
        return only(policy, options, t.algorithm)
    if version in ("1", "2") or (best.train is not None and _risk(given.history, best.train, t) is not None):
        return options
    return _keeping(options, given.history, t)


def _keeping(options: list[Option], history: Sequence[Generation], t: Thresholds) -> list[Option]:
    """The options with the algorithm of the newest job first and at the best score, where it is to be kept."""
    algorithm, jobs = jobs_in_a_row(history)
    own = next((o for o in options if o.feasible and o.algorithm == algorithm), None)
    if own is None:
        return options
    top = max(o.score or 0.0 for o in options if o.feasible)
    score = own.score or 0.0
    helped = next(g for g in reversed(history) if g.lever == "weights").outcome == "promoted"
    if jobs >= t.min_updates and (score == top or (not helped and top > score + t.margin)):
        return options
    why = f"kept: {jobs} job(s) in a row, of at least {t.min_updates}"
    if jobs >= t.min_updates:
        why = f"kept: no other scores higher than its {score:.3g} by more than {t.margin:g}"
        why = "kept: its newest job was promoted" if helped else why
    kept = msgspec.structs.replace(own, score=top, reasons=(*own.reasons, why))
    return [kept, *(o for o in options if o is not own)]  # the first of equal scores is chosen


def _harness(given: PolicyInput, t: Thresholds) -> Option:
    if (not_feasible := no_harness(given)) is not None:
        return not_feasible
    flat = plateau(given.history)
    if flat < t.patience:
        why = "no edit was tried yet" if flat == 0 else f"{flat} edit(s) in a row without promotion"
        return Option(lever="harness", score=1.0, reasons=(f"{why}, below the patience of {t.patience}",))
    score = 0.5 * 0.5 ** (flat - t.patience)
    return Option(lever="harness", score=score, reasons=(f"a plateau: {flat} edit(s) in a row without promotion",))


def _weights(
    given: PolicyInput, best: Generation, info: AlgorithmInfo, t: Thresholds, version: Version, *, scheduled: bool
) -> Option:
    name, first = info.name, version == "1"
    if "weights" not in given.levers:
        return Option(lever="weights", algorithm=name, feasible=False, reasons=("the run leaves the weights alone",))
    missing = unmet(info, best.train, first=first)
    if missing or best.train is None:
        return Option(lever="weights", algorithm=name, feasible=False, reasons=missing)
    if version in ("1", "2"):
        score, why = _preference(_kind(info, first=first), best.train, t)
    else:
        score, why = _third(info, given, best.train, t)
    reasons = [why]
    failed = failures(given.history, name)
    if failed:
        score *= 0.5**failed
        reasons.append(f"{failed} job(s) in a row without promotion")
    untried = not scheduled and not any(g.lever == "weights" for g in given.history)
    if untried and "harness" in given.levers and given.generation == given.max_generations:
        score += 1.0
        reasons.append("the last generation, and weights were never tried")
    return Option(lever="weights", algorithm=name, score=score, reasons=tuple(reasons))


def _kind(info: AlgorithmInfo, *, first: bool) -> str:
    """The row of the table by which an algorithm is judged."""
    if first:
        return "grpo" if info.requires.reward_variance else "best_of_n"
    if info.name in ("ppo", "entropic", "grpo", "best_of_n", "reinforce", "dpo", "trl-grpo"):
        return info.name
    r = info.requires
    return "best_of_n" if r.winners else "grpo" if r.reward_variance else "dpo" if r.pairs else "reinforce"


def _third(info: AlgorithmInfo, given: PolicyInput, land: RewardLandscape, t: Thresholds) -> tuple[float, str]:
    """The score of a row in version 3, and why."""
    kind = _kind(info, first=False)
    match kind:
        case "dpo" if given.ordinal:
            return 0.75, "the task's rewards are ranks: an order, whose distances say nothing"
        case "entropic" if given.ordinal:
            return 0.22, "the task's rewards are ranks: their distances, and so their skew, say nothing"
        case "reinforce" if info.name == kind and (risk := _risk(given.history, land, t)) is not None:
            return 0.92, f"a regression is to be feared: {risk}"
        case "reinforce" if info.name == kind and not given.ordinal and _continuous(land, t):
            shape = f"{land.distinct_rewards} distinct rewards, at least {t.continuous}, of skew {land.skew:.2f}"
            return 0.86, f"{shape}, over {t.skew:.2f}: their distances are kept"
        case "ppo" if land.step_density is not None and land.step_density < t.step_density:
            of = f"{land.step_density:.2f} of {land.step_calls} step rewards are not 0"
            return 0.24, f"{of}, below {t.step_density:.2f}: a critic has little to learn from"
    score, why = _preference(kind, land, t)
    intervals = {
        "grpo": ("the informative share", land.informative_interval),
        "best_of_n": ("success", land.success_interval),
        "ppo": ("their share", land.step_interval),
    }
    name, interval = intervals.get(kind, ("", None))
    return score, f"{why}{_interval(name, interval)}"


def _continuous(land: RewardLandscape, t: Thresholds) -> bool:
    """Whether rewards are continuous, with a few high ones."""
    return land.distinct_rewards >= t.continuous and land.skew > t.skew


def _risk(history: Sequence[Generation], land: RewardLandscape, t: Thresholds) -> str | None:
    """Why a regression is to be feared; None if nothing measured says so."""
    tested = on_regression_set(history)
    if tested is not None and -tested[1].difference > t.regression and tested[1].p_worse < _ONE_ERROR:
        fell = f"the score on the regression set fell by {-tested[1].difference:.3f} with the job of generation"
        return f"{fell} {tested[0].generation} (p = {tested[1].p_worse:.2g}), over {t.regression:g}"
    if land.kl_to_base is not None and land.kl_to_base > t.max_base_kl:
        return f"the KL divergence to the base is {land.kl_to_base:.2f} nats a token, over {t.max_base_kl:g}"
    return None


def _interval(name: str, found: Interval | None) -> str:
    return "" if found is None else f" (95% interval of {name} {found.low:.2f} to {found.high:.2f})"


def _preference(kind: str, land: RewardLandscape, t: Thresholds) -> tuple[float, str]:
    """The score of a row, and why."""
    informative = f"{land.informative:.2f} of {land.groups} groups are informative"
    match kind:
        case "ppo":
            scored = land.samples - land.unscored
            steps = f"{land.step_rewards} of {scored} samples have step rewards"
            if land.step_rewards >= t.step_rewards * scored:
                return 0.9, f"{steps}, a fraction of at least {t.step_rewards:.2f}"
            return 0.24, f"{steps}: a critic has the last reward alone to learn from"
        case "entropic":
            shape = f"{land.distinct_rewards} distinct rewards of skew {land.skew:.2f}"
            if land.distinct_rewards > 2 and land.skew > t.skew:
                return 0.85, f"{shape}, over {t.skew:.2f}: few high ones to weigh up"
            return 0.22, f"{shape}: no few high ones to weigh up"
        case "grpo":
            if land.informative >= t.informative:
                return 0.8, f"{informative}, at least {t.informative:.2f}"
            return 0.6 * land.informative / t.informative, f"{informative}, below {t.informative:.2f}"
        case "best_of_n":
            if land.success_rate < t.cold_success and land.informative < t.cold_informative:
                return 0.7, f"a cold start: success {land.success_rate:.3f}, {informative}"
            success = f"success {land.success_rate:.2f}"
            return 0.35, f"verified winners to clone ({success}), yet the start is not cold"
        case "trl-grpo":
            return 0.0, "the same as grpo, by TRL: only where it is asked for"
        case "dpo":
            return 0.26, f"rewards say more than ranks ({informative})"
        case _:
            return 0.28, f"slow and safe: the divergence from the base is held down (mean reward {land.mean:.2f})"
