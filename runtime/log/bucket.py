"""An object store on the broker, in the layout of NATS object stores, so that its own tools can read it.

An object is a message that describes it, the newest under its name, and chunks: messages with its bytes under an
identifier of their own. A description can be replaced on the condition that it is still the newest.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import msgspec

from bascule.runtime.log.link import Link
from bascule.runtime.log.pull import status_of
from bascule.runtime.log.streams import BLOB_BUCKET, BLOB_STREAM, WRONG_SEQUENCE, open_bucket
from bascule.schemas.errors import Corrupt, LogError

#: A message of a server with the usual limit of 1 MB holds it; puts are twice as fast as with the usual 128 KiB.
CHUNK_BYTES: Final = 900 * 1024
_CHUNKS: Final = f"$O.{BLOB_BUCKET}.C."
_ABOUT: Final = f"$O.{BLOB_BUCKET}.M."
_ROLLUP: Final = {"Nats-Rollup": "sub"}

# Error codes of the JetStream API.
_NO_MESSAGE, _NO_STREAM = 10037, 10059
_FULL = (10023, 10047, 10077, 10122)


class Description(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the store keeps about an object; ``nuid`` is the identifier of its chunks, ``<run>-<hex>``."""

    name: str
    bucket: str
    nuid: str
    size: int
    chunks: int
    digest: str
    mtime: str
    deleted: bool = False
    options: dict[str, Any] = {}


class Entry(msgspec.Struct, frozen=True):
    """The newest description under a name, its sequence, and its age in seconds by this host's clock."""

    seq: int
    age: float
    about: Description


