"""Batches: ``prepare`` runs once, its episodes find what it made, and none leaves anything for another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bascule.runtime.episodes import host
from bascule.runtime.episodes import pool as pools
from bascule.runtime.episodes.batch import Batch
from bascule.runtime.episodes.broker import EpisodeSpec, run_episode
from bascule.runtime.episodes.pool import HarnessPool
from bascule.schemas.harness import Harness, make_harness
from bascule.schemas.trajectory import Sampling, Trajectory
from tests.episodes.seen import episodes, zygotes
from tests.episodes.test_broker import CannedEngine
from tests.episodes.test_pool import DAEMON, until, within

BATCH = Batch(key="g00-dev", data=({"id": "a", "input": {"q": "1"}, "answer": "one"},), seed=5)
COUNTING = (
    "import os, random, time\ndef prepare(data, context):\n    return {'run': time.monotonic_ns(), 'data': data}\n"
)
MECHANISMS = [(), ("namespaces",)]


BOTH = pytest.mark.parametrize("pool", MECHANISMS, ids=["namespaces", "none"], indirect=True)


@pytest.fixture
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[HarnessPool]:
    pool = HarnessPool(without=getattr(request, "param", ()))
    yield pool
    await pool.close()


def harness(code: str, **manifest: Any) -> Harness:
    text = json.dumps({"name": "x", "isolation": "batch", **manifest})
    return make_harness({"harness.py": code, "system_prompt.md": "", "manifest.json": text})


def solving(body: str, before: str = COUNTING, **manifest: Any) -> Harness:
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return harness(f"{before}\ndef solve(example, model, tools, context):\n{lines}", **manifest)


async def play(pool: HarnessPool, harness: Harness, batch: Batch = BATCH, **options: Any) -> Trajectory:
    spec = EpisodeSpec(
        trajectory="g00-dev-0001-n0", harness=harness, example={"q": "?"}, sampling=Sampling(), seed=1, batch=batch
    )
    return await run_episode(spec, CannedEngine(), pool, lambda: options.get("tools", {}))


async def answers(pool: HarnessPool, harness: Harness, n: int, batch: Batch = BATCH) -> list[str]:
    played = await asyncio.gather(*(play(pool, harness, batch) for _ in range(n)))
    assert [t.error for t in played] == [None] * n
    return [t.answer or "" for t in played]


async def begins(event: asyncio.Event, episode: asyncio.Task[Trajectory]) -> None:
    """Wait until an episode has come to where it sets an event; it goes on after that."""
    waiting = asyncio.create_task(event.wait())
    done, _ = await asyncio.wait((waiting, episode), timeout=60, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert waiting in done, episode.result() if episode in done else "the event did not come"


@BOTH
async def test_prepare_runs_once_for_all_episodes_of_a_batch_and_gets_its_data(pool: HarnessPool) -> None:
    code = solving("return repr(context.prepared)")
    first, *others = await answers(pool, code, 12)
    assert set(others) == {first}
    assert eval(first)["data"] == list(BATCH.data)
    assert await answers(pool, code, 1) == [first]
    assert await answers(pool, code, 1, Batch(key="g01-dev")) != [first]


async def test_a_batch_without_prepare_prepares_nothing(pool: HarnessPool) -> None:
    assert await answers(pool, solving("return repr(context.prepared)", before=""), 2) == ["None", "None"]


@BOTH
async def test_what_an_episode_changes_the_next_one_does_not_see(pool: HarnessPool) -> None:
    body = """
import harness
seen = (len(context.prepared), getattr(harness, 'left', 0), sorted(os.listdir('.')), random.random())
context.prepared['more'] = harness.left = 1
open('left', 'w').write('left')
return repr(seen)
"""
    found = [await answers(pool, solving(body), 1) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert eval(found[0][0])[:3] == (2, 0, [])


@BOTH
async def test_episodes_of_a_batch_cannot_reach_one_another(pool: HarnessPool) -> None:
    """One waits while the other looks for its folder, its memory, its descriptors, and tries to end it."""
    meet, leave = asyncio.Event(), asyncio.Event()
    place: list[str] = []

    async def wait(arguments: dict[str, Any]) -> str:
        place.append(str(arguments["where"]))
        meet.set()
        await within(leave.wait())
        return "unharmed"

    body = """
