"""The policy ``fixed``: one algorithm and a lever for each generation, whatever the landscape looks like.

It is the control arm for a policy that chooses: the same budget, and nothing is chosen. The presets are the algorithms
that arXiv:2605.27276 reports for its three tasks, named after these: ``lawbench`` ppo, ``trimul`` entropic (its
advantages weighted by the entropic objective) and ``denoising`` grpo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from bascule.plugins.params import read_params
from bascule.plugins.policies.rules import Thresholds, algorithm_options
from bascule.plugins.policies.schedule import Turn, check_turns, take
from bascule.plugins.policy import CallResult, PolicyInput, PolicyStart
from bascule.schemas.decision import LeverDecision
from bascule.schemas.errors import ConfigError

VERSION = "1"
PRESETS = {"lawbench": "ppo", "trimul": "entropic", "denoising": "grpo"}


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is fixed.

    Attributes:
        algorithm: that the weights are pulled with.
        preset: names the algorithm by the task that it was published for.
        schedule: the lever of each generation from the first; the last one goes on for the rest. If it is empty, one
            harness edit and then the weights, as far as the run has these levers.
    """

    algorithm: str | None = None
    preset: Literal["lawbench", "trimul", "denoising"] | None = None
    schedule: tuple[Turn, ...] = ()


def make(params: dict[str, Any]) -> Fixed:
    """Build the policy.

    Raises:
        ConfigError: a parameter is unknown, or preset and algorithm name two algorithms.
    """
    return Fixed(read_params(params, Params, "The policy fixed"))


class Fixed:
    """See the module's docstring."""

    name = "fixed"
    version = VERSION

    def __init__(self, params: Params) -> None:
        preset = PRESETS.get(params.preset or "")
        if preset is not None and params.algorithm not in (None, preset):
            raise ConfigError(
                f"The preset {params.preset} of the policy fixed is {preset}, and its algorithm is to be "
                f"{params.algorithm}.",
                next_step="Give one of the two.",
            )
        self._algorithm = params.algorithm or preset
        self._schedule = params.schedule
        self.named: tuple[str, ...] = () if self._algorithm is None else (self._algorithm,)

    def check(self, given: PolicyStart) -> None:
        """Refuse a run without a lever of the schedule, or in which the algorithm can never be used."""
        turns = self._turns(given.levers)
        self._wanted(turns)
        check_turns(self.name, turns, self._algorithm, given)

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> LeverDecision:
        """Pull the lever that the schedule has for this generation."""
        del results  # asks for no calls
        turns = self._turns(given.levers)
        turn = turns[min(given.generation, len(turns)) - 1]
        algorithm = self._wanted(turns)
        options = algorithm_options(self.name, given, Thresholds(algorithm=algorithm), scheduled=True)
        why = f"the schedule has the {turn} in generation {given.generation}"
        return take(given, turn, why, options)

    def _turns(self, levers: Sequence[Turn]) -> tuple[Turn, ...]:
        usual: tuple[Turn, ...] = ("harness", "weights")
        return self._schedule or tuple(lever for lever in usual if lever in levers)

    def _wanted(self, turns: Sequence[Turn]) -> str | None:
        """The algorithm.

        Raises:
            ConfigError: the schedule has the weights, and none is named.
        """
        if self._algorithm is None and "weights" in turns:
            raise ConfigError(
                "The policy fixed is to pull the weights and is told no algorithm.",
                next_step=f"Set policy.algorithm, or policy.preset to one of {', '.join(PRESETS)}.",
            )
        return self._algorithm
