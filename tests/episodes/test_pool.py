"""Episode processes: isolated, limited, and gone when they are over. What one does, no other feels."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bascule.runtime.episodes import host
from bascule.runtime.episodes.episode import Limits, Outcome, StopEpisode
from bascule.runtime.episodes.host import EpisodeProcessError
from bascule.runtime.episodes.pool import HarnessPool
from bascule.schemas.harness import Harness, make_harness
from tests.episodes.seen import alive, episodes, folder_of, is_zygote, zygotes

PATIENT = Limits(seconds=30.0)
GOOD = "def solve(example, model, tools, context):\n    return example['q'] + '!'\n"
# A process that has left its parent, its group and its session; `grandchild()` returns its number.
DAEMON = """
import os, time

def grandchild():
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.setsid()
        except PermissionError:
            pass
        if os.fork() == 0:
            os.write(write, str(os.getpid()).encode())
            for number in range(3, 64):
                try:
                    os.close(number)
                except OSError:
                    pass
            time.sleep(1000)
        os._exit(0)
    os.wait()
    return int(os.read(read, 32))
"""


def harness(code: str, files: dict[str, str] | None = None) -> Harness:
    manifest = json.dumps({"name": "test"})
    return make_harness({"harness.py": code, "system_prompt.md": "Answer.", "manifest.json": manifest, **(files or {})})


def solving(body: str) -> Harness:
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return harness(f"import os, signal, sys, time\n{DAEMON}\ndef solve(example, model, tools, context):\n{lines}")


class Heard:
    """A handler that keeps notes, gives tool calls to ``tool``, and stops at the answer."""

    def __init__(self, tool: Callable[[], Any] | None = None) -> None:
        self.notes: list[str] = []
        self.answer: Any = None
        self.noted = asyncio.Event()
        self._tool = tool

    async def __call__(self, frame: bytes) -> bytes | None:
        request = json.loads(frame)
        if request["op"] == "note":
            self.notes.append(request["text"])
            self.noted.set()
            return None
        if request["op"] == "tool" and self._tool is not None:
            return json.dumps({"result": await self._tool()}).encode()
        self.answer = request["answer"]
        raise StopEpisode


async def play(
    pool: HarnessPool, code: Harness, limits: Limits = PATIENT, heard: Heard | None = None, **options: Any
) -> tuple[Outcome, Heard]:
    heard = heard or Heard()
    opening = json.dumps({"example": {"q": "why"}, "seed": 7, "tools": ["wait"]}).encode()
    return await pool.run(code, opening, heard, limits=limits, **options), heard


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def noted(heard: Heard, running: asyncio.Task[Any]) -> None:
    """Wait for the first note of an episode that goes on after it."""
    waiting = asyncio.create_task(heard.noted.wait())
    done, _ = await asyncio.wait((waiting, running), timeout=60, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert waiting in done, running.result() if running in done else "nothing was noted"


async def within(awaited: Awaitable[Any]) -> Any:
    """What must not be waited for without an end."""
    async with asyncio.timeout(60):
        return await awaited


@pytest.fixture
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[HarnessPool]:
    pool = HarnessPool(without=getattr(request, "param", ()))
    yield pool
    await pool.close()


# As the machine offers it, and where it offers no namespaces.
BOTH = pytest.mark.parametrize("pool", [(), ("namespaces",)], ids=["namespaces", "none"], indirect=True)


@BOTH
async def test_an_answer_comes_back_from_a_process_of_its_own(pool: HarnessPool) -> None:
    outcome, heard = await play(pool, harness(GOOD))
    assert (outcome.ending, outcome.exit_code, heard.answer) in (("stopped", 0, "why!"), ("stopped", -9, "why!"))
    _, heard = await play(pool, solving("return str(os.getpid())"))
    assert int(heard.answer) != os.getpid()
    await until(lambda: not episodes())


async def test_modules_of_the_harness_are_imported_and_come_before_the_standard_library(pool: HarnessPool) -> None:
    code = "import statistics, deep.inner, pack\ndef solve(*_):\n    return statistics.A + deep.inner.B + pack.C\n"
    files = {"statistics.py": "A='a'", "deep/inner.py": "B='b'", "pack/__init__.py": "C='c'"}
    _, heard = await play(pool, harness(code, files))
    assert heard.answer == "abc"


async def test_an_exception_leaves_its_traceback_with_the_lines_of_the_harness_only(pool: HarnessPool) -> None:
    code = "import helper\ndef solve(*_):\n    return helper.divide(1)\n"
    outcome, _ = await play(pool, harness(code, {"helper.py": "def divide(x):\n    return x / 0\n"}))
    assert (outcome.ending, outcome.exit_code) == ("exited", 1)
    assert 'File "helper.py", line 2, in divide\n    return x / 0' in outcome.output
    assert outcome.output.strip().endswith("ZeroDivisionError: division by zero")
    assert str(Path(host.__file__).parent) not in outcome.output


async def test_a_module_that_does_not_parse_is_an_exception_of_its_episode(pool: HarnessPool) -> None:
    whole = harness("import helper\ndef solve(*_):\n    return 'x'\n")
    broken = Harness(files={**whole.files, "helper.py": "def f(:\n"}, digest="broken")
    outcome, _ = await play(pool, broken)
    assert outcome.exit_code == 1
    assert 'File "helper.py", line 1' in outcome.output
    assert "SyntaxError" in outcome.output


@BOTH
@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("os._exit(7)", 7),
        ("os._exit(0)", 0),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
        ("sys.exit('no')", 1),
    ],
)
async def test_a_crash_is_reported_with_its_code(pool: HarnessPool, body: str, code: int) -> None:
    outcome, heard = await play(pool, solving(body))
    assert (outcome.ending, outcome.exit_code, heard.answer) == ("exited", code, None)


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "time.sleep(1000)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)",
        "os.close(3)\ntime.sleep(1000)",
        "while True: context.note(time.sleep(0.05))",
        "if os.fork(): time.sleep(1000)\nwhile True: pass",
    ],
)
async def test_a_hang_ends_at_its_time_limit(pool: HarnessPool, body: str) -> None:
    outcome, _ = await play(
        pool, solving(f"context.note(os.getpid())\n{body}"), Limits(seconds=0.3, overall_seconds=20)
    )
    assert outcome.ending == "timeout"


async def test_waiting_for_an_answer_is_not_the_harness_s_time(pool: HarnessPool) -> None:
    released = asyncio.Event()

    async def tool() -> str:
        # The time of the first harness passes while the second one only waits.
        outcome, _ = await play(pool, solving("time.sleep(1000)"), Limits(seconds=1.0))
        assert outcome.ending == "timeout"
        released.set()
        return "late"

    outcome, heard = await play(pool, solving("return tools.call('wait')"), Limits(seconds=1.0), Heard(tool))
    assert released.is_set()
    assert (outcome.ending, heard.answer) == ("stopped", "late")


async def test_the_overall_limit_counts_waiting_too(pool: HarnessPool) -> None:
    async def tool() -> str:
        await asyncio.Event().wait()
        return ""

    limits = Limits(seconds=30, overall_seconds=0.3)
    assert (await play(pool, solving("return tools.call('wait')"), limits, Heard(tool)))[0].ending == "overdue"


@pytest.mark.parametrize(
    "body",
    [
        "while True: print('x' * 1000)",
        "while True: os.write(2, b'x' * 100000)",
        "while True: context.note('x' * 1000)",
        "os.write(3, b'\\xff' * 4)\ntime.sleep(1000)",
        "os.write(3, (1 << 20).to_bytes(4, 'big') + b'x' * (1 << 20))",
    ],
)
async def test_output_without_end_is_cut_off(pool: HarnessPool, body: str) -> None:
    limits = Limits(seconds=20, output_bytes=64 * 1024)
    outcome, heard = await play(pool, solving(body), limits)
    assert outcome.ending == "output-limit"
    assert len(outcome.output) <= 4096
    assert sum(map(len, heard.notes)) <= 64 * 1024


@BOTH
async def test_processes_that_an_episode_forked_are_gone_with_it(pool: HarnessPool) -> None:
    body = """
