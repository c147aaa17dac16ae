"""Forks: another configuration from one step on, outcomes taken from the log alone, the old run untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bascule.plugins.loader import plugins
from bascule.runtime.audit.replay import replay
from bascule.runtime.audit.whatif import Fork, whatif
from bascule.runtime.cli.configuration import layered, override
from bascule.runtime.cli.launch import producer
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.state import RunState
from bascule.runtime.world import merged, plain
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.codec import decode
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import ConfigError, NotFound
from bascule.schemas.run import parse_config

Make = Callable[[MemoryLog], View]


async def finished(make_view: Make, log: MemoryLog) -> list[Recorded]:
    await serve(make_view(log), list(SERVICES.values()))
    return [e async for e in log.read("bascule.small.>")]


def fork(events: list[Recorded], step: int, *settings: str) -> Fork:
    changes: dict[str, Any] = {}
    for item in settings:
        changes = layered(changes, override(item))
    return whatif(
        events,
        "other",
        step=step,
        config=parse_config(layered(plain(RunState.of("small", events).config), changes)),
        changes=changes,
        plugins=plugins(),
        producers={s: producer(s) for s in (*SERVICES, "cli")},
    )


def recorded(made: Fork) -> list[Recorded]:
    return [decode(i, e.subject, e.payload) for i, e in enumerate(made.events, 1)]


async def test_a_fork_that_stops_earlier_ends_on_what_the_log_holds_and_replays_equal(
    make_view: Make, started_log: MemoryLog
) -> None:
    events = await finished(make_view, started_log)
    made = fork(events, 2, "max_generations=1")
    assert made.recorded.lever == "harness"
    assert made.decided is not None
    assert made.decided.lever == "stop"
    assert made.stopped_at is None
    ours = recorded(made)
    assert isinstance(ours[-1].data, ev.RunCompleted)
    assert {e.envelope.origin for e in ours} == {"whatif"}
    assert replay("other", ours, plugins()).differences == ()
    ids = [e.envelope.id for e in ours]
    assert all(e.envelope.causationid in (None, *ids[:i]) for i, e in enumerate(ours))


async def test_a_fork_stops_at_the_first_effect_that_the_log_does_not_hold(
    make_view: Make, started_log: MemoryLog
) -> None:
    events = await finished(make_view, started_log)
    made = fork(events, 3, "max_generations=3")
    assert made.recorded.lever == "stop"
    assert made.decided is not None
    assert made.decided.lever == "harness"
    assert made.stopped_at == "20 of 20 episodes of g03-dev (bascule.other.episodes.g03-dev-s00.requested)"
    assert not any(isinstance(e.data, ev.RunCompleted) for e in recorded(made))


async def test_the_same_configuration_makes_the_same_decisions(make_view: Make, started_log: MemoryLog) -> None:
    events = await finished(make_view, started_log)
    made = fork(events, 1, "concurrency=128")
    assert made.stopped_at is None
    mine = [e for e in events if not isinstance(e.data, ev.LogCheckpointed)]
    theirs = [e for e in recorded(made) if not isinstance(e.data, ev.RunForked | ev.RunPaused)]
    assert sorted(e.subject.split(".", 2)[2] for e in mine) == sorted(e.subject.split(".", 2)[2] for e in theirs)
    assert replay("other", recorded(made), plugins()).decision_hash == replay("small", events, plugins()).decision_hash


async def test_a_fork_can_be_executed_to_its_end(make_view: Make, started_log: MemoryLog, tmp_path: Any) -> None:
    events = await finished(make_view, started_log)
    made = fork(events, 3, "max_generations=3")
    await started_log.append(list(made.events))
    base = make_view(started_log)
    view = View(started_log, base.blobs, plugins(), "other", producer, home=tmp_path, fresh=True)
    await serve(view, list(SERVICES.values()))
    assert view.state.end is None, "a fork waits until somebody resumes it"
    await view.append("cli", [Draft(subject=subjects.run_resumed("other", 1), step=0, data=ev.RunResumed())])
    again = View(started_log, base.blobs, plugins(), "other", producer, home=tmp_path, fresh=True)
    await serve(again, list(SERVICES.values()))
    assert isinstance(again.state.end, ev.RunCompleted)
    assert max(again.state.steps) == 4
    ours = [e async for e in started_log.read("bascule.other.>")]
    assert replay("other", ours, plugins()).differences == ()


async def test_what_episodes_depend_on_cannot_be_changed(make_view: Make, started_log: MemoryLog) -> None:
    events = await finished(make_view, started_log)
    for setting in ("seed=9", "evaluation.dev_examples=3", "model=other", "second=task"):
        with pytest.raises(ConfigError, match="keeps the run's"):
            fork(events, 1, setting)
    with pytest.raises(NotFound, match="no choice at step 9"):
        fork(events, 9, "gate.alpha=0.5")


async def test_a_fork_of_a_fork_replays_equal(make_view: Make, started_log: MemoryLog) -> None:
    events = await finished(make_view, started_log)
    first = fork(events, 2, "gate.alpha=0.2")
    made = whatif(
        recorded(first),
        "third",
        step=2,
        config=parse_config(merged(plain(RunState.of("other", recorded(first)).config), {"max_generations": 1})),
        changes={"max_generations": 1},
        plugins=plugins(),
        producers={s: producer(s) for s in (*SERVICES, "cli")},
    )
    ours = [decode(i, e.subject, e.payload) for i, e in enumerate(made.events, 1)]
    assert [e.data.config.gate.alpha for e in ours if isinstance(e.data, ev.RunForked)] == [0.2, 0.2]
    assert replay("third", ours, plugins()).differences == ()
    assert made.stopped_at is None


async def test_a_fork_that_ended_is_not_paused(make_view: Make, started_log: MemoryLog) -> None:
    made = fork(await finished(make_view, started_log), 2, "max_generations=1")
    state = RunState.of("other", recorded(made))
    assert isinstance(state.end, ev.RunCompleted)
    assert state.paused is None
