"""The ordered feed behind ``follow`` and ``read``: nothing is skipped, doubled or held back, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Any

import nats
import pytest
from nats.aio.msg import Msg

from bascule.runtime.log import nats as module
from bascule.runtime.log import pull
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.protocol import NewEvent, Raw
from bascule.runtime.log.pull import BrokenFeedError, feed
from bascule.runtime.log.server import EmbeddedServer
from bascule.schemas import subjects
from bascule.schemas.codec import encode
from bascule.schemas.envelope import Draft, Producer
from bascule.schemas.errors import Corrupt
from bascule.schemas.events import RunPaused

ENDED = ConnectionError("gone")


@pytest.fixture
async def log(blob_server: EmbeddedServer) -> AsyncIterator[NatsLog]:
    opened = await NatsLog.connect(blob_server.url, user=blob_server.user, password=blob_server.password)
    yield opened
    await opened.close()


def new_events(run: str, count: int) -> list[NewEvent]:
    drafts = [Draft(subject=subjects.run_paused(run, i), step=0, data=RunPaused(reason="-")) for i in range(count)]
    me = Producer(service="cli", version="0", hash="0")
    return [NewEvent(subject=d.subject, payload=encode(d, run=run, producer=me, time="-", root=None)) for d in drafts]


class Scripted:
    """An inbox in which everything is there at once."""

    def __init__(self, items: Sequence[Msg | Exception]) -> None:
        self.asked = 0
        self._items = [i if isinstance(i, Exception) else pull.Delivery(0.0, i) for i in items]

    async def request(self, batch: int, **options: int | bool) -> str:
        del options
        self.asked += batch
        return ""

    async def take_all(self, seconds: float) -> list[pull.Delivery | Exception]:
        del seconds
        if not self._items:
            raise TimeoutError
        items, self._items = self._items, []
        return items


def message(seq: int, place: int, *, reply: str = "$JS.ACK.BASCULE.feed-1.1.{}.{}.0.9") -> Msg:
    return Msg(_client=None, subject="s", reply=reply.format(seq, place), data=b"x")  # type: ignore[arg-type]


def status(code: str, **headers: str) -> Msg:
    return Msg(_client=None, headers={"Status": code} | {k.replace("_", "-"): v for k, v in headers.items()})  # type: ignore[arg-type]


async def delivered(inbox: Scripted) -> tuple[list[int], Exception]:
    """The sequences that a feed gave, and how it ended."""
    found: list[Raw] = []
    try:
        async with aclosing(feed(inbox)) as lists:  # type: ignore[arg-type]
            async for events in lists:
                found += events
    except (BrokenFeedError, ConnectionError, TimeoutError) as e:
        return [event.seq for event in found], e
    raise AssertionError("a feed has no end")


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        ([message(14, 4), message(15, 5)], "a message is missing"),
        ([message(12, 2)], "a message is missing"),
        ([status("409"), message(13, 3)], "status 409"),
        ([ENDED, message(13, 3)], "gone"),
        ([status("100")], "no heartbeat"),
    ],
)
async def test_what_came_before_the_trouble_is_given_and_nothing_after_it(trouble: list[Msg], kind: str) -> None:
    seqs, problem = await delivered(Scripted([message(10, 1), message(12, 2), *trouble]))
    assert seqs == [10, 12]
    assert kind in str(problem)


async def test_places_are_read_from_both_forms_of_a_reply() -> None:
    longer = "$JS.ACK.hub.account.BASCULE.feed-1.1.{}.{}.0.9.random"
    seqs, _ = await delivered(Scripted([message(7, 1), message(9, 2, reply=longer)]))
    assert seqs == [7, 9]


async def test_what_expired_is_asked_for_again() -> None:
    inbox = Scripted([message(1, 1), status("408", Nats_Pending_Messages=str(pull._FEED_BATCH - 1))])
    await delivered(inbox)
    assert inbox.asked == 2 * pull._FEED_BATCH


async def test_a_reader_outlives_its_requests_without_a_new_consumer(
    log: NatsLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_FEED_SECONDS", 0.1), ("_HEARTBEAT_SECONDS", 0.04), ("_FEED_BATCH", 8)):
        monkeypatch.setattr(pull, name, value)
    expired = asyncio.Event()

    def status_of(msg: Msg, plain: Callable[[Msg], str | None] = pull.status_of) -> str | None:
        if plain(msg) == "408":
            expired.set()
        return plain(msg)

    monkeypatch.setattr(pull, "status_of", status_of)
    made: list[str] = []
    make = module.make_feed
    monkeypatch.setattr(module, "make_feed", lambda *args: (made.append(args[2]), make(*args))[1])
    new = iter(new_events("outlives", 40))
    async with asyncio.timeout(30), aclosing(log.follow("bascule.outlives.>")) as events:
        for _ in range(4):
            reading = asyncio.create_task(anext(events))
            await expired.wait()
            expired.clear()
            wanted = await log.append(list(islice(new, 10)))
            assert [await reading, *[await anext(events) for _ in wanted[1:]]] == wanted
    assert len(made) == 1


async def test_a_read_goes_to_the_end_that_the_leader_knows_though_a_replica_lags(
    log: NatsLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = await log.append(new_events("lags", 4))
    request = log.link.request

    async def lagging(subject: str, *args: Any, **options: Any) -> Msg:
        if "DIRECT.GET" in subject:
            return Msg(log.link._nc, headers={"Status": "404"})
        return await request(subject, *args, **options)

    monkeypatch.setattr(log.link, "request", lagging)
    assert await log.head("bascule.lags.>") == there[-1].seq
    assert [event async for event in log.read("bascule.lags.>")] == there


async def test_events_before_one_that_cannot_be_read_are_given(log: NatsLog, blob_server: EmbeddedServer) -> None:
    new = new_events("broken", 4)
    there = await log.append(new[:3])
    client = await nats.connect(blob_server.url, user=blob_server.user, password=blob_server.password)
    await client.jetstream().publish("bascule.broken.run.x.y", b"garbage")
    await client.close()
    await log.append(new[3:])
    async with aclosing(log.read("bascule.broken.>")) as events:
        assert [await anext(events) for _ in there] == there
        with pytest.raises(Corrupt, match="not an envelope"):
            await anext(events)
