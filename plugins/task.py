"""The task protocol: what is asked, what counts as right, and who may see which."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from bascule.plugins.sandbox import Programs
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Trajectory, Verdict


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A question as agents see it.

    Attributes:
        id: unique in the task; may come from a foreign data set.
        group: examples of one group never straddle splits.
        input: what the harness gets; ``question`` is its text form.
    """

    id: str
    group: str
    input: dict[str, Any]


class Allows(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a harness of this task may ask for in its manifest.

    Attributes:
        data: the train items with their answers, in ``prepare`` and in the prompts of few-shot examples.
        packages: installed distributions that it may import.
        memory_mb, disk_mb, prepare_seconds: the most that it may ask for.
    """

    data: bool = True
    packages: tuple[str, ...] = ()
    memory_mb: int = 1024
    disk_mb: int = 16
    prepare_seconds: float = 120.0


class PublicFace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What levers and agents may see: the specification, train items with answers, dev and sealed questions.

    Attributes:
        regression: questions beside the task's own that a candidate must not become worse at; empty for most tasks.
        description: what the task is, for people and authors.
        answers: train answers by example id, as the text a perfect agent would give.
        max_answer_tokens: how long an answer can be.
        source, licence: where the data comes from.
        allows: what a harness may have.
        regime: under which rules the task is played, where it has several; reports keep them apart.
        restricted: items must not be published: their texts go into restricted blobs only.
    """

    name: str
    version: str
    description: str
    train: tuple[Example, ...]
    answers: dict[str, str]
    dev: tuple[Example, ...]
    sealed: tuple[Example, ...]
    max_answer_tokens: int
    source: str
    licence: str
    allows: Allows = Allows()
    regime: str = ""
    restricted: bool = False
    regression: tuple[Example, ...] = ()

    def split(self, name: Split) -> tuple[Example, ...]:
        return {"train": self.train, "dev": self.dev, "sealed": self.sealed, "regression": self.regression}[name]


class PrivateFace(Protocol):
    """The answers of dev, sealed and regression, and the scorer. Only the scoring process opens it.

    It is opened with the rights of the user that runs Bascule and scores with fewer: it may read any file then, and
    write none of that user's. An attribute ``seconds`` says how long one verdict takes at most, if that is not 60.
    """

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """Score one answer; ``None`` is an episode without an answer and scores as a failure, not as Unscored."""
        ...


@runtime_checkable
class RunsPrograms(Protocol):
    """A private face that runs what agents wrote; ``use`` is called once, before the first score."""

    def use(self, programs: Programs) -> None: ...


@runtime_checkable
class ScoresEpisodes(Protocol):
    """A private face that scores by what happened in an episode, as the runtime recorded it, instead of ``score``."""

    def score_episode(self, split: Split, example: str, episode: Trajectory) -> Verdict: ...


Tool = Callable[[dict[str, Any]], Awaitable[str]]
"""A tool of a task: JSON arguments in, text out; an exception is the tool's error, and the harness is told."""


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """What anyone reaches without a model: a constant, or a simple rule.

    Attributes:
        answers: for each split, the answer given to each example id.
    """

    name: str
    answers: dict[str, dict[str, str]]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that was recorded elsewhere, and how to make it here.

    Attributes:
        params: the task's parameters that it is made under, over those that are given.
        baseline, split: whose mean reward it is, and on which split.
        recorded: what was recorded, of ``source``.
        tolerance: how far apart the two may be.
    """

    name: str
    params: dict[str, Any]
    baseline: str
    split: Split
    recorded: float
    tolerance: float
    source: str


@runtime_checkable
class Ranks(Protocol):
    """A task that can say that its rewards are ranks has this as well.

    Attributes:
        ordinal: whether they are: an order of what is better, whose distances say nothing.
    """

    ordinal: bool


@runtime_checkable
class Perturbs(Protocol):
    """A task that knows how to ask its items otherwise has this as well, instead of the general rules."""

    def perturbed(self, example: Example, seed: int) -> Example:
        """The same item in another form or wording: another ``input``, the same right answer. Pure."""
        ...


@runtime_checkable
class SecondOpinion(Protocol):
    """A task that has a second verifier of its own, independent of the first, has this as well."""

    def second(self) -> PrivateFace:
        """Open it; called in the scoring process only."""
        ...


@runtime_checkable
class Compares(Protocol):
    """A task that has recorded figures to compare with has this as well."""

    def comparisons(self) -> Sequence[Comparison]: ...


class Task(Protocol):
    """A task.

    Attributes:
        name: as given to ``--task``.
        summary: one line for listings.
    """

    name: str
    summary: str

    def public(self) -> PublicFace:
        """Load the public face.

        Raises:
            BasculeError: the data cannot be had, with the next step.
        """
        ...

    def private(self) -> PrivateFace:
        """Open the private face; called in the scoring process only."""
        ...

    def harness(self) -> dict[str, str]:
        """Files of the first harness: the task's specification and reference code. Plain, and knows no answers."""
        ...

    def tools(self, example: Example) -> Mapping[str, Tool]:
        """The tools of one episode on ``example``, by name; what they remember lasts as long as the episode."""
        ...

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """Constant and rule baselines, made from the public face alone."""
        ...

    def defaults(self) -> dict[str, Any]:
        """Run configuration that suits the task (``RunConfig`` fields as plain values); the user's values win."""
        ...


class VerifierFactory(Protocol):
    """Makes a second verifier for a task, which may open that task's private face for the truths."""

    def __call__(self, task: Task, params: dict[str, Any]) -> PrivateFace:
        """Called in the scoring process.

        Raises:
            BasculeError: it cannot judge this task; says why.
        """
        ...


class TaskFactory(Protocol):
    """Makes a task from its parameters; heavy work belongs into the task's methods."""

    def __call__(self, params: dict[str, Any]) -> Task: ...