for _ in range(20):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
return tools.call('wait')
"""

    async def tool() -> str:
        assert len(episodes()) > 20
        return "done"

    _, heard = await play(pool, solving(body), heard=Heard(tool))
    assert heard.answer == "done"
    await until(lambda: not episodes())


@BOTH
@pytest.mark.parametrize("end", ["return 'done'", "os._exit(1)", "while True: pass"])
async def test_a_daemon_is_gone_with_its_episode_and_nobody_else_is(pool: HarnessPool, end: str) -> None:
    meeting = asyncio.Event()

    async def tool() -> str:
        await within(meeting.wait())
        return "unharmed"

    # An episode with a daemon of its own, which it still needs when the other one is swept.
    body = """
asked, ask = os.pipe()
answered, answer = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(answer, os.read(asked, 100).upper())
    os._exit(0)
os.wait()
context.note('here')
os.write(ask, tools.call('wait').encode())
os.close(answer)
return os.read(answered, 100).decode()
"""
    bystander = asyncio.create_task(play(pool, solving(body), heard=(watched := Heard(tool))))
    await noted(watched, bystander)
    before = episodes()
    # Where it is to end at its limit, that must leave time for the note.
    limits = Limits(seconds=5.0) if end.startswith("while") else PATIENT
    _, heard = await play(pool, solving(f"context.note(grandchild())\n{end}"), limits)
    assert heard.notes
    await until(lambda: episodes() == before)
    meeting.set()
    assert (await within(bystander))[1].answer == "UNHARMED"


async def test_the_environment_holds_nothing_of_ours(pool: HarnessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASCULE_TEST_SECRET", "hunter2")
    body = """
