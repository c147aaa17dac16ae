"""What ``fixed`` and ``alternate`` share: a schedule says whose turn it is, and that lever is pulled or the run stops.

A turn that cannot be taken ends the run with the reason: what went on after it would be another schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from bascule.plugins.policies.evidence import evidence
from bascule.plugins.policies.feasibility import check_named, no_harness
from bascule.plugins.policy import PolicyInput, PolicyStart
from bascule.schemas.decision import LeverDecision, Option
from bascule.schemas.errors import ConfigError

Turn = Literal["harness", "weights"]


def check_turns(policy: str, turns: Sequence[Turn], algorithm: str | None, given: PolicyStart) -> None:
    """Refuse a run that lacks a lever of the schedule, or in which the named algorithm can never be used.

    Raises:
        ConfigError: names what does not fit.
    """
    for turn in turns:
        if turn not in given.levers:
            raise ConfigError(
                f"The policy {policy} is to pull the {turn}, and the run leaves the {turn} alone.",
                next_step=f"Add it with --levers {','.join(dict.fromkeys((*given.levers, turn)))}, or take it out of "
                "the schedule.",
            )
    if algorithm is not None and "weights" in turns:
        check_named(policy, algorithm, given)


def take(given: PolicyInput, turn: Turn, why: str, algorithms: Sequence[Option]) -> LeverDecision:
    """Pull the lever whose turn it is, with the best of ``algorithms`` where that is the weights; or stop.

    What is feasible and not on scores 0, as the schedule does not want it.
    """
    off = f"it is the turn of the {turn}"
    edit = Option(lever="harness", score=1.0, reasons=("the author can edit the harness",))
    options = tuple(
        o if o.lever == turn or not o.feasible else msgspec.structs.replace(o, score=0.0, reasons=(*o.reasons, off))
        for o in (no_harness(given) or edit, *algorithms)
    )
    on = [o for o in options if o.lever == turn]
    chosen = max((o for o in on if o.feasible), key=lambda o: o.score or 0.0, default=None)
    seen = evidence(given)
    if given.generation > given.max_generations:
        reasons: tuple[str, ...] = (f"all {given.max_generations} generations are used",)
        return LeverDecision(lever="stop", reasons=reasons, options=options, evidence=seen)
    if chosen is None:
        failed = "; ".join(f"{o.algorithm or o.lever}: {', '.join(o.reasons)}" for o in on)
        return LeverDecision(
            lever="stop", reasons=(f"{why}, which is not feasible", failed), options=options, evidence=seen
        )
    reasons = tuple(dict.fromkeys((why, *chosen.reasons)))
    return LeverDecision(
        lever=chosen.lever, algorithm=chosen.algorithm, reasons=reasons, options=options, evidence=seen
    )
