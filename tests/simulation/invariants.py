"""What holds after every schedule, whatever went wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import msgspec

from bascule.runtime.audit import replay
from bascule.runtime.audit.replay import Replayer
from bascule.runtime.log.chain import Chain
from bascule.runtime.state import RunState
from bascule.schemas import codec
from bascule.schemas import events as ev
from bascule.schemas.codec import DecisionHash
from bascule.schemas.envelope import Recorded
from tests.simulation import world
from tests.simulation.effects import plugins
from tests.simulation.schedule import Played, calm


def broken(played: Played) -> list[str]:
    """What does not hold of a schedule."""
    found = list(played.problems)
    events = played.events
    if not any(isinstance(e.data, ev.RunCompleted) for e in events):
        return [*found, "the run is not completed"]
    for check in (_recorded, _decided, _fenced, _folded, _chained):
        found += check(played)
    return found


@cache
def _lasting(of: Callable[[], Played]) -> frozenset[str]:
    return frozenset(e.subject for e in of().events if _counts(e))


def _counts(event: Recorded) -> bool:
    """Attempts at a job and notes on the log's length depend on what went wrong; all else must be there once."""
    return not isinstance(event.data, ev.TrainStarted | ev.LogCheckpointed)


def _recorded(played: Played) -> list[str]:
    """Every trajectory is logged and scored once, every decision and update recorded once, and nothing else."""
    subjects = [e.subject for e in played.events]
    if len(set(subjects)) < len(subjects):
        return ["one subject is in the log twice"]
    there, expected = {e.subject for e in played.events if _counts(e)}, _lasting(calm)
    return [f"missing: {s}" for s in sorted(expected - there)] + [f"too much: {s}" for s in sorted(there - expected)]


def _decided(played: Played) -> list[str]:
    """The decisions are those of the run in which nothing went wrong, and come out the same when made again."""
    with _remembered():
        replayer = Replayer(world.RUN, plugins())
        for event in played.events:
            replayer.add(event)
        result = replayer.result()
    found = [f"replayed otherwise: {d}" for d in result.differences]
    if played is not calm() and result.decision_hash != _calm_hash():
        found.append("the decision hash is not that of the run in which nothing went wrong")
    return found


_KEPT = 5000
_forms: dict[tuple[type, bytes, bool], bytes] = {}
_canonical = codec.canonical


def _recall(data: Any, *, measured: bool = True) -> bytes:
    key = type(data), msgspec.json.encode(data), measured
    found = _forms.get(key)
    if found is None:
        if len(_forms) >= _KEPT:
            _forms.clear()
        found = _forms[key] = _canonical(data, measured=measured)
    return found


@contextmanager
def _remembered() -> Iterator[None]:
    """Schedules come to the same decisions, so their canonical forms, a pure function of them, are made once."""
    codec.canonical = replay.canonical = _recall  # type: ignore[attr-defined]
    try:
        yield
    finally:
        codec.canonical = replay.canonical = _canonical  # type: ignore[attr-defined]


@cache
def _calm_hash() -> str:
    found = DecisionHash()
    for event in calm().events:
        found.add(event)
    return found.hexdigest()


def _fenced(played: Played) -> list[str]:
    """What a training job records comes from the attempt that was started last."""
    found: list[str] = []
    newest = 0
    for event in played.events:
        match event.data:
            case ev.TrainStarted(attempt=attempt):
                newest = attempt
            case ev.AdapterCheckpointed(attempt=attempt) | ev.TrainFailed(attempt=attempt) if attempt != newest:
                found.append(f"attempt {attempt} recorded {event.subject} after attempt {newest} had started")
            case _:
                pass
    return found


def _folded(played: Played) -> list[str]:
    """Each process's state is the fold of the log as far as it saw it; an event that comes twice changes nothing."""
    state = RunState(run=world.RUN)
    ends = {view.seq for view in played.views}
    found = [] if len(played.views) == len(played.plan.machines) else ["not every process saw the end"]
    for event in played.events:
        state.apply(event)
        state.apply(event)
        if event.seq in ends:
            views = [v for v in played.views if v.seq == event.seq]
            found += [f"a process's state at {event.seq} is not the fold" for v in views if v != state]
    return found


def _chained(played: Played) -> list[str]:
    """The notaries' checkpoints are heads of the run's one chain."""
    chain = Chain()
    heads = {0: chain.head.hex()}
    found = []
    for event in played.events:
        if isinstance(event.data, ev.LogCheckpointed) and heads.get(event.data.count) != event.data.head:
            found.append(f"{event.subject} is not the chain's head")
        chain.add(event)
        heads[chain.count] = chain.head.hex()
    return found