import ctypes
text = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')
real = [text[i] for i in range(12) if not any(text[j] is None for j in range(i + 1))]
return repr(dict(os.environ)) + repr(real) + repr(sys.argv + sys.path)
"""
    _, heard = await play(pool, solving(body))
    assert heard.answer.count("PATH") > 1
    assert "hunter2" not in heard.answer
    assert "site-packages" not in heard.answer
    names = set(eval((await play(pool, solving("return repr(list(os.environ))")))[1].answer))
    threads = {f"{library}_NUM_THREADS" for library in ("MKL", "NUMBA", "OMP", "OPENBLAS")}
    assert names == {"BASCULE_ZYGOTE", "HOME", "LANG", "PATH", "PYTHONHASHSEED", "TMPDIR", "TZ", *threads}


@BOTH
async def test_no_descriptor_is_inherited_and_stdin_is_empty(pool: HarnessPool) -> None:
    body = """
there = []
for number in range(100000):
    try:
        os.fstat(number)
        there.append(number)
    except OSError:
        pass
return repr((there, sys.stdin.read()))
"""
    _, heard = await play(pool, solving(body))
    assert heard.answer == "([0, 1, 2, 3], '')"


@BOTH
@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("bytearray(4 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(32 << 20))", "File too large"),
        ("kept = [open('/dev/null') for _ in range(200)]", "Too many open files"),
    ],
)
async def test_memory_files_and_descriptors_are_limited(pool: HarnessPool, body: str, error: str) -> None:
    outcome, _ = await play(pool, solving(body))
    assert outcome.exit_code == 1
    assert error in outcome.output


async def test_processor_time_is_limited_for_what_the_clock_does_not_see(pool: HarnessPool) -> None:
    async def tool() -> str:
        await asyncio.Event().wait()
        return ""

    body = """
