"""The policy ``rules``: feasibility first, then a published table of scores with thresholds as parameters.

Lever: harness edits while they help; weights once ``patience`` edits in a row were not promoted (the sequence of
arXiv:2605.27276, section 6.2), or when the last generation has come and weights were never tried.

Algorithm: what an algorithm requires is held against the landscape over train; of those that are feasible, the
highest score wins. Thresholds are parameters, scores are not:

=========  =====================================================  =====  ==================================  =========
algorithm  preferred where                                        score  elsewhere                           score
=========  =====================================================  =====  ==================================  =========
ppo        the verifier rewards single model calls in at least    0.9    its critic learns from the last     0.24
           ``step_rewards`` of the samples                               reward alone
entropic   rewards are more than pass and fail, and their skew    0.85   few high rewards to weigh up        0.22
           is over ``skew``
grpo       at least ``informative`` of the groups have differing  0.8    in proportion to their share        below 0.6
           rewards
best_of_n  the start is cold: success below ``cold_success`` and  0.7    winners to clone, no cold start     0.35
           informative groups below ``cold_informative``
reinforce  a regression is to be feared, which nothing measures          the KL divergence to the base is    0.28
                                                                         held down, at the cost of speed
dpo        the verifier can only rank, which none does                   rewards say more than ranks         0.26
=========  =====================================================  =====  ==================================  =========

``trl-grpo`` trains as grpo does, with TRL, and is taken only where the parameter ``algorithm`` asks for it.

Every job since the last promotion of an algorithm's halves its score, so that another one has its turn. Algorithms of
other plugins are judged as the built-in one that requires the same: winners as best_of_n, differing rewards as grpo,
pairs as dpo, anything else as reinforce.

What decides for grpo is not the pass rate p but how often a group is informative, I(p, G) = 1 - p^G - (1 - p)^G:
group-relative advantages are worth little below I = 0.3. At a cold start, with hardly a success, cloning the few
verified winners is the safer step. Without any success, and where all rewards are equal, nothing is feasible.

Version 1 knew grpo and best_of_n only; runs that are pinned to it are decided as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from bascule.plugins.policy import AlgorithmInfo, CallResult, Generation, PolicyInput
from bascule.schemas.decision import Evidence, LeverDecision, Option
from bascule.schemas.errors import ConfigError
from bascule.schemas.landscape import RewardLandscape

Version = Literal["1", "2"]
VERSION: Version = "2"
_FIGURES = ("success_rate", "informative", "format_failures", "errors", "mean", "variance")
_FIGURES_2 = (*_FIGURES, "skew", "distinct_rewards", "step_rewards")
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Thresholds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of the table.

    Attributes:
        patience: harness edits in a row without promotion that count as a plateau.
        informative: fraction of informative groups from which group-relative advantages are preferred.
        cold_success, cold_informative: below both, the start is cold and winners are cloned.
        step_rewards: fraction of samples with rewards of single model calls from which a critic is preferred.
        skew: of the rewards, over which the few high ones are weighed up.
        stop_below: no feasible option scoring at least this ends the run.
        algorithm: pull weights with this one where it is feasible, whichever the table prefers.
    """

    patience: Annotated[int, msgspec.Meta(ge=1)] = 1
    informative: Fraction = 0.30
    cold_success: Fraction = 0.05
    cold_informative: Fraction = 0.10
    step_rewards: Fraction = 0.20
    skew: float = 1.0
    stop_below: Fraction = 0.15
    algorithm: str | None = None


def make(params: dict[str, Any], version: Version = VERSION) -> Rules:
    """Build the policy.

    Raises:
        ConfigError: a threshold is unknown or out of range.
    """
    try:
        return Rules(msgspec.convert(params, Thresholds), version)
    except msgspec.ValidationError as e:
        raise ConfigError(
            f"The policy rules cannot take these parameters: {e}.", next_step="Correct that value."
        ) from e


class Rules:
    """See the module's docstring."""

    name = "rules"

    def __init__(self, thresholds: Thresholds, version: Version) -> None:
        self.thresholds = thresholds
        self.version: str = version

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> LeverDecision:
        """Score every option, and take the best feasible one."""
        del results  # asks for no calls
        t = self.thresholds
        best = next(g for g in given.history if g.generation == given.best)
        first = self.version == "1"
        evidence = _evidence(given, best, _FIGURES if first else _FIGURES_2)
        weights = [_weights(given, best, a, t, first=first) for a in given.algorithms]
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


def _evidence(given: PolicyInput, best: Generation, figures: Sequence[str]) -> tuple[Evidence, ...]:
    found = [Evidence(name="harness plateau", value=plateau(given.history), event=best.gate_event or "")]
    if best.train is not None and best.train_event:
        found += [
            Evidence(name=f"train {name}", value=float(getattr(best.train, name)), event=best.train_event)
            for name in figures
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


def unmet(info: AlgorithmInfo, landscape: RewardLandscape | None, *, first: bool = False) -> tuple[str, ...]:
    """Which requirements fail, on which figure; ``first`` asks only what version 1 asked."""
    if landscape is None:
        return ("there is no landscape over train",)
    r, land = info.requires, landscape
    out = []
    if r.behaviour_logprobs and land.output_tokens == 0:
        out.append("the engine gives no tokens with log-probabilities (0 a trajectory)")
    if r.reward_variance and land.informative == 0:
        out.append(f"no group has differing rewards (0 of {land.groups} informative)")
    if r.winners and land.success_rate == 0:
        out.append(f"no verified success in {land.samples} samples")
    if first:
        return tuple(out)
    samples = int(info.params["num_generations"]) if r.on_policy else land.samples // max(land.groups, 1)
    if samples < r.group_size:
        out.append(f"it needs groups of {r.group_size}, and they have {samples} samples")
    if r.pairs and land.informative == 0:
        out.append(f"no sample is ranked above another of its group (in 0 of {land.groups} groups)")
    if r.step_rewards and land.step_rewards == 0:
        out.append(f"no model call has a reward of its own (in 0 of {land.samples} samples)")
    if land.variance == 0 and land.step_rewards == 0 and not out and not r.winners:
        out.append(f"all rewards are {land.mean:g} ({land.samples} samples)")
    return tuple(out)


def _weights(given: PolicyInput, best: Generation, info: AlgorithmInfo, t: Thresholds, *, first: bool) -> Option:
    name = info.name
    if "weights" not in given.levers:
        return Option(lever="weights", algorithm=name, feasible=False, reasons=("the run leaves the weights alone",))
    missing = unmet(info, best.train, first=first)
    if missing or best.train is None:
        return Option(lever="weights", algorithm=name, feasible=False, reasons=missing)
    score, why = _preference(_kind(info, first=first), best.train, t)
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


def _kind(info: AlgorithmInfo, *, first: bool) -> str:
    """The row of the table by which an algorithm is judged."""
    if first:
        return "grpo" if info.requires.reward_variance else "best_of_n"
    if info.name in ("ppo", "entropic", "grpo", "best_of_n", "reinforce", "dpo", "trl-grpo"):
        return info.name
    r = info.requires
    return "best_of_n" if r.winners else "grpo" if r.reward_variance else "dpo" if r.pairs else "reinforce"


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
