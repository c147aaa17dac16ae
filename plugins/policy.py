"""The policy protocol: who chooses the lever; and the author protocol: who writes harnesses. Both are step machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from bascule.plugins.algorithm import Requires
from bascule.plugins.task import Allows, Example
from bascule.schemas.decision import LeverDecision
from bascule.schemas.events import GateFigures, ModelCalled, ToolCalled
from bascule.schemas.harness import Harness
from bascule.schemas.landscape import RewardLandscape


class CallModel(msgspec.Struct, frozen=True, kw_only=True):
    """The machine asks for a model call; its answer is recorded before the next step."""

    model: str
    request: dict[str, Any]


class CallTool(msgspec.Struct, frozen=True, kw_only=True):
    """The machine asks for a tool call."""

    name: str
    arguments: dict[str, Any]


Call = CallModel | CallTool
CallResult = ModelCalled | ToolCalled


class Performed(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a call.

    Attributes:
        answer: the model's answer, as plain JSON; for a tool ``{"result": text}`` or ``{"error": text}``.
    """

    answer: dict[str, Any]
    input_tokens: int = 0
    output_tokens: int = 0


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One finished generation as policies and authors see it: aggregates, no dev or sealed item.

    Attributes:
        lever, algorithm, edit: what was tried; None for the first.
        outcome: what came of it; ``failed`` covers TrainFailed and AuthorFailed.
        gate: the gate's figures on dev.
        train: landscape over train; ``train_event`` names the event that holds it, as :class:`Evidence` does.
    """

    generation: int
    parent: int | None
    lever: Literal["harness", "weights"] | None
    algorithm: str | None
    edit: str | None
    outcome: Literal["promoted", "rejected", "failed"]
    reason: str = ""
    gate: GateFigures | None = None
    gate_event: str | None = None
    train: RewardLandscape | None = None
    train_event: str | None = None
    dev: RewardLandscape | None = None
    dev_event: str | None = None


class AlgorithmInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An installed algorithm, as a policy sees it."""

    name: str
    version: str
    requires: Requires
    params: dict[str, Any]


class PolicyInput(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a lever choice may depend on; all of it is in the log.

    Attributes:
        generation: the one to be chosen.
        best: generation of the promoted candidate.
    """

    generation: int
    max_generations: int
    levers: tuple[Literal["harness", "weights"], ...]
    history: tuple[Generation, ...]
    best: int
    algorithms: tuple[AlgorithmInfo, ...]
    edits_left: int | None = None


#: The tool that the feedback service offers to every author: a harness is tried on train items.
TRIAL = "trial"


class TrialRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of ``trial``.

    Attributes:
        files: of the promoted harness, those that are to be other; None removes one.
        positions: which train items, by their place in the split.
        samples: episodes for each.
    """

    files: dict[str, str | None]
    positions: tuple[int, ...]
    samples: int = 1


class TrialResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of ``trial``, as JSON text.

    Attributes:
        score: mean reward over the positions; an episode without a verdict counts 0.
        n: positions.
        errors: episodes that ended in an error.
        unscored: episodes without a verdict.
        message: of the first of either.
    """

    score: float
    n: int
    errors: int = 0
    unscored: int = 0
    message: str = ""
    rewards: tuple[float | None, ...] = ()


@runtime_checkable
class Performer(Protocol):
    """What a policy or an author that asks for calls has as well: the effect, kept out of the pure ``step``."""

    async def perform(self, call: Call) -> Performed:
        """Make the call. Its result is recorded, so a crash repeats only a call that was under way.

        Raises:
            BasculeError: it cannot be made; the service stops, and the call is made again after a resume.
        """
        ...


class Policy(Protocol):
    """Chooses the lever and the algorithm."""

    name: str
    version: str

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> Call | LeverDecision:
        """Pure: the next call, or the decision, given the results of all earlier calls."""
        ...


class TrainEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """One train trajectory as an author sees it."""

    example: Example
    truth: str
    answer: str | None
    error: str | None
    reward: float | None


#: What stands in ``AuthorInput.tried`` for a generation in which the author had no usable edit.
NO_EDIT = "no edit"


class AuthorInput(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an edit may depend on: the promoted harness, what was tried, train items in full.

    Attributes:
        harness: the promoted one.
        tried: edits of it that did not replace it, by name, and ``NO_EDIT``.
        answers: of the train items; where ``allows.data`` is false, none of them may go into a harness.
        restricted: no text of an item may go into a harness.
    """

    generation: int
    seed: int
    description: str
    max_answer_tokens: int
    harness: Harness
    history: tuple[Generation, ...]
    tried: tuple[str, ...]
    train: tuple[Example, ...]
    answers: dict[str, str]
    evidence: tuple[TrainEvidence, ...]
    allows: Allows = Allows()
    restricted: bool = False


class HarnessEdit(msgspec.Struct, frozen=True, kw_only=True):
    """A new harness and what was done to the old one."""

    files: dict[str, str]
    edit: str


class NoEdit(msgspec.Struct, frozen=True, kw_only=True):
    """The author has nothing more to try."""

    reason: str


class Author(Protocol):
    """Writes harnesses."""

    name: str
    version: str

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> Call | HarnessEdit | NoEdit:
        """Pure: the next call, or the edit, given the results of all earlier calls."""
        ...

    def edits_left(self, harness: Harness, tried: Sequence[str]) -> int | None:
        """How many edits of ``harness`` are untried; None if that cannot be said. ``tried`` is as in AuthorInput."""
        ...