import threading
threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()
return tools.call('wait')
"""
    limits = Limits(seconds=0.1, overall_seconds=20)
    heard = Heard(tool)
    running = asyncio.create_task(play(pool, solving(f"context.note('on')\n{body.strip()}"), limits, heard))
    await noted(heard, running)
    await until(lambda: not episodes())
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


@BOTH
async def test_the_private_folder_is_writable_and_empty_for_the_next_one_whatever_was_in_it(pool: HarnessPool) -> None:
    body = """
folder = os.getcwd()
assert os.environ['HOME'] == os.environ['TMPDIR'] == folder
assert os.listdir(folder) == []
for _ in range(2100):
    os.mkdir('d')
    os.chdir('d')
    open('f', 'w').close()
os.chdir(folder)
os.symlink('/', 'link')
os.mkdir('shut')
os.chmod('shut', 0)
return folder
"""
    await pool.start()
    (zygote,) = zygotes()
    folder = folder_of(zygote)
    for _ in range(2):
        _, heard = await play(pool, solving(body))
        assert heard.answer
    await until(lambda: {path.name for path in folder.iterdir()} <= {"settings.json", "stderr"})
    await pool.close()
    assert not folder.exists()
    assert Path("/usr").exists()


async def test_no_more_children_run_than_allowed() -> None:
    pool = HarnessPool(children=3)
    here = most = 0

    async def tool() -> str:
        nonlocal here, most
        here += 1
        most = max(most, here)
        await asyncio.sleep(0)
        here -= 1
        return "ok"

    episodes = [play(pool, solving("return tools.call('wait')"), heard=Heard(tool)) for _ in range(20)]
    results = await asyncio.gather(*episodes)
    await pool.close()
    assert [heard.answer for _, heard in results] == ["ok"] * 20
    assert 1 <= most <= 3


@BOTH
async def test_a_cancelled_episode_leaves_nothing(pool: HarnessPool) -> None:
    running = asyncio.create_task(
        play(pool, solving("context.note(grandchild())\ntime.sleep(1000)"), heard=(heard := Heard()))
    )
    await noted(heard, running)
    assert episodes()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not episodes())


async def test_more_harnesses_than_the_zygote_keeps(pool: HarnessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_HARNESSES", 2)
    order = [0, 1, 2, 0, 3, 1, 0]
    episodes = [await play(pool, solving(f"return '{number}'")) for number in order]
    assert [int(heard.answer) for _, heard in episodes] == order


async def test_the_set_order_and_the_seed_of_a_harness_are_the_same_in_every_zygote(pool: HarnessPool) -> None:
    code = solving("import random\nreturn f'{random.random()} {set(map(str, range(20)))} {context.seed}'")
    first = (await play(pool, code))[1].answer
    assert first.endswith(" 7")
    assert (await play(pool, code, alone=True))[1].answer == first


@BOTH
async def test_when_the_zygote_is_killed_its_episodes_are_lost_and_the_next_ones_work(pool: HarnessPool) -> None:
    heard = Heard()
    running = asyncio.create_task(play(pool, solving("context.note(grandchild())\ntime.sleep(1000)"), heard=heard))
    await noted(heard, running)
    there = episodes()
    (zygote,) = zygotes()
    os.kill(zygote, signal.SIGKILL)
    outcome, _ = await within(running)
    assert outcome.ending == "lost"
    assert (await play(pool, harness(GOOD)))[1].answer == "why!"
    await pool.close()
    assert there
    await until(lambda: not any(alive(pid) for pid in there))


@BOTH
async def test_a_harness_cannot_signal_the_zygote(pool: HarnessPool) -> None:
    body = """
for number in (1, os.getppid(), int(tools.call('wait'))):
    for signal_ in (signal.SIGKILL, signal.SIGSTOP):
        try:
            os.kill(number, signal_)
        except OSError:
            pass
