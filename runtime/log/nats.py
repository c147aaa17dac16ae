"""The log on NATS JetStream: one stream, first write wins by expected sequence 0, atomic batches, fencing by filter."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from bascule.runtime.log.dead_letters import NatsDeadLetters
from bascule.runtime.log.link import TRANSIENT, Link
from bascule.runtime.log.login import Credential
from bascule.runtime.log.permissions import ADMIN, USERS, inbox
from bascule.runtime.log.protocol import Extent, Fence, NewEvent, Raw
from bascule.runtime.log.pull import (
    BrokenFeedError,
    Inbox,
    feed,
    make_feed,
    status_of,
)
from bascule.runtime.log.queues import NatsQueue, queue_config
from bascule.runtime.log.raw import extent_of, read_raw
from bascule.runtime.log.rules import adopted, checked, fenced_off
from bascule.runtime.log.streams import MAX_BYTES, STREAM, WRONG_SEQUENCE, open_streams
from bascule.runtime.log.telemetry import NatsTelemetry
from bascule.schemas.codec import decode
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import LogError
from bascule.schemas.subjects import token

# Error codes of the JetStream API.
_DUPLICATE_IN_BATCH = 10201
_BATCH_INCOMPLETE = 10176
_NO_RESOURCES, _STORE_FAILED = 10023, 10077
_MESSAGE_NOT_FOUND = 10037


class NatsLog:
    """An :class:`~bascule.runtime.log.protocol.EventLog` on the stream ``BASCULE``. Made by :meth:`connect`."""

    def __init__(self, link: Link, *, lease: float) -> None:
        self.letters = NatsDeadLetters(link)
        self.telemetry = NatsTelemetry(link)
        self._link = link
        self._lease = lease

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        user: str | None = None,
        password: str | None = None,
        nkey_seed: str | None = None,
        ca: Path | None = None,
        store: Path | None = None,
        name: str = "bascule",
        deadline: float = 20.0,
        lease: float = 10.0,
        max_bytes: int = MAX_BYTES,
        replicas: int = 1,
    ) -> NatsLog:
        """Connect, and make the streams if they are not there and the user is not one that may only use them.

        Args:
            user: one of ``permissions.USERS``, or whom the server knows.
            nkey_seed: proves who the user is, instead of a password.
            ca: certificates to trust instead of the system's; TLS is then demanded, as by ``tls://``.
            store: the server's folder of the streams, if it can be looked at.
            name: shown by the server's monitoring.
            deadline: seconds after which an operation gives up with LogUnavailable.
            lease: seconds that a work item stays with its worker without ``progress``.
            max_bytes, replicas: of the log's stream, if it has to be made.

        Raises:
            LogUnavailable: nothing answers.
            NotPermitted: the user is refused, or may not even read.
            LogError: a stream is missing, or is there with settings under which history could be lost.
            Corrupt: a stream would be made in the place of one that is in ``store``.
        """
        link = Link(deadline=deadline, inbox=inbox(user))
        credential = Credential(password=password, nkey_seed=nkey_seed)
        await link.connect(url, user=user, credential=credential, ca=ca, name=name)
        log = cls(link, lease=lease)
        try:
            make = user not in USERS or user == ADMIN
            await open_streams(link, make=make, max_bytes=max_bytes, replicas=replicas, store=store)
        except BaseException:
            await link.close()
            raise
        return log

    @property
    def link(self) -> Link:
        """The connection, for what else is kept on the broker."""
        return self._link

    async def append(self, events: Sequence[NewEvent], *, fence: Fence | None = None) -> list[Recorded]:
        mine = checked(events, fence)
        unconfirmed = False

        async def attempt() -> list[Recorded] | None:
            nonlocal unconfirmed
            if fence is not None:
                # The fence takes the place of the check on the event's own subject. An event stored there before
                # the fence's sequence must be seen here; a later one moves the fence's filter.
                there = adopted(
                    mine, [_decoded(await self._newest_at_leader(mine[0].subject))], unconfirmed=unconfirmed
                )
                if there is not None:
                    return there
            before, unconfirmed = unconfirmed, True
            answer = await self._publish(mine, fence)
            unconfirmed = before
            error = answer.get("error")
            if error is None and not answer.get("duplicate"):
                first = answer["seq"] - len(mine) + 1
                return [replace(m, seq=first + i) for i, m in enumerate(mine)]
            if error is not None and error["err_code"] not in (*WRONG_SEQUENCE, _DUPLICATE_IN_BATCH):
                _raise_if_final(error, mine)
                return None
            there = adopted(mine, [_decoded(await self._newest(m.subject)) for m in mine], unconfirmed=unconfirmed)
            if there is None and fence is not None:
                newest = await self._newest_at_leader(fence.filter)
                if (newest.seq if newest else 0) != fence.seq:
                    raise fenced_off(mine[0].subject, fence, (newest.seq, newest.subject) if newest else None)
            return there

        return await self._link.persist(f"Appending {_described(mine)}", attempt)

    async def get(self, subject: str) -> Recorded | None:
        async def attempt() -> list[Recorded | None]:
            return [_decoded(await self._newest(subject))]

        return (await self._link.persist(f"Reading {subject}", attempt))[0]

    async def head(self, filter: str) -> int:  # noqa: A002
        async def attempt() -> int:
            newest = await self._newest_at_leader(filter)  # a replica may lag behind what readers know of
            return newest.seq if newest else 0

        return await self._link.persist(f"Reading {filter}", attempt)

    async def follow(self, filter: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:  # noqa: A002
        async with aclosing(self._stored(filter, after)) as found:
            async for events in found:
                for event in events:
                    yield decode(event.seq, event.subject, event.payload)

    async def read(self, filter: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:  # noqa: A002
        head = await self.head(filter)
        if head <= after:
            return
        async with aclosing(self._stored(filter, after)) as found:
            async for events in found:
                for event in events:
                    if event.seq <= head:
                        yield decode(event.seq, event.subject, event.payload)
                    if event.seq >= head:
                        return

    async def _stored(self, filter_: str, after: int) -> AsyncGenerator[list[Raw], None]:
        """What :meth:`follow` gives, before it is decoded, as many at a time as have come."""
        last = after
        while True:
            name = f"feed-{secrets.token_hex(8)}"
            try:
                await make_feed(self._link, STREAM, name, filter_, last + 1)
                async with Inbox(self._link, STREAM, name).open() as inbox, aclosing(feed(inbox)) as found:
                    async for events in found:
                        if new := [e for e in events if e.seq > last]:
                            last = new[-1].seq
                            yield new
            except (BrokenFeedError, *TRANSIENT):
                await asyncio.sleep(0.05)
            finally:
                with suppress(*TRANSIENT):
                    await self._link.publish(f"$JS.API.CONSUMER.DELETE.{STREAM}.{name}", b"")

    def read_raw(self, filter: str) -> AsyncGenerator[Raw, None]:  # noqa: A002
        return read_raw(self._link, STREAM, filter)

    async def extent(self) -> Extent:
        return await extent_of(self._link, STREAM)

    async def work(self, run: str, service: str, filters: Sequence[str], *, fresh: bool = False) -> NatsQueue:
        # "=" is in no token, so that two pairs never share a name.
        config = queue_config(f"{token(run)}={token(service)}", filters, self._lease)
        queue = NatsQueue(self._link, STREAM, config, self._lease)
        await queue.open(fresh=fresh)
        return queue

    async def close(self) -> None:
        await self._link.close()

    async def _publish(self, mine: Sequence[Recorded], fence: Fence | None) -> dict[str, Any]:
        """One try: the server's answer to a single event or to an atomic batch (ADR-50)."""
        batch = secrets.token_hex(8)
        for i, event in enumerate(mine, 1):
            headers = {
                "Nats-Msg-Id": event.envelope.id,
                "Nats-Expected-Stream": STREAM,
                "Nats-Expected-Last-Subject-Sequence": str(fence.seq if fence else 0),
            }
            if fence is not None:
                headers["Nats-Expected-Last-Subject-Sequence-Subject"] = fence.filter
            if len(mine) > 1:
                headers |= {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(i)}
            if i < len(mine):
                await self._link.publish(event.subject, event.payload, headers=headers)
        if len(mine) > 1:
            headers["Nats-Batch-Commit"] = "1"
        subjects = [m.subject for m in mine]
        reply = await self._link.request(subjects[-1], mine[-1].payload, headers=headers, also=subjects[:-1])
        return msgspec.json.decode(reply.data, type=dict[str, Any])

    async def _newest(self, filter_: str) -> Raw | None:
        """The newest event under ``filter_`` by direct get: a replica may answer, and lag."""
        request = msgspec.json.encode({"last_by_subj": filter_})
        msg = await self._link.request(f"$JS.API.DIRECT.GET.{STREAM}", request)
        status = status_of(msg)
        if status == "404":
            return None
        if status is not None or msg.headers is None:
            raise LogError(f"Reading {filter_} was refused: {msg.headers}.")
        return Raw(seq=int(msg.headers["Nats-Sequence"]), subject=msg.headers["Nats-Subject"], payload=msg.data)

    async def _newest_at_leader(self, filter_: str) -> Raw | None:
        """The same from the stream's leader, which has seen every acknowledged append."""
        answer = await self._link.api(f"STREAM.MSG.GET.{STREAM}", {"last_by_subj": filter_})
        if "error" in answer:
            if answer["error"]["err_code"] == _MESSAGE_NOT_FOUND:
                return None
            raise LogError(f"Reading {filter_} was refused: {answer['error']['description']}.")
        message = answer["message"]
        payload = base64.b64decode(message.get("data", ""))
        return Raw(seq=message["seq"], subject=message["subject"], payload=payload)


def _raise_if_final(error: dict[str, Any], mine: Sequence[Recorded]) -> None:
    """Return for another try, or raise LogError if trying again will not help."""
    if error["err_code"] in (_NO_RESOURCES, _STORE_FAILED):
        raise LogError(
            f"The log's store is full: {_described(mine)} was refused ({error['description']}).",
            next_step="Free disk space or raise the store's limit, and resume; what was recorded is safe.",
        )
    if error["code"] < 500 and error["err_code"] != _BATCH_INCOMPLETE:
        raise LogError(f"The log refused {_described(mine)}: {error['description']} ({error['err_code']}).")


def _decoded(raw: Raw | None) -> Recorded | None:
    return None if raw is None else decode(raw.seq, raw.subject, raw.payload)


def _described(mine: Sequence[Recorded]) -> str:
    return mine[0].subject if len(mine) == 1 else f"a batch of {len(mine)} from {mine[0].subject}"
