"""Whether a policy can do as it is told: its parameters, and whether an algorithm can be used.

The latter is asked of a landscape, and of a run before it starts as far as it can be said then.
"""

from __future__ import annotations

import msgspec

from bascule.plugins.algorithm import Requires
from bascule.plugins.policy import AlgorithmInfo, PolicyInput, PolicyStart
from bascule.schemas.decision import Option
from bascule.schemas.errors import ConfigError
from bascule.schemas.landscape import RewardLandscape


def no_harness(given: PolicyInput) -> Option | None:
    """The lever harness where it cannot be pulled; None where it can."""
    if "harness" not in given.levers:
        return Option(lever="harness", feasible=False, reasons=("the run leaves the harness alone",))
    if given.edits_left == 0:
        return Option(lever="harness", feasible=False, reasons=("the author has no untried edit of this harness",))
    return None


def unmet(info: AlgorithmInfo, landscape: RewardLandscape | None, *, first: bool = False) -> tuple[str, ...]:
    """Which requirements fail, on which figure; ``first`` asks only what version 1 of ``rules`` asked."""
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
    samples = _group_size(info, land.samples // max(land.groups, 1))
    if samples < r.group_size:
        out.append(f"it needs groups of {r.group_size}, and they have {samples} samples")
    if r.pairs and land.informative == 0:
        out.append(f"no sample is ranked above another of its group (in 0 of {land.groups} groups)")
    if r.step_rewards and land.step_rewards == 0:
        out.append(f"no model call has a reward of its own (in 0 of {land.samples} samples)")
    if land.variance == 0 and land.step_rewards == 0 and not out and not r.winners:
        out.append(f"all rewards are {land.mean:g} ({land.samples} samples)")
    return tuple(out)


def _group_size(info: AlgorithmInfo, logged: int) -> int:
    """Samples of a group that the algorithm would train from: its own where it samples anew, else what is logged."""
    return int(info.params["num_generations"]) if info.requires.on_policy else logged


def never_met(info: AlgorithmInfo, train_samples: int) -> str | None:
    """Which requirement no landscape of a run can meet, with the reason; None if that cannot be said.

    Args:
        train_samples: samples of an example in the landscape over train.
    """
    r: Requires = info.requires
    samples = _group_size(info, train_samples)
    if samples < r.group_size:
        setting = f"algorithms.{info.name}.num_generations" if r.on_policy else "evaluation.train_samples"
        return f"group_size: it needs groups of {r.group_size}, and {setting} is {samples}"
    for name, wanted in (("reward_variance", r.reward_variance), ("pairs", r.pairs)):
        if wanted and train_samples < 2:
            return f"{name}: it compares samples of one example, and evaluation.train_samples is {train_samples}"
    return None


def check_named(policy: str, algorithm: str, given: PolicyStart) -> None:
    """Refuse an algorithm that a policy is told to use and that the run could never use.

    Raises:
        ConfigError: there is none of that name, or one of its requirements cannot be met; names it.
    """
    info = next((a for a in given.algorithms if a.name == algorithm), None)
    if info is None:
        raise unknown(policy, algorithm, [a.name for a in given.algorithms])
    missing = never_met(info, given.train_samples)
    if missing is not None:
        raise ConfigError(
            f"The policy {policy} is told to use {algorithm!r}, and this run cannot meet its requirement {missing}.",
            next_step="Raise that setting, or name another algorithm.",
        )


def unknown(policy: str, algorithm: str, known: list[str]) -> ConfigError:
    """What is said where a policy is told to use an algorithm that is not there."""
    return ConfigError(
        f"The policy {policy} is told to use {algorithm!r}, and there is none.", next_step=f"Known: {', '.join(known)}."
    )


def only(policy: str, options: list[Option], algorithm: str) -> list[Option]:
    """The named algorithm at the score of the best one, the others out; what is not feasible stays so.

    Raises:
        ConfigError: there is none of that name.
    """
    if algorithm not in [o.algorithm for o in options]:
        raise unknown(policy, algorithm, [o.algorithm or "" for o in options])
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
