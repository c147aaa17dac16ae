"""Reading from pull consumers: where they deliver, and the ordered feed behind ``follow``."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple

import msgspec
from nats.aio.msg import Msg

from bascule.runtime.log.link import TRANSIENT, Link
from bascule.runtime.log.protocol import Raw

NANOSECONDS: Final = 1_000_000_000
_FEED_BATCH: Final = 512
_FEED_SECONDS: Final = 30.0
_HEARTBEAT_SECONDS: Final = 5.0

HEARTBEAT, NO_MESSAGES, EXPIRED = "100", "404", "408"
#: What of a request had not been delivered when it expired.
_PENDING: Final = "Nats-Pending-Messages"


class BrokenFeedError(Exception):
    """The consumer is gone, or has skipped a message: make a new one from where the reader stands."""


class Delivery(NamedTuple):
    """A message or status, and when it came (loop time, seconds)."""

    at: float
    msg: Msg


class Inbox:
    """Where a pull consumer delivers: messages and statuses, and what ended the connection, in order."""

    def __init__(self, link: Link, stream: str, consumer: str) -> None:
        self._link = link
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._prefix = link.new_inbox()
        self._requests = 0
        self.items: deque[Delivery | Exception] = deque()
        self._arrived = asyncio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Inbox]:
        now = asyncio.get_running_loop().time

        async def received(msg: Msg) -> None:
            self.items.append(Delivery(now(), msg))
            self._arrived.set()

        def ended(reason: Exception) -> None:
            self.items.append(reason)
            self._arrived.set()

        with self._link.watching(ended, self._next, f"{self._prefix}.*"):
            subscription = await self._link.subscribe(f"{self._prefix}.*", received)
            try:
                yield self
            finally:
                with suppress(*TRANSIENT):
                    await subscription.unsubscribe()

    async def request(self, batch: int, **options: int | bool) -> str:
        """Ask for ``batch`` messages; the subject under which the answer's statuses come."""
        self._requests += 1
        reply = f"{self._prefix}.{self._requests}"
        await self._link.publish(self._next, msgspec.json.encode({"batch": batch, **options}), reply=reply)
        return reply

    async def take(self, seconds: float) -> Delivery:
        """The next message or status.

        Raises:
            TimeoutError: none within ``seconds``.
            Exception: what ended the connection.
        """
        await self._some(seconds)
        item = self.items.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    async def take_all(self, seconds: float) -> list[Delivery | Exception]:
        """What has come, at least one; raises TimeoutError if nothing comes within ``seconds``."""
        await self._some(seconds)
        found = list(self.items)
        self.items.clear()
        return found

    async def _some(self, seconds: float) -> None:
        if not self.items:
            self._arrived.clear()
            async with asyncio.timeout(seconds):
                await self._arrived.wait()


def status_of(msg: Msg) -> str | None:
    """The status code of a message without content, None for an event."""
    return msg.headers.get("Status") if msg.headers and not msg.data else None


def places(msg: Msg) -> tuple[int, int]:
    """The sequence of an event in the stream, and its place among what its consumer has delivered.

    They stand in the reply subject, behind the number of deliveries. Read here because nats-py's ``metadata`` builds
    three objects and a datetime on the way.
    """
    tokens = msg.reply.split(".")
    at = 5 if len(tokens) == 9 else 7  # the longer form names a domain and an account
    return int(tokens[at]), int(tokens[at + 1])


def _feed_config(filter_: str, start: int) -> dict[str, Any]:
    """In memory, without acknowledgements, from sequence ``start``."""
    return {
        "ack_policy": "none",
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": start,
        "filter_subject": filter_,
        "max_deliver": 1,
        "mem_storage": True,
        "num_replicas": 1,
        "inactive_threshold": int(2 * _FEED_SECONDS * NANOSECONDS),
    }


async def feed(inbox: Inbox) -> AsyncGenerator[list[Raw], None]:
    """The events of an ephemeral consumer in order, as many at a time as have come.

    Raises:
        BrokenFeedError: the consumer is gone, is silent for two heartbeats, or has skipped something.
        Exception: one of ``TRANSIENT``, or what ended the connection.
    """
    asked = delivered = 0
    while True:
        if asked - delivered <= _FEED_BATCH // 2:  # early, so that the next ones come while these are read
            asked += _FEED_BATCH
            await inbox.request(
                _FEED_BATCH,
                expires=int(_FEED_SECONDS * NANOSECONDS),
                idle_heartbeat=int(_HEARTBEAT_SECONDS * NANOSECONDS),
            )
        try:
            items = await inbox.take_all(2.5 * _HEARTBEAT_SECONDS)
        except TimeoutError as e:
            raise BrokenFeedError("no heartbeat") from e
        found: list[Raw] = []
        problem: Exception | None = None
        for item in items:
            if isinstance(item, Exception):
                problem = item
                break
            msg = item.msg
            status = status_of(msg)
            if status is None:
                seq, place = places(msg)
                if place != delivered + 1:
                    problem = BrokenFeedError("a message is missing")
                    break
                delivered = place
                found.append(Raw(seq, msg.subject, msg.data))
            elif status == EXPIRED:
                asked -= int((msg.headers or {}).get(_PENDING, 0))
            elif status != HEARTBEAT:
                problem = BrokenFeedError(f"status {status}")
                break
        if found:
            yield found
        if problem is not None:
            raise problem


async def make_feed(link: Link, stream: str, name: str, filter_: str, start: int) -> int:
    """Make an ephemeral consumer for one reader; how many events it has ahead."""
    request = {"stream_name": stream, "config": {"name": name, **_feed_config(filter_, start)}}
    made = await link.ask(f"Reading {filter_}", f"CONSUMER.CREATE.{stream}.{name}", request)
    return int(made["num_pending"])
