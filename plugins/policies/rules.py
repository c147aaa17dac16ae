"""The policy ``rules``: feasibility first, then a published table of scores with thresholds as parameters.

Lever: harness edits while they help; weights once ``patience`` edits in a row were not promoted (the sequence of
arXiv:2605.27276, section 6.2), or when the last generation has come and weights were never tried.

Algorithm: what decides is not the pass rate p but how often a group is informative, I(p, G) = 1 - p^G - (1 - p)^G.
Group-relative advantages are worth little below I = 0.3; at a cold start, with hardly a success, cloning the few
verified winners is the safer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from bascule.plugins.policy import AlgorithmInfo, CallResult, Generation, PolicyInput
from bascule.schemas.decision import Evidence, LeverDecision, Option
from bascule.schemas.errors import ConfigError
from bascule.schemas.landscape import RewardLandscape

VERSION = "1"
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Thresholds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of the table.

    Attributes:
        patience: harness edits in a row without promotion that count as a plateau.
        informative: fraction of informative groups from which group-relative advantages are preferred.
        cold_success, cold_informative: below both, the start is cold and winners are cloned.
        stop_below: no feasible option scoring at least this ends the run.
        algorithm: pull weights with this one where it is feasible, whichever the table prefers.
    """

    patience: Annotated[int, msgspec.Meta(ge=1)] = 1
    informative: Fraction = 0.30
    cold_success: Fraction = 0.05
    cold_informative: Fraction = 0.10
    stop_below: Fraction = 0.15
    algorithm: str | None = None


def make(params: dict[str, Any]) -> Rules:
    """Build the policy.

    Raises:
        ConfigError: a threshold is unknown or out of range.
    """
    try:
        return Rules(msgspec.convert(params, Thresholds))
    except msgspec.ValidationError as e:
        raise ConfigError(
            f"The policy rules cannot take these parameters: {e}.", next_step="Correct that value."
        ) from e


class Rules:
    """See the module's docstring."""

    name = "rules"
    version = VERSION

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> LeverDecision:
        """Score every option, and take the best feasible one."""
        del results  # asks for no calls
        t = self.thresholds
        best = next(g for g in given.history if g.generation == given.best)
        evidence = _evidence(given, best)
        weights = [_weights(given, best, a, t) for a in given.algorithms]
        options = [_harness(given, t), *(_only(weights, t.algorithm) if t.algorithm else weights)]
        feasible = [o for o in options if o.feasible]
        top = max(feasible, key=lambda o: o.score or 0.0, default=None)
        if given.generation > given.max_generations:
            reasons: tuple[str, ...] = (f"all {given.max_generations} generations are used",)
            return LeverDecision(lever="stop", reasons=reasons, options=tuple(options), evidence=evidence)
        if top is None or (top.score or 0.0) < t.stop_below:
            reasons = ("nothing feasible is expected to help",)
            return LeverDecision(lever="stop", reasons=reasons, options=tuple(options), evidence=evidence)
        return LeverDecision(
            lever=top.lever, algorithm=top.algorithm, reasons=top.reasons, options=tuple(options), evidence=evidence
        )


def _only(options: list[Option], algorithm: str) -> list[Option]:
    """The named algorithm at the score of the best one, the others out; what is not feasible stays so."""
    if algorithm not in [o.algorithm for o in options]:
        known = ", ".join(o.algorithm or "" for o in options)
        raise ConfigError(f"The policy rules is told to use {algorithm!r}, and there is none.", next_step=f"{known}.")
    top = max((o.score or 0.0 for o in options if o.feasible), default=None)
    asked = f"the parameter algorithm asks for {algorithm}"
    out = []
    for o in options:
        if o.algorithm != algorithm:
            out.append(msgspec.structs.replace(o, feasible=False, score=None, reasons=(*o.reasons, asked)))
        else:
            score = top if o.feasible else None
            out.append(msgspec.structs.replace(o, score=score, reasons=(*o.reasons, asked)))
    return out


