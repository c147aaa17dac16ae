"""The promotion gate: a candidate replaces its parent only if a paired test on the same examples says so.

Version 2 of the rules adds a guard of dev, and what else speaks against a candidate.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
from msgspec import UNSET

from bascule.schemas.events import GateFigures
from bascule.schemas.landscape import Interval
from bascule.schemas.run import GateConfig
from bascule.verifiers.checks import (
    Rewards,
    cheaper,
    compared,
    differences,
    diverged,
    objection,
    p_better,
    pass_fail,
    won_and_lost,
)
from bascule.verifiers.holdout import guarded
from bascule.verifiers.statistics import score_interval

GATE_VERSION = "1"
#: Of a decision in which the candidate lacks a verdict that its parent has; version 1 left such positions out. A
#: candidate can see to it that it is not scored where it is bad, so that must never pay.
UNSCORED_VERSION = "2"
#: Of every decision by version 2 of the configuration's rules.
GUARDED_VERSION = "3"
#: What levers are told of a gain that is gone with the same questions in another form, or by the second verifier.
NOT_CONFIRMED = "the gain is not there when it is measured in another way"


class PairedTest(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison of two candidates on the same examples.

    Attributes:
        test: exact McNemar if all rewards of the pairs are 0 or 1, otherwise the sign-flip permutation test.
        wins, losses: examples on which the candidate is better or worse.
        p: one-sided, for "the candidate is better"; 1 without a pair that differs.
        better: whether the candidate is better at all: more wins than losses, or the larger mean.
    """

    test: Literal["mcnemar-exact", "paired-sign-flip"]
    wins: int
    losses: int
    p: float
    better: bool


def score(rewards: Rewards) -> float:
    """Mean reward over all positions; an unscored position adds nothing and stays in the denominator."""
    return math.fsum(r for r in rewards if r is not None) / len(rewards) if rewards else 0.0


def paired_test(candidate: Rewards, parent: Rewards, *, seed: int) -> PairedTest:
    """Compare by position. One that the parent has no verdict for is no pair.

    Where only the candidate has none it counts 0, and never as better than its parent.

    Raises:
        ValueError: the two were not measured on the same number of positions.
    """
    found, exact = differences(candidate, parent), pass_fail(candidate, parent)
    wins, losses = won_and_lost(found)
    return PairedTest(
        test="mcnemar-exact" if exact else "paired-sign-flip",
        wins=wins,
        losses=losses,
        p=p_better(found, exact=exact, seed=seed),
        better=math.fsum(found) > 0,
    )


def gate_version(candidate: Rewards, parent: Rewards | None, config: GateConfig) -> str:
    """The version of the rules that a decision between these needs."""
    if config.version > 1:
        return GUARDED_VERSION
    missing = any(c is None and p is not None for c, p in zip(candidate, parent or (), strict=False))
    return UNSCORED_VERSION if missing else GATE_VERSION


def reported_score(figures: GateFigures) -> float:
    """The dev score that a run reports after a decision: the guard's, where there is one."""
    return figures.guard.reported if figures.guard is not UNSET else figures.score


def without_second(figures: GateFigures) -> GateFigures:
    """The figures without those of the second verifier, which no lever is to work towards."""
    if figures.second is UNSET:
        return figures
    spoke = figures.reason is not UNSET and "second verifier" in figures.reason
    return msgspec.structs.replace(figures, second=UNSET, reason=NOT_CONFIRMED if spoke else figures.reason)


def withheld(figures: GateFigures, *, promoted: bool) -> GateFigures:
    """The figures without what they tell of dev: what the guard reports, the kind of reason, the regression set."""
    reason = "" if figures.reason is UNSET else figures.reason
    if promoted:
        reason = "better by enough, or cheaper and not worse"
    elif reason.startswith("brittle") or "second verifier" in reason:
        reason = NOT_CONFIRMED
    elif not reason.startswith("worse on the regression set"):
        reason = "not better on dev by enough"
    known = reported_score(figures)
    return GateFigures(
        test=figures.test,
        score=known,
        score_interval=Interval(known, known),
        alpha=figures.alpha,
        reason=reason,
        regression=figures.regression,
    )


