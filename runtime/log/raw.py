"""What the store holds, undecoded: for audits, which go on where a reader would have to stop."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Final

from bascule.runtime.log.link import TRANSIENT, Link
from bascule.runtime.log.protocol import Extent, Raw
from bascule.runtime.log.pull import BrokenFeedError, Inbox, make_feed, places, status_of
from bascule.schemas.errors import Corrupt, LogUnavailable

_BATCH: Final = 4096
_SILENCE_SECONDS: Final = 15.0
_RESTARTS: Final = 8
_NO_MESSAGES: Final = "404"


async def extent_of(link: Link, stream: str) -> Extent:
    """What the server says about the stream."""
    info = await link.ask(f"Looking at the stream {stream}", f"STREAM.INFO.{stream}", {"deleted_details": True})
    state = info["state"]
    return Extent(
        log=info["config"].get("metadata", {}).get("bascule.log_id", ""),
        first=state["first_seq"],
        last=state["last_seq"],
        messages=state["messages"],
        missing=tuple(state.get("deleted") or ()),
    )


async def read_raw(link: Link, stream: str, filter_: str) -> AsyncGenerator[Raw, None]:
    """Everything under ``filter_`` that the store gives out, in order, up to what is there at the time of the call.

    Raises:
        Corrupt: at the end, if the store counts more events than it gave out.
        LogUnavailable: the connection broke again and again.
    """
    last = given = 0
    promised: int | None = None
    for _ in range(_RESTARTS):
        name = f"raw-{secrets.token_hex(8)}"
        try:
            pending = await make_feed(link, stream, name, filter_, last + 1)
            promised = pending if promised is None else promised
            async with Inbox(link, stream, name).open() as inbox, aclosing(_drain(inbox)) as parts:
                async for part in parts:
                    for raw in part[: promised - given]:
                        last, given = raw.seq, given + 1
                        yield raw
                    if given == promised:
                        return
            break
        except (BrokenFeedError, *TRANSIENT):
            continue
        finally:
            with suppress(*TRANSIENT):
                await link.publish(f"$JS.API.CONSUMER.DELETE.{stream}.{name}", b"")
    else:
        raise LogUnavailable(f"Reading {filter_}: the connection broke {_RESTARTS} times.", next_step="Try again.")
    if given < promised:
        raise Corrupt(
            f"The store counts {promised} events under {filter_} and gives out only {given}: its files are damaged.",
            next_step="Restore the store from a backup.",
        )


async def _drain(inbox: Inbox) -> AsyncGenerator[list[Raw], None]:
    """What the consumer has, as many at a time as have come, until it says that there is no more."""
    asked = delivered = 0
    while True:
        if asked - delivered <= _BATCH // 2:  # early, so that the next ones come while these are read
            asked += _BATCH
            await inbox.request(_BATCH, no_wait=True)
        found: list[Raw] = []
        for item in await inbox.take_all(_SILENCE_SECONDS):
            if isinstance(item, Exception):
                raise item
            status = status_of(item.msg)
            if status == _NO_MESSAGES:
                yield found
                return
            if status is None:
                seq, place = places(item.msg)
                delivered += 1
                if place != delivered:
                    raise BrokenFeedError("a message is missing")
                found.append(Raw(seq, item.msg.subject, item.msg.data))
        yield found
