"""An import: all of it or nothing, the same run afterwards, and never over another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.runtime.blob_care import BlobReferences
from bascule.runtime.cli import launch, serving
from bascule.runtime.cli.store import Store
from bascule.runtime.exports import importing
from bascule.runtime.exports.importing import append_all, import_export, unfinished
from bascule.runtime.exports.reader import Export, open_export
from bascule.runtime.log.blobs import OCTETS, FileBlobs, ref_of
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.protocol import Fence, NewEvent
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import ConfigError, Corrupt, Erased, LogUnavailable
from tests.runtime import sample
from tests.runtime.sample import export_file, log_of, new_event

Open = Callable[[], Export]


@pytest.fixture
def mine(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "mine")


@pytest.fixture
def theirs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "theirs")


@pytest.fixture
async def tar(tmp_path: Path, mine: FileBlobs) -> Path:
    return await export_file(tmp_path / "run.tar", await log_of(await sample.sample(mine), before=2), mine)


async def events_of(log: MemoryLog) -> list[NewEvent]:
    return [NewEvent(subject=e.subject, payload=e.payload) async for e in log.read("bascule.sample.>")]


async def test_an_imported_run_is_exported_again_to_the_same_bytes(
    tmp_path: Path, tar: Path, theirs: FileBlobs
) -> None:
    log = await log_of([new_event("cli", subjects.run_paused("another", 0), ev.RunPaused(reason=""))])
    with open_export(tar) as found:
        done = await import_export(found, log, theirs, home=theirs.root.parent)
        assert (done.events, done.added, done.blobs) == (9, 9, 2)
        refs = BlobReferences()
        for event in found.events():
            refs.apply(event)
    assert (await export_file(tmp_path / "again.tar", log, theirs)).read_bytes() == tar.read_bytes()
    contents = {await theirs.get(refs.referenced[sha256].ref) for sha256 in refs.retained}
    assert contents == {sample.TRAJECTORY, sample.ADAPTER}


async def test_a_run_with_an_open_training_job_is_exported_again_to_the_same_bytes_and_can_go_on(
    tmp_path: Path, mine: FileBlobs, theirs: FileBlobs
) -> None:
    source = await log_of(sample.with_open_job(await sample.sample(mine)))
    await mine.put(sample.GONE)  # a checkpoint that is not discarded yet
    first, log = await export_file(tmp_path / "run.tar", source, mine), MemoryLog()
    with open_export(first) as found:
        await import_export(found, log, theirs, home=tmp_path)
    assert (await export_file(tmp_path / "again.tar", log, theirs)).read_bytes() == first.read_bytes()
    assert await theirs.get(ref_of(sample.NEWEST, OCTETS)) == sample.NEWEST


async def test_a_blob_of_an_event_of_an_unknown_type_goes_along(
    tmp_path: Path, mine: FileBlobs, theirs: FileBlobs
) -> None:
    events = await sample.sample(mine)
    payload = events[1].payload.replace(b"bascule.trajectory.logged", b"bascule.trajectory.painted")
    events[1] = NewEvent(subject=events[1].subject, payload=payload)
    first, log = await export_file(tmp_path / "run.tar", await log_of(events), mine), MemoryLog()
    with open_export(first) as found:
        await import_export(found, log, theirs, home=tmp_path)
    assert (await export_file(tmp_path / "again.tar", log, theirs)).read_bytes() == first.read_bytes()
    assert await theirs.get(ref_of(sample.TRAJECTORY, "")) == sample.TRAJECTORY


class CutShort(MemoryLog):
    """A log that fails after so many appends."""

    def __init__(self, appends: int) -> None:
        super().__init__()
        self.left = appends

    async def append(self, events: Sequence[NewEvent], *, fence: Fence | None = None) -> list[Recorded]:
        if not self.left:
            raise LogUnavailable("The connection is lost.")
        self.left -= 1
        return await super().append(events, fence=fence)


class Told(Exception):
    """Something was said."""


@pytest.mark.parametrize("appends", range(4))
async def test_no_service_touches_a_run_that_is_there_only_in_part(
    tar: Path, tmp_path: Path, theirs: FileBlobs, monkeypatch: pytest.MonkeyPatch, appends: int
) -> None:
    monkeypatch.setattr(importing, "MAX_BATCH", 2)
    log = CutShort(appends)
    store = Store(tmp_path, log, owner=True, writers={})
    with open_export(tar) as found, pytest.raises(LogUnavailable):
        await import_export(found, log, theirs, home=tmp_path)
    assert unfinished(tmp_path, sample.RUN)
    refused = pytest.raises(ConfigError, match=r"import of sample.*cut short.*Import it again")
    with refused:
        await launch.work(store, sample.RUN, [])
    if appends:
        with refused:
            await launch.end(store, sample.RUN, cancel=True, reason="")
        told: list[str] = []

        def say(text: str) -> None:
            told.append(text)
            raise Told

        with pytest.RaisesGroup(Told):
            await serving.serve_forever(store, serving.service_named("meta"), None, say)
        assert told == ["sample: it is not whole yet. Looking again in 1 s."]
    log.left = 9
    with open_export(tar) as found:
        await import_export(found, log, theirs, home=tmp_path)
    assert not unfinished(tmp_path, sample.RUN)
    assert launch.view_of(store, sample.RUN)


async def test_a_run_is_marked_as_written_in_part_before_its_first_event(tmp_path: Path, mine: FileBlobs) -> None:
    """So also a what-if, which is written in the same way."""
    seen: list[bool] = []

    class Looking(MemoryLog):
        async def append(self, events: Sequence[NewEvent], *, fence: Fence | None = None) -> list[Recorded]:
            seen.append(unfinished(tmp_path, sample.RUN))
            return await super().append(events, fence=fence)

    await append_all(Looking(), await sample.sample(mine), home=tmp_path, run=sample.RUN)
    assert (seen, unfinished(tmp_path, sample.RUN)) == ([True], False)


async def test_a_run_that_is_whole_is_left_to_its_services_when_it_is_imported_again(
    tar: Path, tmp_path: Path, theirs: FileBlobs, mine: FileBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await log_of(await sample.sample(mine))
    monkeypatch.setattr(importing, "durable_write", None)
    with open_export(tar) as found:
        assert (await import_export(found, log, theirs, home=tmp_path)).added == 0
    assert not unfinished(tmp_path, sample.RUN)


async def test_a_run_whose_last_event_came_in_before_the_cut_is_whole_after_the_next_import(
    tar: Path, tmp_path: Path, theirs: FileBlobs
) -> None:
    class Stopped(MemoryLog):
        async def append(self, events: Sequence[NewEvent], *, fence: Fence | None = None) -> list[Recorded]:
            await super().append(events, fence=fence)
            raise LogUnavailable("The acknowledgement is lost.")

    log = Stopped()
    for refused in (pytest.raises(LogUnavailable), nullcontext()):
        with open_export(tar) as found, refused:
            await import_export(found, log, theirs, home=tmp_path)
        assert unfinished(tmp_path, sample.RUN) == (not isinstance(refused, nullcontext))


async def test_a_refused_import_leaves_the_run_of_that_name_to_its_services(
    tar: Path, tmp_path: Path, theirs: FileBlobs
) -> None:
    log = await log_of(await sample.sample(FileBlobs(tmp_path / "others"), reward=0.0))
    with open_export(tar) as found, pytest.raises(ConfigError):
        await import_export(found, log, theirs, home=tmp_path)
    assert not unfinished(tmp_path, sample.RUN)


async def test_what_was_erased_stays_so_after_an_import(tar: Path, theirs: FileBlobs) -> None:
    with open_export(tar) as found:
        await import_export(found, MemoryLog(), theirs, home=theirs.root.parent)
    with pytest.raises(Erased):
        await theirs.put(sample.ERASED)


@pytest.mark.parametrize("there", range(10))
async def test_an_import_that_was_cut_short_is_finished_by_doing_it_again(
    tar: Path, theirs: FileBlobs, mine: FileBlobs, there: int
) -> None:
    events = await sample.sample(mine)
    log = await log_of(events[:there]) if there else MemoryLog()
    with open_export(tar) as found:
        assert (await import_export(found, log, theirs, home=theirs.root.parent)).added == 9 - there
    assert await events_of(log) == events


async def test_another_run_of_that_name_stays_as_it_is(tar: Path, theirs: FileBlobs) -> None:
    other = await sample.sample(FileBlobs(theirs.root.parent / "others"), reward=0.0)
    log = await log_of(other[:6])
    with open_export(tar) as found, pytest.raises(ConfigError, match=r"from event 4 on: bascule\.sample\.traj"):
        await import_export(found, log, theirs, home=theirs.root.parent)
    assert await events_of(log) == other[:6]
    assert not theirs.root.exists()


async def test_a_run_that_goes_on_after_the_export_stays_as_it_is(
    tar: Path, theirs: FileBlobs, mine: FileBlobs
) -> None:
    more = new_event("cli", subjects.run_paused(sample.RUN, 0), ev.RunPaused(reason=""))
    log = await log_of([*await sample.sample(mine), more])
    with open_export(tar) as found, pytest.raises(ConfigError, match=r"after event 9.*pause-000"):
        await import_export(found, log, theirs, home=theirs.root.parent)
    assert not theirs.root.exists()


async def test_an_export_that_is_not_intact_writes_nothing(tar: Path, theirs: FileBlobs) -> None:
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b'"reward":1.0', b'"reward":0.0'))
    log = MemoryLog()
    with open_export(tar) as found, pytest.raises(Corrupt, match=r"g00-dev-0000-n0\.scored: event 4"):
        await import_export(found, log, theirs, home=theirs.root.parent)
    assert await events_of(log) == []
    assert not theirs.root.exists()


async def test_an_export_without_its_blobs_is_refused(tmp_path: Path, mine: FileBlobs, theirs: FileBlobs) -> None:
    log = await log_of(await sample.sample(mine))
    path = await export_file(tmp_path / "small.tar", log, mine, with_blobs=False)
    with open_export(path) as found, pytest.raises(ConfigError, match="leaves out 2 blobs"):
        await import_export(found, MemoryLog(), theirs, home=theirs.root.parent)


async def test_blobs_are_there_before_the_first_event_is(tar: Path, theirs: FileBlobs) -> None:
    class Refusing(MemoryLog):
        async def append(self, events: object, **_: object) -> list[object]:  # type: ignore[override]
            assert len(await theirs.list()) == 2
            raise Corrupt("stop here")

    with open_export(tar) as found, pytest.raises(Corrupt, match="stop here"):
        await import_export(found, Refusing(), theirs, home=theirs.root.parent)


@given(st.lists(st.integers(1, 40), max_size=60))
def test_batches_hold_every_event_once_in_order_and_within_the_limits(sizes: list[int]) -> None:
    events = [NewEvent(subject="", payload=b"x" * size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing, "BATCH_BYTES", 50)
        patch.setattr(importing, "MAX_BATCH", 5)
        found = [[len(e.payload) for e in batch] for batch in importing.batches(events)]
    assert [size for batch in found for size in batch] == sizes
    assert all(len(batch) <= 5 and sum(batch) <= 50 for batch in found)


# --- as processes ---

COMMAND = [sys.executable, "-m", "bascule.runtime.cli"]


def environment(home: Path) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("BASCULE_")} | {"BASCULE_HOME": str(home)}


def bascule(home: Path, *args: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *args], env=environment(home), input=stdin, capture_output=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two runs of the same task, ``one`` and ``two``."""
    folder = tmp_path_factory.mktemp("transfer") / "home"
    small = ("--engine", "constant", "--set", 'engine.params.text="7"', "--levers", "harness", "--max-gen", "1")
    sizes = ("dev_examples=4", "sealed_examples=4", "train_groups=2", "train_samples=1")
    options = [part for size in sizes for part in ("--set", f"evaluation.{size}")]
    for run in ("one", "two"):
        done = bascule(folder, "run", "--run-id", run, *small, *options)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_run_goes_through_a_pipe_into_another_home_and_is_the_same_there(home: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    writing = subprocess.Popen([*COMMAND, "export", "two"], env=environment(home), stdout=subprocess.PIPE)
    reading = subprocess.run(
        [*COMMAND, "import", "-", "--json"],
        env=environment(there),
        stdin=writing.stdout,
        capture_output=True,
        check=False,
    )
    assert writing.stdout is not None
    writing.stdout.close()
    assert (writing.wait(), reading.returncode) == (0, 0), reading.stderr
    first = bascule(home, "export", "two").stdout
    assert bascule(there, "export", "two").stdout == first
    same = bascule(home, "diff", "two", "two", "--other-home", str(there))
    assert (same.returncode, same.stdout.startswith(b"equal: ")) == (0, True)
    assert bascule(there, "verify", "two").returncode == 0
    hashes = {json.loads(bascule(h, "fold", "two", "--json").stdout)["hash"] for h in (home, there)}
    hashes.add(json.loads(bascule(home, "fold", "-", "--json", stdin=first).stdout)["hash"])
    assert len(hashes) == 1, "a state holds nothing of the store that it was folded from"
    again = bascule(there, "import", "-", stdin=first)
    assert (again.returncode, b"0 of them new" in again.stdout) == (0, True)


def test_two_runs_with_equal_answers_have_the_same_decisions(home: Path) -> None:
    done = bascule(home, "diff", "one", "two", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["equal"], found["decisions_differ"], found["outcomes_differ"]) == (0, False, 0, 0)
    assert found["measured_differ"] > 0


def test_a_fold_tells_what_was_decided_and_what_is_open(home: Path) -> None:
    text = bascule(home, "fold", "one", "--step", "1").stdout.decode()
    assert "decision.g01.lever" in text
    for part in ("generation 0: start", "promoted", "best: generation 0", "open evaluations: none", "state "):
        assert part in text


def test_a_cut_off_import_is_not_intact_and_leaves_no_run(home: Path, tmp_path: Path) -> None:
    data = bascule(home, "export", "one").stdout
    cut = bascule(tmp_path / "there", "import", "-", stdin=data[:-1])
    assert (cut.returncode, b"cut off" in cut.stderr, b"Traceback" in cut.stderr) == (2, True, False)
    assert json.loads(bascule(tmp_path / "there", "status", "--json").stdout) == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["export", "nope", "-o", "{tmp}/x.tar"], "no run 'nope'"),
        (["export", "one", "-o", "{tmp}"], "is a folder"),
        (["export", "one", "-o", "{tmp}/no/x.tar"], "cannot be written"),
        (["export", "one", "--to", "{tmp}"], "is there already"),
        (["export", "one", "-o", "a", "--to", "b"], "not both"),
        (["import", "{tmp}/nope.tar"], "cannot be read"),
        (["diff", "one", "nope"], "no run 'nope'"),
        (["fold", "one", "--at", "100000"], "Give a count from 1 to"),
        (["fold", "one", "--step", "7"], "Steps with a choice: 1"),
        (["fold", "one", "--step", "1", "--at", "1"], "not both"),
    ],
)
def test_bad_input_gets_one_clear_paragraph_and_leaves_no_file(
    home: Path, tmp_path: Path, args: list[str], says: str
) -> None:
    done = bascule(home, *(a.replace("{tmp}", str(tmp_path)) for a in args))
    assert done.returncode == 3
    assert says in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_and_a_folder_appear_whole(home: Path, tmp_path: Path) -> None:
    assert bascule(home, "export", "one", "-o", str(tmp_path / "one.tar")).returncode == 0
    assert bascule(home, "export", "one", "--to", str(tmp_path / "one.d")).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.d", "one.tar"]
    assert bascule(home, "diff", str(tmp_path / "one.tar"), str(tmp_path / "one.d")).stdout.startswith(b"equal")
    assert (tmp_path / "one.tar").stat().st_mode & 0o777 == 0o600


def test_an_export_that_nobody_reads_to_its_end_fails(home: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "export", "one"], env=environment(home), stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert done.returncode == 3
    assert b"has gone" in done.stderr
    assert b"Traceback" not in done.stderr


def test_an_export_is_not_written_to_a_terminal(home: Path) -> None:
    leader, follower = os.openpty()
    done = subprocess.run(
        [*COMMAND, "export", "one"], env=environment(home), stdout=follower, stderr=subprocess.PIPE, check=False
    )
    os.close(leader)
    os.close(follower)
    assert done.returncode == 3
    assert b"terminal" in done.stderr
