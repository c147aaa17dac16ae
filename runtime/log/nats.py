"""The log on NATS JetStream: one stream, first write wins by expected sequence 0, atomic batches, fencing by filter."""

from __future__ import annotations

import asyncio
import base64
import secrets
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from bascule.runtime.log.link import TRANSIENT, Link
from bascule.runtime.log.protocol import Fence, NewEvent
from bascule.runtime.log.pull import (
    NANOSECONDS,
    BrokenFeedError,
    Inbox,
    NatsQueue,
    feed,
    feed_config,
    made_or_retry,
    queue_config,
    status_of,
)
from bascule.runtime.log.rules import adopted, checked, fenced_off
from bascule.schemas.codec import MAX_EVENT_BYTES, decode
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import LogError
from bascule.schemas.subjects import ROOT, token

STREAM: Final = "BASCULE"
MAX_BYTES: Final = 32 * 1024**3
DUPLICATE_WINDOW_SECONDS: Final = 7 * 86400

# Error codes of the JetStream API.
_WRONG_SEQUENCE = (10071, 10164)
_DUPLICATE_IN_BATCH = 10201
_BATCH_INCOMPLETE = 10176
_NO_RESOURCES, _STORE_FAILED, _NO_STORAGE = 10023, 10077, 10047
_STREAM_NOT_FOUND, _STREAM_EXISTS, _MESSAGE_NOT_FOUND = 10059, 10058, 10037


