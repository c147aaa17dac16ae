"""The blob stores under test, and the server of the one that needs one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bascule.runtime.log.link import Link
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.server import EmbeddedServer
from tests.log.blob_kits import BrokerKit, FolderKit, Kit


@pytest.fixture(scope="session")
def blob_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    started = EmbeddedServer.start(tmp_path_factory.mktemp("blobs"))
    yield started
    started.stop()


@pytest.fixture
async def link(blob_server: EmbeddedServer) -> AsyncIterator[Link]:
    log = await NatsLog.connect(blob_server.url, user=blob_server.user, password=blob_server.password)
    yield log.link
    await log.close()


@pytest.fixture(params=["folder", "broker"])
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> Kit:
    if request.param == "folder":
        return FolderKit(tmp_path / "blobs")
    return BrokerKit(request.getfixturevalue("link"))
