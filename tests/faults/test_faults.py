"""Nothing acknowledged is lost or doubled under any fault, and the checks that say so would notice."""

from __future__ import annotations

import asyncio
import random
import resource
from contextlib import suppress
from pathlib import Path

import pytest

from bascule.runtime.log import process
from bascule.runtime.log.anchor import Anchor, Head
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.server import EmbeddedServer, attach
from bascule.schemas.codec import decode
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import Corrupt, LogError, SchemaError
from tests.faults.catalog import FAULTS
from tests.faults.corruption import judged, read_part
from tests.faults.damage import Damage, damage, drawn
from tests.faults.fault import Fault, Outcome, Setting
from tests.faults.ledger import Ledger, connected, event, everything, persistent, serving
from tests.faults.network import schedule
from tests.faults.original import EXPORT, HOME, Content, make_original
from tests.faults.proxy import Proxy


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.quick], ids=lambda f: f.name)
async def test_every_promise_is_kept_under(fault: Fault, tmp_path: Path) -> None:
    outcome = await fault.inject(Setting(folder=tmp_path, seed=1, count=fault.quick, say=lambda _: None))
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.kept, outcome


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
async def test_every_promise_is_kept_under_much(fault: Fault, tmp_path: Path) -> None:
    outcome = await fault.inject(Setting(folder=tmp_path, seed=2, count=fault.full, say=print))
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.kept, outcome


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(injected=0),
        Outcome(injected=1, lost=1),
        Outcome(injected=1, duplicated=1),
        Outcome(injected=1, detected=0, silent=1),
        Outcome(injected=1, equal=False),
        Outcome(injected=1, broken=("it hung",)),
    ],
)
def test_a_fault_that_was_not_injected_or_broke_something_fails_its_row(outcome: Outcome) -> None:
    assert not outcome.kept


# --- what the checks notice ------------------------------------------------------------------------------------------


def recorded(seq: int, subject: str, text: str = "because") -> Recorded:
    return decode(seq, subject, event(subject, text).payload)


def test_the_ledger_notices_what_is_lost_changed_doubled_moved_or_missing_in_between() -> None:
    a, b, c = (recorded(i, f"bascule.r.own.i{i}.said") for i in (1, 2, 3))
    ledger = Ledger()
    ledger.note([a, b, c], writer="w")
    assert ledger.audit([a, b, c]) == ledger.audit([a, b, c, recorded(4, "bascule.r.own.i4.said")])
    assert (ledger.audit([a, b, c]).lost, ledger.audit([a, b, c]).duplicated, ledger.audit([a, b, c]).broken) == (
        0,
        0,
        (),
    )
    assert ledger.audit([a, b]).lost == 1
    assert ledger.audit([a, b, recorded(3, c.subject, "other bytes")]).lost == 1
    assert ledger.audit([a, b, c, recorded(4, c.subject)]).duplicated == 1
    assert "contiguous" in ledger.audit([a, c]).broken[0]
    ledger.note([a], writer="w")
    assert "another order" in ledger.audit([a, b, c]).broken[0]


