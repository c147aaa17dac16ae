"""The author ``tuner``: a recorded search over the parameters that a harness declares.

Every trial is a call of the tool ``trial``, so its result is in the log: a crash repeats none of those that are there,
and a replay makes none. The first trial is of the harness as it is. All trials of a generation ask the same train
items, so that their scores can be compared; what is best there still has to pass the gate on dev.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from bascule.plugins.authors.parameters import Parameter, parameters, with_values
from bascule.plugins.authors.search import Setting, settings
from bascule.plugins.policy import (
    TRIAL,
    AuthorInput,
    CallResult,
    CallTool,
    HarnessEdit,
    NoEdit,
    TrialRequest,
    TrialResult,
)
from bascule.plugins.task import Example
from bascule.schemas.errors import ConfigError, HarnessError
from bascule.schemas.events import ToolCalled
from bascule.schemas.harness import Harness

PREFIX = "tune-"
#: How many trials of the first search fill the space before what was learnt leads.
FILLING = 3
_NAME = 100


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of the author.

    Attributes:
        trials: of a generation, that of the harness as it is among them.
        positions: train items that each trial asks, or all if there are fewer.
        samples: episodes for each of them.
        seed: another one searches elsewhere, and on other items.
    """

    trials: Annotated[int, msgspec.Meta(ge=2, le=64)] = 8
    positions: Annotated[int, msgspec.Meta(ge=1)] = 200
    samples: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A setting and what came of it.

    Attributes:
        score: None where no episode came to a verdict by the setting's fault or for another reason.
    """

    setting: Setting
    score: float | None
    message: str = ""


def make(params: dict[str, Any]) -> Tuner:
    """Build the author.

    Raises:
        ConfigError: a parameter is unknown or out of range.
    """
    try:
        return Tuner(msgspec.convert(params, Params))
    except msgspec.ValidationError as e:
        raise ConfigError(
            f"The author tuner cannot take these parameters: {e}.", next_step="Correct that value."
        ) from e


class Tuner:
    """See the module's docstring."""

    name = "tuner"
    version = "1"

    def __init__(self, params: Params) -> None:
        self.params = params

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> CallTool | HarnessEdit | NoEdit:
        try:
            tunable = parameters(given.harness)
        except HarnessError as e:
            return NoEdit(reason=f"The promoted harness cannot be tuned. {e}")
        if not tunable:
            return NoEdit(
                reason="The promoted harness declares nothing tunable: neither tunable in its manifest.json, nor "
                "PARAMS and TUNABLE in a code file."
            )
        if not given.train:
            return NoEdit(reason="The task has no train items to try a harness on.")
        present = tuple(p.present for p in tunable)
        again = any(g.edit is not None and g.edit.startswith(PREFIX) and g.outcome == "promoted" for g in given.history)
        scored = [outcome(result) for result in results]
        asked = settings(
            [p.dimension for p in tunable],
            present,
            [score for score, _ in scored],
            seed=_seed(given, self.params),
            trials=self.params.trials,
            # Around parameters that were found by a search, what fills the space finds nothing new.
            first=0 if again else min(FILLING, self.params.trials - 2),
        )
        if len(asked) > len(results):
            return self._trial(given, tunable, asked[-1])
        trials = [
            Trial(setting=setting, score=score, message=message)
            for setting, (score, message) in zip(asked, scored, strict=True)
        ]
        return _edit(given, tunable, trials, self._positions(given))

    def edits_left(self, harness: Harness, tried: Sequence[str]) -> int:
        """One for a harness that declares something, until a search on it came to nothing."""
        try:
            return int(not tried and bool(parameters(harness)))
        except HarnessError:
            return 0

    def _positions(self, given: AuthorInput) -> tuple[int, ...]:
        return fold(given.train, self.params.positions, salt=f"{_seed(given, self.params)}")

    def _trial(self, given: AuthorInput, tunable: Sequence[Parameter], setting: Setting) -> CallTool:
        request = TrialRequest(
            files=dict(_files(given.harness, tunable, setting)),
            positions=self._positions(given),
            samples=self.params.samples,
        )
        return CallTool(name=TRIAL, arguments=msgspec.json.decode(msgspec.json.encode(request)))


def outcome(result: CallResult) -> tuple[float | None, str]:
    """The score of a trial, None for one that failed, and what it ran into."""
    assert isinstance(result, ToolCalled)
    if result.result is None:
        return None, result.error or "the trial gave no result"
    found = msgspec.json.decode(result.result, type=TrialResult)
    if all(reward is None for reward in found.rewards) or found.errors >= len(found.rewards):
        return None, found.message or "no episode was scored"
    return (found.score if math.isfinite(found.score) else None), found.message


def fold(train: Sequence[Example], n: int, *, salt: str) -> tuple[int, ...]:
    """``n`` positions of train, or all; no two of one group as long as there are others."""

    def rank(position: int) -> bytes:
        return hashlib.sha256(f"{salt}\0{train[position].id}".encode()).digest()

    groups: dict[str, int] = {}
    rounds = []
    for position in sorted(range(len(train)), key=rank):
        group = train[position].group
        groups[group] = groups.get(group, 0) + 1
        rounds.append((groups[group], position))
    rounds.sort(key=lambda pair: pair[0])
    return tuple(sorted(position for _, position in rounds[:n]))


def _seed(given: AuthorInput, params: Params) -> int:
    return given.seed + params.seed


def _files(harness: Harness, tunable: Sequence[Parameter], setting: Setting) -> Mapping[str, str]:
    values = {(p.file, p.name): v for p, v in zip(tunable, setting, strict=True) if repr(v) != repr(p.present)}
    return with_values(harness, values)


def _edit(
    given: AuthorInput, tunable: Sequence[Parameter], trials: Sequence[Trial], positions: Sequence[int]
) -> HarnessEdit | NoEdit:
    """The best trial if it is better than the harness as it is; equal is not better."""
    scored = [t for t in trials if t.score is not None]
    of = f"{len(trials)} trials on {len(positions)} train items"
    if not scored:
        return NoEdit(reason=f"None of {of} was scored: {trials[0].message:.500}")
    best = max(scored, key=lambda t: t.score or 0.0)
    if best is trials[0]:
        others = max((t for t in scored if t is not best), key=lambda t: t.score or 0.0, default=None)
        reason = f"None of {of} was better than the present parameters ({best.score:.4g})"
        if others is not None:
            changed = _changes(tunable, others.setting)
            reason += f"; the best of the others had {others.score:.4g} with {changed}"
        return NoEdit(reason=f"{reason}.")
    number = 1 + sum(1 for g in given.history if g.edit is not None and g.edit.startswith(PREFIX))
    return HarnessEdit(
        files={**given.harness.files, **_files(given.harness, tunable, best.setting)},
        edit=_short(f"{PREFIX}{number}: {_changes(tunable, best.setting)}", _NAME),
    )


def _changes(tunable: Sequence[Parameter], setting: Setting) -> str:
    """What is other, ``C 1 to 0.3, ngrams 1 to 2``."""
    return ", ".join(
        f"{p.name} {_short(_said(p.present), 24)} to {_short(_said(value), 24)}"
        for p, value in zip(tunable, setting, strict=True)
        if repr(value) != repr(p.present)
    )


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else repr(value)


def _short(text: str, most: int) -> str:
    text = text.encode("utf-8", "replace").decode()  # a parameter may hold half a surrogate, an event may not
    return text if len(text) <= most else f"{text[: most - 1]}…"
