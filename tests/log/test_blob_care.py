"""No blob that an event needs is ever collected, and what none needs is, once it is old enough."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.runtime.blob_care import collect, references, refs_of, standings
from bascule.runtime.log.blobs import FileBlobs
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.codec import decode, encode
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.landscape import Measured

RUN = "r1"
DAY = 24 * 3600.0
WHEN = "2026-01-01T00:00:00.000000Z"


def recorded(seq: int, subject: str, data: ev.Data) -> Recorded:
    producer = Producer(service="test", version="0", hash="0")
    payload = encode(Draft(subject=subject, step=0, data=data), run=RUN, producer=producer, time=WHEN, root=None)
    return decode(seq, subject, payload)


def logged(seq: int, blob: ev.BlobRef | None, trajectory: str = "g00-dev-0000-n0") -> Recorded:
    data = ev.TrajectoryLogged(
        trajectory=trajectory,
        evaluation="g00-dev",
        example="e",
        position=0,
        sample=0,
        answer=None,
        error=None,
        prompt_tokens=0,
        output_tokens=0,
        measured=Measured(),
        blob=blob,
    )
    return recorded(seq, subjects.trajectory_logged(RUN, trajectory), data)


def checkpointed(seq: int, iteration: int, adapter: ev.BlobRef, state: ev.BlobRef, generation: int = 3) -> Recorded:
    data = ev.AdapterCheckpointed(
        generation=generation,
        iteration=iteration,
        attempt=1,
        adapter=f"g03-i{iteration:03d}",
        files={"adapter_model.safetensors": adapter},
        sha256="0" * 64,
        state=state,
        data_digest="",
        metrics={},
        measured=Measured(),
    )
    return recorded(seq, subjects.adapter_checkpointed(RUN, generation, iteration), data)


def published(seq: int, adapter: ev.BlobRef, generation: int = 3) -> Recorded:
    data = ev.AdapterPublished(
        generation=generation,
        adapter="g03-i001",
        files={"adapter_model.safetensors": adapter},
        sha256="0" * 64,
        parent_adapter=None,
        iterations=2,
    )
    return recorded(seq, subjects.train_outcome(RUN, generation), data)


def erased(seq: int, sha256: str) -> Recorded:
    return recorded(seq, subjects.blob_erased(RUN, sha256), ev.BlobErased(sha256=sha256, reason="on request"))


async def stream(events: Sequence[Recorded]) -> AsyncIterator[Recorded]:
    for event in events:
        yield event


def make_old(store: FileBlobs) -> None:
    for path in store.root.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - 2 * DAY,) * 2)


async def gc(store: FileBlobs, events: Sequence[Recorded], **options: Any) -> tuple[str, ...]:
    return (await collect(RUN, store, lambda: stream(events), **options)).swept


async def hashes(store: FileBlobs) -> set[str]:
    return {s.sha256 for s in await store.list()}


@pytest.fixture
def store(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "blobs")


async def test_blobs_of_trajectories_and_published_adapters_are_kept_for_good(store: FileBlobs) -> None:
    body, adapter = await store.put(b"body"), await store.put(b"adapter")
    make_old(store)
    assert await gc(store, [logged(1, body), published(2, adapter)]) == ()
    assert await hashes(store) == {body.sha256, adapter.sha256}


async def test_the_newest_checkpoint_of_an_open_job_survives_and_older_ones_do_not(store: FileBlobs) -> None:
    old, old_state, new, new_state = [await store.put(b) for b in (b"a0", b"s0", b"a1", b"s1")]
    make_old(store)
    events = [checkpointed(1, 0, old, old_state), checkpointed(2, 1, new, new_state)]
    assert set(await gc(store, events)) == {old.sha256, old_state.sha256}
    assert await store.get(new) == b"a1"
    assert await store.get(new_state) == b"s1"


async def test_each_open_job_keeps_its_own_checkpoint(store: FileBlobs) -> None:
    a, b = await store.put(b"a"), await store.put(b"b")
    make_old(store)
    assert await gc(store, [checkpointed(1, 4, a, a, generation=1), checkpointed(2, 0, b, b, generation=2)]) == ()


async def test_of_a_finished_job_the_published_adapter_is_kept_and_its_state_is_not(store: FileBlobs) -> None:
    adapter, state = await store.put(b"adapter"), await store.put(b"state")
    make_old(store)
    assert await gc(store, [checkpointed(1, 1, adapter, state), published(2, adapter)]) == (state.sha256,)
    assert await hashes(store) == {adapter.sha256}


async def test_of_a_failed_job_no_checkpoint_is_kept(store: FileBlobs) -> None:
    state = await store.put(b"state")
    make_old(store)
    failed = recorded(
        2, subjects.train_outcome(RUN, 3), ev.TrainFailed(generation=3, attempt=1, reason="no variance left")
    )
    assert await gc(store, [checkpointed(1, 1, state, state), failed]) == (state.sha256,)


async def test_a_blob_without_an_event_is_garbage_only_after_the_grace_period(store: FileBlobs) -> None:
    ref = await store.put(b"its event is about to be appended")
    assert await gc(store, []) == ()
    assert await store.get(ref)
    make_old(store)
    assert await gc(store, [], dry_run=True) == (ref.sha256,)
    assert await store.get(ref)
    assert await gc(store, []) == (ref.sha256,)
    assert await hashes(store) == set()


async def test_events_are_read_after_the_store_is_listed(store: FileBlobs) -> None:
    """A blob whose event is appended between the two steps is needed, however old its bytes are."""
    ref = await store.put(b"body")
    make_old(store)
    log: list[Recorded] = []
    listing = store.list

    async def listed_then_appended() -> Any:
        found = await listing()
        log.append(logged(1, ref))
        return found

    store.list = listed_then_appended  # type: ignore[method-assign]
    assert await gc(store, log) == ()
    assert await store.get(ref) == b"body"


async def test_what_is_put_again_during_a_collection_survives_it(store: FileBlobs) -> None:
    ref = await store.put(b"body")
    make_old(store)

    async def put_while_read() -> AsyncIterator[Recorded]:
        await store.put(b"body")
        for event in ():
            yield event

    assert (await collect(RUN, store, put_while_read)).swept == ()
    assert await store.get(ref) == b"body"


async def test_a_kill_between_a_blob_and_its_event_leaves_only_what_a_collection_removes(store: FileBlobs) -> None:
    kept = await store.put(b"of an event")
    script = (
        "import asyncio, os, signal, sys\n"
        "from pathlib import Path\n"
        "from bascule.runtime.log.blobs import FileBlobs\n"
        "ref = asyncio.run(FileBlobs(Path(sys.argv[1])).put(b'lost'))\n"
        "print(ref.sha256, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(store.root)], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    half = store.path("ab" * 32).parent / ".abab.0123.tmp"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    events = [logged(1, kept)]
    assert await gc(store, events) == ()
    assert half.exists()
    make_old(store)
    found = await collect(RUN, store, lambda: stream(events))
    assert found.swept == (done.stdout.strip(),)
    assert (found.tidied, found.kept) == (1, 1)
    assert not half.exists()
    assert await hashes(store) == {kept.sha256}


async def test_a_collection_carries_out_an_erasure_that_was_cut_short(store: FileBlobs) -> None:
    ref = await store.put(b"body")
    events = [logged(1, ref), erased(2, ref.sha256)]
    assert (await standings(stream(events), store))[0][0].state == "kept"
    assert (await collect(RUN, store, lambda: stream(events))).erased == (ref.sha256,)
    assert (await standings(stream(events), store))[0][0].state == "erased"


async def test_an_event_of_an_unknown_type_keeps_every_blob_that_it_may_name(store: FileBlobs) -> None:
    ref = await store.put(b"of a newer version")
    make_old(store)
    event = logged(1, ref)
    newer = event.payload.replace(b"bascule.trajectory.logged", b"bascule.trajectory.painted")
    assert await gc(store, [decode(1, event.subject, newer)]) == ()


async def test_what_an_unknown_type_may_name_is_not_missed_where_it_is_not() -> None:
    ref = ev.BlobRef(sha256="c" * 64, size=3, media="text/plain")
    event = logged(1, ref)
    newer = event.payload.replace(b"bascule.trajectory.logged", b"bascule.trajectory.painted")
    found = await references(stream([decode(1, event.subject, newer)]))
    assert (found.retained, found.suspected, found.ref(ref.sha256)) == (set(), {ref.sha256: ref}, ref)


async def test_only_checkpoints_of_open_jobs_may_yet_be_discarded() -> None:
    adapter, state = (ev.BlobRef(sha256=c * 64, size=1) for c in "ab")
    under_way = [logged(1, adapter), checkpointed(2, 0, adapter, state)]
    assert (await references(stream(under_way))).passing == {state.sha256}
    assert (await references(stream([*under_way, published(3, adapter)]))).passing == set()


async def test_what_is_erased_needs_no_blob() -> None:
    ref = ev.BlobRef(sha256="c" * 64, size=1)
    assert (await references(stream([logged(1, ref)]))).retained == {ref.sha256}
    assert (await references(stream([logged(1, ref), erased(2, ref.sha256)]))).retained == set()


async def test_standings_tell_kept_erased_missing_and_discarded(store: FileBlobs) -> None:
    kept, gone, lost, passed = [await store.put(b) for b in (b"kept", b"gone", b"lost", b"passed")]
    unnamed = await store.put(b"unnamed")
    await store.erase(gone.sha256)
    await store.discard(lost)
    await store.discard(passed)
    events = [
        logged(1, kept, "a"),
        logged(2, gone, "b"),
        logged(3, lost, "c"),
        checkpointed(4, 0, passed, passed),
        published(5, kept),
        erased(6, gone.sha256),
    ]
    rows, besides = await standings(stream(events), store)
    assert [(r.sha256, r.state, r.seq) for r in rows] == [
        (kept.sha256, "kept", 1),
        (gone.sha256, "erased", 2),
        (lost.sha256, "missing", 3),
        (passed.sha256, "discarded", 4),
    ]
    assert besides == 1
    assert unnamed.sha256 not in (await references(stream(events))).referenced


def test_no_event_type_names_a_blob_where_nobody_looks() -> None:
    """A new kind of field that holds blobs must not make them garbage."""
    ref = {"$ref": "#/$defs/BlobRef"}
    for kind in ev.TYPES.values():
        schema = msgspec.json.schema(kind)
        others = {name: d for name, d in schema["$defs"].items() if name not in ("BlobRef", kind.__name__)}
        assert ref not in list(_within(others)), f"{kind.__name__} holds a blob inside another struct"
        for name, field in schema["$defs"][kind.__name__]["properties"].items():
            seen = (field, *field.get("anyOf", ()), field.get("additionalProperties"))
            assert (ref in list(_within(field))) == (ref in seen), f"{kind.__name__}.{name} hides a blob"
    assert {r.size for r in refs_of(checkpointed(1, 0, *(ev.BlobRef(sha256="", size=s) for s in (1, 2))).data)} == {
        1,
        2,
    }


def _within(value: Any) -> Any:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _within(inner)
