"""Audit a run from its log alone: verify it, make its decisions again, explain them. No model, no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from bascule.plugins.loader import Plugins
from bascule.runtime.log.blobs import BlobStore
from bascule.runtime.services.decisions import DECIDE
from bascule.runtime.state import RunState
from bascule.runtime.world import World, world_of
from bascule.schemas.codec import canonical, decision_hash
from bascule.schemas.envelope import Draft, Recorded, Unknown
from bascule.schemas.errors import BasculeError, NotFound
from bascule.schemas.events import (
    AdapterPublished,
    BlobRef,
    Data,
    LeverChosen,
    RunCompleted,
    RunStarted,
    TrajectoryLogged,
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


def replay(run: str, events: Sequence[Recorded], plugins: Plugins) -> ReplayResult:
    """Make every decision of a run again from what the log held when it was made, and compare.

    A decision is compared in type, subject and data, as canonical JSON with figures at 12 digits.
    """
    state = RunState(run=run)
    world: World | None = None
    expected: dict[str, Draft] = {}
    differences: list[Difference] = []
    decisions = 0
    for event in events:
        if isinstance(event.data, Data) and event.data.KIND == "decision":
            decisions += 1
            draft = expected.pop(event.subject, None)
            if draft is None:
                found: Difference | None = Difference(
                    subject=event.subject, seq=event.seq, path="", recorded=event.envelope.type, replayed=None
                )
            else:
                found = _compare(event, draft)
            if found:
                differences.append(found)
        else:
            expected.pop(event.subject, None)
        state.apply(event)
        if isinstance(event.data, RunStarted) and world is None:
            world = world_of(plugins, event.data)
        if world is None:
            raise NotFound(f"The log of {run} does not begin with its start.", next_step="Run `bascule verify`.")
        for decide in DECIDE.values():
            expected |= {d.subject: d for d in decide(state, event, world)}
    if isinstance(state.end, RunCompleted):
        differences += [
            Difference(subject=d.subject, seq=None, path="", recorded=None, replayed=d.data.TYPE)
            for d in expected.values()
        ]
    return ReplayResult(
        run=run,
        events=len(events),
        decisions=decisions,
        decision_hash=decision_hash(events),
        differences=tuple(differences),
    )


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it should be, and where."""

    seq: int
    subject: str
    what: str


def blobs_of(event: Recorded) -> list[BlobRef]:
    """The blobs that an event names and that are kept for good; checkpoints are not, their last is published."""
    match event.data:
        case TrajectoryLogged(blob=BlobRef() as blob):
            return [blob]
        case AdapterPublished(files=files):
            return list(files.values())
        case _:
            return []


def verify(events: Sequence[Recorded], blobs: BlobStore) -> tuple[Fault, ...]:
    """Check order, identities, causality and blobs of a run's events."""
    faults: list[Fault] = []
    seen: set[str] = set()
    last = 0
    for event in events:

        def fault(what: str, event: Recorded = event) -> None:
            faults.append(Fault(seq=event.seq, subject=event.subject, what=what))

        if event.seq <= last:
            fault(f"sequence {event.seq} does not follow {last}")
        last = event.seq
        envelope = event.envelope
        if envelope.id in seen:
            fault("its identity was there before")
        seen.add(envelope.id)
        if envelope.causationid is not None and envelope.causationid not in seen:
            fault(f"its cause {envelope.causationid} is not in the log before it")
        if envelope.run != event.subject.split(".")[1]:
            fault(f"it says that it belongs to the run {envelope.run}")
        if isinstance(event.data, Unknown):
            continue
        for blob in blobs_of(event):
            try:
                blobs.get(blob)
            except BasculeError as e:
                fault(str(e))
    return tuple(faults)


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a generation did what it did."""

    chosen: LeverChosen
    chosen_id: str
    seq: int
    producer: str
    evidence: tuple[tuple[str, float, str], ...]
    causes: tuple[tuple[str, str], ...]


def explain(events: Sequence[Recorded], step: int) -> Explanation:
    """The lever decision of generation ``step``, what it looked at, and the chain of causes back to the start.

    Raises:
        NotFound: no lever was chosen in that generation.
    """
    by_id = {e.envelope.id: e for e in events}
    found = next((e for e in events if isinstance(e.data, LeverChosen) and e.data.generation == step), None)
    if found is None or not isinstance(found.data, LeverChosen):
        steps = [str(e.data.generation) for e in events if isinstance(e.data, LeverChosen)]
        raise NotFound(
            f"No lever was chosen at step {step}.",
            next_step=f"Steps with a choice: {', '.join(steps) or 'none yet'}. Step 0 is the first harness.",
        )
    causes: list[tuple[str, str]] = []
    cursor: Recorded | None = found
    while cursor is not None and cursor.envelope.causationid is not None:
        cursor = by_id.get(cursor.envelope.causationid)
        if cursor is not None:
            causes.append((cursor.subject, cursor.envelope.type))
    producer = found.envelope.producer
    return Explanation(
        chosen=found.data,
        chosen_id=found.envelope.id,
        seq=found.seq,
        producer=f"{producer.service} {producer.version} ({producer.hash})",
        evidence=tuple((e.name, e.value, e.event) for e in found.data.evidence),
        causes=tuple(causes),
    )
