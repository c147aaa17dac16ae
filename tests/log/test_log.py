"""What every log promises, on the log in memory and on a real server; and what only the real one has to promise."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import nats
import pytest
from nats.js.api import StreamConfig

from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.protocol import EventLog, Fence, NewEvent
from bascule.runtime.log.rules import matches
from bascule.runtime.log.server import EmbeddedServer, find_binary
from bascule.runtime.log.streams import STREAM, stream_config
from bascule.schemas import subjects
from bascule.schemas.codec import encode
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.errors import Conflict, Corrupt, LogError, LogUnavailable, SchemaError
from bascule.schemas.events import RunPaused
from tests.log.restarts import restart

PRODUCER = Producer(service="test", version="0", hash="0")
MakeLog = Callable[..., Awaitable[EventLog]]


def event(subject: str, reason: str = "because") -> NewEvent:
    draft = Draft(subject=subject, step=0, data=RunPaused(reason=reason))
    payload = encode(draft, run=subject.split(".")[1], producer=PRODUCER, time="2026-01-01T00:00:00Z", root=None)
    return NewEvent(subject=subject, payload=payload)


def pause(run: str, i: int, reason: str = "because") -> NewEvent:
    return event(subjects.run_paused(run, i), reason)


async def first(events: AsyncIterator[Recorded], n: int) -> list[Recorded]:
    async with asyncio.timeout(20):
        return [await anext(events) for _ in range(n)]


async def collected(events: AsyncIterator[Recorded]) -> list[Recorded]:
    async with asyncio.timeout(20):
        return [e async for e in events]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    started = EmbeddedServer.start(tmp_path_factory.mktemp("home"))
    yield started
    started.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    started = EmbeddedServer.start(tmp_path / "home")
    yield started
    started.stop()


async def opened(server: EmbeddedServer, **options: float) -> NatsLog:
    return await NatsLog.connect(server.url, user=server.user, password=server.password, **options)  # type: ignore[arg-type]


@pytest.fixture(params=["memory", "nats"])
async def make_log(request: pytest.FixtureRequest) -> AsyncIterator[MakeLog]:
    logs: list[EventLog] = []

    async def make(**options: float) -> EventLog:
        if request.param == "memory":
            logs.append(MemoryLog(**options))
        else:
            logs.append(await opened(request.getfixturevalue("server"), **options))
        return logs[-1]

    yield make
    for log in logs:
        await log.close()


@pytest.fixture
async def log(make_log: MakeLog) -> EventLog:
    return await make_log()


@pytest.fixture
def run() -> str:
    return f"t{secrets.token_hex(6)}"


# --- appending -------------------------------------------------------------------------------------------------------


async def test_an_append_returns_the_event_as_recorded(log: EventLog, run: str) -> None:
    new = pause(run, 1)
    (recorded,) = await log.append([new])
    assert (recorded.subject, recorded.payload, recorded.duplicate) == (new.subject, new.payload, False)
    assert await log.get(new.subject) == recorded


async def test_the_first_write_wins_over_other_bytes_and_is_adopted(log: EventLog, run: str) -> None:
    (mine,) = await log.append([pause(run, 1, "mine")])
    (same,) = await log.append([pause(run, 1, "mine")])
    (other,) = await log.append([pause(run, 1, "other")])
    for answer in (same, other):
        assert answer.duplicate
        assert (answer.seq, answer.payload) == (mine.seq, mine.payload)
    assert len(await collected(log.read(f"bascule.{run}.>"))) == 1


async def test_of_many_writers_at_once_exactly_one_writes(log: EventLog, run: str) -> None:
    answers = await asyncio.gather(*(log.append([pause(run, 1, f"writer {i}")]) for i in range(20)))
    assert sum(not a.duplicate for (a,) in answers) == 1
    assert len({(a.seq, a.payload) for (a,) in answers}) == 1


async def test_a_payload_under_another_subject_is_refused(log: EventLog, run: str) -> None:
    stray = NewEvent(subject=subjects.run_paused(run, 2), payload=pause(run, 1).payload)
    with pytest.raises(Corrupt, match="says it is"):
        await log.append([stray])
    assert await log.get(stray.subject) is None


async def test_a_closed_log_says_so(make_log: MakeLog, run: str) -> None:
    log = await make_log()
    await log.close()
    with pytest.raises(LogError, match="closed"):
        await log.append([pause(run, 1)])


# --- batches ---------------------------------------------------------------------------------------------------------


async def test_a_batch_is_recorded_in_its_order_without_gaps(log: EventLog, run: str) -> None:
    batch = [pause(run, i) for i in range(20)]
    recorded = await log.append(batch)
    assert [r.seq for r in recorded] == list(range(recorded[0].seq, recorded[0].seq + 20))
    assert [r.payload for r in recorded] == [b.payload for b in batch]
    assert await collected(log.read(f"bascule.{run}.>")) == recorded


async def test_a_batch_that_is_there_is_adopted_whole(log: EventLog, run: str) -> None:
    before = await log.append([pause(run, i, "first") for i in range(3)])
    after = await log.append([pause(run, i, "second") for i in range(3)])
    assert all(a.duplicate for a in after)
    assert [(a.seq, a.payload) for a in after] == [(b.seq, b.payload) for b in before]


async def test_a_batch_that_is_there_in_part_writes_nothing_and_names_what_is_there(log: EventLog, run: str) -> None:
    (there,) = await log.append([pause(run, 2)])
    with pytest.raises(Conflict, match=r"pause-002.*missing: .*pause-001.*pause-003"):
        await log.append([pause(run, 1), pause(run, 2), pause(run, 3)])
    assert await log.head(f"bascule.{run}.>") == there.seq
    assert [r.duplicate for r in await log.append([pause(run, 1), pause(run, 3)])] == [False, False]


async def test_of_two_overlapping_batches_at_once_one_is_whole_and_the_other_leaves_no_trace(
    log: EventLog, run: str
) -> None:
    answers = await asyncio.gather(
        log.append([pause(run, i, "a") for i in (1, 2)]),
        log.append([pause(run, i, "b") for i in (2, 3)]),
        return_exceptions=True,
    )
    assert sorted(isinstance(a, Conflict) for a in answers) == [False, True]
    assert len(await collected(log.read(f"bascule.{run}.>"))) == 2


@pytest.mark.parametrize("indices", [[], [1, 1], range(1001)])
async def test_a_batch_that_cannot_be_atomic_is_refused(log: EventLog, run: str, indices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"append takes|one subject twice"):
        await log.append([pause(run, i) for i in indices])


# --- fencing ---------------------------------------------------------------------------------------------------------


async def test_a_fence_refuses_a_stale_attempt_and_accepts_the_newest(log: EventLog, run: str) -> None:
    job = subjects.train_aggregate(run, 1)
    (old,) = await log.append([event(subjects.train_started(run, 1, 1))], fence=Fence(filter=job, seq=0))
    (new,) = await log.append([event(subjects.train_started(run, 1, 2))], fence=Fence(filter=job, seq=old.seq))
    outcome = subjects.train_outcome(run, 1)
    with pytest.raises(Conflict, match=f"started-002 is there at sequence {new.seq}"):
        await log.append([event(outcome, "stale")], fence=Fence(filter=job, seq=old.seq))
    assert await log.get(outcome) is None
    (accepted,) = await log.append([event(outcome, "newest")], fence=Fence(filter=job, seq=new.seq))
    assert not accepted.duplicate


async def test_of_two_attempts_that_start_at_once_one_is_refused(log: EventLog, run: str) -> None:
    job = subjects.train_aggregate(run, 1)
    answers = await asyncio.gather(
        *(log.append([event(subjects.train_started(run, 1, i))], fence=Fence(filter=job, seq=0)) for i in (1, 2)),
        return_exceptions=True,
    )
    assert sorted(isinstance(a, Conflict) for a in answers) == [False, True]


async def test_a_stored_outcome_is_adopted_whatever_the_fence(log: EventLog, run: str) -> None:
    job, outcome = subjects.train_aggregate(run, 1), subjects.train_outcome(run, 1)
    (stored,) = await log.append([event(outcome, "first")], fence=Fence(filter=job, seq=0))
    (later,) = await log.append([event(subjects.train_started(run, 1, 2))], fence=Fence(filter=job, seq=stored.seq))
    for seq in (0, stored.seq, later.seq):
        (answer,) = await log.append([event(outcome, "second")], fence=Fence(filter=job, seq=seq))
        assert answer.duplicate
        assert (answer.seq, answer.payload) == (stored.seq, stored.payload)


async def test_a_fence_that_does_not_cover_its_event_is_refused(log: EventLog, run: str) -> None:
    with pytest.raises(ValueError, match="fence"):
        await log.append([pause(run, 1)], fence=Fence(filter=subjects.train_aggregate(run, 1), seq=0))


# --- reading ---------------------------------------------------------------------------------------------------------


async def test_head_is_the_newest_event_under_a_filter(log: EventLog, run: str) -> None:
    assert await log.head(f"bascule.{run}.>") == 0
    (a,) = await log.append([pause(run, 1)])
    (b,) = await log.append([event(subjects.train_started(run, 1, 1))])
    assert await log.head(f"bascule.{run}.>") == b.seq
    assert await log.head(f"bascule.{run}.run.*.paused") == a.seq
    assert await log.get(subjects.run_paused(run, 9)) is None


async def test_read_gives_history_in_order_and_ends_at_the_head(log: EventLog, run: str) -> None:
    assert await collected(log.read(f"bascule.{run}.>")) == []
    recorded = [r for i in range(5) for r in await log.append([pause(run, i)])]
    await log.append([pause(f"{run}x", 0)])
    assert await collected(log.read(f"bascule.{run}.>")) == recorded
    assert await collected(log.read(f"bascule.{run}.>", after=recorded[2].seq)) == recorded[3:]
    assert await collected(log.read(f"bascule.{run}.>", after=recorded[-1].seq)) == []


async def test_read_leaves_out_what_is_appended_while_it_reads(log: EventLog, run: str) -> None:
    await log.append([pause(run, i) for i in range(3)])
    async with aclosing(log.read(f"bascule.{run}.>")) as events:  # type: ignore[type-var]
        await anext(events)
        await log.append([pause(run, 3)])
        assert len(await collected(events)) == 2


async def test_follow_gives_history_then_live_events_in_order(log: EventLog, run: str) -> None:
    history = await log.append([pause(run, i) for i in range(3)])
    async with aclosing(log.follow(f"bascule.{run}.>", after=history[0].seq)) as events:  # type: ignore[type-var]
        assert await first(events, 2) == history[1:]
        live = []
        for i in range(3, 30):
            await log.append([pause(f"{run}x", i)])
            live += await log.append([pause(run, i)])
        assert await first(events, len(live)) == live


async def test_follow_waits_for_the_first_event_of_a_run(log: EventLog, run: str) -> None:
    async with aclosing(log.follow(f"bascule.{run}.>")) as events:  # type: ignore[type-var]
        waiting = asyncio.create_task(first(events, 1))
        recorded = await log.append([pause(run, 1)])
        assert await waiting == recorded


@pytest.mark.parametrize(
    "filter_", ["bascule.{}.run.*.paused", "bascule.{}.*.g01.>", "bascule.{}.train.>", "bascule.{}.>"]
)
async def test_get_head_read_and_follow_agree_on_what_a_filter_covers(log: EventLog, run: str, filter_: str) -> None:
    under = filter_.format(run)
    await log.append([pause(run, 1), event(subjects.train_started(run, 1, 1)), event(subjects.train_outcome(run, 11))])
    read = await collected(log.read(under))
    assert read == [e for e in await collected(log.read(f"bascule.{run}.>")) if matches(under, e.subject)]
    assert await log.head(under) == read[-1].seq
    assert await log.get(read[-1].subject) == read[-1]
    async with aclosing(log.follow(under)) as events:  # type: ignore[type-var]
        assert await first(events, len(read)) == read


# --- work ------------------------------------------------------------------------------------------------------------


async def test_two_workers_share_the_work_and_none_is_given_twice(log: EventLog, run: str) -> None:
    recorded = await log.append([pause(run, i) for i in range(40)])
    a, b = [await log.work(run, "verifier", [f"bascule.{run}.run.*.paused"]) for _ in range(2)]
    taken: list[Recorded] = []
    while len(taken) < len(recorded):
        for queue in (a, b):
            items = await queue.next(3, 10)
            taken += [item.event for item in items]
            assert len(items) <= 3
    assert sorted(taken, key=lambda e: e.seq) == recorded
    assert await a.next(1, 0.05) == []
    assert await b.next(1, 0.05) == []


async def test_work_that_comes_later_is_delivered_to_a_worker_that_waits(log: EventLog, run: str) -> None:
    queue = await log.work(run, "verifier", [f"bascule.{run}.>"])
    waiting = asyncio.create_task(queue.next(8, 20))
    (recorded,) = await log.append([pause(run, 1)])
    assert [item.event for item in await waiting] == [recorded]


async def test_work_given_back_is_delivered_again(log: EventLog, run: str) -> None:
    await log.append([pause(run, 1)])
    queue = await log.work(run, "verifier", [f"bascule.{run}.>"])
    (item,) = await queue.next(1, 10)
    await item.retry(0.05)
    (again,) = await queue.next(1, 10)
    assert again.event == item.event


async def test_work_that_is_done_is_not_delivered_again(make_log: MakeLog, run: str) -> None:
    log = await make_log(lease=0.3)
    await log.append([pause(run, 1)])
    queue = await log.work(run, "verifier", [f"bascule.{run}.>"])
    (item,) = await queue.next(1, 10)
    await item.done()
    assert await queue.next(1, 0.8) == []


async def test_work_of_a_worker_that_died_goes_to_another(make_log: MakeLog, run: str) -> None:
    log = await make_log(lease=0.3)
    await log.append([pause(run, 1)])
    dead, alive = [await log.work(run, "verifier", [f"bascule.{run}.>"]) for _ in range(2)]
    (lost,) = await dead.next(1, 10)
    (item,) = await alive.next(1, 10)
    assert item.event == lost.event


async def test_progress_extends_the_lease(make_log: MakeLog, run: str) -> None:
    log = await make_log(lease=1.5)
    await log.append([pause(run, 1)])
    busy, idle = [await log.work(run, "verifier", [f"bascule.{run}.>"]) for _ in range(2)]
    (item,) = await busy.next(1, 10)
    for _ in range(5):
        assert await idle.next(1, 0.4) == []
        await item.progress()


async def test_a_fresh_queue_delivers_everything_again_without_waiting_for_leases(log: EventLog, run: str) -> None:
    recorded = await log.append([pause(run, i) for i in range(3)])
    before = await log.work(run, "verifier", [f"bascule.{run}.>"])
    leased = await before.next(3, 10)
    await leased[0].done()
    fresh = await log.work(run, "verifier", [f"bascule.{run}.>"], fresh=True)
    assert [item.event for item in await fresh.next(3, 10)] == recorded


async def test_changed_filters_deliver_what_they_newly_cover(log: EventLog, run: str) -> None:
    (paused,) = await log.append([pause(run, 1)])
    (started,) = await log.append([event(subjects.train_started(run, 1, 1))])
    before = await log.work(run, "verifier", [f"bascule.{run}.train.>"])
    (item,) = await before.next(2, 10)
    assert item.event == started
    await item.done()
    after = await log.work(run, "verifier", [f"bascule.{run}.train.>", f"bascule.{run}.run.>"])
    assert paused in [item.event for item in await after.next(2, 10)]


async def test_services_and_runs_have_queues_of_their_own(log: EventLog, run: str) -> None:
    await log.append([pause(run, 1)])
    names = [(run, "b-c"), (f"{run}-b", "c"), (run, "verifier")]
    for run_, service in names:
        queue = await log.work(run_, service, [f"bascule.{run}.>"])
        assert len(await queue.next(1, 10)) == 1


async def test_cancelling_a_worker_that_waits_loses_nothing(log: EventLog, run: str) -> None:
    queue = await log.work(run, "verifier", [f"bascule.{run}.>"])
    for i in range(10):
        waiting = asyncio.create_task(queue.next(4, 20))
        await log.append([pause(run, i)])
        waiting.cancel()
        taken = await asyncio.gather(waiting, return_exceptions=True)
        items = taken[0] if isinstance(taken[0], list) else await queue.next(4, 5)
        assert [item.event.subject for item in items] == [subjects.run_paused(run, i)]


async def test_a_closed_queue_gives_its_work_to_others(log: EventLog, run: str) -> None:
    leaving, staying = [await log.work(run, "verifier", [f"bascule.{run}.>"]) for _ in range(2)]
    waiting = asyncio.create_task(leaving.next(1, 20))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await leaving.close()
    (recorded,) = await log.append([pause(run, 1)])
    assert [item.event for item in await staying.next(1, 5)] == [recorded]
    assert await leaving.next(1, 5) == []


# --- a server that dies ----------------------------------------------------------------------------------------------


async def test_what_was_acknowledged_survives_the_death_of_the_server(own_server: EmbeddedServer, run: str) -> None:
    log = await opened(own_server)
    recorded = [r for i in range(20) for r in await log.append([pause(run, i)])]
    recorded += await log.append([pause(run, i) for i in range(20, 40)])
    os.kill(own_server.pid, signal.SIGKILL)
    restart(own_server)
    assert await collected(log.read(f"bascule.{run}.>")) == recorded
    await log.close()


async def test_append_follow_and_work_go_on_over_the_death_of_the_server(own_server: EmbeddedServer, run: str) -> None:
    log = await opened(own_server)
    queue = await log.work(run, "verifier", [f"bascule.{run}.>"])
    worked: set[str] = set()
    async with aclosing(log.follow(f"bascule.{run}.>")) as events:
        for round_ in range(3):
            appends = [asyncio.create_task(log.append([pause(run, 10 * round_ + i)])) for i in range(10)]
            await asyncio.wait(appends, return_when=asyncio.FIRST_COMPLETED)
            os.kill(own_server.pid, signal.SIGKILL)
            restart(own_server)
            recorded = [r for (r,) in await asyncio.gather(*appends)]
            assert not any(r.duplicate for r in recorded)
            followed = await first(events, 10)
            assert [e.seq for e in followed] == sorted(r.seq for r in recorded)
            async with asyncio.timeout(20):
                while len(worked) < 10 * (round_ + 1):
                    for item in await queue.next(4, 1):
                        worked.add(item.event.subject)
                        await item.done()
    await log.close()


async def test_without_a_server_an_append_gives_up_at_its_deadline(own_server: EmbeddedServer, run: str) -> None:
    log = await opened(own_server, deadline=0.3)
    own_server.stop()
    with pytest.raises(LogUnavailable, match=r"pause-001\.paused: not confirmed within 0\.3 s \(not connected\)"):
        await log.append([pause(run, 1)])
    await log.close()


async def test_the_first_write_wins_long_after_the_server_has_forgotten_its_id(
    own_server: EmbeddedServer, run: str
) -> None:
    nc = await nats.connect(own_server.url, user=own_server.user, password=own_server.password)
    config = stream_config(10**8, 1) | {"duplicate_window": 100_000_000}
    await nc.request(f"$JS.API.STREAM.CREATE.{STREAM}", json.dumps(config).encode())
    log = await opened(own_server)
    job, outcome = subjects.train_aggregate(run, 1), subjects.train_outcome(run, 1)
    (stored,) = await log.append([event(outcome, "first")])
    (later,) = await log.append([event(subjects.train_started(run, 1, 2))], fence=Fence(filter=job, seq=stored.seq))
    # An id that is younger than those above: once it is forgotten, so are they.
    probe = {"Nats-Msg-Id": "probe"}
    await nc.request("bascule.probe", b"", headers=probe)
    async with asyncio.timeout(20):
        while b'"duplicate"' in (await nc.request("bascule.probe", b"", headers=probe)).data:
            pass
    for fence in (None, Fence(filter=job, seq=later.seq)):
        (answer,) = await log.append([event(outcome, "second")], fence=fence)
        assert (answer.duplicate, answer.seq, answer.payload) == (True, stored.seq, stored.payload)
    await log.close()
    await nc.close()


# --- refusals --------------------------------------------------------------------------------------------------------


async def test_a_wrong_password_is_refused_as_such(server: EmbeddedServer) -> None:
    with pytest.raises(LogError, match="refuses the user admin"):
        await NatsLog.connect(server.url, user=server.user, password="wrong")


async def test_no_server_is_said_to_be_none() -> None:
    with pytest.raises(LogUnavailable, match="No server answered"):
        await NatsLog.connect("nats://127.0.0.1:1", deadline=0.3)


async def test_a_full_store_is_said_to_be_full_and_keeps_what_it_has(own_server: EmbeddedServer, run: str) -> None:
    log = await opened(own_server, max_bytes=100_000)
    recorded = [r for i in range(9) for r in await log.append([pause(run, i, "x" * 10_000)])]
    with pytest.raises(LogError, match="store is full"):
        await log.append([pause(run, 9, "x" * 10_000)])
    with pytest.raises(LogError, match="store is full"):
        await log.append([pause(run, i, "x" * 10_000) for i in range(200, 210)])
    assert await collected(log.read(f"bascule.{run}.>")) == recorded
    await log.close()


async def test_a_stream_that_could_lose_history_is_refused(own_server: EmbeddedServer) -> None:
    nc = await nats.connect(own_server.url, user=own_server.user, password=own_server.password)
    await nc.jetstream().add_stream(StreamConfig(name=STREAM, subjects=["bascule.>"], max_age=60))
    await nc.close()
    with pytest.raises(LogError, match=r"made by somebody else: .*max_age"):
        await opened(own_server)


async def test_nobody_can_delete_or_purge_what_is_recorded(server: EmbeddedServer, run: str) -> None:
    log = await opened(server)
    (recorded,) = await log.append([pause(run, 1)])
    nc = await nats.connect(server.url, user=server.user, password=server.password)
    for attempt in (nc.jetstream().delete_msg(STREAM, recorded.seq), nc.jetstream().purge_stream(STREAM)):
        with pytest.raises(nats.js.errors.APIError):
            await attempt
    await nc.close()
    assert await log.get(recorded.subject) == recorded
    await log.close()


async def test_a_missing_permission_reaches_the_caller_as_such(tmp_path: Path, run: str) -> None:
    (tmp_path / "server.conf").write_text(
        f"""listen: "127.0.0.1:-1"
        jetstream {{ store_dir: {json.dumps(str(tmp_path))} }}
        authorization {{ users: [
          {{ user: all, password: p }}
          {{ user: some, password: p, permissions: {{ publish: ["$JS.API.>", "bascule.{run}.run.>"] }} }}
        ] }}"""
    )
    argv = [find_binary(), "-c", str(tmp_path / "server.conf"), "--ports_file_dir", str(tmp_path), "-l", "/dev/null"]
    with subprocess.Popen(argv) as process:
        try:
            async with asyncio.timeout(20):
                while not (ports := [p for p in tmp_path.glob("*.ports") if p.read_text().endswith("}")]):
                    await asyncio.sleep(0.002)
            url = json.loads(ports[0].read_text())["nats"][0]
            await (await NatsLog.connect(url, user="all", password="p")).close()
            log = await NatsLog.connect(url, user="some", password="p")
            await log.append([pause(run, 1)])
            forbidden = event(subjects.train_started(run, 1, 1))
            for batch in ([forbidden], [forbidden, pause(run, 2)]):
                with pytest.raises(
                    LogError,
                    match=r"(?i)refuses this user: permissions violation for publish to .*train\.g01\.started-001",
                ):
                    await log.append(batch)
            assert await log.get(subjects.run_paused(run, 2)) is None
            await log.close()
        finally:
            process.kill()


@pytest.mark.parametrize(
    "token", [">", "*", "A", "é", "x" * 65, "", "a b", "a\r\nPUB x 0"], ids=["tail", "any", "upper", "accent", "long",
    "empty", "space", "line"],
)  # fmt: skip
async def test_a_subject_that_is_none_is_refused_before_anything_is_sent(log: EventLog, token: str) -> None:
    subject = f"bascule.run.traj.{token}.logged"
    with pytest.raises(SchemaError, match="cannot be the subject"):
        await log.append([NewEvent(subject=subject, payload=b"{}")])
    assert await log.head("bascule.run.>") == 0