def gate(
    candidate: Rewards,
    parent: Rewards | None,
    *,
    config: GateConfig,
    seed: int,
    reported: float | None = None,
    costs: tuple[float, float] | None = None,
    regression: tuple[Rewards, Rewards] | None = None,
    perturbed: tuple[Rewards, Rewards] | None = None,
    second: tuple[Rewards, Rewards] | None = None,
) -> tuple[bool, GateFigures]:
    """Whether to promote, and the figures that say why.

    By version 1 of the rules the paired test alone decides, and of what follows ``seed`` nothing is looked at. By
    version 2 a candidate is promoted if it passes the test and the guard, or is cheaper and not worse by more than the
    margin, and neither the regression set nor dev in another form nor the second verifier object
    (:func:`~bascule.verifiers.checks.objection`).

    Args:
        candidate: reward by position in the split; None is unscored. Several samples are given as their mean.
        parent: the promoted candidate's rewards on the same positions; None for the first candidate, which has
            nothing to be compared with and is promoted.
        seed: of the permutation tests, used with more than 16 pairs that differ in a reward other than 0 and 1, and of
            the guard's noise.
        reported: what the run reported as its dev score until now; the parent's score if it is None.
        costs: tokens a rollout of the candidate and of its parent.
        regression, perturbed: rewards of the candidate and of its parent on the regression set, and on examples of dev
            in another form.
        second: their rewards on the same positions of dev by a second verifier.

    Raises:
        ValueError: the two of a pair were not measured on the same number of positions.
    """
    values = [r if r is not None else 0.0 for r in candidate]
    interval = score_interval(values, pass_fail=all(v in (0, 1) for v in values))
    if parent is None:
        reason = UNSET if config.version == 1 else "the first candidate"
        return True, GateFigures(test="first", score=score(candidate), score_interval=interval, reason=reason)
    result = paired_test(candidate, parent, seed=seed)
    figures = GateFigures(
        test=result.test,
        score=score(candidate),
        score_interval=interval,
        parent_score=score(parent),
        wins=result.wins,
        losses=result.losses,
        p=result.p,
        alpha=config.alpha,
    )
    better = result.better and result.p < config.alpha
    if config.version == 1:
        return better, figures
    known = score(parent) if reported is None else reported
    clear, guard = guarded(
        differences(candidate, parent), score=figures.score, reported=known, config=config, seed=seed
    )
    thrifty = None if costs is None else cheaper(candidate, parent, costs=costs, config=config, seed=seed)
    others = {
        "regression": None if regression is None else compared(*regression, seed=seed),
        "perturbed": None if perturbed is None else compared(*perturbed, seed=seed),
    }
    opinion = None if second is None else diverged((candidate, parent), second, seed=seed)
    gained = better and clear
    spared = not gained and thrifty is not None and thrifty.p < config.alpha
    objected = objection(guard.difference, alpha=config.alpha, gained=gained, second=opinion, **others)
    if objected is not None and (gained or spared):
        promote, reason = False, objected
    elif gained:
        promote, reason = True, f"better on dev: {_counted(result)}"
    elif spared and thrifty is not None:
        fewer = f"{thrifty.saved:.0%} fewer tokens a rollout"
        promote, reason = True, f"{fewer}, and worse by less than {thrifty.margin:g}: p = {thrifty.p:.2g}"
    elif better:
        least = f"which is not above the guard's {guard.threshold:.3f}"
        promote, reason = False, f"better on dev by {guard.difference:.3f}, {least}"
    else:
        promote, reason = False, f"not better on dev: {_counted(result)}"
    if not promote:
        guard = msgspec.structs.replace(guard, reported=known)
    elif spared:
        guard = msgspec.structs.replace(guard, reported=min(known, figures.score))
    return promote, msgspec.structs.replace(
        figures,
        reason=reason,
        guard=guard,
        cheaper=thrifty or UNSET,
        regression=others["regression"] or UNSET,
        perturbed=others["perturbed"] or UNSET,
        second=opinion or UNSET,
    )


def _counted(result: PairedTest) -> str:
    return f"{result.wins} better and {result.losses} worse, p = {result.p:.2g}"
