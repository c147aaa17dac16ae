"""Reading from pull consumers: the ordered feed behind ``follow``, and the shared queue behind ``work``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Final, NamedTuple

import msgspec
from nats.aio.msg import Msg

from bascule.runtime.log.link import TRANSIENT, Link
from bascule.schemas.codec import decode
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import LogError

NANOSECONDS: Final = 1_000_000_000
_FEED_BATCH: Final = 512
_FEED_SECONDS: Final = 30.0
_HEARTBEAT_SECONDS: Final = 5.0
_ANSWER_SECONDS: Final = 2.0
_MAX_ACK_PENDING: Final = 1024

_HEARTBEAT, _NO_MESSAGES, _EXPIRED = "100", "404", "408"


class BrokenFeedError(Exception):
    """The consumer is gone, or has skipped a message: make a new one from where the reader stands."""


class Delivery(NamedTuple):
    """A message or status, and when it came (loop time, seconds)."""

    at: float
    msg: Msg


class Inbox:
    """Where a pull consumer delivers: a queue of messages and statuses, and of what ended the connection."""

    def __init__(self, link: Link, stream: str, consumer: str) -> None:
        self._link = link
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._prefix = link.new_inbox()
        self._requests = 0
        self.queue: asyncio.Queue[Delivery | Exception] = asyncio.Queue()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Inbox]:
        now = asyncio.get_running_loop().time

        async def received(msg: Msg) -> None:
            self.queue.put_nowait(Delivery(now(), msg))

        with self._link.watching(self.queue.put_nowait, self._next, f"{self._prefix}.*"):
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
        if self.queue.empty():
            async with asyncio.timeout(seconds):
                item = await self.queue.get()
        else:
            item = self.queue.get_nowait()
        if isinstance(item, Exception):
            raise item
        return item


def status_of(msg: Msg) -> str | None:
    """The status code of a message without content, None for an event."""
    return msg.headers.get("Status") if msg.headers and not msg.data else None


def event_of(msg: Msg) -> Recorded:
    return decode(msg.metadata.sequence.stream, msg.subject, msg.data)


def feed_config(filter_: str, start: int) -> dict[str, Any]:
    """An ephemeral consumer for one reader: in memory, without acknowledgements, from sequence ``start``."""
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


async def feed(inbox: Inbox) -> AsyncGenerator[Recorded, None]:
    """The events of an ephemeral consumer, in order.

    Raises:
        BrokenFeedError: the consumer is gone, is silent for two heartbeats, or has skipped something.
        Exception: one of ``TRANSIENT``, or what ended the connection.
    """
    delivered = 0
    while True:
        request = await inbox.request(
            _FEED_BATCH,
            expires=int(_FEED_SECONDS * NANOSECONDS),
            idle_heartbeat=int(_HEARTBEAT_SECONDS * NANOSECONDS),
        )
        left = _FEED_BATCH
        while left:
            try:
                _, msg = await inbox.take(2.5 * _HEARTBEAT_SECONDS)
            except TimeoutError as e:
                raise BrokenFeedError("no heartbeat") from e
            status = status_of(msg)
            if status is None:
                delivered += 1
                if msg.metadata.sequence.consumer != delivered:
                    raise BrokenFeedError("a message is missing")
                left -= 1
                yield event_of(msg)
            elif status == _EXPIRED:
                if msg.subject == request:
                    break
            elif status != _HEARTBEAT:
                raise BrokenFeedError(f"status {status}")


def queue_config(name: str, filters: Sequence[str], lease: float) -> dict[str, Any]:
    """A durable consumer shared by workers. It redelivers for ever: state is in the log, not in the consumer."""
    return {
        "durable_name": name,
        "ack_policy": "explicit",
        "deliver_policy": "all",
        "ack_wait": int(lease * NANOSECONDS),
        "max_ack_pending": _MAX_ACK_PENDING,
        "max_deliver": -1,
        "filter_subjects": list(filters),
    }


def drifted(wanted: dict[str, Any], actual: dict[str, Any]) -> bool:
    """Whether a consumer was made by other code: its server would not deliver again what new filters cover."""
    actual = {"filter_subjects": [actual["filter_subject"]] if actual.get("filter_subject") else [], **actual}
    return any(actual.get(key) != value for key, value in wanted.items())


class NatsItem:
    """A delivered trigger. A lost acknowledgement is harmless, so none waits for an answer or for a connection."""

    def __init__(self, link: Link, delivery: Delivery, lease: float) -> None:
        self._link = link
        self._reply = delivery.msg.reply
        self._event = event_of(delivery.msg)
        self.expires = delivery.at + lease

    @property
    def event(self) -> Recorded:
        return self._event

    async def done(self) -> None:
        await self._send(b"+ACK")

    async def progress(self) -> None:
        await self._send(b"+WPI")

    async def retry(self, delay: float) -> None:
        await self._send(b"-NAK " + msgspec.json.encode({"delay": max(1, int(delay * NANOSECONDS))}))

    async def _send(self, verb: bytes) -> None:
        with suppress(*TRANSIENT):
            await self._link.publish(self._reply, verb)


class NatsQueue:
    """A :class:`~bascule.runtime.log.protocol.WorkQueue` on a durable pull consumer."""

    def __init__(self, link: Link, stream: str, config: dict[str, Any], lease: float) -> None:
        self._link = link
        self._stream = stream
        self._config = config
        self._lease = lease
        self._inbox = Inbox(link, stream, config["durable_name"])
        self._opened = AsyncExitStack()
        self._held: list[NatsItem] = []
        self._closed = False

    async def open(self, *, fresh: bool) -> None:
        await self._ensure(fresh=fresh)
        await self._opened.enter_async_context(self._inbox.open())

    async def next(self, limit: int, wait: float) -> list[NatsItem]:
        """What is there at once, up to ``limit``; otherwise the first that comes within ``wait`` and what came with it.

        Only one message is waited for, so that no worker hoards what another could do. Cancelling loses nothing: what
        had been delivered is the next call's.
        """
        if self._closed:
            return []
        try:
            await self._collect(limit, _ANSWER_SECONDS, no_wait=True)
            if not self._held and wait > 0:
                await self._collect(1, wait + _ANSWER_SECONDS, expires=max(1_000_000, int(wait * NANOSECONDS)))
                if self._held:
                    await self._collect(limit, _ANSWER_SECONDS, no_wait=True)
        except BrokenFeedError:
            await self._ensure(fresh=False)
        except TRANSIENT:
            if not self._held:
                await asyncio.sleep(min(wait, 0.05))
        items, self._held = self._held[:limit], self._held[limit:]
        return items

    async def close(self) -> None:
        """Stop taking. What was delivered and not yet returned goes back at once."""
        if self._closed:
            return
        self._closed = True
        await self._opened.aclose()
        while not self._inbox.queue.empty():
            item = self._inbox.queue.get_nowait()
            if isinstance(item, Delivery) and status_of(item.msg) is None:
                self._held.append(NatsItem(self._link, item, self._lease))
        for held in self._held:
            await held.retry(0)

    async def _collect(self, limit: int, seconds: float, **options: int | bool) -> None:
        """Request until ``limit`` items are held or the server has no more."""
        now = asyncio.get_running_loop().time()
        self._held = [item for item in self._held if item.expires > now]
        if len(self._held) >= limit:
            return
        request = await self._inbox.request(limit - len(self._held), **options)
        while len(self._held) < limit:
            delivery = await self._inbox.take(seconds)
            status = status_of(delivery.msg)
            if status is None:
                item = NatsItem(self._link, delivery, self._lease)
                if item.expires > now:  # left by a call that was cancelled long ago, and another worker's by now
                    self._held.append(item)
            elif delivery.msg.subject == request:
                if status not in (_NO_MESSAGES, _EXPIRED):
                    raise BrokenFeedError(f"status {status}")
                return

    async def _ensure(self, *, fresh: bool) -> None:
        """Make the consumer, again if it is another's or ``fresh`` is asked for."""
        name = self._config["durable_name"]

        async def attempt() -> bool | None:
            found = await self._link.api(f"CONSUMER.INFO.{self._stream}.{name}", {})
            if "error" not in found:
                if not fresh and not drifted(self._config, found["config"]):
                    return True
                await self._link.api(f"CONSUMER.DELETE.{self._stream}.{name}", {})
            made = await self._link.api(
                f"CONSUMER.CREATE.{self._stream}.{name}",
                {"stream_name": self._stream, "config": self._config},
            )
            return made_or_retry(made, f"The work queue {name}")

        await self._link.persist(f"Opening the work queue {name}", attempt)


def made_or_retry(answer: dict[str, Any], what: str) -> bool | None:
    """True if a consumer was made; None asks for another try.

    Raises:
        LogError: the server will never make it.
    """
    error = answer.get("error")
    if error is None:
        return True
    if error["code"] >= 500 or error["code"] == 404:
        return None
    raise LogError(f"{what} could not be made: {error['description']}.", next_step="Look into the server's log.")