async def test_what_the_proxy_drops_and_repeats_are_acknowledgements(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, connected(server) as log:
        proxy = Proxy(server.port)
        await proxy.start()
        try:
            async with connected(server, port=proxy.port, deadline=0.5) as behind:
                proxy.repeat = 1
                (first,) = await behind.append([event("bascule.r.own.i1.said", "x")])
                proxy.drop = 1
                (second,) = await persistent(behind, [event("bascule.r.own.i2.said", "x")], deadline=0.5)
                assert (proxy.repeat, proxy.drop) == (0, 0)
                assert [(e.seq, e.subject) for e in await everything(log)] == [
                    (r.seq, r.subject) for r in (first, second)
                ]
        finally:
            await proxy.close()


async def test_a_stalled_proxy_answers_nothing_and_goes_on_or_is_cut(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        proxy = Proxy(server.port)
        await proxy.start()
        try:
            async with connected(server, port=proxy.port) as behind:
                proxy.stall(None)
                append = asyncio.create_task(behind.append([event("bascule.r.own.i1.said", "x")]))
                async with connected(server, port=proxy.port) as other:
                    await other.append([event("bascule.r.own.i2.said", "x")])
                assert not append.done()
                proxy.cut()
                assert (await append)[0].subject == "bascule.r.own.i1.said"
        finally:
            await proxy.close()


def test_six_schedules_begin_with_each_kind_of_fault_and_a_seed_gives_them_again() -> None:
    plans = [schedule(n, random.Random(n)) for n in range(6)]
    assert plans == [schedule(n, random.Random(n)) for n in range(6)]
    assert len({plan[0][1] for plan in plans}) == 6


async def test_content_that_differs_without_a_complaint_is_silent_and_the_same_content_harmless(tmp_path: Path) -> None:
    await make_original(tmp_path, random.Random(1))
    for part in (EXPORT, HOME):
        read = await read_part(tmp_path / part)
        assert await judged(tmp_path / part, read) == ("harmless", "")
        seq, subject, payload = read.events[5]
        other = Content((*read.events[:5], (seq, subject, payload + b" "), *read.events[6:]), read.blobs)
        assert (await judged(tmp_path / part, other))[0] == "silent"


def test_a_damage_is_one_bit_or_the_end_of_one_file(tmp_path: Path) -> None:
    file = tmp_path / "1.blk"
    for seed in range(20):
        file.write_bytes(bytes(range(64)))
        done = drawn(1, tmp_path, random.Random(seed))
        assert done == drawn(1, tmp_path, random.Random(seed))
        damage(done, tmp_path)
        left = file.read_bytes()
        if done.kind == "flip":
            assert sum((x ^ y).bit_count() for x, y in zip(left, range(64), strict=True)) == 1
        else:
            assert left == bytes(range(done.at))


def test_a_flipped_bit_in_an_event_is_another_event_or_said_to_be_corrupt() -> None:
    new = event("bascule.r.own.i1.said", "why")
    for bit in range(8 * len(new.payload)):
        flipped = bytearray(new.payload)
        flipped[bit // 8] ^= 1 << bit % 8
        with suppress(Corrupt, SchemaError):
            assert decode(1, new.subject, bytes(flipped)).payload != new.payload


def test_a_flipped_bit_in_an_anchor_is_corrupt_or_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "anchor.jsonl"
    for count in (1, 2):
        Anchor(path).append("log", {"r": Head(count=count, seq=count, head="0" * 64)})
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (7 if place % 2 else place % 7)
        path.write_bytes(flipped)
        with suppress(Corrupt):
            assert Anchor(path).read().n < 2  # the newline at the end is gone


def test_what_a_damaged_file_says_of_a_server_is_no_connection(tmp_path: Path) -> None:
    (tmp_path / "server.json").write_bytes(b'{"url": "\xff"}')
    assert attach(tmp_path) is None


def test_a_server_that_crashed_has_left_no_index(tmp_path: Path) -> None:
    (tmp_path / "1.blk").write_bytes(b"x")
    (tmp_path / "index.db").write_bytes(b"x")
    damage(Damage(group="messages", path="1.blk", kind="flip", at=0, crashed=True), tmp_path)
    assert not (tmp_path / "index.db").exists()


# --- damage that nats-server takes badly -----------------------------------------------------------------------------


async def test_a_server_that_a_damaged_store_makes_allocate_without_end_is_stopped_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [event(f"bascule.r.own.i{i}.said", "x") for i in range(9)]
    async with serving(tmp_path) as server, connected(server) as log:
        for new in said:
            await log.append([new])
    (block,) = (b for b in tmp_path.rglob("*.blk") if said[4].subject.encode() in b.read_bytes())
    stored = bytearray(block.read_bytes())
    # A record begins with its length (4 bytes), its sequence (8), its time (8) and its subject's length (2).
    stored[stored.index(said[4].subject.encode()) - 18 + 5] ^= 1
    block.write_bytes(stored)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(process, "_memory_limit", lambda: (256 * 1024**2, hard))
    with pytest.raises(LogError, match="its store is damaged and it runs out of memory"):
        await asyncio.to_thread(EmbeddedServer.start, tmp_path)


async def test_a_stream_that_the_server_takes_offline_is_refused_at_once_with_the_servers_reason(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as server, connected(server) as log:
        await log.append([event("bascule.r.own.i1.said", "x")])
        await (await log.work("r", "verifier", ["bascule.r.>"])).close()
    (consumer,) = tmp_path.rglob("obs/*/meta.inf")
    consumer.write_bytes(consumer.read_bytes().replace(b"Created", b"Createl"))
    async with serving(tmp_path) as server:
        with pytest.raises(LogError, match='unsupported consumer "r=verifier"'):
            await NatsLog.connect(server.url, user=server.user, password=server.password)
