"""Telemetry: lines come back in order, a lost one is no error, and the stream forgets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bascule.runtime.log.lazy import LazyLog
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.protocol import EventLog
from bascule.runtime.log.server import EmbeddedServer
from bascule.runtime.log.telemetry import Line, step_subject
from bascule.schemas.errors import ConfigError, LogUnavailable


def line(run: str, iteration: int) -> Line:
    return Line(
        subject=step_subject(run, 1), time="2026-01-01", attempt=1, iteration=iteration, figures={"loss": 1.0 / 3}
    )


@pytest.fixture(params=["memory", "nats", "lazy"])
async def log(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EventLog]:
    if request.param == "memory":
        yield MemoryLog()
        return
    server = EmbeddedServer.start(tmp_path)
    connected = await NatsLog.connect(server.url, user=server.user, password=server.password)

    async def connect() -> EventLog:
        return connected

    try:
        yield connected if request.param == "nats" else LazyLog(connect)
    finally:
        await connected.close()
        server.stop()


async def test_lines_of_a_run_come_back_in_order_and_those_of_others_do_not(log: EventLog) -> None:
    for iteration in range(3):
        await log.telemetry.send(line("r", iteration))
        await log.telemetry.send(line("other", iteration))
    async with asyncio.timeout(20):
        while len(found := [line async for line in log.telemetry.read("r")]) < 3:
            await asyncio.sleep(0)
    assert found == [line("r", i) for i in range(3)]
    assert [found async for found in log.telemetry.read("nobody")] == []
    assert await log.head("bascule.>") == 0


async def test_no_other_run_can_be_read_by_a_pattern(log: EventLog) -> None:
    with pytest.raises(ConfigError):
        _ = [found async for found in log.telemetry.read("*")]


async def test_what_cannot_be_sent_is_lost_without_an_error(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path)
    connected = await NatsLog.connect(server.url, user=server.user, password=server.password)
    await connected.close()
    await connected.telemetry.send(line("r", 0))
    server.stop()

    async def connect() -> EventLog:
        raise LogUnavailable("Nothing answers.")

    await LazyLog(connect).telemetry.send(line("r", 0))


async def test_the_stream_forgets_and_the_log_does_not(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path)
    connected = await NatsLog.connect(server.url, user=server.user, password=server.password)
    try:
        infos = [await connected.link.api(f"STREAM.INFO.{name}", {}) for name in ("BASCULE_TELEMETRY", "BASCULE")]
    finally:
        await connected.close()
        server.stop()
    kept = [info["config"] for info in infos]
    assert [c["discard"] for c in kept] == ["old", "new"]
    assert [c.get("max_age", 0) for c in kept] == [7 * 86400 * 10**9, 0]
    assert kept[0]["max_bytes"] == 64 * 1024**2
