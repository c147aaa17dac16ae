"""Make every decision of a run again from its log alone, and compare. No model, no network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from bascule.plugins.loader import Plugins
from bascule.runtime.services.decisions import DECIDE
from bascule.runtime.state import RunState
from bascule.runtime.world import World, world_of
from bascule.schemas.codec import DecisionHash, canonical
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import NotFound
from bascule.schemas.events import (
    Data,
    RunCompleted,
    RunForked,
    RunStarted,
)


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One decision that came out otherwise.

    Attributes:
        path: where in the data, e.g. ``$.options[1].score``; empty if the event as a whole is missing or extra.
    """

    subject: str
    seq: int | None
    path: str
    recorded: Any
    replayed: Any


class ReplayResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay found; ``differences`` holds all of them."""

    run: str
    events: int
    decisions: int
    decision_hash: str
    differences: tuple[Difference, ...]


def first_path(recorded: Any, replayed: Any, path: str = "$") -> tuple[str, Any, Any] | None:
    """The first place, in key order, where two JSON values differ."""
    if isinstance(recorded, dict) and isinstance(replayed, dict):
        for key in sorted(set(recorded) | set(replayed)):
            found = first_path(recorded.get(key), replayed.get(key), f"{path}.{key}")
            if found:
                return found
        return None
    if isinstance(recorded, list) and isinstance(replayed, list) and len(recorded) == len(replayed):
        for i, (a, b) in enumerate(zip(recorded, replayed, strict=True)):
            if found := first_path(a, b, f"{path}[{i}]"):
                return found
        return None
    return None if recorded == replayed else (path, recorded, replayed)


def _compare(event: Recorded, draft: Draft) -> Difference | None:
    assert isinstance(event.data, Data)
    if event.envelope.type != draft.data.TYPE:
        return Difference(
            subject=event.subject, seq=event.seq, path="", recorded=event.envelope.type, replayed=draft.data.TYPE
        )
    recorded, replayed = (msgspec.json.decode(canonical(d)) for d in (event.data, draft.data))
    found = first_path(recorded, replayed)
    if found is None:
        return None
    return Difference(subject=event.subject, seq=event.seq, path=found[0], recorded=found[1], replayed=found[2])


class Replayer:
    """Makes every decision of a run again from what the log held when it was made, and compares.

    A decision is compared in type, subject and data, as canonical JSON with figures at 12 digits. Events are taken one
    by one; memory is bounded by the run's state.
    """

    def __init__(self, run: str, plugins: Plugins) -> None:
        self.state = RunState(run=run)
        self._plugins = plugins
        self._world: World | None = None
        self._expected: dict[str, Draft] = {}
        self._differences: list[Difference] = []
        self._decisions = 0
        self._hash = DecisionHash()

    def add(self, event: Recorded) -> None:
        """Take the run's next event.

        Raises:
            NotFound: the first one is not the run's start.
            ConfigError: a plugin or the task's data is not as the run recorded it.
        """
        self._hash.add(event)
        draft = self._expected.pop(event.subject, None)
        if isinstance(event.data, Data) and event.data.KIND == "decision":
            self._decisions += 1
            self._compare(event, draft)
        self.state.apply(event)
        if isinstance(event.data, RunStarted | RunForked) and self.state.started is not None:
            self._world = world_of(self._plugins, self.state.started)
        if self._world is None:
            raise NotFound(
                f"The log of {self.state.run} does not begin with its start.", next_step="Run `bascule verify`."
            )
        try:
            for decide in DECIDE.values():
                self._expected |= {d.subject: d for d in decide(self.state, event, self._world)}
        except (LookupError, AssertionError, ValueError) as error:
            # Something that a decision needs is missing, as in a damaged log that was accepted as it is.
            failed = f"nothing can be decided here: {type(error).__name__}: {error}"
            self._differences.append(
                Difference(subject=event.subject, seq=event.seq, path="", recorded=None, replayed=failed)
            )

    def _compare(self, event: Recorded, draft: Draft | None) -> None:
        if draft is None:
            found: Difference | None = Difference(
                subject=event.subject, seq=event.seq, path="", recorded=event.envelope.type, replayed=None
            )
        else:
            assert self._world is not None
            found = _compare(event, msgspec.structs.replace(draft, data=self._world.recorded(draft.data)))
        if found:
            self._differences.append(found)

    def result(self) -> ReplayResult:
        """What was found so far; of a completed run also what was decided and never recorded."""
        missing = self._expected.values() if isinstance(self.state.end, RunCompleted) else ()
        return ReplayResult(
            run=self.state.run,
            events=self.state.events,
            decisions=self._decisions,
            decision_hash=self._hash.hexdigest(),
            differences=(
                *self._differences,
                *(
                    Difference(subject=d.subject, seq=None, path="", recorded=None, replayed=d.data.TYPE)
                    for d in missing
                ),
            ),
        )


def replay(run: str, events: Iterable[Recorded], plugins: Plugins) -> ReplayResult:
    """Replay a run from its events; see :class:`Replayer`."""
    replayer = Replayer(run, plugins)
    for event in events:
        replayer.add(event)
    return replayer.result()
