"""Damage of a real store: nothing is lost by looking at it, no run vanishes, and what is missing is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from bascule.runtime.audit.verify import verify
from bascule.runtime.cli.store import open_store
from bascule.runtime.log.anchor import Anchor, Head
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.chain import Chain
from bascule.runtime.log.guard import find_missing
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.protocol import Extent, Raw
from bascule.schemas import subjects
from bascule.schemas.errors import Corrupt, NotFound
from bascule.schemas.events import LogCheckpointed
from tests.runtime.sample import new_event, sample

RUNS = ("one", "two")
COPY = "nats-before-recovery"
FIRST, MIDDLE, LAST = (
    subject.removeprefix("bascule.one.")
    for subject in (
        subjects.run_started("one"),
        subjects.lever_chosen("one", 1),
        subjects.log_checkpointed("one", 9),
    )
)


@pytest.fixture
async def home(tmp_path: Path) -> Path:
    """A home with two anchored runs, closed; ``crashed`` beside it is the same while the server was still there."""
    home = tmp_path / "home"
    async with open_store(home) as store:
        heads = {}
        for run in RUNS:
            events = await sample(FileBlobs(home / "blobs" / run), run=run)
            chain = Chain()
            for event in events:
                chain.add((await store.admin().append([event]))[0])
            noted = LogCheckpointed(count=chain.count, head=chain.head.hex())
            event = new_event("verifier", subjects.log_checkpointed(run, chain.count), noted)
            chain.add((await store.admin().append([event]))[0])
            heads[run] = Head(count=chain.count, seq=chain.seq, head=chain.head.hex())
        store.anchor.append((await store.log.extent()).log, heads)
        shutil.copytree(home, tmp_path / "crashed")
    return home


@pytest.fixture
def crashed(home: Path) -> Path:
    return home.with_name("crashed")


def block(home: Path) -> Path:
    (found,) = home.glob("nats/jetstream/**/streams/BASCULE/msgs/1.blk")
    return found


def flip(home: Path, run: str, event: str) -> bytes:
    """Flip a bit in the payload of a stored event; the block as it is then."""
    data = bytearray(block(home).read_bytes())
    subject = data.index(f"bascule.{run}.{event}".encode())
    data[data.index(b'"time":"20', subject) + 9] ^= 1
    block(home).write_bytes(data)
    return bytes(data)


async def sequence(home: Path, run: str, event: str) -> int:
    async with open_store(home) as store:
        return await store.log.head(f"bascule.{run}.{event}")


def bascule(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("BASCULE_")} | {"BASCULE_HOME": str(home)}
    command = [sys.executable, "-m", "bascule.runtime.cli", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


# --- what the server's own recovery would destroy --------------------------------------------------------------------


async def test_what_the_servers_recovery_cuts_off_is_kept(crashed: Path) -> None:
    damaged = flip(crashed, "one", MIDDLE)
    for _ in range(2):
        with pytest.raises(Corrupt, match=rf"before the server started on them are in {crashed / COPY}\."):
            async with open_store(crashed):
                pass
        assert len(block(crashed).read_bytes()) < len(damaged), "nats-server no longer cuts: the copy has no purpose"
        assert (crashed / COPY / "BASCULE" / "msgs" / "1.blk").read_bytes() == damaged


async def test_without_an_index_a_damaged_first_event_takes_nothing_along(home: Path) -> None:
    (index,) = home.glob("nats/jetstream/**/streams/BASCULE/msgs/index.db")
    index.unlink()
    damaged = flip(home, "one", FIRST)
    with pytest.raises(Corrupt, match=COPY):
        async with open_store(home):
            pass
    assert (home / COPY / "BASCULE" / "msgs" / "1.blk").read_bytes() == damaged


async def test_verify_keeps_the_copy_and_says_where_it_is_also_once_the_damage_is_accepted(crashed: Path) -> None:
    flip(crashed, "one", MIDDLE)
    found = bascule(crashed, "verify", "two")
    assert found.returncode == 2
    assert str(crashed / COPY) in found.stdout
    for run in RUNS:
        assert bascule(crashed, "verify", run, "--accept", "the disk died").returncode == 0
    async with open_store(crashed):
        pass
    assert (crashed / COPY).is_dir()


async def test_a_whole_log_needs_no_copy_after_a_crash(crashed: Path) -> None:
    (crashed / f"{COPY}.tmp").mkdir()  # another crash, while it was copied
    async with open_store(crashed) as store:
        assert [run async for run in store.runs()] == list(RUNS)
        assert not [*crashed.glob(f"{COPY}*")]


async def test_where_there_was_no_space_for_a_copy_that_is_said(crashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 100, 0))
    flip(crashed, "one", MIDDLE)
    with pytest.raises(Corrupt, match="not copied before the server started on them: the disk has too little space"):
        async with open_store(crashed):
            pass
    assert not [*crashed.glob(f"{COPY}*")]


# --- a run whose start is damaged ------------------------------------------------------------------------------------


async def test_a_run_whose_start_is_damaged_does_not_vanish(home: Path) -> None:
    flip(home, "one", FIRST)
    async with open_store(home) as store:
        with pytest.raises(Corrupt, match=r"does not give out: one\. In the store sequence 1 is missing"):
            _ = [run async for run in store.runs()]
        assert await store.events("two"), "another run is read as before"
    for command in (["status"], ["status", "one"], ["blobs", "gc", "--dry-run"]):
        done = bascule(home, *command)
        assert (done.returncode, done.stdout) == (2, ""), (command, done.stderr)
        assert "sequence 1 is missing" in done.stderr


@pytest.mark.parametrize("options", [{"writes": True}, {"exclusive": True}], ids=str)
async def test_nothing_is_written_to_a_log_that_lost_the_start_of_a_run(home: Path, options: dict[str, bool]) -> None:
    flip(home, "one", FIRST)
    with pytest.raises(Corrupt, match="does not give out: one"):
        async with open_store(home, **options):
            pass


async def test_a_run_that_was_accepted_without_its_start_is_no_obstacle(home: Path) -> None:
    flip(home, "one", FIRST)
    assert bascule(home, "verify", "one", "--accept", "its start is lost").returncode == 0
    async with open_store(home, writes=True) as store:
        assert [run async for run in store.runs()] == ["two"]


# --- where the damage is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [MIDDLE, LAST])
async def test_what_is_missing_is_named_by_every_command_with_the_exit_code_of_damage(home: Path, event: str) -> None:
    seq = await sequence(home, "one", event)
    flip(home, "one", event)
    for command in (["replay", "one"], ["status", "one"], ["fold", "one"], ["explain", "one", "1"], ["log", "one"]):
        done = bascule(home, *command)
        assert done.returncode == 2, (command, done.stderr)
        assert f"In the store sequence {seq} is missing." in done.stderr, command
    async with open_store(home) as store:
        found = await verify("one", store.log, store.blobs("one"), store.anchor)
    assert f"in the store sequence {seq} is missing" in [f.what for f in found.faults]


async def test_a_run_of_which_only_the_last_event_is_damaged_is_not_called_empty(home: Path) -> None:
    seq = await sequence(home, "two", LAST)
    flip(home, "two", LAST)
    (home / "anchor.jsonl").unlink()
    async with open_store(home) as store:
        with pytest.raises(Corrupt, match=f"sequence {seq} is missing"):
            await store.events("two")


async def failing(home: Path) -> None:
    """Fail over the events of a run as nobody foresaw."""
    async with open_store(home) as store:
        await store.events("one")
        raise KeyError("what a fold needs")


async def test_a_failure_over_an_unanchored_gap_is_blamed_on_the_gap(home: Path) -> None:
    seq = await sequence(home, "one", MIDDLE)
    flip(home, "one", MIDDLE)
    (home / "anchor.jsonl").unlink()
    with pytest.raises(Corrupt, match=f"sequence {seq} is missing"):
        await failing(home)


async def test_a_failure_over_a_whole_log_stays_what_it_is(home: Path) -> None:
    with pytest.raises(NotFound, match="Runs: one, two"):
        async with open_store(home) as store:
            _ = await store.events("three")
    with pytest.raises(KeyError):
        await failing(home)


class Sparse(MemoryLog):
    """A log that says that it ends at 2**60 and gives out three events."""

    async def read_raw(self, filter: str) -> AsyncGenerator[Raw, None]:  # noqa: A002
        for seq in (2, 3, 9):
            yield Raw(seq, "bascule.r.a.b.c", b"")

    async def extent(self) -> Extent:
        return Extent(log="", first=2, last=2**60, messages=3)


async def test_of_many_missing_sequences_five_are_named_and_the_rest_counted() -> None:
    missing = await find_missing(Sparse())
    assert str(missing) == f"sequences 1, 4, 5, 6, 7 and {2**60 - 3 - 5} others are missing"


# --- without an anchor -----------------------------------------------------------------------------------------------


async def test_an_anchor_that_was_removed_is_missed(home: Path) -> None:
    assert "there is no anchor, although" not in bascule(home, "verify", "one").stdout
    (home / "anchor.jsonl").unlink()
    found = bascule(home, "verify", "one")
    assert "there is no anchor, although the log holds 1 checkpoints" in found.stdout
    assert Anchor(home / "anchor.jsonl").read().n == 0, "looking makes none"
