"""Who may write what: by the table, and as real servers enforce it, the embedded one and one with a generated file."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bascule.runtime.cli.app import app
from bascule.runtime.log.access import Access, embedded_access, read_credentials
from bascule.runtime.log.dead_letters import DeadLetter
from bascule.runtime.log.login import Credential
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.object_blobs import ObjectBlobs
from bascule.runtime.log.permissions import ADMIN, APPENDS, CLI, READER, SERVICES, USERS, inbox, may_append
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.log.server import EmbeddedServer, find_binary
from bascule.runtime.log.telemetry import Line
from bascule.schemas import subjects
from bascule.schemas.codec import encode
from bascule.schemas.envelope import Draft, Producer
from bascule.schemas.errors import Erased, LogError, NotPermitted
from bascule.schemas.events import RunPaused
from tests.log.restarts import restart

Open = Callable[[str], Awaitable[NatsLog]]


def examples(run: str) -> dict[str, set[str]]:
    """Every kind of event, and who writes it."""
    return {
        subjects.run_started(run): {"cli"},
        subjects.run_end(run): {"cli", "meta", "feedback"},
        subjects.run_paused(run, 1): {"cli", "feedback"},
        subjects.run_resumed(run, 1): {"cli"},
        subjects.run_forked(run, 1): {"cli"},
        subjects.runtime_changed(run, 1): {"cli"},
        subjects.run_rolled_back(run, 1): {"cli"},
        subjects.ablation_requested(run, "constant"): {"cli"},
        subjects.blob_erased(run, "ab" * 32): {"cli"},
        subjects.harness_outcome(run, 0): {"meta", "feedback"},
        subjects.harness_outcome(run, 1): {"feedback"},
        subjects.candidate_proposed(run, 0): {"meta", "feedback", "trainer"},
        subjects.candidate_proposed(run, 1): {"feedback", "trainer"},
        subjects.candidate_gate(run, 1): {"verifier"},
        subjects.episodes_requested(run, "g01-dev", 0): {"meta", "feedback", "trainer", "verifier"},
        subjects.evaluation_completed(run, "g01-dev"): {"verifier"},
        subjects.trajectory_logged(run, "g01-dev-0001-n0"): {"rollout"},
        subjects.trajectory_scored(run, "g01-dev-0001-n0"): {"verifier"},
        subjects.lever_chosen(run, 1): {"feedback"},
        subjects.call_outcome(run, "g01-author", 1): {"feedback"},
        subjects.train_requested(run, 1): {"feedback"},
        subjects.train_started(run, 1, 1): {"trainer"},
        subjects.adapter_checkpointed(run, 1, 0): {"trainer"},
        subjects.train_outcome(run, 1): {"trainer"},
        subjects.adapter_served(run, "g01-i000"): {"rollout"},
        subjects.sandbox_probed(run, "rollout", "1a2b3c"): {"rollout", "verifier", "feedback"},
        subjects.log_checkpointed(run, 256): {"verifier"},
    }


def event(run: str, subject: str) -> NewEvent:
    producer = Producer(service="test", version="0", hash="0")
    draft = Draft(subject=subject, step=0, data=RunPaused(reason="because"))
    return NewEvent(
        subject=subject, payload=encode(draft, run=run, producer=producer, time="2026-01-01T00:00:00.000000Z", root="r")
    )


# --- the table -------------------------------------------------------------------------------------------------------


def test_each_kind_of_event_has_the_writers_that_decide_it_and_the_admin() -> None:
    for subject, writers in examples("r01").items():
        assert {user for user in USERS if may_append(user, subject)} == writers | {ADMIN}, subject


def test_every_subject_that_the_schemas_define_is_in_the_table() -> None:
    makers = {
        name
        for name, value in vars(subjects).items()
        if callable(value) and "run" in getattr(value, "__annotations__", {}) and not name.endswith("_aggregate")
    }
    used = set(examples.__code__.co_names)
    assert makers - {"subject"} <= used, "add the new event to the table and say who writes it"


@pytest.mark.parametrize(
    "subject", ["", "bascule", "bascule.r.traj.a", "bascule.r.traj.a.logged.more", "other.r.traj.a.logged"]
)
def test_what_is_no_event_may_nobody_append(subject: str) -> None:
    assert not any(may_append(user, subject) for user in USERS)


def test_an_unknown_service_may_append_nothing() -> None:
    assert not any(may_append("somebody", subject) for subject in examples("r01"))


def test_no_two_users_share_an_inbox() -> None:
    assert len({inbox(user) for user in USERS}) == len(USERS)


# --- real servers ----------------------------------------------------------------------------------------------------


@contextmanager
def external(folder: Path, auth: str) -> Iterator[Access]:
    """A server as somebody else would run it: by what ``bascule ops`` writes and makes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    made = CliRunner().invoke(
        app, ["ops", "nats-config", "--out", str(folder), "--auth", auth, "--listen", listen, "--json"]
    )
    assert made.exit_code == 0, made.output
    paths = json.loads(made.stdout)
    with subprocess.Popen([find_binary(), "-c", paths["config"], "-l", str(folder / "log")]) as process:
        try:
            init = [
                "ops",
                "init",
                "--url",
                paths["url"],
                "--credentials",
                paths["credentials"],
                "--max-bytes",
                "1000000",
            ]
            done = CliRunner().invoke(app, init)
            assert done.exit_code == 0, done.output
            credentials = Path(paths["credentials"])
            yield Access(url=paths["url"], credentials=read_credentials(credentials), source=str(credentials))
        finally:
            process.kill()


