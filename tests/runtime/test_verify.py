"""Verification: each kind of damage is found, named once, and does not hide what comes after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from bascule.runtime.audit.verify import Checker, Fault, Verification, accept, verify
from bascule.runtime.cli.launch import producer
from bascule.runtime.cli.store import Store, open_store
from bascule.runtime.log.anchor import Anchor, Head
from bascule.runtime.log.blobs import OCTETS, FileBlobs, ref_of
from bascule.runtime.log.chain import START, Chain, link
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.protocol import Extent, NewEvent, Raw
from bascule.runtime.notary import Notary
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.schemas import subjects
from bascule.schemas.codec import decode, encode
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import Corrupt, NotFound
from bascule.schemas.events import AdapterCheckpointed, AdapterPublished, BlobErased, BlobRef, Data, LogCheckpointed
from bascule.schemas.landscape import Measured

RUN = "small"
Make = Callable[[MemoryLog], View]
PATTERN = f"bascule.{RUN}.>"


class OpenLog(MemoryLog):
    """A log that gives out whatever is put into it."""

    def __init__(self, raws: list[Raw]) -> None:
        super().__init__()
        self.raws = raws

    async def read_raw(self, filter: str):  # type: ignore[no-untyped-def]  # noqa: A002
        for raw in self.raws:
            yield raw

    async def extent(self) -> Extent:
        last = self.raws[-1].seq if self.raws else 0
        return Extent(log="memory", first=1, last=last, messages=last)


@pytest.fixture
async def raws(make_view: Make, started_log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> list[Raw]:
    """A finished run with a checkpoint every 30 events."""
    monkeypatch.setattr(Notary.__init__, "__kwdefaults__", {"every": 30, "seconds": 3600.0})
    await serve(make_view(started_log), list(SERVICES.values()))
    found = [r async for r in started_log.read_raw(PATTERN)]
    assert sum("checkpointed" in r.subject for r in found) > 3
    return found


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "blobs")


@pytest.fixture
def anchor(tmp_path: Path) -> Anchor:
    return Anchor(tmp_path / "anchor.jsonl")


def head_of(raws: list[Raw]) -> Head:
    head = START
    for count, raw in enumerate(raws, 1):
        head = link(head, count, raw.subject, raw.payload)
    return Head(count=len(raws), seq=raws[-1].seq, head=head.hex())


async def found_in(raws: list[Raw], blobs: FileBlobs, anchor: Anchor) -> Verification:
    return await verify(RUN, OpenLog(raws), blobs, anchor)


def checked(raws: list[Raw]) -> list[Fault]:
    checker = Checker(RUN)
    return [f for n, raw in enumerate(raws, 1) for f in checker.add(n, *raw)] + checker.finish()


def event_raw(seq: int, subject: str, data: Data, service: str = "verifier", cause: str | None = None) -> Raw:
    draft = Draft(subject=subject, step=0, data=data, cause=cause)
    return Raw(seq, subject, encode(draft, run=RUN, producer=producer(service), time="2026-01-01T00:00:00Z", root=None))


# --- a run as it is --------------------------------------------------------------------------------------------------


async def test_an_intact_run_has_no_faults_and_says_how_far_it_is_verified(
    raws: list[Raw], blobs: FileBlobs, anchor: Anchor
) -> None:
    anchor.append("memory", {RUN: head_of(raws[:50])})
    found = await found_in(raws, blobs, anchor)
    assert found.faults == ()
    assert (found.events, found.anchored, found.unanchored) == (len(raws), 50, len(raws) - 50)
    assert found.checkpoints == sum("checkpointed" in r.subject for r in raws)
    assert found.head == head_of(raws).head


async def test_without_an_anchor_nothing_counts_as_anchored(raws: list[Raw], blobs: FileBlobs, anchor: Anchor) -> None:
    found = await found_in(raws, blobs, anchor)
    assert (found.anchored, found.anchor_time, found.faults) == (0, None, ())


async def test_an_unknown_run_is_not_intact_but_unknown(blobs: FileBlobs, anchor: Anchor) -> None:
    with pytest.raises(NotFound, match="no run 'small'"):
        await found_in([], blobs, anchor)


# --- the chain -------------------------------------------------------------------------------------------------------


def changed(raws: list[Raw], at: int) -> list[Raw]:
    """The run with another time in one event: still a good event."""
    raw = raws[at]
    payload = raw.payload.replace(b'"time":"20', b'"time":"19')
    assert payload != raw.payload
    return [*raws[:at], raw._replace(payload=payload), *raws[at + 1 :]]


def spot(raws: list[Raw], at: int) -> tuple[int, int]:
    """Between which counts the checkpoints show a change of event ``at`` (from 0)."""
    covers = [0] + [int(r.subject.split("-")[1].split(".")[0]) for r in raws if "checkpointed" in r.subject]
    return max(c for c in covers if c <= at) + 1, min(c for c in covers if c > at)


@pytest.mark.parametrize("at", [0, 40, 100])
async def test_a_changed_event_is_placed_between_two_checkpoints(raws: list[Raw], at: int) -> None:
    (fault,) = checked(changed(raws, at))
    low, high = spot(raws, at)
    assert f"events {low} to {high} " in fault.what
    assert "checkpointed" in fault.subject


async def test_an_event_taken_out_or_put_in_is_found(raws: list[Raw]) -> None:
    low, high = spot(raws, 50)
    for damaged in ([*raws[:50], *raws[51:]], [*raws[:50], event_raw(0, "bascule.small.x.y.z", NOTE), *raws[50:]]):
        numbered = [raw._replace(seq=seq) for seq, raw in enumerate(damaged, 1)]
        assert any(f"events {low} to {high} " in f.what for f in checked(numbered))


NOTE = BlobErased(sha256="0" * 64, reason="test")


async def test_the_anchor_finds_a_change_that_also_covers_its_checkpoints(
    raws: list[Raw], blobs: FileBlobs, anchor: Anchor
) -> None:
    """Somebody who can write the whole log anew writes its checkpoints anew as well."""
    anchor.append("memory", {RUN: head_of(raws[:30])})
    anchor.append("memory", {RUN: head_of(raws[:60])})
    forged: list[Raw] = []
    for raw in changed(raws, 40):
        payload = raw.payload
        if "checkpointed" in raw.subject:
            count = int(raw.subject.split("-")[1].split(".")[0])
            old = msgspec.json.decode(payload)["data"]["head"]
            payload = payload.replace(old.encode(), head_of(forged[:count]).head.encode())
        forged.append(raw._replace(payload=payload))
    assert checked(forged) == []
    found = await found_in(forged, blobs, anchor)
    (fault,) = found.faults
    assert f"to 60 (after sequence {raws[spot(raws, 40)[0] - 2].seq}, up to {raws[59].seq})" in fault.what
    assert found.anchored == 30


async def test_a_missing_end_is_named_with_its_sequence(raws: list[Raw], blobs: FileBlobs, anchor: Anchor) -> None:
    anchor.append("memory", {RUN: head_of(raws)})
    found = await found_in(raws[:-3], blobs, anchor)
    n = len(raws)
    assert any(
        f"gives out {n - 3} events of the run (up to sequence {n - 3}); its anchor knows {n} events, up to sequence {n}"
        in f.what
        for f in found.faults
    )


async def test_a_sequence_that_goes_back_is_found(raws: list[Raw]) -> None:
    swapped = [*raws[:3], raws[4], raws[3], *raws[5:]]
    assert "sequence 4 does not follow 5" in [f.what for f in checked(swapped)]


async def test_a_checkpoint_cannot_speak_of_what_comes_after_it(raws: list[Raw]) -> None:
    early = event_raw(11, subjects.log_checkpointed(RUN, 500), LogCheckpointed(count=500, head="0" * 64))
    (fault,) = checked([*raws[:10], early])
    assert fault.seq == 11


# --- single events ---------------------------------------------------------------------------------------------------


async def test_an_undecodable_event_is_one_fault_and_the_rest_is_verified(raws: list[Raw]) -> None:
    for payload in (b"\xff", b"{}", b"[" * 100_000, raws[5].payload.replace(b'"data":{', b'"data":7,"x":{')):
        damaged = [*raws[:5], raws[5]._replace(payload=payload), *raws[6:20], raws[1]._replace(seq=99)]
        first, second = checked(damaged)
        assert (first.seq, first.subject) == (6, raws[5].subject)
        assert "identity was there" in second.what


async def test_causes_identities_runs_and_writers_are_checked(raws: list[Raw]) -> None:
    seq = 11
    erased = f"bascule.{RUN}.blob.{'0' * 64}.erased"
    cause = subjects.event_id("bascule.small.no.such.event")
    for raw, what in (
        (raws[2]._replace(seq=seq), "its identity was there before"),
        (event_raw(seq, erased, NOTE, "cli", cause), f"its cause {cause} is not in the log"),
        (event_raw(seq, erased, NOTE, "cli", "no identity"), "its cause no identity is not in the log"),
        (event_raw(seq, erased, NOTE, "rollout"), "'rollout' may not write it"),
    ):
        (fault,) = checked([*raws[:10], raw])
        assert what in fault.what
    (fault,) = Checker("other").add(1, *raws[0])
    assert "belongs to the run small" in fault.what


async def test_types_from_the_future_are_counted_not_faulted(raws: list[Raw], blobs: FileBlobs, anchor: Anchor) -> None:
    erased = event_raw(len(raws) + 1, f"bascule.{RUN}.blob.{'0' * 64}.erased", NOTE, "cli")
    later = erased._replace(payload=erased.payload.replace(b"bascule.blob.erased", b"bascule.blob.frozen"))
    found = await found_in([*raws, later], blobs, anchor)
    assert found.faults == ()
    assert found.unknown == {"bascule.blob.frozen": 1}


# --- blobs -----------------------------------------------------------------------------------------------------------


def published(seq: int, ref: BlobRef) -> Raw:
    data = AdapterPublished(
        generation=1, adapter="a", files={"f": ref}, sha256="0" * 64, parent_adapter=None, iterations=1
    )
    return event_raw(seq, subjects.train_outcome(RUN, 1), data, "trainer")


async def test_blobs_must_be_there_and_match_unless_they_were_erased(
    raws: list[Raw], blobs: FileBlobs, anchor: Anchor
) -> None:
    ref = await blobs.put(b"weights")
    log = [*raws, published(len(raws) + 1, ref)]
    found = await found_in(log, blobs, anchor)
    assert (found.blobs, found.erased, found.faults) == (1, 0, ())
    blobs.path(ref.sha256).write_bytes(b"weightz")
    (fault,) = (await found_in(log, blobs, anchor)).faults
    assert "does not match its hash" in fault.what
    await blobs.erase(ref.sha256)
    (fault,) = (await found_in(log, blobs, anchor)).faults
    assert fault.subject == log[-1].subject
    note = BlobErased(sha256=ref.sha256, reason="asked")
    log.append(event_raw(len(log) + 1, subjects.blob_erased(RUN, ref.sha256), note, "cli"))
    found = await found_in(log, blobs, anchor)
    assert (found.blobs, found.erased, found.faults) == (0, 1, ())


def checkpointed(seq: int, iteration: int, ref: BlobRef) -> Raw:
    data = AdapterCheckpointed(
        generation=1, iteration=iteration, attempt=1, adapter=f"g01-i{iteration:03d}", files={"f": ref},
        sha256="0" * 64, state=ref, data_digest="", metrics={}, measured=Measured(),
    )  # fmt: skip
    return event_raw(seq, subjects.adapter_checkpointed(RUN, 1, iteration), data, "trainer")


async def test_of_an_open_job_the_newest_checkpoint_has_to_be_there(
    raws: list[Raw], blobs: FileBlobs, anchor: Anchor
) -> None:
    n, older, newest = len(raws), ref_of(b"older", OCTETS), await blobs.put(b"newest")
    log = [*raws, checkpointed(n + 1, 0, older), checkpointed(n + 2, 1, newest)]
    found = await found_in(log, blobs, anchor)
    assert (found.blobs, found.faults) == (1, ())
    await blobs.discard(newest)
    (fault,) = (await found_in(log, blobs, anchor)).faults
    assert (fault.subject, newest.sha256 in fault.what) == (log[-1].subject, True)
    published_elsewhere = published(n + 3, await blobs.put(b"another"))
    assert (await found_in([*log, published_elsewhere], blobs, anchor)).faults == ()


async def test_a_checkpoint_that_is_superseded_meanwhile_is_not_missed(
    raws: list[Raw], blobs: FileBlobs, anchor: Anchor
) -> None:
    n, older, newest = len(raws), ref_of(b"older", OCTETS), await blobs.put(b"newest")
    later = checkpointed(n + 2, 1, newest)

    class GoingOn(OpenLog):
        async def read(self, filter: str, *, after: int = 0) -> AsyncIterator[Recorded]:  # type: ignore[override]  # noqa: A002
            assert after == n + 1
            yield decode(*later)

    found = await verify(RUN, GoingOn([*raws, checkpointed(n + 1, 0, older)]), blobs, anchor)
    assert found.faults == ()


async def test_a_blob_that_many_events_name_is_read_once(raws: list[Raw], blobs: FileBlobs, anchor: Anchor) -> None:
    reads: list[str] = []

    class Counting(FileBlobs):
        async def get(self, ref: BlobRef) -> bytes:
            reads.append(ref.sha256)
            return await super().get(ref)

    n, ref = len(raws), await blobs.put(b"weights")
    log = [*raws, checkpointed(n + 1, 0, ref), published(n + 2, ref)]
    found = await found_in(log, Counting(blobs.root), anchor)
    assert (found.blobs, reads) == (1, [ref.sha256])


# --- the real store --------------------------------------------------------------------------------------------------


async def fill(home: Path, raws: list[Raw], *, anchored: bool) -> None:
    async with open_store(home) as store:
        there = await store.log.head(PATTERN)
        for raw in raws[there:]:
            await store.admin().append([NewEvent(subject=raw.subject, payload=raw.payload)])
        if anchored:
            store.anchor.append((await store.log.extent()).log, {RUN: head_of(raws)})


@pytest.fixture
async def home(tmp_path: Path, raws: list[Raw]) -> Path:
    """A home with the run, and in ``nats.old`` its store as it was after 40 events."""
    home = tmp_path / "home"
    await fill(home, raws[:40], anchored=False)
    shutil.copytree(home / "nats", home / "nats.old")
    await fill(home, raws, anchored=True)
    return home


def damage(home: Path, needle: bytes) -> None:
    """Flip a bit in the stored event that holds ``needle``."""
    (block,) = (b for b in home.glob("nats/jetstream/**/streams/BASCULE/msgs/*.blk") if needle in b.read_bytes())
    data = bytearray(block.read_bytes())
    data[data.index(needle)] ^= 1
    block.write_bytes(data)


def roll_back(home: Path) -> None:
    shutil.rmtree(home / "nats")
    (home / "nats.old").rename(home / "nats")


async def verification(home: Path) -> tuple[Verification, Store]:
    async with open_store(home, guarded=False) as store:
        return await verify(RUN, store.log, store.blobs(RUN), store.anchor), store


def bascule(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"BASCULE_HOME": str(home)}
    command = [sys.executable, "-m", "bascule.runtime.cli", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


async def test_a_store_gives_the_same_verdict_as_the_memory(home: Path, raws: list[Raw]) -> None:
    found, _ = await verification(home)
    assert (found.faults, found.events, found.anchored, found.head) == ((), len(raws), len(raws), head_of(raws).head)


async def test_a_flipped_bit_in_the_store_is_found_and_placed(home: Path, raws: list[Raw]) -> None:
    damage(home, raws[50].payload[:200])
    found, _ = await verification(home)
    low, high = spot(raws, 50)
    assert any(f"events {low} to {high} " in f.what for f in found.faults)
    async with open_store(home) as store:
        with pytest.raises(Corrupt, match=f"gives out {len(raws) - 1} events .* In the store sequence 51 is missing"):
            await store.events(RUN)


async def test_a_bit_flipped_in_the_last_event_is_found(home: Path, raws: list[Raw]) -> None:
    damage(home, raws[-1].payload[:200])
    found, _ = await verification(home)
    n = len(raws)
    assert any(f"counts {n} events under {PATTERN} and gives out only {n - 1}" in f.what for f in found.faults)
    assert any(f"gives out {n - 1} events " in f.what for f in found.faults)


async def test_a_truncated_store_is_refused_at_start_up_with_the_sequence(home: Path, raws: list[Raw]) -> None:
    roll_back(home)
    with pytest.raises(Corrupt, match=f"ends at sequence 40, but its anchor .* up to sequence {len(raws)} "):
        async with open_store(home):
            pass
    result = bascule(home, "resume", RUN)
    assert result.returncode == 2
    assert "ends at sequence 40" in result.stderr


async def test_a_store_made_anew_is_refused(home: Path) -> None:
    shutil.rmtree(home / "nats")
    with pytest.raises(Corrupt, match="belongs to the log"):
        async with open_store(home):
            pass


async def test_an_edited_anchor_is_refused_at_start_up(home: Path) -> None:
    path = home / "anchor.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"count":', b'"count":1'))
    with pytest.raises(Corrupt, match=r"anchor\.jsonl is not intact at line 1"):
        async with open_store(home):
            pass
    found, _ = await verification(home)
    assert [f.what[:10] for f in found.faults] == ["The anchor"]


async def test_damage_can_be_accepted_and_the_reason_is_kept(home: Path, raws: list[Raw]) -> None:
    roll_back(home)
    refused = bascule(home, "verify", RUN, "--json")
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["faults"]
    assert bascule(home, "verify", RUN, "--accept", "the disk died").returncode == 0
    shown = bascule(home, "verify", RUN)
    assert shown.returncode == 0, shown.stdout
    assert "the disk died" in shown.stdout
    assert "verified through event 40" in shown.stdout
    async with open_store(home) as store:
        assert len(await store.events(RUN)) == 40
    assert bascule(home, "verify", RUN, "--accept", "again").returncode == 3, "an intact run needs no acceptance"


async def test_after_an_acceptance_the_run_is_held_to_what_it_was_then(
    home: Path, raws: list[Raw], blobs: FileBlobs
) -> None:
    damage(home, raws[50].payload[:200])
    async with open_store(home, guarded=False) as store:
        found = await verify(RUN, store.log, blobs, store.anchor)
        await accept(found, store.log, store.anchor, "one event is lost")
        again = await verify(RUN, store.log, blobs, store.anchor)
        assert not any("chain's" in f.what or ("gives out" in f.what and "its anchor" in f.what) for f in again.faults)
        assert len(await store.events(RUN)) == len(raws) - 1
        assert store.anchor.read().heads[RUN] == Head(count=found.events, seq=found.seq, head=found.head)


async def test_a_chain_of_recorded_events_is_the_chain_of_their_bytes(raws: list[Raw], home: Path) -> None:
    chain = Chain()
    async with open_store(home) as store:
        events: list[Recorded] = await store.events(RUN)
    for event in events:
        chain.add(event)
    assert chain.head.hex() == head_of(raws).head