return 'tried'
"""
    zygote = []

    async def tool() -> str:
        zygote.extend(zygotes())
        return str(zygote[0])

    assert (await play(pool, solving(body), heard=Heard(tool)))[1].answer == "tried"
    assert zygotes() == set(zygote)
    assert (await play(pool, harness(GOOD)))[1].answer == "why!"


async def test_a_zygote_that_is_stopped_is_replaced(pool: HarnessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_REPORT_SECONDS", 1.0)

    async def tool() -> str:
        (zygote,) = zygotes()
        os.kill(zygote, signal.SIGSTOP)
        return "x"

    outcome, _ = await play(pool, solving("return tools.call('wait')"), heard=Heard(tool))
    assert outcome.ending == "lost"
    monkeypatch.undo()
    assert (await play(pool, harness(GOOD)))[1].answer == "why!"


async def test_what_befalls_the_zygote_of_an_episode_alone_befalls_no_other(pool: HarnessPool) -> None:
    gate = asyncio.Event()

    async def wait() -> str:
        await within(gate.wait())
        return "still here"

    first = Heard(wait)
    other = asyncio.create_task(play(pool, solving("context.note('in')\nreturn tools.call('wait')"), heard=first))
    await noted(first, other)
    shared = zygotes()

    async def kill() -> str:
        (own,) = zygotes() - shared
        os.kill(own, signal.SIGKILL)
        return "x"

    outcome, _ = await play(pool, solving("tools.call('wait')\ntime.sleep(1000)"), heard=Heard(kill), alone=True)
    assert outcome.ending == "lost"
    gate.set()
    assert (await within(other))[1].answer == "still here"


async def test_a_pool_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EpisodeProcessError, match="did not start"):
        await HarnessPool().start()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(EpisodeProcessError, match="did not start"):
        await HarnessPool().start()


async def test_what_fails_before_the_harness_runs_is_not_its_failure(pool: HarnessPool) -> None:
    outcome, heard = await play(pool, harness(GOOD), Limits(disk_bytes=1 << 63))
    assert (outcome.ending, heard.answer) == ("unavailable", None)
    assert "Error" in outcome.output


async def test_a_closed_pool_ends_what_runs_and_takes_nothing_more(pool: HarnessPool) -> None:
    heard = Heard()
    running = asyncio.create_task(play(pool, solving("context.note(os.getpid())\ntime.sleep(1000)"), heard=heard))
    await noted(heard, running)
    await within(pool.close())
    assert (await within(running))[0].ending == "lost"
    await until(lambda: not episodes())
    await until(lambda: not zygotes())
    with pytest.raises(EpisodeProcessError, match="closed"):
        await play(pool, harness(GOOD))
    await pool.start()
    assert (await play(pool, harness(GOOD)))[1].answer == "why!"


async def test_everything_dies_with_the_runtime() -> None:
    program = f"""
import asyncio, os
from bascule.runtime.episodes.episode import Limits
from bascule.runtime.episodes.pool import HarnessPool
from bascule.schemas.harness import make_harness
from bascule.verifiers.sandbox.processes import below
code = {DAEMON!r} + '''
def solve(example, model, tools, context):
    context.note(grandchild())
    time.sleep(1000)
'''
async def hear(frame):
    print(*below(os.getpid()), flush=True)
async def main():
    harness = make_harness({{"harness.py": code, "system_prompt.md": "", "manifest.json": '{{"name": "x"}}'}})
    opening = b'{{"example": {{}}, "seed": 1, "tools": []}}'
    await HarnessPool().run(harness, opening, hear, limits=Limits(seconds=1000))
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as runtime:
        assert runtime.stdout is not None
        try:
            line = await within(asyncio.to_thread(runtime.stdout.readline))
        except TimeoutError:
            runtime.kill()  # it ends the thread that reads
            raise
        said = [int(word) for word in line.split()]
        assert len(said) >= 3
        assert all(alive(pid) for pid in said)
        folder = folder_of(next(filter(is_zygote, said)))
        assert folder.exists()
        runtime.kill()
    await until(lambda: not any(alive(pid) for pid in said))
    await until(lambda: not folder.exists())