@pytest.fixture(scope="module", params=["embedded", "nkeys", "password"])
def access(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param != "embedded":
        with external(folder, request.param) as found:
            yield found
        return
    server = EmbeddedServer.start(folder)
    try:
        yield embedded_access(server.connection)
    finally:
        server.stop()


@pytest.fixture
async def as_user(access: Access) -> AsyncIterator[Open]:
    logs: dict[str, NatsLog] = {ADMIN: await access.connect(ADMIN)}

    async def opened(user: str) -> NatsLog:
        if user not in logs:
            logs[user] = await access.connect(user)
        return logs[user]

    yield opened
    for log in logs.values():
        await log.close()


@pytest.fixture
def run() -> str:
    return f"t{secrets.token_hex(6)}"


@pytest.mark.parametrize("user", USERS)
async def test_a_server_lets_each_user_append_what_the_table_says_and_nothing_else(
    as_user: Open, run: str, user: str
) -> None:
    log = await as_user(user)
    for subject in examples(run):
        if may_append(user, subject):
            await log.append([event(run, subject)])
            continue
        words = f'permissions violation for publish to "{subject}"'
        async with asyncio.timeout(1):
            with pytest.raises(NotPermitted, match=rf"(?i){words}"):
                await log.append([event(run, subject)])


@pytest.mark.parametrize("user", USERS)
async def test_every_user_can_read(as_user: Open, run: str, user: str) -> None:
    subject = subjects.run_started(run)
    (stored,) = await (await as_user(ADMIN)).append([event(run, subject)])
    log = await as_user(user)
    assert await log.get(subject) == stored
    assert await log.head(f"bascule.{run}.>") == stored.seq
    assert [e async for e in log.read(f"bascule.{run}.>")] == [stored]
    async with asyncio.timeout(20), aclosing(log.follow(f"bascule.{run}.>")) as events:
        assert await anext(events) == stored


async def test_a_batch_with_one_event_that_is_not_ones_own_stores_none(as_user: Open, run: str) -> None:
    log = await as_user("rollout")
    mine = event(run, subjects.trajectory_logged(run, "a"))
    async with asyncio.timeout(1):
        with pytest.raises(NotPermitted, match="gate"):
            await log.append([mine, event(run, subjects.candidate_gate(run, 1))])
    assert await log.head(f"bascule.{run}.>") == 0


@pytest.mark.parametrize("user", ["rollout", "verifier"])
async def test_shared_work_comes_once_when_done_and_again_when_not(as_user: Open, run: str, user: str) -> None:
    await (await as_user(ADMIN)).append([event(run, subjects.trajectory_logged(run, f"t{i}")) for i in range(3)])
    queue = await (await as_user(user)).work(run, user, [f"bascule.{run}.traj.*.logged"])
    async with asyncio.timeout(20):
        first, second, third = await queue.next(8, 5.0)
        await first.done()
        await second.progress()
        await second.done()
        await third.retry(0.0)
        (again,) = await queue.next(8, 5.0)
    assert again.event == third.event
    await again.done()
    await queue.close()
    name = f"{run}={user}"
    async with asyncio.timeout(20):
        while (await (await as_user(user)).link.api(f"CONSUMER.INFO.BASCULE.{name}", {}))["num_ack_pending"]:
            pass


def letter(run: str, service: str) -> DeadLetter:
    return DeadLetter(
        run=run, service=service, seq=7, subject=f"bascule.{run}.x.y.z", error="e", trace="t", version="0", time="now"
    )


async def test_a_service_buries_its_own_dead_letters_and_a_person_retries_them(as_user: Open, run: str) -> None:
    rollout, cli, reader = [await as_user(user) for user in ("rollout", CLI, READER)]
    await rollout.letters.bury(letter(run, "rollout"))
    assert [found.dead for found in await reader.letters.list(run)] == [True]
    await cli.letters.retry(letter(run, "rollout"))
    assert [found.dead for found in await rollout.letters.list(run, "rollout")] == [False]
    async with asyncio.timeout(1):
        with pytest.raises(NotPermitted):
            await rollout.letters.bury(letter(run, "verifier"))
        with pytest.raises(NotPermitted):
            await reader.letters.retry(letter(run, "rollout"))


def line(run: str, place: str = "train.g01.step") -> Line:
    return Line(subject=f"bascule-telemetry.{run}.{place}", time="now", attempt=1, iteration=0, figures={"loss": 0.5})


async def test_the_trainer_tells_how_it_goes_on_and_every_user_may_see_it(as_user: Open, run: str) -> None:
    trainer, other, admin = [await as_user(user) for user in ("trainer", "rollout", ADMIN)]
    await other.telemetry.send(line(run))  # refused, and said to nobody
    await trainer.telemetry.send(line(run, "rollout.g01.step"))
    await trainer.telemetry.send(line(run))
    info = {"subjects_filter": f"*.{run}.>"}
    async with asyncio.timeout(20):
        while not (await admin.link.api("STREAM.INFO.BASCULE_TELEMETRY", info))["state"].get("subjects"):
            await asyncio.sleep(0)
    for user in USERS:
        log = await as_user(user)
        assert [found async for found in log.telemetry.read(run)] == [line(run)]


async def test_blobs_on_the_broker_are_written_by_services_read_by_all_and_erased_from_the_command_line(
    as_user: Open, run: str
) -> None:
    blobs = {
        user: ObjectBlobs((await as_user(user)).link, run) for user in ("rollout", "trainer", "feedback", READER, CLI)
    }
    ref = await blobs["rollout"].put(b"tokens")
    await blobs["trainer"].put(b"weights")
    assert await blobs[READER].get(ref) == b"tokens"
    async with asyncio.timeout(1):
        for user in (READER, "feedback"):
            with pytest.raises(NotPermitted):
                await blobs[user].put(b"mine")
        with pytest.raises(NotPermitted):
            await blobs["rollout"].erase(ref.sha256)
    await blobs[CLI].erase(ref.sha256)
    with pytest.raises(Erased):
        await blobs[READER].get(ref)


@pytest.mark.parametrize("user", [user for user in USERS if user != ADMIN])
async def test_only_the_admin_may_change_streams_or_what_is_in_them(as_user: Open, run: str, user: str) -> None:
    (stored,) = await (await as_user(ADMIN)).append([event(run, subjects.run_started(run))])
    link = (await as_user(user)).link
    calls = {
        "STREAM.MSG.DELETE": {"seq": stored.seq},
        "STREAM.PURGE": {},
        "STREAM.DELETE": {},
        "STREAM.UPDATE": {"name": "BASCULE", "subjects": ["bascule.>"], "deny_purge": False},
        "STREAM.CREATE": {"name": "BASCULE", "subjects": ["bascule.>"]},
        "STREAM.RESTORE": {},
        "STREAM.SNAPSHOT": {"deliver_subject": "x"},
    }
    for call, request in calls.items():
        async with asyncio.timeout(1):
            with pytest.raises(NotPermitted, match=rf"(?i)permissions violation for publish to .*{call}\.bascule"):
                await link.api(f"{call}.BASCULE", request)
    assert await (await as_user(READER)).get(stored.subject) == stored


async def test_not_even_the_admin_can_purge_or_delete_what_is_recorded(as_user: Open, run: str) -> None:
    admin = await as_user(ADMIN)
    (stored,) = await admin.append([event(run, subjects.run_started(run))])
    for stream in ("BASCULE", "BASCULE_DLQ"):
        assert "not permitted" in (await admin.link.api(f"STREAM.PURGE.{stream}", {}))["error"]["description"]
        refused = await admin.link.api(f"STREAM.MSG.DELETE.{stream}", {"seq": stored.seq})
        assert "not permitted" in refused["error"]["description"]
    assert await admin.get(stored.subject) == stored


async def test_an_answer_of_the_server_cannot_be_made_somebody_elses_event(as_user: Open, run: str) -> None:
    """The server writes its answers where the asker says; an event under another's subject must not come of it."""
    log = await as_user("rollout")
    gate = subjects.candidate_gate(run, 1)
    (mine,) = await log.append([event(run, subjects.trajectory_logged(run, "a"))])
    consumer = f"c{run}"
    config = {"name": consumer, "ack_policy": "none", "filter_subject": mine.subject}
    made = await log.link.api(f"CONSUMER.CREATE.BASCULE.{consumer}", {"stream_name": "BASCULE", "config": config})
    assert "error" not in made
    asks: list[tuple[str, dict[str, Any]]] = [
        ("STREAM.INFO.BASCULE", {}),
        ("STREAM.MSG.GET.BASCULE", {"seq": mine.seq}),
        ("DIRECT.GET.BASCULE", {"seq": mine.seq}),
        (f"CONSUMER.MSG.NEXT.BASCULE.{consumer}", {"batch": 1}),
    ]
    for call, request in asks:
        await log.link.publish(f"$JS.API.{call}", json.dumps(request).encode(), reply=gate)
    await log.link.publish(subjects.trajectory_logged(run, "b"), b"{}", reply=gate)
    # An answer that would have gone there is stored before this one, on the same connection, is answered.
    await log.append([event(run, subjects.trajectory_logged(run, "c"))])
    for stream in ("BASCULE", "BASCULE_DLQ"):
        target = gate if stream == "BASCULE" else f"basculedlq.{run}.verifier.1.dead-000"
        config = {"name": f"p{run}", "ack_policy": "none", "deliver_subject": target, "filter_subject": mine.subject}
        await log.link.api(f"CONSUMER.CREATE.BASCULE.p{run}", {"stream_name": "BASCULE", "config": config})
    await log.append([event(run, subjects.trajectory_logged(run, "d"))])
    admin = await as_user(ADMIN)
    held = await admin.link.api("STREAM.INFO.BASCULE", {"subjects_filter": f"bascule.{run}.>"})
    assert held["state"]["subjects"] == {subjects.trajectory_logged(run, t): 1 for t in "abcd"}
    assert await admin.letters.list(run) == []


async def test_a_user_hears_only_what_is_sent_to_itself(access: Access, as_user: Open, run: str) -> None:
    log = await as_user("rollout")
    for foreign in ("bascule.>", "_INBOX_verifier.>", ">", "$JS.>"):
        refused: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

        async def heard(msg: object, foreign: str = foreign) -> None:
            raise AssertionError(f"{foreign}: {msg}")

        with log.link.watching(refused.set_result, foreign):
            await log.link.subscribe(foreign, heard)
            async with asyncio.timeout(1):
                assert isinstance(await refused, NotPermitted)


async def test_nobody_gets_in_without_or_with_wrong_credentials(access: Access) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(NotPermitted, match=r"refuses the user \(none\)"):
            await Access(url=access.url).connect("rollout")
        for wrong in (Credential(password="wrong"), other_seed()):
            with pytest.raises(NotPermitted, match="refuses the user rollout"):
                await Access(url=access.url, credentials={"rollout": wrong}).connect("rollout")


def other_seed() -> Credential:
    import nkeys

    return Credential(nkey_seed=nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER).decode())


