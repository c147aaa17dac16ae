"""Version 1 of the author ``operators``, for the runs that are pinned to it: the next edit by a fixed order, untried.

Which comes next follows from the promoted harness, its landscape on train, and what became of earlier edits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bascule.plugins.authors.edit_table import OPERATORS, of_version
from bascule.plugins.authors.edits import Family, Operator, Params, edited, material_of, untried
from bascule.plugins.policy import NO_EDIT, AuthorInput, CallResult, Generation, HarnessEdit, NoEdit
from bascule.schemas.errors import ConfigError
from bascule.schemas.harness import Harness

LOW_SUCCESS = 0.5
MANY_FORMAT_FAILURES = 0.2

#: Which families come first, by what the promoted harness shows.
ORDERS: dict[str, tuple[Family, ...]] = {
    "low-chat": ("completion", "chat-shots", "extract", "brief", "retry", "vote", "reshuffle", "instruction"),
    "ill-formed": ("extract", "brief", "retry", "completion", "chat-shots", "vote", "reshuffle", "instruction"),
    "completion": ("completion", "reshuffle", "vote", "retry", "extract", "chat-shots", "instruction", "brief"),
    "good-chat": ("chat-shots", "vote", "brief", "completion", "retry", "reshuffle", "extract", "instruction"),
}


def situation(params: Params, best: Generation | None) -> str:
    """The key into ``ORDERS`` for the promoted candidate. Without a landscape a harness counts as low."""
    train = None if best is None else best.train
    if params["form"] == "chat" and (train is None or train.success_rate < LOW_SUCCESS):
        return "low-chat"
    if train is not None and train.format_failures > MANY_FORMAT_FAILURES:
        return "ill-formed"
    return "completion" if params["form"] == "completion" else "good-chat"


def ranked(
    given: AuthorInput, operators: Sequence[Operator], orders: Mapping[str, tuple[Family, ...]]
) -> list[Operator]:
    """The operators that are left, best first."""
    failed = Counter(
        OPERATORS[g.edit].family for g in given.history if g.edit in OPERATORS and g.outcome in ("rejected", "failed")
    )
    may_quote = given.allows.data and not given.restricted
    left = [o for o in untried(given.harness, given.tried, operators) if may_quote or not o.quotes]
    if not left:
        return []
    best = next((g for g in given.history if g.generation == given.best), None)
    order = orders[situation(given.harness.manifest.params, best)]
    return sorted(left, key=lambda o: (failed[o.family], order.index(o.family)))


class OperatorsFirst:
    """The author ``operators`` of version 1. It has no parameters and makes no calls."""

    name = "operators"
    version = "1"

    def __init__(self, params: Mapping[str, Any]) -> None:
        if params:
            raise ConfigError(f"The author operators has no parameter {min(params)!r}.", next_step="Leave it out.")

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> HarnessEdit | NoEdit:
        material = material_of(given)
        for operator in ranked(given, of_version("1"), ORDERS):
            files = edited(given.harness, operator, material)
            if files is not None:
                return HarnessEdit(files=files, edit=operator.name)
        without = "" if material.quotable else ", and the task lets no train items into a harness"
        return NoEdit(reason=f"Every operator that applies to the promoted harness was tried{without}.")

    def edits_left(self, harness: Harness, tried: Sequence[str]) -> int:
        # After a generation without an edit none is left but those with examples, which the task does not let in.
        return len([o for o in untried(harness, tried, of_version("1")) if not o.quotes or NO_EDIT not in tried])
