"""The author ``tuner``: a recorded search over the parameters that a harness declares.

Every trial is a call of the tool ``trial``, and before each but the first stands a call of ``suggest``, which says what
to try. So both are in the log: a crash repeats none of those that are there, and a replay makes none. The first trial
is of the harness as it is. All trials of a generation ask the same train items, so that their scores can be compared;
what is best there still has to pass the gate on dev.

Version 1 searched by arithmetic of its own (``search.py``) within the pure step; runs that are pinned to it are decided
as they were.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from bascule.plugins.authors.dimensions import Setting
from bascule.plugins.authors.parameters import Parameter, parameters, with_values
from bascule.plugins.authors.search import settings
from bascule.plugins.authors.suggesting import (
    SUGGEST,
    Point,
    SuggestRequest,
    axis_of,
    need_optuna,
    point_of,
    setting_of,
    suggestion,
)
from bascule.plugins.authors.trials import fold, outcome, trial_call
from bascule.plugins.params import read_params
from bascule.plugins.policy import (
    TRIAL,
    AuthorInput,
    Call,
    CallResult,
    CallTool,
    HarnessEdit,
    NoEdit,
    Performed,
    TrialRequest,
)
from bascule.schemas.errors import ConfigError, HarnessError
from bascule.schemas.events import ToolCalled
from bascule.schemas.harness import Harness

Version = Literal["1", "2"]
VERSION: Version = "2"
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


def make(params: dict[str, Any], version: Version = VERSION) -> Tuner:
    """Build the author.

    Raises:
        ConfigError: a parameter is unknown or out of range.
    """
    return Tuner(read_params(params, Params, "The author tuner"), version)


class Tuner:
    """See the module's docstring."""

    name = "tuner"

    def __init__(self, params: Params, version: Version) -> None:
        self.params = params
        self.version: str = version

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
        again = any(g.edit is not None and g.edit.startswith(PREFIX) and g.outcome == "promoted" for g in given.history)
        # Around parameters that were found by a search, what fills the space finds nothing new.
        first = 0 if again else min(FILLING, self.params.trials - 2)
        search = _computed if self.version == "1" else _suggested
        found = search(tunable, results, seed=_seed(given, self.params), trials=self.params.trials, first=first)
        if isinstance(found, SuggestRequest):
            return CallTool(name=SUGGEST, arguments=_plain(found))
        if isinstance(found, tuple):
            return self._trial(given, tunable, found)
        return _edit(given, tunable, found, self._positions(given))

    def ready(self) -> None:
        """See whether there is Optuna.

        Raises:
            ModelError: it is not installed.
        """
        if self.version != "1":
            need_optuna()

    async def perform(self, call: Call) -> Performed:
        """Make the call ``suggest``.

        Raises:
            ModelError: Optuna is not installed.
            ConfigError: it is another call.
        """
        if not isinstance(call, CallTool) or call.name != SUGGEST:
            raise ConfigError("The author tuner makes suggestions only.", next_step="Report this as a fault.")
        request = msgspec.convert(call.arguments, SuggestRequest)
        point = await asyncio.to_thread(suggestion, request)
        return Performed(answer={"result": msgspec.json.encode(point).decode()})

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
        return trial_call(request)


def _computed(
    tunable: Sequence[Parameter], results: Sequence[CallResult], *, seed: int, trials: int, first: int
) -> Setting | list[Trial]:
    """Version 1: the setting to try next, or all trials if these are all."""
    scored = [outcome(result) for result in results]
    space, present = [p.dimension for p in tunable], tuple(p.present for p in tunable)
    scores = [score for score, _ in scored]
    asked = settings(space, present, scores, seed=seed, trials=trials, first=first)
    if len(asked) > len(results):
        return asked[-1]
    return [Trial(setting=s, score=score, message=said) for s, (score, said) in zip(asked, scored, strict=True)]


def _suggested(
    tunable: Sequence[Parameter], results: Sequence[CallResult], *, seed: int, trials: int, first: int
) -> SuggestRequest | Setting | list[Trial]:
    """The suggestion to ask for, or the setting to try next, or all trials if these are all."""
    space = [p.dimension for p in tunable]
    present = tuple(p.present for p in tunable)
    points, found, asked = [point_of(space, present)], [], present
    for result in results:
        assert isinstance(result, ToolCalled)
        if result.name == TRIAL:
            score, message = outcome(result)
            found.append(Trial(setting=asked, score=score, message=message))
            continue
        point = msgspec.json.decode(result.result or "null", type=Point | None)
        if point is None:
            return found
        points.append(point)
        asked = setting_of(space, point)
    if len(found) < len(points):
        return asked
    if len(found) == trials:
        return found
    return SuggestRequest(
        space=tuple(axis_of(dimension) for dimension in space),
        points=tuple(points),
        scores=tuple(trial.score for trial in found),
        seed=seed,
        filling=len(found) <= first,
    )


def _plain(request: TrialRequest | SuggestRequest) -> dict[str, Any]:
    """The arguments of a call, as they are recorded."""
    arguments: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(request))
    return arguments


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