# --- what a refusal looks like ---------------------------------------------------------------------------------------


@contextmanager
def configured(folder: Path, users: str) -> Iterator[str]:
    """A server with these users; its address."""
    (folder / "server.conf").write_text(
        f'listen: "127.0.0.1:-1"\njetstream {{ store_dir: {json.dumps(str(folder))} }}\n'
        f"authorization {{ users: [{users}] }}"
    )
    argv = [find_binary(), "-c", str(folder / "server.conf"), "--ports_file_dir", str(folder), "-l", "/dev/null"]
    with subprocess.Popen(argv) as process:
        try:
            while not (ports := [p for p in folder.glob("*.ports") if p.read_text().endswith("}")]):
                assert process.poll() is None
            yield json.loads(ports[0].read_text())["nats"][0]
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("permissions", "words"),
    [
        ('publish: "bascule.>"', "publish to .*stream.info"),
        ('publish: "$JS.API.STREAM.INFO.>"', "publish to .*direct.get"),
        ('publish: ">", subscribe: "elsewhere"', "subscription to .*_inbox"),
    ],
)
async def test_a_user_who_may_not_even_read_is_told_when_connecting(
    tmp_path: Path, permissions: str, words: str
) -> None:
    users = f"{{user: all, password: p}}, {{user: some, password: p, permissions: {{ {permissions} }}}}"
    with configured(tmp_path, users) as url:
        await (await NatsLog.connect(url, user="all", password="p")).close()
        async with asyncio.timeout(1):
            with pytest.raises(NotPermitted, match=rf"(?i)permissions violation for {words}"):
                await NatsLog.connect(url, user="some", password="p")


