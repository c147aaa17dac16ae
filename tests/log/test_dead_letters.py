"""Dead letters: once for each failure, asked again, and not to be broken by who writes nonsense there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from bascule.runtime.log.dead_letters import DeadLetter, DeadLetters
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.server import EmbeddedServer

LETTER = DeadLetter(
    run="r", service="rollout", seq=7, subject="bascule.r.episodes.g00-dev-s00.requested", error="KeyError: 'x'",
    trace="ab", version="0", time="2026-01-01T00:00:00",
)  # fmt: skip


async def as_rollout(server: EmbeddedServer) -> NatsLog:
    """Connected as a service; the administrator makes the streams first."""
    await (await NatsLog.connect(server.url, user=server.user, password=server.password)).close()
    return await NatsLog.connect(server.url, user="rollout", password=server.connection.passwords["rollout"])


@pytest.fixture(params=["memory", "nats"])
async def letters(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DeadLetters]:
    if request.param == "memory":
        yield MemoryLog().letters
        return
    server = EmbeddedServer.start(tmp_path)
    log = await as_rollout(server)
    try:
        yield log.letters
    finally:
        await log.close()
        server.stop()


async def test_each_failure_is_one_letter_and_a_retry_ends_it(letters: DeadLetters) -> None:
    await letters.bury(LETTER)
    await letters.bury(msgspec.structs.replace(LETTER, error="the same failure, told again"))
    assert await letters.list("r") == [LETTER]
    await letters.retry(LETTER)
    (asked,) = await letters.list("r", "rollout")
    assert (asked.dead, asked.retries) == (False, 1)
    await letters.bury(msgspec.structs.replace(LETTER, retries=1))
    assert [(found.dead, found.retries) for found in await letters.list()] == [(True, 1)]
    assert await letters.list("other") == []


async def test_nonsense_in_the_stream_hides_no_letter(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path)
    log = await as_rollout(server)
    try:
        forged = msgspec.json.encode(msgspec.structs.replace(LETTER, seq=8))
        for place, payload in (("5.dead-000", b"garbage"), ("6.dead-000", b"\xff"), ("9.dead-000", forged)):
            await log.link.request(f"basculedlq.r.rollout.{place}", payload)
        await log.letters.bury(LETTER)
        assert await log.letters.list("r") == [LETTER]
    finally:
        await log.close()
        server.stop()
