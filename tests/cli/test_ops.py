"""Setting up a server of one's own: what is written, what is refused, and that a command gets in with it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bascule.runtime.cli.app import app
from bascule.runtime.cli.store import open_store
from bascule.runtime.log.access import Access, read_credentials, remote_access
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.permissions import ADMIN, CLI, READER, USERS
from bascule.runtime.log.server import EmbeddedServer, find_binary
from bascule.schemas.errors import BasculeError, ConfigError, LogError, NotPermitted


def invoke(*args: str) -> Any:
    """The JSON that a command prints; what it raises."""
    done = CliRunner().invoke(app, [*args, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def serving(config: str) -> Iterator[None]:
    with subprocess.Popen([find_binary(), "-c", config, "-l", "/dev/null"]) as process:
        try:
            yield
        finally:
            process.kill()


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["nkeys", "password"])
def test_the_servers_file_holds_no_secret_and_both_are_for_their_owner_only(tmp_path: Path, auth: str) -> None:
    made = invoke("ops", "nats-config", "--out", str(tmp_path / "new"), "--auth", auth)
    conf, credentials = Path(made["config"]), read_credentials(Path(made["credentials"]))
    assert set(credentials) == set(USERS)
    secrets = [c.password or c.nkey_seed or "" for c in credentials.values()]
    assert all(len(secret) >= 32 for secret in secrets)
    assert len(set(secrets)) == len(USERS)
    assert not any(secret in conf.read_text() for secret in secrets)
    assert {p.stat().st_mode & 0o777 for p in (conf, Path(made["credentials"]))} == {0o600}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert "sync_interval: always" in conf.read_text()


def test_nothing_is_overwritten_and_credentials_in_use_stay_in_use(tmp_path: Path) -> None:
    made = invoke("ops", "nats-config", "--out", str(tmp_path))
    conf, file = Path(made["config"]), Path(made["credentials"])
    before, credentials = conf.read_text(), file.read_bytes()
    with pytest.raises(ConfigError, match=r"nats\.conf already"):
        invoke("ops", "nats-config", "--out", str(tmp_path))
    assert conf.read_text() == before
    conf.rename(tmp_path / "old.conf")
    invoke("ops", "nats-config", "--out", str(tmp_path))
    assert file.read_bytes() == credentials
    assert conf.read_text() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen", "4222"], "is not HOST:PORT"),
        (["--listen", "localhost:99999"], "is not HOST:PORT"),
        (["--tls-cert", "cert.pem"], "belong together"),
        (["--tls-ca", "ca.pem"], "belong together"),
        (["--tls-cert", "cert.pem", "--tls-key", "key.pem"], "no file cert.pem"),
    ],
)
def test_options_that_make_no_server_are_refused_before_anything_is_written(
    tmp_path: Path, options: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        invoke("ops", "nats-config", "--out", str(tmp_path / "new"), *options)
    assert not (tmp_path / "new").exists()


def test_what_to_do_next_is_said(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["ops", "nats-config", "--out", str(tmp_path), "--listen", "0.0.0.0:4222"])
    for part in ("nats-server -c", "bascule ops init --url nats://0.0.0.0:4222", "bascule serve SERVICE", "--tls-cert"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{ half", "holds no credentials"),
        ('{"somebody": {"password": "p"}}', "wrong for the user 'somebody'"),
        ('{"cli": {}}', "wrong for the user 'cli'"),
        ('{"cli": {"password": "secret", "nkey_seed": "secret"}}', "wrong for the user 'cli'"),
        ('{"cli": {"pasword": "secret"}}', "holds no credentials"),
    ],
)
def test_a_credentials_file_that_is_none_is_named_without_its_secrets(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=words) as e:
        read_credentials(tmp_path / "c.json")
    assert "secret" not in str(e.value)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'none.json'} cannot be read")):
        read_credentials(tmp_path / "none.json")


async def test_a_seed_that_is_none_is_said_to_be_none_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="nkey_seed of the user rollout is not one") as e:
        await NatsLog.connect("nats://127.0.0.1:1", user="rollout", nkey_seed="SUsecret")
    assert "SUsecret" not in str(e.value)


# --- getting in ------------------------------------------------------------------------------------------------------


async def test_the_users_of_a_url_stand_for_all_and_a_file_for_each(tmp_path: Path) -> None:
    one = remote_access("nats://me:p%40ss@host", None)
    assert (one.url, one.user, one.password, one.credentials) == ("nats://host:4222", "me", "p@ss", None)
    (tmp_path / "c.json").write_text('{"reader": {"password": "p"}}')
    each = remote_access("tls://host:1", tmp_path / "c.json")
    assert (each.url, each.has(READER), each.has(CLI)) == ("tls://host:1", True, False)
    with pytest.raises(NotPermitted, match=r"c\.json has no credentials of the user 'cli'"):
        await each.connect(CLI)
    for odd in ("http://host", "nats://host:abc", "nats://u:s3cret#x@host:1", "u:s3cret@host:1", "nats://[::1:1"):
        with pytest.raises(LogError, match="not the address of a NATS server") as caught:
            remote_access(odd, None)
        assert "s3cret" not in str(caught.value)


async def test_a_store_writes_as_whom_the_event_belongs_to_and_connects_nobody_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[str] = []
    connect = Access.connect

    async def noted(access: Access, user: str, **options: Any) -> NatsLog:
        connected.append(user)
        return await connect(access, user, **options)

    monkeypatch.setattr(Access, "connect", noted)
    async with open_store(tmp_path) as store:
        assert set(store.writers) == set(USERS)
        assert store.writers[CLI] is store.log
        assert store.admin() is store.writers[ADMIN]
        assert connected == [ADMIN, CLI]  # the admin made the streams
        assert await store.writers["rollout"].head("bascule.>") == 0
        assert await store.writers["rollout"].head("bascule.>") == 0
        assert connected == [ADMIN, CLI, "rollout"]


async def test_with_a_readers_credentials_one_can_read_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedServer.start(tmp_path / "home")
    try:
        await (await NatsLog.connect(server.url, user=server.user, password=server.password)).close()
        file = tmp_path / "c.json"
        file.write_text(json.dumps({READER: {"password": server.connection.passwords[READER]}}))
        monkeypatch.setenv("BASCULE_CREDENTIALS", str(file))
        async with open_store(tmp_path / "other", url=server.url) as store:
            assert [run async for run in store.runs()] == []
            with pytest.raises(NotPermitted, match="no credentials of the user 'admin'"):
                await store.admin().append([])
    finally:
        server.stop()


async def test_a_server_without_users_serves_all_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BASCULE_CREDENTIALS", raising=False)
    address = free_address()
    (tmp_path / "n.conf").write_text(f'listen: "{address}"\njetstream {{ store_dir: {json.dumps(str(tmp_path))} }}\n')
    with serving(str(tmp_path / "n.conf")):
        async with open_store(tmp_path / "home", url=f"nats://{address}") as store:
            assert store.writers == {}
            assert store.admin() is store.log


def test_a_service_without_a_server_is_told_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=f"No server runs on {tmp_path}. Start `bascule broker`"):
        CliRunner().invoke(app, ["serve", "rollout", "--home", str(tmp_path)], catch_exceptions=False)


# --- TLS -------------------------------------------------------------------------------------------------------------


def authority(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Paths of an authority's certificate, and of a certificate for 127.0.0.1 that it signed, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def signed(subject: str, key: Any, issuer: str, by: Any, *, ca: bool) -> x509.Certificate:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        now = datetime.now(UTC)
        made = x509.CertificateBuilder(
            issuer_name=named(issuer),
            subject_name=named(subject),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - timedelta(days=1),
            not_valid_after=now + timedelta(days=1),
        ).add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if not ca:
            names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
            made = made.add_extension(names, critical=False)
        return made.sign(by, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    paths = (folder / f"{name}-ca.pem", folder / f"{name}.pem", folder / f"{name}.key")
    pem = serialization.Encoding.PEM
    paths[0].write_bytes(signed(name, ca_key, name, ca_key, ca=True).public_bytes(pem))
    paths[1].write_bytes(signed("server", key, name, ca_key, ca=False).public_bytes(pem))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths[2].write_bytes(key.private_bytes(pem, *plain))
    return paths


def test_a_server_with_tls_is_used_if_its_authority_is_trusted_and_else_said_not_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca, cert, key = authority(tmp_path, "ours")
    stranger, _, _ = authority(tmp_path, "stranger")
    files = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-ca", str(ca))
    made = invoke("ops", "nats-config", "--out", str(tmp_path / "out"), "--listen", free_address(), *files)
    assert made["url"].startswith("tls://")
    init = ("ops", "init", "--url", made["url"], "--credentials", made["credentials"], "--max-bytes", "1000000")
    with serving(made["config"]):
        monkeypatch.setenv("BASCULE_TLS_CA", str(ca))
        assert invoke(*init)["streams"] == ["BASCULE", "BASCULE_DLQ", "OBJ_bascule-blobs"]
        for wrong, words in (
            (str(stranger), "is not trusted: .*BASCULE_TLS_CA"),
            ("", "is not trusted: .*BASCULE_TLS_CA"),
            (str(tmp_path / "none.pem"), r"none\.pem holds no certificates"),
            (str(key), "holds no certificates"),
        ):
            monkeypatch.setenv("BASCULE_TLS_CA", wrong)
            with pytest.raises(BasculeError, match=words):
                invoke(*init)
