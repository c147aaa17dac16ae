"""The log: appends, folds from the server and from an export, verification, a restart, and the memory of a fold.

What bascule does is measured in turns with the least that could do it: a bare ``js.publish``, a bare ordered
subscription, a bare decode. The events are those of a synthetic run on the embedded server, which fsyncs each append.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import nats

from bascule.runtime.audit.verify import verify
from bascule.runtime.exports.reader import open_export
from bascule.runtime.exports.writer import FolderSink, write_export
from bascule.runtime.log.anchor import Anchor
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.chain import START, Chain, link
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.server import EmbeddedServer
from bascule.runtime.log.streams import STREAM
from bascule.runtime.state import RunState
from bascule.schemas.envelope import Envelope
from bascule.schemas.events import TYPES
from ops.bench.fold import RUN
from ops.bench.report import Figure, figure
from ops.bench.synthetic import new_events

EVENTS, LONG = 100_000, 1_000_000
SINGLES, BATCH = 200, 50
ROUNDS = 5
PATTERN = f"bascule.{RUN}.>"

Measure = Callable[[], Awaitable[float]]


def run() -> tuple[dict[str, Figure], list[str]]:
    """Measure everything; between two and three minutes."""
    return asyncio.run(_run())


async def _run() -> tuple[dict[str, Figure], list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        figures = await _appends(root / "appends")
        empty, full = await _restarts(root / "empty", 0), await _restarts(root / "home", EVENTS)
        figures |= {"restart": figure(full, "s"), "restart, empty": figure(empty, "s")}
        figures |= await _reads(root / "home", root)
        figures |= await _exports(root / "export")
    memory, notes = _memory()
    return figures | memory, [*_against_limits(figures), *notes]


def _against_limits(figures: dict[str, Figure]) -> list[str]:
    """What was found against what the log has to keep on a machine that does nothing else."""

    def ratio(name: str) -> float:
        return figures[name].ratio or 0.0

    return [
        f"an append takes {1 / ratio('append'):.2f} times a raw awaited publish (at most 1.5)",
        f"a fold with chain from the server: {ratio('fold, server'):.2f} of the bare subscription (at least 0.5)",
        f"from an export: {ratio('fold, export'):.2f} of the bare decode with the hash (at least 0.5)",
        f"{EVENTS:,} events verify in {figures['verify'].value:.1f} s (at most 5)",
        f"a server killed on {EVENTS:,} events is ready again in {figures['restart'].value:.2f} s (at most 1)",
    ]


@asynccontextmanager
async def _opened(home: Path) -> AsyncIterator[tuple[EmbeddedServer, NatsLog]]:
    server = EmbeddedServer.start(home)
    try:
        log = await NatsLog.connect(server.url, user=server.user, password=server.password)
        yield server, log
        await log.close()
    finally:
        server.stop()


async def _bare(server: EmbeddedServer) -> Any:
    return await nats.connect(server.url, user=server.user, password=server.password)


async def _in_turns(*measures: Measure, rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of each, measured one after the other in every round; a round before the first warms up."""
    found = [[await measure() for measure in measures] for _ in range(rounds + 1)]
    return [list(column) for column in zip(*found[1:], strict=True)]