@pytest.mark.parametrize("denied", ["CONSUMER.CREATE", "CONSUMER.MSG.NEXT"])
async def test_who_may_look_but_not_follow_is_told_so_at_once(tmp_path: Path, run: str, denied: str) -> None:
    permissions = f'publish: {{ allow: ">", deny: "$JS.API.{denied}.>" }}'
    users = f"{{user: all, password: p}}, {{user: some, password: p, permissions: {{ {permissions} }}}}"
    with configured(tmp_path, users) as url:
        every = await NatsLog.connect(url, user="all", password="p")
        await every.append([event(run, subjects.trajectory_logged(run, "a"))])
        log = await NatsLog.connect(url, user="some", password="p")
        pattern = f"bascule.{run}.traj.*.logged"
        for reading in (log.follow(pattern), log.read(pattern)):
            async with asyncio.timeout(1), aclosing(reading) as events:
                with pytest.raises(NotPermitted, match=denied.lower()):
                    await anext(events)
        async with asyncio.timeout(1):
            with pytest.raises(NotPermitted, match=denied.lower()):
                await (await log.work(run, "verifier", [pattern])).next(1, 0.5)
        for opened in (every, log):
            await opened.close()


async def test_without_streams_all_but_the_admin_are_told_how_they_are_made(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path)
    try:
        access = embedded_access(server.connection)
        for user in (*SERVICES, CLI, READER):
            with pytest.raises(LogError, match=r"no stream BASCULE.*bascule ops init --url"):
                await access.connect(user)
        for user in (ADMIN, *SERVICES, CLI, READER):
            await (await access.connect(user)).close()
    finally:
        server.stop()


