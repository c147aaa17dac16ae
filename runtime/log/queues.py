"""The shared queue behind ``work``: a durable pull consumer whose deliveries its workers acknowledge."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Final

import msgspec

from bascule.runtime.log.link import TRANSIENT, Link, settled
from bascule.runtime.log.pull import (
    EXPIRED,
    NANOSECONDS,
    NO_MESSAGES,
    BrokenFeedError,
    Delivery,
    Inbox,
    places,
    status_of,
)
from bascule.schemas.codec import decode
from bascule.schemas.envelope import Recorded

_ANSWER_SECONDS: Final = 2.0
_MAX_ACK_PENDING: Final = 1024


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
        msg = delivery.msg
        self._event = decode(places(msg)[0], msg.subject, msg.data)
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
        for item in self._inbox.items:
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
                if status not in (NO_MESSAGES, EXPIRED):
                    raise BrokenFeedError(f"status {status}")
                return

    async def _ensure(self, *, fresh: bool) -> None:
        """Make the consumer, again if it is another's or ``fresh`` is asked for."""
        name = self._config["durable_name"]

        async def attempt() -> dict[str, Any] | None:
            found = await self._link.api(f"CONSUMER.INFO.{self._stream}.{name}", {})
            if "error" not in found:
                if not fresh and not drifted(self._config, found["config"]):
                    return found
                await self._link.api(f"CONSUMER.DELETE.{self._stream}.{name}", {})
            made = await self._link.api(
                f"CONSUMER.CREATE.{self._stream}.{name}",
                {"stream_name": self._stream, "config": self._config},
            )
            return settled(made, f"The work queue {name}")

        await self._link.persist(f"Opening the work queue {name}", attempt)
