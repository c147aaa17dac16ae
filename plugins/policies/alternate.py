"""The policy ``alternate``: harness and weights by turns, whatever came of the turns before.

The turns begin with ``harness_steps`` generations of the harness, then ``weights_steps`` of the weights, and so on. The
algorithm is the one that is named, or the one that ``rules`` scores highest under its usual thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from bascule.plugins.params import read_params
from bascule.plugins.policies.rules import Thresholds, algorithm_options
from bascule.plugins.policies.schedule import Turn, check_turns, take
from bascule.plugins.policy import CallResult, PolicyInput, PolicyStart
from bascule.schemas.decision import LeverDecision

VERSION = "1"
Steps = Annotated[int, msgspec.Meta(ge=1)]


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The turns.

    Attributes:
        harness_steps, weights_steps: generations in a row of each lever.
        algorithm: that the weights are pulled with; None leaves it to the rules.
    """

    harness_steps: Steps = 1
    weights_steps: Steps = 1
    algorithm: str | None = None


def make(params: dict[str, Any]) -> Alternate:
    """Build the policy.

    Raises:
        ConfigError: a parameter is unknown or out of range.
    """
    return Alternate(read_params(params, Params, "The policy alternate"))


class Alternate:
    """See the module's docstring."""

    name = "alternate"
    version = VERSION

    def __init__(self, params: Params) -> None:
        self._params = params
        self.named: tuple[str, ...] = () if params.algorithm is None else (params.algorithm,)

    def check(self, given: PolicyStart) -> None:
        """Refuse a run without both levers, or in which the named algorithm can never be used."""
        check_turns(self.name, ("harness", "weights"), self._params.algorithm, given)

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> LeverDecision:
        """Pull the lever whose turn it is."""
        del results  # asks for no calls
        p = self._params
        place = (given.generation - 1) % (p.harness_steps + p.weights_steps)
        turn: Turn = "harness" if place < p.harness_steps else "weights"
        first = 1 if turn == "harness" else 1 + p.harness_steps
        length = p.harness_steps if turn == "harness" else p.weights_steps
        why = f"generation {given.generation} is step {place + 2 - first} of {length} on the {turn}"
        options = algorithm_options(self.name, given, Thresholds(algorithm=p.algorithm), scheduled=True)
        return take(given, turn, why, options)