def _evidence(given: PolicyInput, best: Generation) -> tuple[Evidence, ...]:
    found = [Evidence(name="harness plateau", value=plateau(given.history), event=best.gate_event or "")]
    if best.train is not None and best.train_event:
        found += [
            Evidence(name=f"train {name}", value=float(getattr(best.train, name)), event=best.train_event)
            for name in ("success_rate", "informative", "format_failures", "errors", "mean", "variance")
        ]
    if best.dev is not None and best.dev_event:
        found.append(Evidence(name="dev score", value=best.dev.score, event=best.dev_event))
    return tuple(found)


def plateau(history: Sequence[Generation]) -> int:
    """Harness edits since the last promoted one."""
    count = 0
    for g in reversed(history):
        if g.lever == "harness":
            if g.outcome == "promoted":
                break
            count += 1
    return count


def failures(history: Sequence[Generation], algorithm: str) -> int:
    """Jobs of an algorithm since its last promoted one."""
    count = 0
    for g in reversed(history):
        if g.lever == "weights" and g.algorithm == algorithm:
            if g.outcome == "promoted":
                break
            count += 1
    return count


def _harness(given: PolicyInput, t: Thresholds) -> Option:
    if "harness" not in given.levers:
        return Option(lever="harness", feasible=False, reasons=("the run leaves the harness alone",))
    if given.edits_left == 0:
        return Option(lever="harness", feasible=False, reasons=("the author has no untried edit of this harness",))
    flat = plateau(given.history)
    if flat < t.patience:
        why = "no edit was tried yet" if flat == 0 else f"{flat} edit(s) in a row without promotion"
        return Option(lever="harness", score=1.0, reasons=(f"{why}, below the patience of {t.patience}",))
    score = 0.5 * 0.5 ** (flat - t.patience)
    return Option(lever="harness", score=score, reasons=(f"a plateau: {flat} edit(s) in a row without promotion",))


def unmet(info: AlgorithmInfo, landscape: RewardLandscape | None) -> tuple[str, ...]:
    """Which requirements fail, on which figure."""
    out = []
    if landscape is None:
        return ("there is no landscape over train",)
    if "behaviour_logprobs" in info.requires and landscape.output_tokens == 0:
        out.append("the engine gives no tokens with log-probabilities (0 a trajectory)")
    if "reward_variance" in info.requires and landscape.informative == 0:
        out.append(f"no group has differing rewards (0 of {landscape.groups} informative)")
    if "winners" in info.requires and landscape.success_rate == 0:
        out.append(f"no verified success in {landscape.samples} samples")
    return tuple(out)


def _weights(given: PolicyInput, best: Generation, info: AlgorithmInfo, t: Thresholds) -> Option:
    name = info.name
    if "weights" not in given.levers:
        return Option(lever="weights", algorithm=name, feasible=False, reasons=("the run leaves the weights alone",))
    missing = unmet(info, best.train)
    if missing or best.train is None:
        return Option(lever="weights", algorithm=name, feasible=False, reasons=missing)
    land = best.train
    cold = land.success_rate < t.cold_success and land.informative < t.cold_informative
    informative = f"{land.informative:.2f} of {land.groups} groups are informative"
    if "reward_variance" in info.requires:
        if land.informative >= t.informative:
            score, why = 0.8, f"{informative}, at least {t.informative:.2f}"
        else:
            score, why = 0.6 * land.informative / t.informative, f"{informative}, below {t.informative:.2f}"
    elif cold:
        score, why = 0.7, f"a cold start: success {land.success_rate:.3f}, {informative}"
    else:
        score, why = 0.35, f"verified winners to clone (success {land.success_rate:.2f}), yet the start is not cold"
    reasons = [why]
    failed = failures(given.history, name)
    if failed:
        score *= 0.5**failed
        reasons.append(f"{failed} job(s) in a row without promotion")
    untried = not any(g.lever == "weights" for g in given.history)
    if untried and "harness" in given.levers and given.generation == given.max_generations:
        score += 1.0
        reasons.append("the last generation, and weights were never tried")
    return Option(lever="weights", algorithm=name, score=score, reasons=tuple(reasons))
