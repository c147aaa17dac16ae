"""What the blob store promises: bytes come back as they were put, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bascule.runtime.log.blobs import BlobStore
from bascule.schemas.errors import Corrupt, LogError, NotFound
from bascule.schemas.events import BlobRef


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_come_back_as_they_were_put(store: BlobStore, data: bytes) -> None:
    ref = store.put(data, "text/plain")
    assert ref == BlobRef(sha256=hashlib.sha256(data).hexdigest(), size=len(data), media="text/plain")
    assert store.get(ref) == data
    assert store.put(data, "text/plain") == ref


def test_a_blob_is_for_its_owner_only(store: BlobStore) -> None:
    path = store.path(store.put(b"data"))
    assert [p.stat().st_mode & 0o777 for p in (path, path.parent, store.root)] == [0o600, 0o700, 0o700]


def test_a_missing_blob_is_named_with_its_path(store: BlobStore) -> None:
    ref = BlobRef(sha256="a" * 64, size=1)
    with pytest.raises(NotFound, match=str(store.root / "aa" / ref.sha256)):
        store.get(ref)


@pytest.mark.parametrize("damage", [b"dat", b"datA", b"data and more", b""])
def test_a_damaged_blob_is_never_returned(store: BlobStore, damage: bytes) -> None:
    ref = store.put(b"data")
    store.path(ref).write_bytes(damage)
    with pytest.raises(Corrupt, match=ref.sha256):
        store.get(ref)


def test_putting_again_repairs_a_damaged_blob(store: BlobStore) -> None:
    ref = store.put(b"data")
    store.path(ref).write_bytes(b"")
    store.put(b"data")
    assert store.get(ref) == b"data"


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "/" * 64])
def test_a_reference_cannot_point_outside_the_store(store: BlobStore, sha256: str) -> None:
    with pytest.raises(Corrupt, match="is not a sha256"):
        store.get(BlobRef(sha256=sha256, size=0))


def test_a_link_in_the_place_of_a_blob_is_not_followed(store: BlobStore, tmp_path: Path) -> None:
    ref = store.put(b"data")
    (tmp_path / "elsewhere").write_bytes(b"data")
    store.path(ref).unlink()
    store.path(ref).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match="cannot be read"):
        store.get(ref)


def test_a_blob_is_synced_before_it_has_its_name_and_its_folder_after(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(b"so that the folders are there")
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(fd: int) -> None:
        steps.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).suffix or 'folder'}")
        fsync(fd)

    def seen_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        replace(self, target)
        return target

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    store.put(b"data")
    assert steps[-3:] == ["fsync .tmp", "rename", "fsync folder"]


def test_a_failed_put_leaves_nothing_and_says_why(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LogError, match="is full"):
            store.put(b"data")
    assert [p for p in store.root.rglob("*") if p.is_file()] == []
    assert store.get(store.put(b"data")) == b"data"


def test_a_file_in_the_place_of_the_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file in its place")
    with pytest.raises(LogError, match="cannot be written"):
        BlobStore(tmp_path / "blobs").put(b"data")