import signal, sys
if context.seed == 1:
    open('mine', 'w').write('secret')
    return tools.call('wait', where=os.getcwd() + ' ' + str(os.getpid()))
folder, pid = tools.call('where').split()
done = []
def attempt(name, action):
    try:
        if action() is not False:
            done.append(name)
    except OSError:
        pass
attempt('list', lambda: os.listdir(folder))
attempt('siblings', lambda: os.listdir(os.path.dirname(folder)))
attempt('read', lambda: open(folder + '/mine').read())
attempt('write', lambda: open(folder + '/theirs', 'w'))
attempt('prepared', lambda: open(context.prepared['folder'] + '/mine', 'w'))
attempt('processes', lambda: any(n.isdecimal() and n != str(os.getpid()) for n in os.listdir('/proc')))
for name in ('environ', 'maps', 'mem', 'fd/1', 'fd/3', 'stat', 'cwd/mine'):
    attempt(name, lambda name=name: open('/proc/' + pid + '/' + name, 'rb').read(1))
    attempt('server ' + name, lambda name=name: open('/proc/' + str(os.getppid()) + '/' + name, 'rb').read(1))
for number in (int(pid), os.getppid(), -1):
    attempt('kill ' + str(number == -1), lambda number=number: os.kill(number, signal.SIGKILL))
kept = open(context.prepared['folder'] + '/kept').read()
return repr((kept, done))
"""
    before = """
import os
def prepare(data, context):
    open('kept', 'w').write('kept')
    return {'folder': os.getcwd()}
"""
    code = solving(body, before, tools=["wait", "where"])

    async def where(_: dict[str, Any]) -> str:
        return place[0]

    first = EpisodeSpec(trajectory="a", harness=code, example={}, sampling=Sampling(), seed=1, batch=BATCH)
    second = EpisodeSpec(trajectory="b", harness=code, example={}, sampling=Sampling(), seed=2, batch=BATCH)
    waiting = asyncio.create_task(run_episode(first, CannedEngine(), pool, lambda: {"wait": wait}))
    await begins(meet, waiting)
    found = await run_episode(second, CannedEngine(), pool, lambda: {"where": where})
    leave.set()
    assert (found.answer, found.error) == (repr(("kept", [])), None)
    assert (await within(waiting)).answer == "unharmed"


@BOTH
@pytest.mark.parametrize("end", ["return 'done'", "os._exit(1)"])
async def test_a_daemon_of_an_episode_is_gone_with_it_and_the_batch_goes_on(pool: HarnessPool, end: str) -> None:
    code = solving(f"if example['q'] == 'x':\n    return 'begun'\ngrandchild()\n{end}", f"{DAEMON}\n{COUNTING}")
    begun = EpisodeSpec(
        trajectory="g00-dev-0000-n0", harness=code, example={"q": "x"}, sampling=Sampling(), seed=1, batch=BATCH
    )
    assert (await run_episode(begun, CannedEngine(), pool, dict)).answer == "begun"
    there = episodes()
    for _ in range(3):
        left = await play(pool, code)
        assert (left.error is None) == end.startswith("return")
    await until(lambda: episodes() == there)
    assert (await run_episode(begun, CannedEngine(), pool, dict)).answer == "begun"


@BOTH
@pytest.mark.parametrize(
    ("prepare", "what"),
    [
        ("threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()", "a thread"),
        ("if not os.fork():\n        time.sleep(1000)", "a process"),
    ],
)
async def test_what_prepare_leaves_running_is_refused(pool: HarnessPool, prepare: str, what: str) -> None:
    before = f"import os, threading, time\ndef prepare(data, context):\n    {prepare}\n"
    trajectory = await play(pool, solving("return 'x'", before))
    assert trajectory.error is not None
    assert trajectory.error.kind == "crash"
    assert f"prepare left {what} behind" in trajectory.error.message


@BOTH
async def test_what_prepare_has_ended_is_not_left_running_and_a_numerical_library_is_no_thread(
    pool: HarnessPool,
) -> None:
    before = """
