"""The two blob stores as one kind of thing, with what a test does behind their backs."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.bucket import Bucket
from bascule.runtime.log.link import Link
from bascule.runtime.log.object_blobs import ObjectBlobs
from bascule.schemas.events import BlobRef


class FolderKit:
    """A store in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = "r1"

    def store(self, run: str = "") -> FileBlobs:
        return FileBlobs(self.root / (run or self.run))

    async def damage(self, ref: BlobRef, stored: bytes) -> None:
        self.store().path(ref.sha256).write_bytes(stored)

    async def make_old(self, ref: BlobRef) -> None:
        os.utime(self.store().path(ref.sha256), (time.time() - 1e6,) * 2)

    async def last_put(self, ref: BlobRef) -> int:
        return self.store().path(ref.sha256).stat().st_mtime_ns

    async def cut_short(self) -> None:
        """What a put leaves that is killed before the blob has its name."""
        folder = self.store().path("ab" * 32).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".abababababababab.0123456789abcdef.tmp").write_bytes(b"half")


class BrokerKit:
    """A store on the broker."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.bucket = Bucket(link)
        self.run = f"r{secrets.token_hex(6)}"

    def store(self, run: str = "") -> ObjectBlobs:
        return ObjectBlobs(self.link, f"{self.run}{run}")

    async def damage(self, ref: BlobRef, stored: bytes) -> None:
        entry = await self.bucket.entry(f"{self.run}/{ref.sha256}")
        assert entry is not None
        subject = f"$O.bascule-blobs.C.{entry.about.nuid}"
        await self.link.request(subject, stored, headers={"Nats-Rollup": "sub"})

    async def make_old(self, ref: BlobRef) -> None:
        """The server's clock cannot be set; its sequence tells what is newer."""

    async def last_put(self, ref: BlobRef) -> int:
        entry = await self.bucket.entry(f"{self.run}/{ref.sha256}")
        assert entry is not None
        return entry.seq

    async def cut_short(self) -> None:
        await self.bucket.open()
        await self.link.request(f"$O.bascule-blobs.C.{self.run}-0123456789abcdef", b"half")


Kit = FolderKit | BrokerKit
