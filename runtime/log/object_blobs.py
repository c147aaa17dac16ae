"""Blobs in the object store of the broker, for hosts that share nothing else."""

from __future__ import annotations

import asyncio

from bascule.runtime.log.blobs import OCTETS, Stored, checked_hash, erased, missing, ref_of, verified
from bascule.runtime.log.bucket import Bucket, Entry
from bascule.runtime.log.link import Link
from bascule.schemas.errors import Corrupt
from bascule.schemas.events import BlobRef
from bascule.schemas.subjects import token


class ObjectBlobs:
    """The blobs of one run as objects ``<run>/<sha256>``. An object ``<run>/<sha256>.erased`` marks an erased one.

    Args:
        link: of a user that may write to the bucket, or only read from it; to erase and to tidy, also delete.
    """

    def __init__(self, link: Link, run: str) -> None:
        self._bucket = Bucket(link)
        self._run = token(run)

    async def put(self, data: bytes, media: str = OCTETS) -> BlobRef:
        ref = await asyncio.to_thread(ref_of, data, media)
        await self._bucket.open()
        await self._refuse_erased(ref.sha256)
        there = await self._there(ref.sha256)
        # What is there becomes young again, so that no sweep takes it before its event is there.
        if there is None or not await self._holds(there, ref) or not await self._bucket.refresh(there):
            await self._bucket.write(self._name(ref.sha256), data)
            if there is not None:
                await self._bucket.drop(there.about.nuid)
        if await self._bucket.entry(self._marker(ref.sha256)) is not None:  # it was erased meanwhile
            await self._delete(ref.sha256)
            raise erased(ref.sha256)
        return ref

    async def get(self, ref: BlobRef) -> bytes:
        name = self._name(ref.sha256)
        await self._refuse_erased(ref.sha256)
        there = await self._there(ref.sha256)
        while there is not None:
            data = await self._read(there, ref)
            try:
                return await asyncio.to_thread(verified, data, ref, name)
            except Corrupt:
                newest = await self._there(ref.sha256)
                if newest is not None and newest.about.nuid == there.about.nuid:
                    raise
                there = newest  # it was replaced while it was read
        raise missing(name)

    async def discard(self, ref: BlobRef) -> None:
        await self._delete(ref.sha256)

    async def erase(self, sha256: str) -> None:
        there = await self._there(sha256)
        await self._bucket.open()
        if await self._bucket.entry(self._marker(sha256)) is None:
            await self._bucket.write(self._marker(sha256), b"")
        if there is not None:
            await self._bucket.shred(there.about.nuid)
        await self._delete(sha256)

    async def list(self) -> tuple[Stored, ...]:
        hashes = [name.partition("/")[2] for name in await self._names() if not name.endswith(".erased")]
        found = [(sha256, await self._there(sha256)) for sha256 in hashes]
        return tuple(Stored(sha256=s, age=e.age, size=e.about.size) for s, e in found if e is not None)

    async def sweep(self, sha256: str, older: float) -> bool:
        return await self._delete(sha256, older)

    async def tidy(self, older: float, *, dry_run: bool = False) -> int:
        """Chunks that no object has: of puts that were cut short, and what is left of deleted objects."""
        nuids = [n for n in await self._bucket.nuids() if n.rpartition("-")[0] == self._run]
        entries = [await self._bucket.entry(name) for name in await self._names()]
        owned = {e.about.nuid for e in entries if e is not None and not e.about.deleted}
        left = [n for n in nuids if n not in owned and await self._bucket.age(n) > older]
        for nuid in () if dry_run else left:
            await self._bucket.purge(nuid)
        return len(left)

    async def _names(self) -> tuple[str, ...]:
        return tuple(name for name in await self._bucket.names() if name.startswith(f"{self._run}/"))

    def _name(self, sha256: str) -> str:
        return f"{self._run}/{checked_hash(sha256)}"

    def _marker(self, sha256: str) -> str:
        return f"{self._name(sha256)}.erased"

    async def _refuse_erased(self, sha256: str) -> None:
        if await self._bucket.entry(self._marker(sha256)) is not None:
            raise erased(sha256)

    async def _there(self, sha256: str) -> Entry | None:
        entry = await self._bucket.entry(self._name(sha256))
        return None if entry is None or entry.about.deleted else entry

    async def _read(self, there: Entry, ref: BlobRef) -> bytes:
        """The chunks, up to the first one that goes beyond the size of the blob."""
        parts: list[bytes] = []
        size = 0
        async for _, chunk in self._bucket.chunks(there.about.nuid):
            parts.append(chunk)
            size += len(chunk)
            if size > ref.size:
                break
        return b"".join(parts)

    async def _holds(self, there: Entry, ref: BlobRef) -> bool:
        try:
            await asyncio.to_thread(verified, await self._read(there, ref), ref, there.about.name)
        except Corrupt:
            return False
        return True

    async def _delete(self, sha256: str, older: float | None = None) -> bool:
        there = await self._there(sha256)
        if there is None or (older is not None and there.age <= older):
            return False
        return await self._bucket.delete(there)