async def test_services_go_on_where_they_were_when_the_server_was_killed(tmp_path: Path, run: str) -> None:
    server = EmbeddedServer.start(tmp_path)
    try:
        access = embedded_access(server.connection)
        await (await access.connect(ADMIN)).close()
        rollout, reader = await access.connect("rollout"), await access.connect(READER)
        async with asyncio.timeout(30), aclosing(reader.follow(f"bascule.{run}.>")) as events:
            for name in ("a", "b"):
                await rollout.append([event(run, subjects.trajectory_logged(run, name))])
                assert (await anext(events)).subject == subjects.trajectory_logged(run, name)
                server._process.kill()  # type: ignore[union-attr]
                restart(server)
            await rollout.append([event(run, subjects.trajectory_logged(run, "c"))])
            assert (await anext(events)).subject == subjects.trajectory_logged(run, "c")
        for log in (rollout, reader):
            await log.close()
    finally:
        server.stop()


async def test_a_log_from_before_there_were_users_is_still_there(tmp_path: Path, run: str) -> None:
    (tmp_path / "nats").mkdir()
    with configured(tmp_path / "nats", "{user: bascule, password: p}") as url:
        old = await NatsLog.connect(url, user="bascule", password="p")
        (stored,) = await old.append([event(run, subjects.run_started(run))])
        await old.close()
    server = EmbeddedServer.start(tmp_path)
    try:
        log = await embedded_access(server.connection).connect(ADMIN)
        assert await log.get(stored.subject) == stored
        await log.close()
    finally:
        server.stop()


def test_every_user_but_the_reader_has_something_to_write() -> None:
    assert {user for user in USERS if not APPENDS[user].allow} == {READER}