class NatsLog:
    """An :class:`~bascule.runtime.log.protocol.EventLog` on the stream ``BASCULE``. Made by :meth:`connect`."""

    def __init__(self, link: Link, *, lease: float) -> None:
        self._link = link
        self._lease = lease

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        user: str | None = None,
        password: str | None = None,
        name: str = "bascule",
        deadline: float = 20.0,
        lease: float = 10.0,
        max_bytes: int = MAX_BYTES,
        replicas: int = 1,
    ) -> NatsLog:
        """Connect, and make the stream if it is not there.

        Args:
            name: shown by the server's monitoring.
            deadline: seconds after which an operation gives up with LogUnavailable.
            lease: seconds that a work item stays with its worker without ``progress``.
            max_bytes, replicas: of the stream, if it has to be made.

        Raises:
            LogUnavailable: nothing answers.
            LogError: the user is refused, or the stream is there with settings under which history could be lost.
        """
        link = Link(deadline=deadline)
        await link.connect(url, user=user, password=password, name=name)
        log = cls(link, lease=lease)
        try:
            await log._open(max_bytes, replicas)
        except BaseException:
            await link.close()
            raise
        return log

    async def append(self, events: Sequence[NewEvent], *, fence: Fence | None = None) -> list[Recorded]:
        mine = checked(events, fence)
        unconfirmed = False

        async def attempt() -> list[Recorded] | None:
            nonlocal unconfirmed
            if fence is not None:
                # The fence takes the place of the check on the event's own subject. An event stored there before
                # the fence's sequence must be seen here; a later one moves the fence's filter.
                there = adopted(mine, [await self._newest_at_leader(mine[0].subject)], unconfirmed=unconfirmed)
                if there is not None:
                    return there
            before, unconfirmed = unconfirmed, True
            answer = await self._publish(mine, fence)
            unconfirmed = before
            error = answer.get("error")
            if error is None and not answer.get("duplicate"):
                first = answer["seq"] - len(mine) + 1
                return [replace(m, seq=first + i) for i, m in enumerate(mine)]
            if error is not None and error["err_code"] not in (*_WRONG_SEQUENCE, _DUPLICATE_IN_BATCH):
                _raise_if_final(error, mine)
                return None
            there = adopted(mine, [await self._newest(m.subject) for m in mine], unconfirmed=unconfirmed)
            if there is None and fence is not None:
                newest = await self._newest_at_leader(fence.filter)
                if (newest.seq if newest else 0) != fence.seq:
                    raise fenced_off(mine[0].subject, fence, (newest.seq, newest.subject) if newest else None)
            return there

        return await self._link.persist(f"Appending {_described(mine)}", attempt)

    async def get(self, subject: str) -> Recorded | None:
        return await self._look_up(subject)

    async def head(self, filter: str) -> int:  # noqa: A002
        newest = await self._look_up(filter)
        return newest.seq if newest else 0

    async def follow(self, filter: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:  # noqa: A002
        last = after
        while True:
            name = f"feed-{secrets.token_hex(8)}"
            try:
                await self._make_feed(name, filter, last + 1)
                async with Inbox(self._link, STREAM, name).open() as inbox, aclosing(feed(inbox)) as events:
                    async for event in events:
                        if event.seq > last:
                            last = event.seq
                            yield event
            except (BrokenFeedError, *TRANSIENT):
                await asyncio.sleep(0.05)
            finally:
                with suppress(*TRANSIENT):
                    await self._link.publish(f"$JS.API.CONSUMER.DELETE.{STREAM}.{name}", b"")

    async def read(self, filter: str, *, after: int = 0) -> AsyncGenerator[Recorded, None]:  # noqa: A002
        head = await self.head(filter)
        if head <= after:
            return
        async with aclosing(self.follow(filter, after=after)) as events:
            async for event in events:
                if event.seq <= head:
                    yield event
                if event.seq >= head:
                    return

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

    async def _look_up(self, filter_: str) -> Recorded | None:
        async def attempt() -> list[Recorded | None]:
            return [await self._newest(filter_)]

        return (await self._link.persist(f"Reading {filter_}", attempt))[0]

    async def _newest(self, filter_: str) -> Recorded | None:
        """The newest event under ``filter_`` by direct get: a replica may answer, and lag."""
        request = msgspec.json.encode({"last_by_subj": filter_})
        msg = await self._link.request(f"$JS.API.DIRECT.GET.{STREAM}", request)
        status = status_of(msg)
        if status == "404":
            return None
        if status is not None or msg.headers is None:
            raise LogError(f"Reading {filter_} was refused: {msg.headers}.")
        return decode(int(msg.headers["Nats-Sequence"]), msg.headers["Nats-Subject"], msg.data)

    async def _newest_at_leader(self, filter_: str) -> Recorded | None:
        """The same from the stream's leader, which has seen every acknowledged append."""
        answer = await self._link.api(f"STREAM.MSG.GET.{STREAM}", {"last_by_subj": filter_})
        if "error" in answer:
            if answer["error"]["err_code"] == _MESSAGE_NOT_FOUND:
                return None
            raise LogError(f"Reading {filter_} was refused: {answer['error']['description']}.")
        message = answer["message"]
        return decode(message["seq"], message["subject"], base64.b64decode(message.get("data", "")))

    async def _make_feed(self, name: str, filter_: str, start: int) -> None:
        async def attempt() -> bool | None:
            request = {"stream_name": STREAM, "config": {"name": name, **feed_config(filter_, start)}}
            answer = await self._link.api(f"CONSUMER.CREATE.{STREAM}.{name}", request)
            return made_or_retry(answer, f"A reader of {filter_}")

        await self._link.persist(f"Following {filter_}", attempt)

    async def _open(self, max_bytes: int, replicas: int) -> None:
        async def attempt() -> bool | None:
            answer = await self._link.api(f"STREAM.INFO.{STREAM}", {})
            if "error" not in answer:
                _check_stream(answer["config"])
                return True
            if answer["error"]["err_code"] == _STREAM_NOT_FOUND:
                answer = await self._link.api(f"STREAM.CREATE.{STREAM}", stream_config(max_bytes, replicas))
            error = answer.get("error")
            if error is None:
                return True
            if error["err_code"] == _NO_STORAGE:
                raise LogError(
                    f"The server has no room for a log of {max_bytes} bytes.",
                    next_step="Raise its max_file_store, or ask for a smaller log.",
                )
            # Another client was faster, or the server is still starting.
            if error["err_code"] == _STREAM_EXISTS or error["code"] >= 500:
                return None
            raise LogError(f"The stream {STREAM} could not be opened: {error['description']}.")

        await self._link.persist(f"Opening the stream {STREAM}", attempt)


def stream_config(max_bytes: int, replicas: int) -> dict[str, Any]:
    """A stream that forgets nothing: when it is full it refuses, and nobody can delete from it or purge it."""
    return {
        "name": STREAM,
        "subjects": [f"{ROOT}.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_age": 0,
        "max_msgs": -1,
        "max_bytes": max_bytes,
        "max_msg_size": MAX_EVENT_BYTES + 4096,
        "max_consumers": -1,
        "duplicate_window": DUPLICATE_WINDOW_SECONDS * NANOSECONDS,
        "deny_delete": True,
        "deny_purge": True,
        "allow_rollup_hdrs": False,
        "allow_direct": True,
        "allow_atomic": True,
        "num_replicas": replicas,
        "metadata": {"bascule.schema": "1", "bascule.log_id": str(uuid.uuid4())},
    }


def _check_stream(actual: dict[str, Any]) -> None:
    """Raise LogError if a stream that was found could lose history or cannot do what the log needs."""
    wanted = stream_config(0, 1)
    keys = ("subjects", "retention", "discard", "max_age", "deny_delete", "deny_purge", "allow_direct", "allow_atomic")
    # The server leaves out what is false or 0.
    wrong = [key for key in keys if (actual.get(key) or 0) != (wanted[key] or 0)]
    if wrong:
        raise LogError(
            f"The stream {STREAM} was made by somebody else: {', '.join(f'{k}={actual.get(k)}' for k in wrong)}.",
            next_step="Use another server or account, or make the stream with the settings of bascule.",
        )


def _raise_if_final(error: dict[str, Any], mine: Sequence[Recorded]) -> None:
    """Return for another try, or raise LogError if trying again will not help."""
    if error["err_code"] in (_NO_RESOURCES, _STORE_FAILED):
        raise LogError(
            f"The log's store is full: {_described(mine)} was refused ({error['description']}).",
            next_step="Free disk space or raise the store's limit, and resume; what was recorded is safe.",
        )
    if error["code"] < 500 and error["err_code"] != _BATCH_INCOMPLETE:
        raise LogError(f"The log refused {_described(mine)}: {error['description']} ({error['err_code']}).")


def _described(mine: Sequence[Recorded]) -> str:
    return mine[0].subject if len(mine) == 1 else f"a batch of {len(mine)} from {mine[0].subject}"
