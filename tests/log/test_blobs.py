"""What every blob store promises: bytes come back as they were put, or not at all; in a folder and on a real broker."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from bascule.runtime.log.bucket import CHUNK_BYTES
from bascule.schemas.errors import Corrupt, Erased, NotFound
from bascule.schemas.events import BlobRef
from tests.log.blob_kits import Kit

NEVER, ALWAYS = 3600.0, -1.0  # older than an hour; older than now
GONE = BlobRef(sha256="a" * 64, size=1)


def some(size: int) -> bytes:
    return hashlib.shake_256(str(size).encode()).digest(size)


@pytest.mark.parametrize("size", [0, 1, 300, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 5])
@pytest.mark.parametrize("media", ["text/plain", "application/octet-stream"])
async def test_bytes_come_back_as_they_were_put(kit: Kit, size: int, media: str) -> None:
    data = some(size)
    ref = await kit.store().put(data, media)
    assert ref == BlobRef(sha256=hashlib.sha256(data).hexdigest(), size=size, media=media)
    assert await kit.store().put(data, media) == ref
    assert await kit.store().get(ref) == data


async def test_one_run_does_not_see_the_blobs_of_another(kit: Kit) -> None:
    ref = await kit.store("x").put(b"data")
    with pytest.raises(NotFound):
        await kit.store("y").get(ref)
    assert await kit.store("y").list() == ()
    assert [s.sha256 for s in await kit.store("x").list()] == [ref.sha256]


async def test_a_missing_blob_is_named_and_not_said_to_be_erased(kit: Kit) -> None:
    with pytest.raises(NotFound, match=GONE.sha256) as caught:
        await kit.store().get(GONE)
    assert not isinstance(caught.value, Erased)


@pytest.mark.parametrize("damage", [b"dat", b"datA", b"data and more", b""], ids=["cut", "flipped", "longer", "empty"])
async def test_a_damaged_blob_is_never_returned(kit: Kit, damage: bytes) -> None:
    ref = await kit.store().put(b"data")
    await kit.damage(ref, damage)
    with pytest.raises(Corrupt, match=ref.sha256):
        await kit.store().get(ref)


async def test_putting_again_repairs_a_damaged_blob(kit: Kit) -> None:
    ref = await kit.store().put(b"data")
    await kit.damage(ref, b"")
    await kit.store().put(b"data")
    assert await kit.store().get(ref) == b"data"


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "/" * 64])
async def test_a_reference_cannot_point_outside_the_store(kit: Kit, sha256: str) -> None:
    ref = BlobRef(sha256=sha256, size=0)
    for work in (kit.store().get(ref), kit.store().discard(ref), kit.store().erase(sha256)):
        with pytest.raises(Corrupt, match="is not a sha256"):
            await work


async def test_many_may_put_the_same_bytes_at_the_same_time(kit: Kit) -> None:
    data = some(CHUNK_BYTES + 1)
    refs = await asyncio.gather(*(kit.store().put(data) for _ in range(8)))
    assert len(set(refs)) == 1
    assert await kit.store().get(refs[0]) == data
    assert [s.sha256 for s in await kit.store().list()] == [refs[0].sha256]


async def test_a_discarded_blob_is_missing_and_can_be_put_again(kit: Kit) -> None:
    ref = await kit.store().put(b"data")
    await kit.store().discard(ref)
    await kit.store().discard(ref)
    with pytest.raises(NotFound):
        await kit.store().get(ref)
    assert await kit.store().list() == ()
    assert await kit.store().get(await kit.store().put(b"data")) == b"data"


async def test_an_erased_blob_says_so_and_stays_erased(kit: Kit) -> None:
    ref = await kit.store().put(b"data")
    other = await kit.store().put(b"other")
    await kit.store().erase(ref.sha256)
    await kit.store().erase(ref.sha256)
    with pytest.raises(Erased, match=ref.sha256):
        await kit.store().get(ref)
    with pytest.raises(Erased, match=ref.sha256):
        await kit.store().put(b"data")
    assert [s.sha256 for s in await kit.store().list()] == [other.sha256]


async def test_a_blob_can_be_erased_where_it_never_was(kit: Kit) -> None:
    await kit.store().erase(GONE.sha256)
    with pytest.raises(Erased):
        await kit.store().get(GONE)


async def test_a_put_at_the_same_time_does_not_undo_an_erasure(kit: Kit) -> None:
    for i in range(10):
        data = some(i)
        erased = hashlib.sha256(data).hexdigest()
        await asyncio.gather(kit.store().put(data), kit.store().erase(erased), return_exceptions=True)
        with pytest.raises(Erased):
            await kit.store().get(BlobRef(sha256=erased, size=i))
    assert await kit.store().list() == ()


async def test_only_what_is_old_enough_is_swept(kit: Kit) -> None:
    ref = await kit.store().put(b"data")
    assert not await kit.store().sweep(ref.sha256, NEVER)
    assert await kit.store().get(ref) == b"data"
    assert await kit.store().sweep(ref.sha256, ALWAYS)
    assert not await kit.store().sweep(ref.sha256, ALWAYS)
    assert await kit.store().list() == ()


async def test_what_is_put_again_is_young_again(kit: Kit) -> None:
    ref = await kit.store().put(b"data")
    await kit.make_old(ref)
    before = await kit.last_put(ref)
    await kit.store().put(b"data")
    assert await kit.last_put(ref) > before
    assert not await kit.store().sweep(ref.sha256, NEVER)


async def test_what_cut_short_puts_left_is_tidied_up_and_nothing_else(kit: Kit) -> None:
    ref = await kit.store().put(b"data")
    await kit.cut_short()
    assert await kit.store("other").tidy(ALWAYS) == 0
    assert await kit.store().tidy(NEVER) == 0
    assert await kit.store().tidy(ALWAYS, dry_run=True) == 1
    assert await kit.store().tidy(ALWAYS) == 1
    assert await kit.store().tidy(ALWAYS) == 0
    assert await kit.store().get(ref) == b"data"
