"""An export: the recorded bytes and no more, and no byte of it can change unnoticed."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from bascule.runtime.exports.archive import END, header, padding
from bascule.runtime.exports.check import verify_export
from bascule.runtime.exports.manifest import encode_manifest, parse_manifest
from bascule.runtime.exports.reader import open_export
from bascule.runtime.exports.writer import FolderSink, TarSink, write_export
from bascule.runtime.log.blobs import OCTETS, FileBlobs, Stored, ref_of
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.signing import KeyFile, Signer
from bascule.schemas import subjects
from bascule.schemas.errors import ConfigError, Corrupt, LogError, NotFound, SchemaError
from bascule.schemas.events import BlobRef
from tests.runtime import sample
from tests.runtime.sample import export_file, log_of

Edit = Callable[[list[bytes]], list[bytes]]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BASCULE_VERIFY_KEY", raising=False)


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "blobs")


@pytest.fixture
async def tar(tmp_path: Path, blobs: FileBlobs) -> Path:
    return await export_file(tmp_path / "run.tar", await log_of(await sample.sample(blobs)), blobs)


@pytest.fixture
async def folder(tmp_path: Path, blobs: FileBlobs) -> Path:
    log = await log_of(await sample.sample(blobs))
    sink = FolderSink(tmp_path / "folder")
    await write_export(sample.RUN, lambda: log.read(f"bascule.{sample.RUN}.>"), blobs, sink)
    return tmp_path / "folder"


def faults(export: Path | io.BytesIO) -> list[tuple[int, str, str]]:
    with open_export(export) as found:
        return [(f.seq, f.subject, f.what) for f in verify_export(found)]


def edited(folder: Path, edit: Edit) -> list[tuple[int, str, str]]:
    """The faults after the lines of the events were edited."""
    path = folder / "events.jsonl"
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    return faults(folder)


def detected(data: bytes) -> bool:
    try:
        return bool(faults(io.BytesIO(data)))
    except (Corrupt, SchemaError):
        return True


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


# --- what is written ---


async def test_an_export_holds_the_recorded_bytes_the_chain_and_the_blobs_that_are_needed(
    tar: Path, blobs: FileBlobs
) -> None:
    events = await sample.sample(blobs)
    with tarfile.open(tar) as found:
        content = {m.name: found.extractfile(m).read() for m in found}  # type: ignore[union-attr]
        assert all((m.mode, m.mtime, m.uid, m.gid, m.uname) == (0o600, 0, 0, 0, "") for m in found)
    manifest = json.loads(content.pop("manifest.json"))
    assert content.pop("events.jsonl") == b"".join(e.payload + b"\n" for e in events)
    heads = content.pop("chain.txt").decode().splitlines()
    assert (len(heads), heads[-1]) == (len(events), manifest["head"])
    assert sorted(content.values()) == sorted((sample.TRAJECTORY, sample.ADAPTER))
    assert list(content) == sorted(content)
    assert [b["size"] for b in manifest["blobs"] if b.get("erased")] == [len(sample.ERASED)]
    assert faults(tar) == []


async def test_an_export_does_not_depend_on_where_in_which_store_the_run_lies(
    tar: Path, tmp_path: Path, blobs: FileBlobs
) -> None:
    other = FileBlobs(tmp_path / "others")
    log = await log_of(await sample.sample(other), before=7)
    assert (await export_file(tmp_path / "other.tar", log, other)).read_bytes() == tar.read_bytes()


async def test_without_blobs_they_are_named_as_left_out(tmp_path: Path, blobs: FileBlobs) -> None:
    log = await log_of(await sample.sample(blobs))
    path = await export_file(tmp_path / "run.tar", log, blobs, with_blobs=False)
    assert faults(path) == []
    with open_export(path) as found:
        assert {b.size for b in found.manifest.blobs if b.omitted} == {len(sample.TRAJECTORY), len(sample.ADAPTER)}
        assert not any(b.included for b in found.manifest.blobs)


async def contents(path: Path) -> list[bytes]:
    assert faults(path) == []
    with open_export(path) as found:
        return sorted(found.blob(b) for b in found.manifest.blobs if b.included)


async def test_of_an_open_training_job_the_newest_checkpoint_is_included_and_no_older_one(
    tmp_path: Path, blobs: FileBlobs
) -> None:
    log = await log_of(sample.with_open_job(await sample.sample(blobs)))
    await blobs.put(sample.GONE)  # not discarded yet
    path = await export_file(tmp_path / "run.tar", log, blobs)
    assert await contents(path) == sorted((sample.TRAJECTORY, sample.ADAPTER, sample.NEWEST))


async def test_an_export_without_the_newest_checkpoint_of_an_open_job_is_not_intact(
    tmp_path: Path, blobs: FileBlobs
) -> None:
    log = await log_of(sample.with_open_job(await sample.sample(blobs)))
    await write_export(sample.RUN, lambda: log.read("bascule.sample.>"), blobs, FolderSink(tmp_path / "f"))
    newest = ref_of(sample.NEWEST, OCTETS).sha256
    path = tmp_path / "f" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["blobs"] = [b for b in manifest["blobs"] if b["sha256"] != newest]
    path.write_bytes(msgspec.json.encode(manifest) + b"\n")
    (tmp_path / "f" / "blobs" / newest).unlink()
    assert any(newest in what and "is not in the manifest" in what for _, _, what in faults(tmp_path / "f"))


async def test_a_run_that_goes_on_is_exported_up_to_its_newest_event_at_the_time(
    tmp_path: Path, blobs: FileBlobs
) -> None:
    """And no event or blob of what comes after that gets in."""
    *events, last = await sample.sample(blobs)
    log = await log_of(events)

    class GoingOn(FileBlobs):
        async def list(self) -> tuple[Stored, ...]:
            await log.append([last])
            return await super().list()

    erased = ref_of(sample.ERASED, OCTETS)
    (blobs.path(erased.sha256).with_name(f"{erased.sha256}.erased")).unlink()
    await blobs.put(sample.ERASED)
    path = await export_file(tmp_path / "run.tar", log, GoingOn(blobs.root))
    assert await contents(path) == sorted((sample.TRAJECTORY, sample.ADAPTER, sample.ERASED))
    with open_export(path) as found:
        assert list(found.lines()) == [e.payload for e in events]


async def test_a_checkpoint_that_is_superseded_while_it_is_exported_gives_an_export_of_the_newer_one(
    tmp_path: Path, blobs: FileBlobs
) -> None:
    events = sample.with_open_job(await sample.sample(blobs))
    newer = next(e for e in events if e.subject == subjects.adapter_checkpointed(sample.RUN, 1, 2))
    log = await log_of([e for e in events if e is not newer])
    older = await blobs.put(sample.GONE)

    class Training(FileBlobs):
        async def list(self) -> tuple[Stored, ...]:
            await log.append([newer])
            await self.discard(older)
            return await super().list()

    path = await export_file(tmp_path / "run.tar", log, Training(blobs.root))
    assert await contents(path) == sorted((sample.TRAJECTORY, sample.ADAPTER, sample.NEWEST))


async def test_a_blob_that_an_event_of_an_unknown_type_names_is_included_if_it_is_there(
    tmp_path: Path, blobs: FileBlobs
) -> None:
    events = await sample.sample(blobs)
    payload = events[1].payload.replace(b"bascule.trajectory.logged", b"bascule.trajectory.painted")
    events[1] = NewEvent(subject=events[1].subject, payload=payload)
    log = await log_of(events)
    path = await export_file(tmp_path / "a.tar", log, blobs)
    assert await contents(path) == sorted((sample.TRAJECTORY, sample.ADAPTER))
    await blobs.discard(ref_of(sample.TRAJECTORY, "application/json"))
    assert await contents(await export_file(tmp_path / "b.tar", log, blobs)) == [sample.ADAPTER]


async def test_a_missing_blob_fails_the_export_before_anything_is_written(tmp_path: Path, blobs: FileBlobs) -> None:
    log = await log_of(await sample.sample(blobs))
    with open_export(await export_file(tmp_path / "run.tar", log, blobs)) as found:
        sha256 = next(b.sha256 for b in found.manifest.blobs if b.size == len(sample.TRAJECTORY))
    await blobs.discard(BlobRef(sha256=sha256, size=len(sample.TRAJECTORY)))
    out = io.BytesIO()
    with pytest.raises(NotFound, match=sha256):
        await write_export(sample.RUN, lambda: log.read("bascule.sample.>"), blobs, TarSink(out))
    assert out.getvalue() == b""


async def test_a_damaged_blob_leaves_a_tar_that_nobody_takes_for_whole(tmp_path: Path, blobs: FileBlobs) -> None:
    log = await log_of(await sample.sample(blobs))
    for path in blobs.root.glob("*/*"):
        if path.suffix != ".erased":
            path.write_bytes(b"x" * path.stat().st_size)
    out = io.BytesIO()
    with pytest.raises(Corrupt):
        await write_export(sample.RUN, lambda: log.read("bascule.sample.>"), blobs, TarSink(out))
    with pytest.raises(Corrupt):
        open_export(io.BytesIO(out.getvalue()))


def test_a_member_that_no_tar_can_hold_is_refused_with_another_way() -> None:
    with pytest.raises(LogError, match="--to"):
        header("events.jsonl", 8 * 1024**3)


# --- what is read ---


async def test_a_pipe_a_buffer_and_a_folder_read_as_the_file_does(tar: Path, folder: Path) -> None:
    with open_export(tar) as found:
        wanted = (found.manifest, [e.payload for e in found.events()])
        content = {b.sha256: found.blob(b) for b in found.manifest.blobs if b.included}
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb") as out:
            out.write(tar.read_bytes())

    writer = threading.Thread(target=write)
    writer.start()
    with open(reading, "rb") as pipe:
        for source in (pipe, io.BytesIO(tar.read_bytes()), folder):
            with open_export(source) as found:
                assert (found.manifest, list(found.lines())) == wanted
                assert {b.sha256: found.blob(b) for b in found.manifest.blobs if b.included} == content
    writer.join()


async def test_every_flipped_byte_and_every_cut_is_detected(tmp_path: Path, tar: Path) -> None:
    data = tar.read_bytes()
    rng = random.Random(1)
    for _ in range(300):
        at = rng.randrange(len(data))
        assert detected(data[:at]), f"cut at {at}"
        flipped = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        assert detected(flipped), f"flipped at {at}: {data[at : at + 1]!r}"
    assert detected(data + b"\0")
    assert not detected(data)


async def test_a_flip_of_any_byte_of_a_header_a_signed_manifest_or_a_padding_is_detected(
    tmp_path: Path, blobs: FileBlobs
) -> None:
    """A tar has room for bytes that no other reader looks at."""
    signer: Signer = KeyFile(key_pair(tmp_path, "a")[0])
    path = await export_file(tmp_path / "r.tar", await log_of(await sample.sample(blobs)), blobs, signer=signer)
    data = path.read_bytes()
    manifest = int(data[124:135], 8)
    for at in range(512 + manifest + padding(manifest) + 512):
        assert detected(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]), at


async def test_a_changed_reward_names_exactly_that_event(folder: Path) -> None:
    def edit(lines: list[bytes]) -> list[bytes]:
        return [line.replace(b'"reward":1.0', b'"reward":0.0') for line in lines]

    found = edited(folder, edit)
    assert [(seq, subject) for seq, subject, _ in found] == [(4, "bascule.sample.traj.g00-dev-0000-n0.scored")]
    assert "event 4 is not the one" in found[0][2]


async def test_a_dropped_last_event_says_that_the_anchor_is_ahead(folder: Path) -> None:
    found = edited(folder, lambda lines: lines[:-1])
    assert "the manifest's anchor is ahead: it covers 9 events, the log ends at 8" in found[0][2]


async def test_an_added_event_says_that_the_log_goes_on(folder: Path) -> None:
    found = edited(folder, lambda lines: [*lines, lines[-1]])
    assert "it covers 9 events, the log ends at 10" in found[-1][2]


async def test_a_rewritten_chain_does_not_hide_a_rewritten_log(folder: Path) -> None:
    from bascule.runtime.log.chain import START, link

    path = folder / "events.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"reward":1.0', b'"reward":0.0'))
    head, heads = START, []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        head = link(head, number, json.loads(line)["subject"], line)
        heads.append(head.hex() + "\n")
    (folder / "chain.txt").write_text("".join(heads))
    assert [what for _, _, what in faults(folder)] == ["the manifest's head is not the last of chain.txt"]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda ls: [*ls[:2], b"garbage\n", *ls[3:]], "line 3 of events.jsonl"),
        (lambda ls: [*ls[:2], b'{"subject": "' + b"\xff" * 9 + b'"}\n', *ls[3:]], "line 3 of events.jsonl"),
        (lambda ls: [b"[" * 100_000 + b"\n", *ls[1:]], "line 1 of events.jsonl"),
        (lambda ls: [b'{"subject":"bascule.sample.traj.*.logged"}\n', *ls[1:]], "'bascule.sample.traj.*.logged'"),
        (lambda ls: [b'{"subject":"bascule.other.run.run.end"}\n', *ls[1:]], "'bascule.other.run.run.end'"),
        (lambda ls: [b"x" * (512 * 1024 + 1) + b"\n", *ls[1:]], "Line 1 of events.jsonl is longer than 524288 bytes"),
        (lambda ls: [*ls[:-1], ls[-1][:-1]], "Line 9 of events.jsonl is cut off"),
        (lambda ls: [ls[1], ls[0], *ls[2:]], "event 1 is not the one that chain.txt covers"),
        (lambda ls: [], "the log ends at 0"),
    ],
)
async def test_damaged_events_are_faults_that_name_their_line(folder: Path, edit: Edit, says: str) -> None:
    assert any(says in what for _, _, what in edited(folder, edit))
    with open_export(folder) as found, pytest.raises((Corrupt, SchemaError)):
        list(found.events())


@pytest.mark.parametrize("name", ["manifest.json", "events.jsonl", "chain.txt", "blobs"])
async def test_a_missing_member_is_named(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "away")
    with pytest.raises(Corrupt, match=name):
        open_export(folder)


async def test_a_folder_with_a_link_or_with_more_than_its_manifest_names_is_refused(folder: Path) -> None:
    (folder / "extra").write_text("")
    with pytest.raises(Corrupt, match="extra"):
        open_export(folder)
    (folder / "extra").unlink()
    (folder / "chain.txt").rename(folder.parent / "chain.txt")
    (folder / "chain.txt").symlink_to(folder.parent / "chain.txt")
    with pytest.raises(Corrupt, match="not a plain file"):
        open_export(folder)
    (folder / "chain.txt").unlink()
    (folder.parent / "chain.txt").rename(folder / "chain.txt")
    (folder / "blobs").rename(folder.parent / "elsewhere")
    (folder / "blobs").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(Corrupt, match="not a folder"):
        open_export(folder)


def _member(name: str, data: bytes = b"", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(padding(len(data)))


@pytest.mark.parametrize(
    ("hostile", "says"),
    [
        (_member("/etc/passwd", b"x"), "/etc/passwd"),
        (_member("../../up", b"x"), "../../up"),
        (_member("events.jsonl", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not a plain file"),
        (_member("events.jsonl", type=tarfile.LNKTYPE, linkname="manifest.json"), "not a plain file"),
        (_member("events.jsonl", type=tarfile.CHRTYPE), "not a plain file"),
        (_member("manifest.json", b"{}"), "manifest.json"),
        (_member("blobs/" + "0" * 64, b"x"), "blobs/"),
        (_member("events.jsonl", b"x"), "not as bascule writes it"),
        (header("events.jsonl", 8 * 1024**3 - 1), "at most"),
        (b"\1" * 512, "damaged"),
        (bytes(1024), "has no events.jsonl"),
        (b"", "ends where events.jsonl should begin"),
    ],
)
async def test_a_tar_with_anything_else_in_place_of_a_member_is_refused(tar: Path, hostile: bytes, says: str) -> None:
    data = tar.read_bytes()
    size = int(data[124:135], 8)
    rest = b"" if hostile[:512] == bytes(512) or not hostile else data[512 + size + padding(size) :]
    with pytest.raises(Corrupt, match=says):
        open_export(io.BytesIO(data[: 512 + size + padding(size)] + hostile + rest))


async def test_a_member_after_the_last_is_refused(tar: Path) -> None:
    data = tar.read_bytes()
    with pytest.raises(Corrupt, match="more"):
        open_export(io.BytesIO(data[: -len(END)] + _member("more", b"x") + END))


async def test_a_blob_of_another_size_or_content_is_refused(folder: Path) -> None:
    blob = next((folder / "blobs").iterdir())
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [what for _, _, what in faults(folder)] == [
        f"blobs/{blob.name} does not match its hash. Get the export again."
    ]
    blob.write_bytes(data + b"x")
    with pytest.raises(Corrupt, match="at most"):
        open_export(folder)
    blob.write_bytes(data[:-1])
    with pytest.raises(Corrupt, match="the manifest says"):
        open_export(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m | {"decision_hash": "0" * 40}, "decision hash"),
        (lambda m: m | {"bytes": m["bytes"] + 1}, "takes"),
        (lambda m: m | {"events": 10}, "anchor is ahead"),
        (lambda m: m | {"blobs": [b for b in m["blobs"] if not b.get("erased")]}, "is not in the manifest"),
        (lambda m: m | {"blobs": [b | ({"size": 1} if b.get("erased") else {}) for b in m["blobs"]]}, "1 bytes by"),
        (lambda m: m | {"blobs": [*m["blobs"], {"sha256": "f" * 64, "size": 1, "omitted": True}]}, "no event names"),
    ],
)
async def test_a_manifest_that_says_otherwise_than_the_events_is_a_fault(
    folder: Path, change: Callable[[dict[str, object]], dict[str, object]], says: str
) -> None:
    path = folder / "manifest.json"
    path.write_bytes(msgspec.json.encode(change(json.loads(path.read_text()))) + b"\n")
    assert any(says in what for _, _, what in faults(folder))


async def test_a_manifest_of_another_format_says_so(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"bascule-export/1", b"bascule-export/2"))
    with pytest.raises(SchemaError, match="bascule-export/2"):
        open_export(folder)
    path.write_bytes(path.read_bytes().replace(b"bascule-export/2", b"bascule-export/1").replace(b":", b": "))
    with pytest.raises(Corrupt, match="not as bascule writes it"):
        open_export(folder)


# --- signatures ---


async def test_a_signature_is_checked_against_the_trusted_key(
    tmp_path: Path, blobs: FileBlobs, tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine, public), (_, other) = key_pair(tmp_path, "a"), key_pair(tmp_path, "b")
    log = await log_of(await sample.sample(blobs))
    signed = await export_file(tmp_path / "a.tar", log, blobs, signer=KeyFile(mine))
    again = await export_file(tmp_path / "b.tar", log, blobs, signer=KeyFile(mine))
    assert signed.read_bytes() == again.read_bytes()
    assert faults(signed) == []
    monkeypatch.setenv("BASCULE_VERIFY_KEY", str(public))
    assert faults(signed) == []
    assert ["not signed" in what for _, _, what in faults(tar)] == [True]
    monkeypatch.setenv("BASCULE_VERIFY_KEY", str(other))
    assert ["another key" in what for _, _, what in faults(signed)] == [True]
    monkeypatch.setenv("BASCULE_VERIFY_KEY", str(mine))
    with pytest.raises(ConfigError, match="no ed25519 public key"):
        faults(signed)


async def test_a_key_without_a_signature_does_not_make_a_manifest_signed(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key_pair(tmp_path, "a")
    path = folder / "manifest.json"
    manifest = msgspec.structs.replace(parse_manifest(path.read_bytes()), public_key=KeyFile(private).public_key)
    path.write_bytes(encode_manifest(manifest))
    assert ["signature" in what for _, _, what in faults(folder)] == [True]
    monkeypatch.setenv("BASCULE_VERIFY_KEY", str(public))
    assert ["not signed" in what for _, _, what in faults(folder)] == [True]


async def test_a_signed_manifest_cannot_be_changed(tmp_path: Path, blobs: FileBlobs) -> None:
    log = await log_of(await sample.sample(blobs))
    signer = KeyFile(key_pair(tmp_path, "a")[0])
    await write_export(
        sample.RUN, lambda: log.read("bascule.sample.>"), blobs, FolderSink(tmp_path / "f"), signer=signer
    )
    path = tmp_path / "f" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"erased":true', b'"omitted":true'))
    assert any("signature" in what for _, _, what in faults(tmp_path / "f"))
