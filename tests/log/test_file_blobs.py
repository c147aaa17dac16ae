"""What the blob store in a folder promises besides: durable, private, compressed, and not fooled."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bascule.runtime.log.blobs import FileBlobs
from bascule.schemas.errors import Corrupt, LogError
from bascule.schemas.events import BlobRef

TEXT = b'{"role": "user", "content": "What is 3 + 4?"}\n' * 200


@pytest.fixture
def store(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "blobs")


def put(store: FileBlobs, data: bytes, media: str = "application/octet-stream") -> BlobRef:
    return asyncio.run(store.put(data, media))


def get(store: FileBlobs, ref: BlobRef) -> bytes:
    return asyncio.run(store.get(ref))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    st.one_of(st.binary(max_size=300), st.builds(bytes.__mul__, st.binary(max_size=9), st.integers(0, 99))),
    st.sampled_from(["application/json", "text/plain; charset=utf-8", "application/octet-stream"]),
)
def test_bytes_come_back_however_they_are_stored(store: FileBlobs, data: bytes, media: str) -> None:
    ref = put(store, data, media)
    assert get(store, ref) == data
    assert store.path(ref.sha256).stat().st_size <= len(data)


def test_text_takes_less_room_and_has_the_same_identity(store: FileBlobs, tmp_path: Path) -> None:
    ref = put(store, TEXT, "application/json")
    assert store.path(ref.sha256).stat().st_size < len(TEXT) / 10
    plain = put(FileBlobs(tmp_path / "other"), TEXT)
    assert (plain.sha256, plain.size) == (ref.sha256, ref.size)
    # The same bytes under another media type are the same blob.
    assert get(store, put(store, TEXT)) == TEXT
    assert len(asyncio.run(store.list())) == 1


def test_other_media_and_what_does_not_shrink_are_stored_as_they_are(store: FileBlobs) -> None:
    for data, media in ((TEXT, "application/x-safetensors"), (os.urandom(500), "application/json"), (b"{}", "text/x")):
        assert store.path(put(store, data, media).sha256).read_bytes() == data


def test_a_blob_that_is_itself_a_frame_comes_back_packed(store: FileBlobs) -> None:
    frame = zstandard.ZstdCompressor().compress(TEXT)
    assert get(store, put(store, frame, "text/plain")) == frame


def frames(size: int) -> dict[str, bytes]:
    """Frames in the place of a blob of ``size`` bytes that hold far more, or something else."""
    huge = b"\0" * (64 * size)
    honest = zstandard.ZstdCompressor().compress(huge)
    unsaid = io.BytesIO()
    with zstandard.ZstdCompressor(write_content_size=False).stream_writer(unsaid, closefd=False) as writer:
        writer.write(huge)
    # Magic number, descriptor, then the size that the header says: with one segment, 4 bytes.
    lying = honest[:5] + size.to_bytes(4, "little") + honest[9:]
    right = zstandard.ZstdCompressor().compress(b"x" * size)
    return {
        "honest": honest,
        "unsaid": unsaid.getvalue(),
        "lying": lying,
        "other": right,
        "cut": right[:-2],
        "more": right + b"\0",
        "twice": right + right,
        "empty": b"",
    }


@pytest.mark.parametrize("kind", list(frames(1024)))
def test_a_frame_that_is_not_the_blob_is_corrupt_and_never_expands_beyond_it(store: FileBlobs, kind: str) -> None:
    data = b"y" * 1024 * 1024
    ref = put(store, data, "text/plain")
    bomb = frames(ref.size)[kind]
    assert len(bomb) < ref.size
    store.path(ref.sha256).write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match=ref.sha256):
            get(store, ref)
        assert tracemalloc.get_traced_memory()[1] < 2 * ref.size
    finally:
        tracemalloc.stop()
    put(store, data, "text/plain")
    assert get(store, ref) == data


def test_a_file_that_is_far_too_long_is_not_read_to_its_end(store: FileBlobs) -> None:
    ref = put(store, b"data")
    os.truncate(store.path(ref.sha256), 1 << 40)
    with pytest.raises(Corrupt, match=ref.sha256):
        get(store, ref)


@pytest.mark.parametrize("size", [0, 8, 1000])
def test_every_flipped_bit_in_a_frame_is_seen(store: FileBlobs, size: int) -> None:
    ref = put(store, TEXT[:size] * 3, "text/plain")
    path = store.path(ref.sha256)
    stored = path.read_bytes()
    for place in range(len(stored) * 8):
        flipped = bytearray(stored)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        # A bit of the header may mean nothing, so that the bytes are still right; wrong ones never come back.
        with suppress(Corrupt):
            assert get(store, ref) == TEXT[:size] * 3


def test_a_sweep_waits_for_puts_under_way_and_sees_what_they_did(
    store: FileBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = put(store, b"data")
    os.utime(store.path(ref.sha256), (0, 0))
    waits = threading.Event()
    flock = fcntl.flock

    def seen(fd: int, how: int) -> None:
        if how == fcntl.LOCK_EX:
            waits.set()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", seen)
    with ThreadPoolExecutor() as pool:
        with store._locked(fcntl.LOCK_SH):
            swept = pool.submit(lambda: asyncio.run(store.sweep(ref.sha256, 3600.0)))
            assert waits.wait(20)
            put(store, b"data")
        assert not swept.result()
    assert get(store, ref) == b"data"


def test_a_blob_is_for_its_owner_only(store: FileBlobs) -> None:
    path = store.path(put(store, b"data").sha256)
    assert [p.stat().st_mode & 0o777 for p in (path, path.parent, store.root)] == [0o600, 0o700, 0o700]


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_only_a_file_is_read_in_the_place_of_a_blob(store: FileBlobs, tmp_path: Path, kind: str) -> None:
    ref = put(store, b"data")
    path = store.path(ref.sha256)
    path.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(b"data")
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(Corrupt, match="cannot be read"):
        get(store, ref)
    assert asyncio.run(store.list()) == ()


def test_a_put_replaces_a_link_and_leaves_alone_what_it_points_to(store: FileBlobs, tmp_path: Path) -> None:
    ref = put(store, b"data")
    (tmp_path / "elsewhere").write_bytes(b"mine")
    store.path(ref.sha256).unlink()
    store.path(ref.sha256).symlink_to(tmp_path / "elsewhere")
    put(store, b"data")
    assert get(store, ref) == b"data"
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"


def test_a_blob_is_synced_before_it_has_its_name_and_its_folder_after(
    store: FileBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, b"so that the folders are there")
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
    put(store, b"data")
    assert steps[-3:] == ["fsync .tmp", "rename", "fsync folder"]
    steps.clear()
    asyncio.run(store.erase("c" * 64))
    assert steps[-3:] == ["fsync .tmp", "rename", "fsync folder"]


def test_a_failed_put_leaves_nothing_and_says_why(store: FileBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def full(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LogError, match="is full"):
            put(store, b"data")
    assert [p.name for p in store.root.rglob("*") if p.is_file()] == [".lock"]
    assert get(store, put(store, b"data")) == b"data"


def test_a_file_in_the_place_of_the_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file in its place")
    with pytest.raises(LogError, match="cannot be written"):
        put(FileBlobs(tmp_path / "blobs"), b"data")


def test_a_killed_put_leaves_no_blob_and_what_it_leaves_is_tidied_up(store: FileBlobs) -> None:
    script = (
        "import asyncio, os, signal, sys\n"
        "from pathlib import Path\n"
        "from bascule.runtime.log.blobs import FileBlobs\n"
        "fsync = os.fsync\n"
        "def killed(fd):\n"
        "    if os.readlink(f'/proc/self/fd/{fd}').endswith('.tmp'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    fsync(fd)\n"
        "os.fsync = killed\n"
        "asyncio.run(FileBlobs(Path(sys.argv[1])).put(b'data'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(store.root)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert asyncio.run(store.list()) == ()
    assert len(list(store.root.rglob("*.tmp"))) == 1
    assert asyncio.run(store.tidy(-1.0)) == 1
    assert list(store.root.rglob("*.tmp")) == []
    assert get(store, put(store, b"data")) == b"data"
