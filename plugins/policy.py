"""The policy protocol: who chooses the lever; and the author protocol: who writes harnesses. Both are step machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from bascule.plugins.algorithm import Requires
from bascule.plugins.task import Allows, Example
from bascule.schemas.budget import BudgetConfig
from bascule.schemas.decision import LeverDecision
from bascule.schemas.events import GateFigures, ModelCalled, ToolCalled, TrialCost
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
        input_tokens: without those read from or written to the endpoint's cache, which are counted beside them.
        stop_reason: why the model's answer ended.
        pause: what a person should look at before the run goes on; the call is recorded, and the run pauses with it.
        trial: what a tool that ran episodes ran; ``device`` is what their model computes on.
    """

    answer: dict[str, Any]
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    stop_reason: str | None = None
    pause: str | None = None
    trial: TrialCost | None = None
    device: str = ""


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


class TrainOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one episode on train: its trajectory's id, the kind of its error, its reward if it was scored."""

    trajectory: str
    error: str | None
    reward: float | None


class PolicyInput(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a lever choice may depend on; all of it is in the log.

    Attributes:
        generation: the one to be chosen.
        best: generation of the promoted candidate.
        outcomes: of the promoted candidate's episodes on train, in order.
        ordinal: the task's rewards are ranks: an order, whose distances say nothing.
    """

    generation: int
    max_generations: int
    levers: tuple[Literal["harness", "weights"], ...]
    history: tuple[Generation, ...]
    best: int
    algorithms: tuple[AlgorithmInfo, ...]
    edits_left: int | None = None
    outcomes: tuple[TrainOutcome, ...] = ()
    ordinal: bool = False
    budget_left: BudgetConfig = BudgetConfig()


class PolicyStart(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a run before it starts.

    Attributes:
        train_samples: samples of each example in the landscapes over train.
    """

    levers: tuple[Literal["harness", "weights"], ...]
    algorithms: tuple[AlgorithmInfo, ...]
    train_samples: int


#: The tool that the feedback service offers to every author: a harness is tried on train items.
TRIAL = "trial"
#: The tool that it offers to every policy and author: ``{"trajectory": id}`` of an episode on train, told as text.
READ = "read_trajectory"


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
            ModelError: it cannot be made; the run is paused, and the call is made again after a resume.
            BasculeError: any other; the service stops, and the call is made again after a resume.
        """
        ...


@runtime_checkable
class ChecksReady(Protocol):
    """What a performer has as well whose calls need something of the machine that they are made on."""

    def ready(self) -> None:
        """See whether it is there; asked once, before the run spends anything.

        Raises:
            ModelError: a key or a package is missing.
        """
        ...


@runtime_checkable
class CallsModels(Protocol):
    """What a policy or an author that calls models has as well.

    Attributes:
        models: their names, as its calls have them; a run that is bounded in dollars needs a price of each.
    """

    models: tuple[str, ...]


class Policy(Protocol):
    """Chooses the lever and the algorithm."""

    name: str
    version: str

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> Call | LeverDecision:
        """Pure: the next call, or the decision, given the results of all earlier calls."""
        ...


@runtime_checkable
class ChecksStart(Protocol):
    """What a policy has as well that is told what to do and can say beforehand that a run does not allow it.

    Attributes:
        named: algorithms that it is told to use; their parameters are checked before the run starts.
    """

    named: tuple[str, ...]

    def check(self, given: PolicyStart) -> None:
        """Refuse a run in which it could not do as it is told.

        Raises:
            ConfigError: names what does not fit.
        """
        ...


class TrainEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """One train trajectory as an author sees it; ``trajectory`` is its id."""

    example: Example
    truth: str
    answer: str | None
    error: str | None
    reward: float | None
    trajectory: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether there is nothing to learn from it but how it is done."""
        return self.error is None and self.reward is not None and self.reward >= 1


#: What stands in ``AuthorInput.tried`` for a generation in which the author had no usable edit.
NO_EDIT = "no edit"


class AuthorInput(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an edit may depend on: the promoted harness, what was tried, train items in full.

    Attributes:
        harness: the promoted one; ``best`` is its candidate's generation.
        tried: edits of it, by name, and ``NO_EDIT``; a promoted one is among them after a rollback.
        answers: of the train items; where ``allows.data`` is false, none of them may go into a harness.
        restricted: no text of an item may go into a harness.
    """

    generation: int
    seed: int
    description: str
    max_answer_tokens: int
    harness: Harness
    history: tuple[Generation, ...]
    best: int
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
