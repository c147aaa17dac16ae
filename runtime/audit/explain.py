"""Why? What an event followed from, and for a choice: on which figures, over what else, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from bascule.plugins.policy import Generation
from bascule.runtime.audit.cost import BudgetRow, budget_rows
from bascule.runtime.state import RunState
from bascule.schemas.envelope import Recorded, Unknown
from bascule.schemas.errors import NotFound
from bascule.schemas.events import EvaluationCompleted, LeverChosen


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """One link of the chain from an event back to the run's start."""

    subject: str
    type: str
    seq: int


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """An event and where it came from.

    Attributes:
        data: what the event records.
        chosen: the same, if the event is a choice of lever; ``outcome`` is then what came of it, None while open.
        seen: for a choice, the completed evaluation over train whose landscape it was made on.
        budget: what was spent and left of each bound of the run then.
        causes: from the event's direct cause back to the run's start.
        producer: service, version and code hash that wrote it; ``versions`` are the plugins that the run was pinned to
            when it was written, as ``kind name version (hash)``.
    """

    subject: str
    type: str
    id: str
    seq: int
    time: str
    step: int
    data: Any
    chosen: LeverChosen | None
    outcome: Generation | None
    causes: tuple[Cause, ...]
    producer: str
    versions: tuple[str, ...]
    budget: tuple[BudgetRow, ...] = ()
    seen: EvaluationCompleted | None = None


class _Known(msgspec.Struct, frozen=True):
    subject: str
    type: str
    seq: int
    cause: str | None


class Explainer:
    """Finds one event of a run and what it followed from. Events are taken one by one.

    Args:
        target: a generation (its choice of lever), an event's id, or its subject with or without ``bascule.<run>.``.
    """

    def __init__(self, run: str, target: str) -> None:
        self._target = target
        self._step = int(target) if target.isdecimal() else None
        self._names = {target, f"bascule.{run}.{target}"}
        self._state = RunState(run=run)
        self._known: dict[str, _Known] = {}
        self._found: Recorded | None = None
        self._versions: tuple[str, ...] = ()
        self._budget: tuple[BudgetRow, ...] = ()
        self._steps: list[int] = []

    def add(self, event: Recorded) -> None:
        """Take the run's next event."""
        envelope = event.envelope
        self._known[envelope.id] = _Known(event.subject, envelope.type, event.seq, envelope.causationid)
        self._state.apply(event)
        if isinstance(event.data, LeverChosen):
            self._steps.append(event.data.generation)
        if self._wanted(event):
            self._found = event
            started = self._state.started
            self._budget = budget_rows(self._state) if started else ()
            self._versions = tuple(
                f"{p.kind} {p.name} {p.version} ({p.hash[:12]})" for p in (started.plugins if started else ())
            )

    def _wanted(self, event: Recorded) -> bool:
        if self._step is not None:
            return isinstance(event.data, LeverChosen) and event.data.generation == self._step
        return event.subject in self._names or event.envelope.id == self._target

    def result(self) -> Explanation:
        """The explanation.

        Raises:
            NotFound: there is no such event.
        """
        if self._found is None:
            if self._step is None:
                raise NotFound(
                    f"The run has no event {self._target!r}.", next_step=f"`bascule log {self._state.run}` lists them."
                )
            steps = ", ".join(map(str, self._steps)) or "none yet"
            raise NotFound(
                f"No lever was chosen at step {self._target}.",
                next_step=f"Steps with a choice: {steps}. Step 0 is the first harness.",
            )
        event, envelope = self._found, self._found.envelope
        producer = envelope.producer
        chosen = event.data if isinstance(event.data, LeverChosen) else None
        history = {g.generation: g for g in self._state.history()}
        return Explanation(
            subject=event.subject,
            type=envelope.type,
            id=envelope.id,
            seq=event.seq,
            time=envelope.time,
            step=envelope.step,
            data=msgspec.json.decode(event.data.raw) if isinstance(event.data, Unknown) else event.data,
            chosen=chosen,
            outcome=history.get(chosen.generation) if chosen else None,
            causes=tuple(self._causes(envelope.causationid)),
            producer=f"{producer.service} {producer.version} ({producer.hash})",
            versions=self._versions,
            budget=self._budget,
            seen=self._seen(chosen) if chosen else None,
        )

    def _seen(self, chosen: LeverChosen) -> EvaluationCompleted | None:
        train = self._state.evaluations.get(f"g{chosen.parent:02d}-train")
        return train.completed if train else None

    def _causes(self, cause: str | None) -> Iterable[Cause]:
        while cause is not None and cause in self._known:
            known = self._known[cause]
            yield Cause(subject=known.subject, type=known.type, seq=known.seq)
            cause = known.cause
