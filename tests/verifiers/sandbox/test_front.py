"""Programs are forked by a zygote: what they share of it, which is nothing, and what its end and ours mean to them."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bascule.plugins.sandbox import Program, Running
from bascule.verifiers.sandbox import front
from bascule.verifiers.sandbox.layered import LayeredSandbox
from tests.verifiers.sandbox.remains import processes_with, starter, wait_until_gone

LONG = 600.0
MARK = "zygote.serve"
NOTHING = Program(arguments=("-c", ""), seconds=LONG)


def zygotes(parent: int | None = None) -> list[int]:
    """The zygotes that this process, or ``parent``, has."""
    return [pid for pid in processes_with(MARK) if parent_of(pid) == (parent or os.getpid())]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def kill_zygote() -> None:
    for pid in zygotes():
        os.kill(pid, signal.SIGKILL)


def line_of(running: Running) -> Any:
    """A line of JSON that a program prints."""
    line = b""
    while not line.endswith(b"\n"):
        line += running.read(1)
    return json.loads(line)


def test_programs_have_one_zygote_however_many_start_at_once(sandbox: LayeredSandbox) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(sandbox.run, [NOTHING] * 32))
    assert [(one.ending, one.exit_code) for one in found] == [("exited", 0)] * 32
    assert len(zygotes()) == 1


def test_a_program_has_nothing_open_that_is_anothers(sandbox: LayeredSandbox) -> None:
    code = """
import fcntl, json, os, signal
def is_open(descriptor):
    try: fcntl.fcntl(descriptor, fcntl.F_GETFD)
    except OSError: return False
    return True
found = [d for d in range(1024) if is_open(d)]
print(json.dumps([found, [os.fstat(d).st_ino for d in found]]), flush=True)
os.read(0, 1); os.close(0); os.close(1); signal.pause()
"""
    program = Program(arguments=("-c", code), seconds=120.0)
    with sandbox.start(program) as first, sandbox.start(program) as second:
        told = [line_of(running) for running in (first, second)]
        assert [descriptors for descriptors, _ in told] == [[0, 1, 2]] * 2
        assert len({number for _, numbers in told for number in numbers}) == 6
        for running in (first, second):
            # If anybody else held these pipes, their ends would not be told here while both programs live.
            running.write(b"x")
            with pytest.raises(EOFError):
                running.read(1)
            with pytest.raises(EOFError):
                running.write(b"x")


def test_the_kernel_is_to_choose_a_program_where_memory_runs_out(sandbox: LayeredSandbox) -> None:
    mark = secrets.token_hex(8)
    code = "import os; os.write(1, b'1\\n'); os.read(0, 1)"
    with sandbox.start(Program(arguments=("-c", code, mark), seconds=LONG)) as running:
        assert line_of(running) == 1
        (pid,) = processes_with(mark)
        assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == 1000
        assert running.wait().exit_code == 0


def test_when_the_zygote_is_killed_what_it_started_ends_and_the_next_gets_another(sandbox: LayeredSandbox) -> None:
    mark = secrets.token_hex(8)
    code = "import os, signal; os.fork(); os.write(1, b'1\\n'); signal.pause()"
    with sandbox.start(Program(arguments=("-c", code, mark), seconds=LONG)) as running:
        assert [line_of(running), line_of(running)] == [1, 1]
        old = zygotes()
        kill_zygote()
        for _ in range(3):
            # It may not be quite dead yet.
            assert sandbox.run(NOTHING).exit_code == 0
            kill_zygote()
        result = running.wait()
    assert (result.ending, result.exit_code) == ("exited", -signal.SIGKILL)
    assert processes_with(mark) == []
    assert sandbox.run(NOTHING).exit_code == 0
    assert set(zygotes()).isdisjoint(old)


@pytest.mark.parametrize("alone", [False, True], ids=["zygote", "no-zygote"])
def test_the_process_in_front_can_be_killed(alone: bool) -> None:
    process, control = front.fork(stdin=False)
    with control:
        if alone:
            kill_zygote()
            deadline = time.monotonic() + 60
            while zygotes():
                assert time.monotonic() < deadline
                os.sched_yield()
        else:
            assert parent_of(process.pid) in zygotes()
        assert process.poll() is None
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        # Nobody has this number any more, or somebody else.
        process.kill()
        process.stop()
    process.close()


def test_a_zygote_that_does_not_start_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = LayeredSandbox()
    kill_zygote()
    with monkeypatch.context() as patch:
        patch.setattr(front, "executable", lambda: "/no/such/interpreter")
        assert b"/no/such/interpreter" in sandbox.run(NOTHING).stderr
        patch.setattr(front, "executable", lambda: "/bin/false")
        result = sandbox.run(NOTHING)
        assert (result.ending, result.stderr) == ("refused", b"the zygote ended with 1: ")
    assert sandbox.run(NOTHING).exit_code == 0


def test_a_process_that_we_fork_has_a_zygote_of_its_own() -> None:
    code = """
import os
from bascule.plugins.sandbox import Program
from bascule.verifiers.sandbox.layered import LayeredSandbox
from tests.verifiers.sandbox.test_front import zygotes
sandbox = LayeredSandbox()
def runs(): return sandbox.run(Program(arguments=("-c", ""), seconds=600)).exit_code == 0
assert runs()
(ours,) = zygotes()
child = os.fork()
if not child:
    good = runs() and len(zygotes()) == 1 and ours not in zygotes()
    os._exit(0 if good else 1)
assert os.waitpid(child, 0)[1] == 0
assert runs() and zygotes() == [ours]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LONG)


def test_all_of_it_dies_with_us(sandbox: LayeredSandbox) -> None:
    mark = secrets.token_hex(8)
    code = f"""
work = "import os, signal; os.fork(); os.write(1, b'x'); signal.pause()"
program = Program(arguments=("-c", work, {mark!r}), seconds=600)
under_way = [sandbox.start(program), sandbox.start(program)]
for running in under_way:
    running.read(2)
"""
    with starter(sandbox, code) as process:
        (zygote,) = zygotes(process.pid)
        assert processes_with(mark)
        process.kill()
        process.wait()
        assert wait_until_gone(mark)
        deadline = time.monotonic() + 60
        # A number that is another's by then is that of no zygote.
        while zygote in processes_with(MARK):
            assert time.monotonic() < deadline, "the zygote outlived us"
            os.sched_yield()
