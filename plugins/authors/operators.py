"""The author ``operators``: general edits of a harness that reads its parameters, chosen by a recorded search.

It knows no task. Of the edits that apply, the first ``candidates`` are tried beside the promoted harness on train items
by successive halving; each trial is a call of the tool ``trial``, so that a crash repeats none and a replay makes none.
The best edit is proposed if it is better by more than noise, and still has to pass the gate on dev.

Which edits come first, and win where scores are equal, follows from the promoted harness, its landscape on train, and
what became of earlier edits. Few-shot examples are train items with their answers: none is drawn where those must not
enter a harness. What is quoted is in no group with what edits are tried on, or they would look better than they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from bascule.plugins.authors.edit_table import of_version
from bascule.plugins.authors.edits import Family, Material, edited, known_form, material_of, untried
from bascule.plugins.authors.halving import Round, Standing, excess, kept, rounds
from bascule.plugins.authors.operators_first import ranked
from bascule.plugins.authors.trials import ordered, rewards, trial_call
from bascule.plugins.params import read_params
from bascule.plugins.policy import (
    NO_EDIT,
    AuthorInput,
    CallResult,
    CallTool,
    HarnessEdit,
    NoEdit,
    TrialRequest,
)
from bascule.schemas.harness import Harness

#: Which families come first, by what the promoted harness shows.
ORDERS: dict[str, tuple[Family, ...]] = {
    "low-chat": (
        "completion", "nearest", "chat-shots", "extract", "told", "own", "brief", "steps", "retry", "vote",
        "reshuffle", "instruction",
    ),
    "ill-formed": (
        "extract", "told", "brief", "retry", "completion", "chat-shots", "nearest", "own", "steps", "vote",
        "reshuffle", "instruction",
    ),
    "completion": (
        "completion", "nearest", "reshuffle", "own", "vote", "retry", "extract", "chat-shots", "instruction", "told",
        "brief", "steps",
    ),
    "good-chat": (
        "chat-shots", "nearest", "own", "steps", "vote", "told", "brief", "completion", "retry", "reshuffle", "extract",
        "instruction",
    ),
}  # fmt: skip


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of the author.

    Attributes:
        episodes: of a generation's trials, about; each trial is one episode for each of its items. With 0 nothing is
            tried, and the first edit is proposed.
        candidates: edits that are tried in a generation.
        noise: standard errors by which an edit has to be better than the promoted harness on the same items.
    """

    episodes: Annotated[int, msgspec.Meta(ge=0)] = 480
    candidates: Annotated[int, msgspec.Meta(ge=1, le=64)] = 12
    noise: Annotated[float, msgspec.Meta(ge=0, le=10)] = 1.0


class Candidate(msgspec.Struct, frozen=True):
    """An edit and the files after it."""

    name: str
    files: dict[str, str]


def make(params: dict[str, Any]) -> Operators:
    """Build the author.

    Raises:
        ConfigError: a parameter is unknown or out of range.
    """
    return Operators(read_params(params, Params, "The author operators"))