import os, threading
import numpy
def prepare(data, context):
    threads = [threading.Thread(target=numpy.linalg.inv, args=(numpy.eye(64),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not os.fork():
        os._exit(0)
    return str((numpy.eye(300) @ numpy.eye(300)).sum())
"""
    assert await answers(pool, solving("return context.prepared", before, packages=["numpy"]), 2) == ["300.0"] * 2


async def test_a_guest_that_ends_while_it_prepares_is_not_killed_before_it_has_said_how(
    pool: HarnessPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[host.ZygoteHost] = []
    waited_for = threading.Event()
    on_report, ended = host.ZygoteHost._on_report, host.ZygoteHost._ended

    def kill(self: host.ZygoteHost) -> None:
        killed.append(self)

    def after_the_wait_began(self: host.ZygoteHost) -> None:
        with contextlib.suppress(BlockingIOError):
            if not self._control.recv(1, socket.MSG_PEEK) and not waited_for.is_set():
                return  # the loop calls again: its end is still there to be read
        on_report(self)

    def until_its_end_was_seen(self: host.ZygoteHost) -> int:
        waited_for.set()
        deadline = time.monotonic() + 30
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        return ended(self)

    monkeypatch.setattr(host.ZygoteHost, "_kill", kill)
    monkeypatch.setattr(host.ZygoteHost, "_on_report", after_the_wait_began)
    monkeypatch.setattr(host.ZygoteHost, "_ended", until_its_end_was_seen)
    trajectory = await play(pool, solving("return 'x'", "import os\ndef prepare(data, context):\n    os._exit(3)\n"))
    monkeypatch.undo()
    assert trajectory.error is not None
    assert "prepare exited with status 3" in trajectory.error.message
    assert killed == []


@pytest.mark.parametrize(
    ("prepare", "kind", "said"),
    [
        ("raise ValueError('no data')", "crash", "ValueError: no data"),
        ("os._exit(3)", "crash", "prepare exited with status 3"),
        ("os.abort()", "crash", "prepare was killed by SIGABRT"),
        ("time.sleep(1000)", "timeout", "prepare ran for"),
        ("while True: print('x' * 4096)", "output-limit", "prepare sent more"),
        ("bytearray(4 << 30)", "crash", "MemoryError"),
        ("open('big', 'wb').write(bytes(32 << 20))", "crash", "File too large"),
        ("import numpy", "crash", "No module named 'numpy'"),
    ],
)
async def test_what_prepare_ends_by_every_episode_of_its_batch_ends_by(prepare: str, kind: str, said: str) -> None:
    pool = HarnessPool()
    before = f"import os, time\ndef prepare(data, context):\n    {prepare}\n"
    code = solving("return 'x'", before, prepare_seconds=1.0 if kind == "timeout" else 60.0)
    for trajectory in await asyncio.gather(*(play(pool, code) for _ in range(3))):
        assert trajectory.error is not None
        assert trajectory.error.kind == kind
        assert said in trajectory.error.message
    assert await answers(pool, solving("return 'fine'"), 1) == ["fine"]
    await pool.close()
    assert not zygotes()


async def test_memory_of_all_processes_of_prepare_together_is_limited() -> None:
    pool = HarnessPool()
    before = """
import os, time
def prepare(data, context):
    for _ in range(8):
        if os.fork() == 0:
            break
    kept = bytearray(os.urandom(1 << 20) * 32)
    time.sleep(1000)
"""
    trajectory = await play(pool, solving("return 'x'", before, memory_mb=128))
    await pool.close()
    assert trajectory.error is not None
    assert (trajectory.error.kind, "128 MiB" in trajectory.error.message) == ("crash", True)


@pytest.mark.parametrize(
    ("tampered", "said"),
    [
        ("zygote._control.send(b'{')", "lost again and again"),
        ("while True: zygote._report({'op': 'exit', 'number': 7, 'status': 0})", "lost again and again"),
        ("zygote._control.send(b'[' * 60000)", "lost again and again"),
        ("os._exit(0)", "lost again and again"),
        ("zygote._report({'op': 'exit', 'number': message['number'], 'status': 0})", "exited with status 0"),
        (
            "zygote._report({'op': 'exit', 'number': message['number'], 'error': 'x' * 50000})",
            "exited with status None",
        ),
        ("zygote._report({'op': 'exit', 'number': message['number'], 'status': 10**6})", "exited with status 1000000"),
    ],
)
async def test_a_server_that_prepare_has_tampered_with_hurts_its_own_batch_only(tampered: str, said: str) -> None:
    before = f"""
import gc, os, time
def prepare(data, context):
    zygote = [o for o in gc.get_objects() if type(o).__name__ == 'Zygote'][0]
    def start(message, channel, output):
        {tampered}
    zygote._start = start
"""
    good = solving("return tools.call('wait')", tools=["wait"])
    gate, begun = asyncio.Event(), asyncio.Event()

    async def wait(_: dict[str, Any]) -> str:
        begun.set()
        await within(gate.wait())
        return "unharmed"

    pool = HarnessPool()
    other = asyncio.create_task(play(pool, good, tools={"wait": wait}))
    await begins(begun, other)
    bad = solving("return 'x'", before)
    played = [await play(pool, bad, Batch(key="tampered")) for _ in range(3)]
    assert {t.error.kind for t in played if t.error} <= {"crash", "protocol"}
    assert played[-1].error is not None
    assert said in played[-1].error.message
    assert len(played[-1].error.message) < 3000
    gate.set()
    assert (await within(other)).answer == "unharmed"
    await pool.close()
    assert not zygotes()


async def test_a_server_that_plays_the_episode_itself_and_reports_no_end_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = """
import gc, os
def prepare(data, context):
    zygote = [o for o in gc.get_objects() if type(o).__name__ == 'Zygote'][0]
    frame = bytes([1]) + (7).to_bytes(4, 'big') + b'no json'
    zygote._start = lambda message, channel, output: os.write(os.dup(channel), frame)
"""
    monkeypatch.setattr(host, "_REPORT_SECONDS", 1.0)
    pool = HarnessPool()
    trajectory = await play(pool, solving("return 'x'", before))
    assert trajectory.error is not None
    assert trajectory.error.kind == "protocol", trajectory.error.message
    assert not zygotes()
    await pool.close()


async def test_a_batch_is_retired_when_it_is_over_and_when_others_need_its_place() -> None:
    pool = HarnessPool()
    code = solving("return str(context.prepared['run'])")
    a, b, c = (Batch(key=key) for key in "abc")
    first = await answers(pool, code, 1, a)
    await answers(pool, code, 1, b)
    assert await answers(pool, code, 1, a) == first
    await pool.retire("a")
    assert await answers(pool, code, 1, a) != first
    again = await answers(pool, code, 1, b)
    await answers(pool, code, 1, c)  # a was used least recently
    assert await answers(pool, code, 1, b) == again
    assert len(zygotes()) <= 2 + pools.BATCHES
    await pool.close()
    assert not zygotes()


async def test_more_batches_than_may_be_open_wait_for_one_another() -> None:
    pool = HarnessPool(children=2)
    code = solving("return str(context.prepared['run'])")
    rounds = [answers(pool, code, 3, Batch(key=key)) for key in "abcde"]
    async with asyncio.timeout(60):
        found = await asyncio.gather(*rounds)
    await pool.close()
    assert [len(set(answered)) for answered in found] == [1] * 5


async def test_a_batch_in_use_is_retired_after_its_last_episode(pool: HarnessPool) -> None:
    gate, begun = asyncio.Event(), asyncio.Event()

    async def wait(_: dict[str, Any]) -> str:
        begun.set()
        await within(gate.wait())
        return "done"

    running = asyncio.create_task(
        play(pool, solving("return tools.call('wait')", tools=["wait"]), tools={"wait": wait})
    )
    await begins(begun, running)
    assert episodes()
    await pool.retire(BATCH.key)
    gate.set()
    assert (await within(running)).answer == "done"
    await pool.close()
    assert not zygotes()
