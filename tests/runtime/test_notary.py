"""The notary: what it notes, that an idle log does not grow, and that a log behind its anchor is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from bascule.plugins.loader import plugins
from bascule.runtime.cli.launch import producer
from bascule.runtime.log.anchor import Anchor
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.chain import Chain
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.notary import Notary, notarised
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.state import RunState
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import Corrupt, NotFound
from bascule.schemas.events import AdapterServed, LogCheckpointed, RunCompleted

RUN = "small"
Make = Callable[[MemoryLog], View]


@pytest.fixture
def make_view(tmp_path: Path) -> Make:
    """A view with an anchor."""

    def make(log: MemoryLog) -> View:
        anchor = Anchor(tmp_path / "anchor.jsonl")
        blobs = FileBlobs(tmp_path / "blobs")
        return View(log, blobs, plugins(), RUN, producer, home=tmp_path, fresh=True, anchor=anchor)

    return make


async def events_of(log: MemoryLog) -> list[Recorded]:
    return [e async for e in log.read(f"bascule.{RUN}.>")]


def checkpoints(events: list[Recorded]) -> list[Recorded]:
    return [e for e in events if isinstance(e.data, LogCheckpointed)]


async def work(view: View, numbers: range) -> None:
    """Events that call for no decision."""
    for i in numbers:
        data = AdapterServed(adapter=f"x{i}", sha256="0" * 64, engine="test")
        await view.append("rollout", [Draft(subject=subjects.adapter_served(RUN, f"x{i}"), step=0, data=data)])


class Following:
    """A view that is kept up to date and decides nothing, with its notary."""

    def __init__(self, view: View, notary: Notary) -> None:
        self.view = view
        self._tasks = [asyncio.create_task(view.follow([])), asyncio.create_task(notary.run())]

    async def __aenter__(self) -> View:
        async with asyncio.timeout(20):
            await self.view.ready()
        return self.view

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def until(view: View, count: int) -> None:
    async with asyncio.timeout(20):
        await view.until(lambda s: s.events >= count)


# --- whole runs ------------------------------------------------------------------------------------------------------


async def test_the_last_checkpoint_and_the_anchor_cover_the_end_of_the_run(
    make_view: Make, started_log: MemoryLog
) -> None:
    view = make_view(started_log)
    await serve(view, list(SERVICES.values()))
    events = await events_of(started_log)
    *_, end, last = events
    assert isinstance(end.data, RunCompleted)
    assert isinstance(last.data, LogCheckpointed)
    assert last.data.count == len(events) - 1
    assert last.envelope.producer.service == "verifier"
    assert view.anchor is not None
    noted = view.anchor.read().heads[RUN]
    chain = Chain()
    heads = [chain.add(e).hex() for e in events]
    assert last.data.head == heads[-2]
    assert (noted.count, noted.head, noted.seq) == (len(events), heads[-1], last.seq)


async def test_what_a_process_held_when_it_let_go_is_a_fold_of_the_whole_log(
    make_view: Make, started_log: MemoryLog
) -> None:
    view = make_view(started_log)
    await serve(view, list(SERVICES.values()))
    assert view.state.digest() == RunState.of(RUN, await events_of(started_log)).digest()


async def test_opening_a_finished_run_again_and_again_writes_nothing(make_view: Make, started_log: MemoryLog) -> None:
    view = make_view(started_log)
    await serve(view, list(SERVICES.values()))
    assert view.anchor is not None
    before = await events_of(started_log), view.anchor.path.read_bytes()
    for _ in range(3):
        await serve(make_view(started_log), list(SERVICES.values()))
    assert (await events_of(started_log), view.anchor.path.read_bytes()) == before


async def test_a_process_that_is_stopped_notes_what_is_there(make_view: Make, started_log: MemoryLog) -> None:
    view = make_view(started_log)
    reached = asyncio.Event()
    view.listeners.append(lambda e: reached.set() if e.seq >= 20 else None)
    task = asyncio.create_task(serve(view, list(SERVICES.values())))
    await reached.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    events = await events_of(started_log)
    (last,) = checkpoints(events)
    assert isinstance(last.data, LogCheckpointed)
    assert view.anchor is not None
    assert view.anchor.read().heads[RUN].count == len(events)


# --- when a checkpoint is due ----------------------------------------------------------------------------------------


async def test_a_checkpoint_is_due_after_so_many_events(make_view: Make, started_log: MemoryLog) -> None:
    view = make_view(started_log)
    async with Following(view, Notary(view, every=10, seconds=3600)):
        await work(view, range(8))
        await until(view, 9)
        assert not checkpoints(await events_of(started_log))
        await work(view, range(8, 9))
        await until(view, 11)
        await work(view, range(9, 20))
        await until(view, 23)
    found = checkpoints(await events_of(started_log))
    assert len(found) == 2
    assert found[0].subject == subjects.log_checkpointed(RUN, 10)


async def test_a_checkpoint_is_due_some_time_after_an_event_and_an_idle_log_does_not_grow(
    make_view: Make, started_log: MemoryLog
) -> None:
    """Between two events, an interval of no length passes many times over; one checkpoint each is all there may be."""
    view = make_view(started_log)
    async with Following(view, Notary(view, every=1000, seconds=0.0)):
        await until(view, 2)
        for i in range(3):
            await work(view, range(i, i + 1))
            await until(view, 4 + 2 * i)
            for _ in range(200):
                await asyncio.sleep(0)
    events = await events_of(started_log)
    assert [isinstance(e.data, LogCheckpointed) for e in events] == [False, True] * 4
    assert view.anchor is not None
    assert view.anchor.read().n == 4


async def test_two_notaries_make_one_chain_of_checkpoints(make_view: Make, started_log: MemoryLog) -> None:
    views = [make_view(started_log), make_view(started_log)]
    first, second = (Following(v, Notary(v, every=3, seconds=0.0)) for v in views)
    async with first, second:
        await asyncio.gather(work(views[0], range(20)), work(views[1], range(20, 40)))
        for view in views:
            await until(view, 42)
    for view in views:
        async with notarised(view):
            pass
    events = await events_of(started_log)
    chain, heads, counts = Chain(), [""], []
    for event in events:
        heads.append(chain.add(event).hex())
        if isinstance(event.data, LogCheckpointed):
            counts.append(event.data.count)
            assert event.data.head == heads[event.data.count]
    assert counts == sorted(set(counts))
    assert counts[-1] == len(events) - 1
    assert views[0].anchor is not None
    assert views[0].anchor.read().heads[RUN].head == heads[-1]


# --- a log behind its anchor -----------------------------------------------------------------------------------------


async def finished(make_view: Make, log: MemoryLog) -> list[Recorded]:
    await serve(make_view(log), list(SERVICES.values()))
    return await events_of(log)


async def copied(events: list[Recorded]) -> MemoryLog:
    log = MemoryLog()
    for event in events:
        await log.append([NewEvent(subject=event.subject, payload=event.payload)])
    return log


async def refused(make_view: Make, log: MemoryLog) -> str:
    before = await log.head("bascule.>")
    with pytest.raises(BaseException) as caught:
        await serve(make_view(log), list(SERVICES.values()))
    assert await log.head("bascule.>") == before, "nothing may be done before it is refused"
    (error,) = caught.value.exceptions if isinstance(caught.value, BaseExceptionGroup) else (caught.value,)
    assert isinstance(error, Corrupt)
    return str(error)


async def test_services_refuse_a_run_whose_end_is_missing(make_view: Make, started_log: MemoryLog) -> None:
    events = await finished(make_view, started_log)
    text = await refused(make_view, await copied(events[:40]))
    assert "gives out 40 events of the run" in text
    assert "(up to sequence 40)" in text
    assert f"knows {len(events)} events, up to sequence {len(events)}" in text


async def test_services_refuse_a_run_that_lost_an_event_on_the_way(make_view: Make, started_log: MemoryLog) -> None:
    events = await finished(make_view, started_log)
    assert f"gives out {len(events) - 1} events" in await refused(make_view, await copied([*events[:20], *events[21:]]))


async def test_services_refuse_a_run_with_another_past(make_view: Make, started_log: MemoryLog) -> None:
    events = await finished(make_view, started_log)
    first = events[0].payload.replace(b'"time":"20', b'"time":"19')
    assert first != events[0].payload
    log = await copied(events[:0])
    await log.append([NewEvent(subject=events[0].subject, payload=first)])
    for event in events[1:]:
        await log.append([NewEvent(subject=event.subject, payload=event.payload)])
    assert f"up to sequence {len(events)}" in await refused(make_view, log)


async def test_a_run_that_is_gone_is_not_called_unknown(make_view: Make, started_log: MemoryLog) -> None:
    await finished(make_view, started_log)
    assert "gives out 0 events of the run" in await refused(make_view, MemoryLog())


async def test_a_run_that_never_was_is_unknown(make_view: Make) -> None:
    with pytest.raises(NotFound):
        await make_view(MemoryLog()).follow([])