class Operators:
    """See the module's docstring."""

    name = "operators"
    version = "2"

    def __init__(self, params: Params) -> None:
        self.params = params

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> CallTool | HarnessEdit | NoEdit:
        positions = tried_on(given, self._items()) if self.params.episodes else ()
        material = material_of(given, without={given.train[p].group for p in positions})
        candidates = self._candidates(given, material)
        if not candidates:
            without = "" if material.quotable else ", and the task lets no train items into a harness"
            return NoEdit(reason=f"Every operator that applies to the promoted harness was tried{without}.")
        if not positions:
            return HarnessEdit(files=candidates[0].files, edit=candidates[0].name)  # there is nothing to try it on
        plan = rounds(len(candidates), budget=self.params.episodes, items=len(positions))
        found = searched(given.harness, candidates, plan, positions, results)
        if isinstance(found, CallTool):
            return found
        return _best(found, candidates, self.params.noise)

    def edits_left(self, harness: Harness, tried: Sequence[str]) -> int:
        """None after a search that found nothing better, or nothing that applies."""
        return 0 if NO_EDIT in tried else len(untried(harness, tried, of_version("2")))

    def _items(self) -> int:
        """How many train items are needed where all candidates are tried."""
        plan = rounds(self.params.candidates, budget=self.params.episodes, items=self.params.episodes)
        return sum(part.items for part in plan)

    def _candidates(self, given: AuthorInput, material: Material) -> list[Candidate]:
        """The first edits that apply, no two of which are the same."""
        found: dict[str, Candidate] = {}
        for operator in ranked(given, of_version("2"), ORDERS):
            files = edited(given.harness, operator, material)
            if files is not None:
                found.setdefault(repr(sorted(files.items())), Candidate(operator.name, files))
            if len(found) == self.params.candidates:
                break
        return list(found.values())


def tried_on(given: AuthorInput, most: int) -> tuple[int, ...]:
    """Positions of the train items that edits may be tried on, best first.

    None is in a group with an example of the promoted harness. Where items may be quoted, half of the groups are left
    for that, those first that the landscape has asked, of which the harness's own answers are known.
    """
    params = given.harness.manifest.params
    quoted = {shot["question"] for shot in params.get("shots", ())} if known_form(params) else set()
    shown = {e.group for e in given.train if e.input.get("question") in quoted}
    groups = {e.group for e in given.train}
    order = [p for p in ordered(given.train, salt=f"{given.seed} trials") if given.train[p].group not in shown]
    if given.allows.data and not given.restricted:
        asked = {e.example.group for e in given.evidence}
        order.sort(key=lambda p: given.train[p].group in asked)
        chosen = set(list(dict.fromkeys(given.train[p].group for p in order))[: (len(groups) + 1) // 2])
        order = [p for p in order if given.train[p].group in chosen]
    return tuple(order[:most])


def searched(
    harness: Harness,
    candidates: Sequence[Candidate],
    plan: Sequence[Round],
    positions: Sequence[int],
    results: Sequence[CallResult],
) -> CallTool | list[Standing]:
    """The next trial, or after the last one the standings: that of the promoted harness, and of who is left.

    Entrant 0 is the promoted harness.
    """
    left = iter(results)
    standings = [Standing(entrant=i, rewards=()) for i in range(len(candidates) + 1)]
    start = 0
    for part in plan:
        standings = [standings[0], *(kept(standings[1:], part.entrants) if start else standings[1:])]
        asked = tuple(sorted(positions[start : start + part.items]))
        start += part.items
        for i, standing in enumerate(standings):
            result = next(left, None)
            if result is None:
                files = {} if standing.entrant == 0 else _other(harness, candidates[standing.entrant - 1].files)
                request = TrialRequest(files=files, positions=asked)
                return trial_call(request)
            scored = rewards(result, len(asked))
            standings[i] = Standing(entrant=standing.entrant, rewards=(*standing.rewards, *scored))
    return standings


def _other(harness: Harness, files: dict[str, str]) -> dict[str, str | None]:
    return {name: text for name, text in files.items() if harness.files.get(name) != text}


def _best(standings: Sequence[Standing], candidates: Sequence[Candidate], noise: float) -> HarnessEdit | NoEdit:
    present, others = standings[0], standings[1:]
    best = kept(others, 1)[0]
    chosen = candidates[best.entrant - 1]
    more, error = excess(best.rewards, present.rewards)
    if more > noise * error:
        return HarnessEdit(files=chosen.files, edit=chosen.name)
    return NoEdit(
        reason=f"None of {len(candidates)} edits was better than the promoted harness ({present.score:.3g} on "
        f"{len(present.rewards)} train items) by more than noise: the best, {chosen.name}, had {best.score:.3g}, "
        f"{more:+.3g} with a standard error of {error:.2g}."
    )