def _rates(name: str, baseline: str, ours: Sequence[float], theirs: Sequence[float], count: int) -> dict[str, Figure]:
    """Events per second of both, and the ratio within the rounds."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return {
        name: figure([count / s for s in ours], "events/s", baseline=baseline, ratio=ratio),
        baseline: figure([count / s for s in theirs], "events/s"),
    }


async def _appends(home: Path) -> dict[str, Figure]:
    """Single appends against bare publishes of the same bytes, one by one in turns; a batch against singles."""
    events = new_events(RUN, EVENTS)
    singles: list[list[float]] = [[], []]
    batches: list[list[float]] = [[], []]
    async with _opened(home) as (server, log):
        client = await _bare(server)
        js = client.jetstream()
        for _ in range(ROUNDS + 1):
            seconds = [0.0, 0.0]
            for new in islice(events, SINGLES):
                start = time.perf_counter()
                await log.append([new])
                middle = time.perf_counter()
                await js.publish(new.subject.replace(RUN, "other"), new.payload)
                end = time.perf_counter()
                seconds = [seconds[0] + middle - start, seconds[1] + end - middle]
            for column, value in zip(singles, seconds, strict=True):
                column.append(value)
            whole, parts = list(islice(events, BATCH)), list(islice(events, BATCH))
            start = time.perf_counter()
            await log.append(whole)
            middle = time.perf_counter()
            for new in parts:
                await log.append([new])
            end = time.perf_counter()
            batches[0].append(middle - start)
            batches[1].append(end - middle)
        await client.close()
    return _rates("append", "js.publish", singles[0][1:], singles[1][1:], SINGLES) | _rates(
        f"batch of {BATCH}", f"{BATCH} appends", batches[0][1:], batches[1][1:], BATCH
    )


async def _restarts(home: Path, events: int) -> list[float]:
    """Seconds from the start of the server until a log on it answers, after the server was killed."""
    pending = new_events(RUN, events)
    seconds = []
    async with _opened(home) as (server, log):
        while batch := list(islice(pending, 1000)):
            await log.append(batch)
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    for _ in range(3):
        start = time.perf_counter()
        async with _opened(home) as (server, log):
            await log.head(PATTERN)
            seconds.append(time.perf_counter() - start)
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
    return seconds


async def _reads(home: Path, root: Path) -> dict[str, Figure]:
    """The fold and the verification of a run on the server against a subscription that only counts; and its export."""
    async with _opened(home) as (server, log):

        async def fold() -> float:
            chain, state = Chain(), RunState(run=RUN)
            start = time.perf_counter()
            async for event in log.read(PATTERN):
                chain.add(event)
                state.apply(event)
            seconds = time.perf_counter() - start
            assert state.events == EVENTS
            return seconds

        async def count() -> float:
            client = await _bare(server)
            seen, done = 0, asyncio.Event()

            async def counting(_: Any) -> None:
                nonlocal seen
                seen += 1
                if seen == EVENTS:
                    done.set()

            start = time.perf_counter()
            await client.jetstream().subscribe(PATTERN, stream=STREAM, ordered_consumer=True, cb=counting)
            await done.wait()
            seconds = time.perf_counter() - start
            await client.close()
            return seconds

        async def verification() -> float:
            start = time.perf_counter()
            found = await verify(RUN, log, FileBlobs(root / "blobs"), Anchor(root / "anchor"))
            seconds = time.perf_counter() - start
            assert found.events == EVENTS
            assert not found.faults
            return seconds

        folded, counted, verified = await _in_turns(fold, count, verification, rounds=3)
        await write_export(RUN, lambda: log.read(PATTERN), FileBlobs(root / "blobs"), FolderSink(root / "export"))
    ratio = statistics.median(b / a for a, b in zip(verified, counted, strict=True))
    return _rates("fold, server", "subscription", folded, counted, EVENTS) | {
        "verify": figure(verified, "s", baseline="subscription", ratio=ratio)
    }


async def _exports(folder: Path) -> dict[str, Figure]:
    """The fold of an export against a decode of its lines, envelope and data, and the hash that chains them."""
    envelope = msgspec.json.Decoder(Envelope)
    decoders = {key: msgspec.json.Decoder(kind) for key, kind in TYPES.items()}
    with open_export(folder) as export:

        async def fold() -> float:
            state = RunState(run=RUN)
            start = time.perf_counter()
            for event in export.events():
                state.apply(event)
            seconds = time.perf_counter() - start
            assert state.events == EVENTS
            return seconds

        async def decode() -> float:
            start, head = time.perf_counter(), START
            with (folder / "events.jsonl").open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    e = envelope.decode(line)
                    decoders[e.type, e.schemaversion].decode(e.data)
                    head = link(head, number, e.subject, line)
            return time.perf_counter() - start

        folded, decoded = await _in_turns(fold, decode)
    return _rates("fold, export", "decode, hash", folded, decoded, EVENTS)


def _memory() -> tuple[dict[str, Figure], list[str]]:
    """The peak of a process that folds a run, over that of a run of a tenth of its length."""
    short, long = (
        json.loads(subprocess.check_output([sys.executable, "-m", "ops.bench.fold", str(n)])) for n in (EVENTS, LONG)
    )
    figures = {
        "peak, long": figure([long["peak"] / 2**20], "MiB", baseline="peak, short", ratio=short["peak"] / long["peak"]),
        "peak, short": figure([short["peak"] / 2**20], "MiB"),
    }
    held = f"{long['state'] / 2**20:.1f} and {short['state'] / 2**20:.1f} MiB"
    return figures, [
        f"Folds, verify and restart (after SIGKILL, to the first answer): {EVENTS} events, 90 MB.",
        f"Peak of a process that folds {LONG} events, and of one that folds {EVENTS}; state, as JSON: {held}.",
    ]
