"""What the blob store on the broker promises besides."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import nats
import pytest

from bascule.runtime.log.bucket import CHUNK_BYTES, Bucket
from bascule.runtime.log.link import Link
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.object_blobs import ObjectBlobs
from bascule.runtime.log.server import EmbeddedServer
from bascule.schemas.errors import Corrupt, Erased, NotFound, NotPermitted
from tests.log.blob_kits import BrokerKit
from tests.log.restarts import restart

LARGE = hashlib.shake_256(b"large").digest(2 * CHUNK_BYTES + 7)


@pytest.fixture
def kit(link: Link) -> BrokerKit:
    return BrokerKit(link)


async def test_the_tools_of_nats_can_read_the_objects(kit: BrokerKit, blob_server: EmbeddedServer) -> None:
    ref = await kit.store().put(LARGE)
    client = await nats.connect(blob_server.url, user=blob_server.user, password=blob_server.password)
    try:
        bucket = await client.jetstream().object_store("bascule-blobs")
        found = io.BytesIO()
        result = await bucket.get(f"{kit.run}/{ref.sha256}", writeinto=found)
        assert found.getvalue() == LARGE
        assert (result.info.size, result.info.chunks) == (len(LARGE), 3)
    finally:
        await client.close()


async def test_a_missing_chunk_is_corrupt(kit: BrokerKit) -> None:
    ref = await kit.store().put(LARGE)
    entry = await kit.bucket.entry(f"{kit.run}/{ref.sha256}")
    assert entry is not None
    seqs = [seq async for seq, _ in kit.bucket.chunks(entry.about.nuid)]
    await kit.link.api("STREAM.MSG.DELETE.OBJ_bascule-blobs", {"seq": seqs[1]})
    with pytest.raises(Corrupt, match=ref.sha256):
        await kit.store().get(ref)


async def test_an_unreadable_description_is_corrupt(kit: BrokerKit, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = await kit.store().put(b"data")
    entry = await kit.bucket.entry(f"{kit.run}/{ref.sha256}")
    assert entry is not None
    monkeypatch.setattr("msgspec.json.encode", lambda _: b"not json")
    await kit.bucket._describe(entry.about)
    monkeypatch.undo()
    with pytest.raises(Corrupt, match=ref.sha256):
        await kit.store().get(ref)


async def test_a_sweep_that_meets_a_put_of_the_same_bytes_deletes_nothing(kit: BrokerKit) -> None:
    ref = await kit.store().put(b"data")
    listed = await kit.bucket.entry(f"{kit.run}/{ref.sha256}")
    assert listed is not None
    await kit.store().put(b"data")
    assert not await kit.bucket.delete(listed)
    assert await kit.store().get(ref) == b"data"


async def test_a_put_that_meets_a_sweep_of_the_same_bytes_stores_them(
    kit: BrokerKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = await kit.store().put(b"data")
    refresh = Bucket.refresh

    async def swept_before(bucket: Bucket, entry: object) -> bool:
        assert await kit.store().sweep(ref.sha256, -1.0)
        return await refresh(bucket, entry)  # type: ignore[arg-type]

    monkeypatch.setattr(Bucket, "refresh", swept_before)
    await kit.store().put(b"data")
    assert await kit.store().get(ref) == b"data"


async def test_deleted_objects_leave_no_chunks_once_tidied_up(kit: BrokerKit) -> None:
    ref = await kit.store().put(LARGE)
    await kit.store().discard(ref)
    assert await kit.store().tidy(-1.0) == 1
    assert [n for n in await kit.bucket.nuids() if n.startswith(kit.run)] == []


async def test_erased_bytes_are_not_in_the_servers_files_any_more(tmp_path: Path) -> None:
    secret = b"the name of somebody who asked to be forgotten" + LARGE
    server = EmbeddedServer.start(tmp_path / "home")

    def found() -> bool:
        files = [p for p in (tmp_path / "home").rglob("*") if p.is_file()]
        return any(mark in p.read_bytes() for p in files for mark in (secret[:40], LARGE[-40:]))

    try:
        log = await NatsLog.connect(server.url, user=server.user, password=server.password)
        store = ObjectBlobs(log.link, "r1")
        ref = await store.put(secret)
        assert found()
        await store.erase(ref.sha256)
        assert not found()
        restart(server)
        with pytest.raises(Erased):
            await store.get(ref)
        await log.close()
    finally:
        server.stop()


async def test_a_service_may_keep_blobs_and_not_erase_them(kit: BrokerKit, blob_server: EmbeddedServer) -> None:
    passwords = blob_server.connection.passwords
    log = await NatsLog.connect(blob_server.url, user="rollout", password=passwords["rollout"], deadline=5.0)
    try:
        store = ObjectBlobs(log.link, kit.run)
        ref = await store.put(LARGE)
        assert await store.put(LARGE) == ref
        assert await store.get(ref) == LARGE
        assert len(await store.list()) == 1
        with pytest.raises(NotPermitted):
            await store.erase(ref.sha256)
        await store.discard(await store.put(b"data"))
    finally:
        await log.close()


async def test_a_store_that_nothing_was_put_in_has_nothing(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path / "home")
    try:
        log = await NatsLog.connect(server.url, user=server.user, password=server.password)
        store = ObjectBlobs(log.link, "r1")
        assert await store.list() == ()
        assert await store.tidy(0.0) == 0
        other = await ObjectBlobs(log.link, "r2").put(b"data")
        with pytest.raises(NotFound):
            await store.get(other)
        await log.close()
    finally:
        server.stop()
