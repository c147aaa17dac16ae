"""TLS: where it is asked for, nothing goes out in plain text."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bascule.runtime.log.access import embedded_access, remote_access
from bascule.runtime.log.link import Link
from bascule.runtime.log.login import Credential
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.permissions import ADMIN
from bascule.runtime.log.server import EmbeddedServer, find_binary
from bascule.schemas.errors import LogError, LogUnavailable

SECRET = Credential(password="the-secret")


class Plain:
    """A server that offers no TLS, and what it was sent on the connections that have ended."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id": "plain", "version": "2.12.0", "auth_required": true, "headers": true}\r\n')
        self.heard.put_nowait(await reader.read())
        writer.close()


@asynccontextmanager
async def plain(port: int = 0) -> AsyncIterator[Plain]:
    found = Plain(port)
    async with await asyncio.start_server(found.serve, "127.0.0.1", port) as server:
        found.port = server.sockets[0].getsockname()[1]
        yield found


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    cert, key = (tmp_path_factory.mktemp("tls") / name for name in ("cert.pem", "key.pem"))
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    about = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", *kind, *about, "-out", cert, "-keyout", key]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.mark.parametrize(("scheme", "with_ca"), [("tls", False), ("tls", True), ("nats", True)])
async def test_a_server_without_tls_is_refused_by_its_address_and_sent_nothing(
    certificate: tuple[Path, Path], scheme: str, with_ca: bool
) -> None:
    async with asyncio.timeout(20), plain() as server:
        url = f"{scheme}://127.0.0.1:{server.port}"
        with pytest.raises(LogError, match=f"The server at {url} offers no TLS"):
            await NatsLog.connect(url, user="rollout", password=SECRET.password, ca=certificate[0] if with_ca else None)
        assert await server.heard.get() == b""


async def test_a_server_that_comes_back_without_tls_is_sent_nothing(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    cert, key = (json.dumps(str(path)) for path in certificate)
    (tmp_path / "server.conf").write_text(
        f'listen: "127.0.0.1:-1"\ntls {{ cert_file: {cert}, key_file: {key} }}\n'
        f"authorization {{ user: rollout, password: {SECRET.password} }}"
    )
    argv = [find_binary(), "-c", str(tmp_path / "server.conf"), "--ports_file_dir", str(tmp_path), "-l", "/dev/null"]
    link = Link(deadline=10.0)
    with subprocess.Popen(argv) as process:
        try:
            while not (ports := [p for p in tmp_path.glob("*.ports") if p.read_text().endswith("}")]):
                assert process.poll() is None
            port = int(json.loads(ports[0].read_text())["nats"][0].rsplit(":", 1)[1])
            url = f"tls://127.0.0.1:{port}"
            await link.connect(url, user="rollout", credential=SECRET, ca=certificate[0], name="test")
        finally:
            process.kill()
    async with asyncio.timeout(20), plain(port) as server:
        assert await server.heard.get() == b""
        link.deadline = 0.3
        with pytest.raises(LogUnavailable, match="the server offers no TLS"):
            await link.ask("Looking", "INFO", {})
    await link.close()


async def test_an_authority_for_other_servers_does_not_keep_one_from_the_embedded_one(
    tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASCULE_TLS_CA", str(certificate[0]))
    server = EmbeddedServer.start(tmp_path)
    try:
        await (await embedded_access(server.connection).connect(ADMIN)).close()
        with pytest.raises(LogError, match=f"{server.url} offers no TLS"):
            await remote_access(server.url, None).connect(ADMIN)
    finally:
        server.stop()