class Bucket:
    """The bucket ``bascule-blobs``. Where it is not there, nothing is in it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._opened = False

    async def open(self) -> None:
        """Check that there is a bucket to write to.

        Raises:
            LogError: there is none; the admin makes it.
        """
        if not self._opened:
            await open_bucket(self._link)
            self._opened = True

    async def names(self) -> list[str]:
        """The name of every object, also of deleted ones, sorted."""
        return sorted(base64.urlsafe_b64decode(last).decode() for last in await self._under(_ABOUT))

    async def nuids(self) -> list[str]:
        """The identifier of all chunks, sorted, whether or not an object has them."""
        return sorted(await self._under(_CHUNKS))

    async def entry(self, name: str) -> Entry | None:
        """The newest description, also if it says that the object is deleted.

        Raises:
            Corrupt: it cannot be read.
        """
        message = await self._message({"last_by_subj": _subject(name)})
        if message is None:
            return None
        try:
            about = msgspec.json.decode(base64.b64decode(message.get("data", "")), type=Description)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise Corrupt(f"The object store's description of {name} is not readable.", next_step="Restore it.") from e
        return Entry(message["seq"], _age(message), about)

    async def write(self, name: str, data: bytes) -> None:
        """Store an object in the place of another that may be there, whose chunks stay."""
        nuid = f"{name.partition('/')[0]}-{secrets.token_hex(11)}"
        view = memoryview(data)
        starts = range(0, len(data), CHUNK_BYTES)
        for start in starts:
            chunk = bytes(view[start : start + CHUNK_BYTES])
            # A chunk that is sent again after a lost acknowledgement is not stored twice.
            await self._publish(name, _CHUNKS + nuid, chunk, {"Nats-Msg-Id": f"{nuid}-{start}"})
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).digest())
        await self._describe(
            Description(
                name=name,
                bucket=BLOB_BUCKET,
                nuid=nuid,
                size=len(data),
                chunks=len(starts),
                digest=f"SHA-256={base64.urlsafe_b64encode(digest).decode()}",
                mtime=_now(),
                options={"max_chunk_size": CHUNK_BYTES},
            )
        )

    async def refresh(self, entry: Entry) -> bool:
        """Make an object as young as a new one. False if it is not what it was any more."""
        return await self._describe(msgspec.structs.replace(entry.about, mtime=_now()), expected=entry.seq)

    async def delete(self, entry: Entry) -> bool:
        """Delete an object. False if it is not what it was any more."""
        gone = msgspec.structs.replace(entry.about, deleted=True, size=0, chunks=0, digest="", mtime=_now())
        if not await self._describe(gone, expected=entry.seq):
            return False
        await self.drop(entry.about.nuid)
        return True

    async def chunks(self, nuid: str) -> AsyncIterator[tuple[int, bytes]]:
        """Sequence and bytes of each chunk, from any replica that has it."""
        seq = 0
        while True:
            wanted = {"seq": seq + 1, "next_by_subj": _CHUNKS + nuid}
            direct = partial(self._link.request, f"$JS.API.DIRECT.GET.{BLOB_STREAM}", msgspec.json.encode(wanted))
            message = await self._link.persist(f"Reading {_CHUNKS}{nuid}", direct)
            if status_of(message) is None and message.headers and "Nats-Sequence" in message.headers:
                seq, data = int(message.headers["Nats-Sequence"]), message.data
            elif (found := await self._message(wanted)) is not None:
                seq, data = found["seq"], base64.b64decode(found.get("data", ""))
            else:
                return
            yield seq, data

    async def drop(self, nuid: str) -> None:
        """Replace chunks by nothing: who may write may do so, without the right to purge the stream."""
        await self._publish(nuid, _CHUNKS + nuid, b"", _ROLLUP)

    async def shred(self, nuid: str) -> None:
        """Delete chunks so that the server overwrites them; what is purged stays in its files for a while."""
        for seq in [seq async for seq, _ in self.chunks(nuid)]:
            await self._api("STREAM.MSG.DELETE", {"seq": seq})

    async def purge(self, nuid: str) -> None:
        """Remove chunks without a trace."""
        await self._api("STREAM.PURGE", {"filter": _CHUNKS + nuid})

    async def age(self, nuid: str) -> float:
        """Seconds since the newest chunk, by this host's clock; 0 if there is none."""
        newest = await self._message({"last_by_subj": _CHUNKS + nuid})
        return _age(newest) if newest is not None else 0.0

    async def _under(self, prefix: str) -> set[str]:
        """What follows ``prefix`` in subjects; the server gives them by the page."""
        found: set[str] = set()
        while True:
            answer = await self._api("STREAM.INFO", {"subjects_filter": f"{prefix}>", "offset": len(found)})
            page = answer["state"].get("subjects", {}) if answer else {}
            found |= {subject.removeprefix(prefix) for subject in page}
            if not page or len(found) >= answer.get("total", 0):
                return found

    async def _message(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """A message as the stream's leader has it."""
        answer = await self._api("STREAM.MSG.GET", wanted)
        return answer["message"] if answer else None

    async def _describe(self, about: Description, *, expected: int | None = None) -> bool:
        headers = dict(_ROLLUP)
        if expected is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected)
        return await self._publish(about.name, _subject(about.name), msgspec.json.encode(about), headers)

    async def _publish(self, name: str, subject: str, data: bytes, headers: dict[str, str]) -> bool:
        """False if it is refused because of the sequence that it expects."""

        async def attempt() -> bool | None:
            answer = await self._link.request(subject, data, headers=headers)
            error = msgspec.json.decode(answer.data, type=dict[str, Any]).get("error")
            if error is None:
                return True
            if error["err_code"] in WRONG_SEQUENCE:
                return False
            if error["err_code"] in _FULL:
                raise LogError(
                    f"The server has no room for the blob {name}: {error['description']}.",
                    next_step="Raise its max_file_store or free some space, and resume.",
                )
            return None

        return await self._link.persist(f"Storing {name}", attempt)

    async def _api(self, call: str, request: dict[str, Any]) -> dict[str, Any]:
        """A JetStream API call; nothing if what it is about is not there."""
        what = f"{call} of {BLOB_STREAM}"

        async def attempt() -> dict[str, Any] | None:
            answer = await self._link.api(f"{call}.{BLOB_STREAM}", request)
            error = answer.get("error")
            if error is None:
                return answer
            if error["err_code"] in (_NO_MESSAGE, _NO_STREAM):
                return {}
            if error["code"] >= 500:
                return None  # the server is still starting, or choosing a leader
            raise LogError(f"{what}: the server refuses: {error['description']}.", next_step="Look into its log.")

        return await self._link.persist(what, attempt)


def _subject(name: str) -> str:
    return _ABOUT + base64.urlsafe_b64encode(name.encode()).decode()


def _age(message: dict[str, Any]) -> float:
    return max(0.0, time.time() - datetime.fromisoformat(message["time"]).timestamp())


def _now() -> str:
    return datetime.now(UTC).isoformat()
