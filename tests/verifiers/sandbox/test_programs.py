"""What a program gets in the sandbox, what comes back, and what stops it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bascule.plugins.sandbox import Program, Ran
from bascule.verifiers.sandbox import plans
from bascule.verifiers.sandbox.confine import seal
from bascule.verifiers.sandbox.layered import LayeredSandbox
from bascule.verifiers.sandbox.unsafe import UnsafeSandbox
from tests.verifiers.sandbox.remains import processes_with, starter, wait_until_gone

LONG = 600.0
BECOMES = {seal.UID, seal.USER}


def ran(sandbox: LayeredSandbox | UnsafeSandbox, code: str, stdin: bytes = b"", **more: Any) -> Ran:
    return sandbox.run(Program(arguments=("-c", code), **{"seconds": LONG, **more}), stdin)


def told(result: Ran) -> Any:
    assert result.ending == "exited", result
    assert result.exit_code == 0, result
    return json.loads(result.stdout)


def test_it_finds_its_files_and_its_results_come_back(sandbox: LayeredSandbox) -> None:
    program = Program(
        files={"main.py": b"import helper, sys; helper.work(sys.stdin.read())", "helper.py": b"""
import json, os, pathlib
def work(text):
    os.mkdir("out"); pathlib.Path("out/a.txt").write_text(text + pathlib.Path("data/in.txt").read_text())
    print(json.dumps(sorted(os.listdir("."))))
""", "data/in.txt": b"from a file"},
        arguments=("main.py",),
        results=("out/a.txt", "missing"),
        seconds=LONG,
    )  # fmt: skip
    result = sandbox.run(program, b"from stdin, ")
    assert told(result) == ["data", "helper.py", "main.py", "out"]
    assert result.results == {"out/a.txt": b"from stdin, from a file"}


def test_only_plain_files_come_back_and_no_link_is_followed(sandbox: LayeredSandbox) -> None:
    code = """
import os, socket
open("plain", "w").write("yes")
os.symlink("/etc/passwd", "link"); os.symlink("plain", "inner")
os.mkfifo("pipe"); os.mkdir("folder"); os.symlink("/etc", "etc")
"""
    names = ("plain", "link", "inner", "pipe", "folder", "etc/passwd")
    assert ran(sandbox, code, results=names).results == {"plain": b"yes"}


def test_results_that_are_too_large_are_not_read(sandbox: LayeredSandbox) -> None:
    result = ran(
        sandbox, "import os; os.mknod('r', 0o600); os.truncate('r', 2 << 20)", results=("r",), result_bytes=1 << 20
    )
    assert (result.ending, result.results) == ("output", {})


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ""])
def test_a_file_outside_the_folder_is_refused(name: str) -> None:
    result = LayeredSandbox().run(Program(files={name: b""}, arguments=("-c", "")))
    assert result.ending == "refused"
    assert repr(name) in result.stderr.decode()


def test_files_that_do_not_fit_are_refused(sandbox: LayeredSandbox) -> None:
    if not sandbox.mechanisms.own_root:
        # There the watch measures the disk, once the program runs.
        result = ran(sandbox, "import time; time.sleep(600)", files={"big": b"x" * (2 << 20)}, disk_mb=1)
        assert result.ending == "disk"
        return
    result = ran(sandbox, "", files={"big": b"x" * (2 << 20)}, disk_mb=1)
    assert result.ending == "refused"
    assert b"No space left" in result.stderr


def test_status_and_signal_are_passed_on(sandbox: LayeredSandbox) -> None:
    assert ran(sandbox, "raise SystemExit(7)").exit_code == 7
    assert ran(sandbox, "import os; os.abort()").exit_code == -signal.SIGABRT
    assert ran(sandbox, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").exit_code == -signal.SIGKILL


def test_the_environment_is_ours_alone(sandbox: LayeredSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASCULE_SECRET", "s3cret")
    code = "import json, os; print(json.dumps([dict(os.environ), os.getcwd()]))"
    environment, folder = told(ran(sandbox, code))
    environment.pop("LC_CTYPE", None)
    box = plans.Box(environment["HOME"], environment["TMPDIR"], environment["PYTHONPATH"])
    assert environment == plans.environment(None if sandbox.mechanisms.own_root else box)
    assert folder == environment["HOME"]


def test_it_is_an_ordinary_user_without_groups(sandbox: LayeredSandbox) -> None:
    uid, groups = told(ran(sandbox, "import json, os; print(json.dumps([os.getresuid(), os.getgroups()]))"))
    if not BECOMES & set(sandbox.mechanisms.mechanisms):
        assert set(uid) == {os.geteuid()}, "who cannot become another stays who he is"
        return
    assert 0 not in uid
    if seal.UID in sandbox.mechanisms:
        assert plans.FIRST_UID <= uid[0] < plans.FIRST_UID + plans.UIDS
        assert groups == []


def test_programs_of_root_have_each_a_user_id_of_their_own() -> None:
    with ThreadPoolExecutor(4) as pool:
        code = "import os, sys; print(f'{os.getuid():9}', flush=True); sys.stdin.read()"
        program = Program(arguments=("-c", code), seconds=LONG)
        sandbox = LayeredSandbox()
        running = list(pool.map(sandbox.start, [program] * 4))
    uids = [one.read(10) for one in running]
    assert [one.wait().exit_code for one in running] == [0] * 4
    own = os.geteuid() == 0 and BECOMES & set(sandbox.mechanisms.mechanisms)
    assert len(set(uids)) == (4 if own else 1)


def test_time_is_up_for_one_that_ignores_everything(sandbox: LayeredSandbox) -> None:
    mark = secrets.token_hex(8)
    code = f"""
import signal, sys
mark = {mark!r}
for number in set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}:
    signal.signal(number, signal.SIG_IGN)
while True: pass
"""
    result = ran(sandbox, code, seconds=0.5)
    assert (result.ending, result.exit_code) == ("timeout", None)
    assert processes_with(mark) == []


def test_memory_is_counted_over_all_processes(sandbox: LayeredSandbox) -> None:
    code = """
import os, signal
for _ in range(3):
    if os.fork() == 0:
        break
taken = bytearray(48 << 20); taken[::4096] = b"1" * len(taken[::4096])
signal.pause()
"""
    assert ran(sandbox, code, memory_mb=128).ending == "memory"


def test_memory_in_moderation_is_left_alone(sandbox: LayeredSandbox) -> None:
    code = "taken = bytearray(48 << 20); taken[::4096] = b'1' * len(taken[::4096]); print(len(taken))"
    assert told(ran(sandbox, code, memory_mb=128)) == 48 << 20


def test_the_disk_is_limited_over_all_files(sandbox: LayeredSandbox) -> None:
    code = """
import os, time
for number in range(8):
    with open(os.path.join(os.environ["TMPDIR"] if number % 2 else ".", str(number)), "wb") as file:
        file.write(b"x" * (1 << 20))
time.sleep(600)
"""
    assert ran(sandbox, code, disk_mb=3).ending == "disk"


def test_empty_files_without_end_are_stopped(sandbox: LayeredSandbox) -> None:
    code = """
import errno, os, time
try:
    for number in range(20_000):
        os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY))
except OSError as e:
    raise SystemExit(5 if e.errno == errno.ENOSPC else 6)
time.sleep(600)
"""
    result = ran(sandbox, code, disk_mb=1)
    if sandbox.mechanisms.own_root:
        assert result.exit_code == 5, "the file system takes no more"
    else:
        assert result.ending == "disk"


def test_a_folder_of_any_depth_is_removed(sandbox: LayeredSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    # Programs of root's must be able to pass.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        # Deeper than the interpreter recurses, and not so deep that a path is too long for the kernel.
        code = """
import os
for _ in range(1200): os.mkdir("d"); os.chdir("d")
os.chmod("..", 0); print(1)
"""
        assert told(ran(sandbox, code)) == 1
        assert os.listdir(folder) == []


def test_a_tree_too_deep_to_be_measured_counts_as_over_its_disk() -> None:
    # With an own root the file system counts.
    sandbox = LayeredSandbox(without=("namespaces",))
    code = """
import os, time
for _ in range(100): os.mkdir("d" * 99); os.chdir("d" * 99)
time.sleep(600)
"""
    assert ran(sandbox, code).ending == "disk"


@pytest.mark.parametrize("mode", [0, 0o300, 0o600])
def test_what_lies_in_a_closed_folder_counts(mode: int) -> None:
    # With an own root the file system counts.
    sandbox = LayeredSandbox(without=("namespaces",))
    code = f"""
import os, time
os.mkdir("closed")
with open("closed/much", "wb") as file: file.write(bytes(8 << 20))
with open("closed/more", "wb") as file: file.write(bytes(8 << 20))
os.chmod("closed", {mode})
time.sleep(600)
"""
    assert ran(sandbox, code, disk_mb=12).ending == "disk"


def test_memory_that_would_count_as_nobodys_cannot_be_had(sandbox: LayeredSandbox) -> None:
    code = """
import json, mmap, os, socket
def by(action):
    try: action()
    except OSError as e: return type(e).__name__
    return "had"
def zero():
    with open("/dev/zero", "r+b") as file: mmap.mmap(file.fileno(), 4096)
def kept():
    with open("kept", "w+b") as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096) as m: m[:4] = b"kept"
        assert file.read(4) == b"kept"
a, b = socket.socketpair()
print(json.dumps([
    by(lambda: mmap.mmap(-1, 4096)), by(zero),
    *(by(lambda: a.setsockopt(socket.SOL_SOCKET, option, 1 << 20)) for option in (socket.SO_SNDBUF, 32)),
    by(lambda: a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)),
    by(lambda: mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)), by(kept),
]))
"""
    refused = told(ran(sandbox, code))
    assert refused[0] == "PermissionError"
    assert refused[1] in ("FileNotFoundError", "PermissionError")
    assert refused[2:] == ["PermissionError", "PermissionError", "had", "had", "had"]


@pytest.mark.parametrize("stream", [1, 2])
def test_endless_output_is_cut_off(sandbox: LayeredSandbox, stream: int) -> None:
    result = ran(sandbox, f"import os\nwhile True: os.write({stream}, b'x' * 4096)", output_bytes=10_000)
    assert result.ending == "output"
    assert len(result.stdout) + len(result.stderr) == 10_000


def test_threads_but_no_processes_where_forks_are_not_allowed(sandbox: LayeredSandbox) -> None:
    code = """
import ctypes, json, os, subprocess, sys, threading
def by(action):
    try: action()
    except OSError as e: return e.errno
    return 0
libc = ctypes.CDLL(None, use_errno=True)
def raw(*numbers):
    child = libc.syscall(*[ctypes.c_long(n) for n in numbers])
    if child == 0: os._exit(0)
    if child < 0: raise OSError(ctypes.get_errno(), "clone")
clone = 56 if os.uname().machine == "x86_64" else 220
VM, THREAD_LESS = 0x100, 0x4000
stack = ctypes.create_string_buffer(1 << 16)
found = {
    "fork": by(os.fork),
    "spawn": by(lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})),
    "subprocess": by(lambda: subprocess.run([sys.executable, "-c", ""])),
    "clone": by(lambda: raw(clone, 17, 0, 0, 0, 0)),
    "clone3": by(lambda: raw(435, 0, 0, 0, 0, 0)),
}
seen = []
thread = threading.Thread(target=lambda: seen.append(1)); thread.start(); thread.join()
print(json.dumps([found, seen]))
"""
    found, seen = told(ran(sandbox, code, forks=False))
    assert 0 not in found.values(), found
    assert seen == [1]


def test_processes_are_limited(sandbox: LayeredSandbox) -> None:
    code = """
import os, signal
made = []
try:
    while len(made) < 200:
        child = os.fork()
        if not child: signal.pause()
        made.append(child)
except BlockingIOError:
    pass
print(len(made))
"""
    made = told(ran(sandbox, code, processes=12))
    if seal.UID in sandbox.mechanisms:
        assert made == 11
    elif seal.USER in sandbox.mechanisms and os.geteuid() != 0:
        # Before Linux 5.14 the kernel also counts this user's processes outside.
        assert made <= 11
    elif os.geteuid() != 0:
        # The kernel counts all of this user's processes, and others may come and go; root's it does not limit.
        assert made < 200


def test_nothing_outlives_its_program(sandbox: LayeredSandbox) -> None:
    mark = secrets.token_hex(8)
    code = f"""
import os, sys, time
ready, told = os.pipe(); os.set_inheritable(told, True)
if os.fork() == 0:
    try: os.setsid()
    except PermissionError: pass
    if os.fork() == 0:
        code = "import os, signal, sys, time; signal.signal(15, 1); os.close(int(sys.argv[1])); time.sleep(600)"
        os.execv(sys.executable, [sys.executable, "-c", code, str(told), {mark!r}])
    os._exit(0)
os.close(told); os.read(ready, 1)
print(1)
"""
    assert told(ran(sandbox, code)) == 1
    assert processes_with(mark) == []


def test_it_dies_with_whoever_started_it(sandbox: LayeredSandbox) -> None:
    mark = secrets.token_hex(8)
    code = f"""
work = "import os, signal, sys; os.fork(); os.write(1, b'x'); signal.pause()"
running = sandbox.start(Program(arguments=("-c", work, {mark!r}), seconds=600)).__enter__()
running.read(2)
"""
    with starter(sandbox, code) as process:
        assert processes_with(mark)
        process.kill()
        process.wait()
        assert wait_until_gone(mark)


def test_the_processes_that_guard_it_are_out_of_its_reach(sandbox: LayeredSandbox) -> None:
    code = """
import json, os, signal
def by(action):
    try: action()
    except OSError as e: return e.errno
    return 0
found = {}
for pid in {1, os.getppid()} - {0}:
    for name in ("environ", "mem", "maps", "fd", "root", "cwd"):
        path = f"/proc/{pid}/{name}"
        found[path] = by(lambda: os.listdir(path) if name in ("fd", "root", "cwd") else open(path, "rb").read(1))
    by(lambda: os.kill(pid, signal.SIGKILL))
    by(lambda: os.kill(pid, signal.SIGSTOP))
if os.sys.argv[1] == "confined":
    by(lambda: os.kill(-1, signal.SIGKILL))
print(json.dumps(found))
"""
    # With nothing to hold it, the last signal would go to all processes of this user.
    confined = {"landlock", "seccomp"} <= set(sandbox.mechanisms.mechanisms)
    arguments = ("-c", code, "confined" if confined else "not")
    found = told(sandbox.run(Program(arguments=arguments, seconds=LONG)))
    if confined:
        assert 0 not in found.values(), found


def test_a_pinned_program_stays_on_the_one_core(sandbox: LayeredSandbox) -> None:
    code = """
import json, os
def widen():
    try: os.sched_setaffinity(0, range(os.cpu_count()))
    except OSError as e: return e.errno
print(json.dumps([widen(), sorted(os.sched_getaffinity(0))]))
"""
    error, cores = told(ran(sandbox, code, pinned=True))
    assert cores == [max(os.sched_getaffinity(0))]
    assert ("seccomp" in sandbox.mechanisms) == (error is not None)


def test_one_is_spoken_with_over_its_streams(sandbox: LayeredSandbox) -> None:
    code = """
import sys
while data := sys.stdin.buffer.read(4):
    sys.stdout.buffer.write(data[::-1]); sys.stdout.buffer.flush()
sys.stdout.buffer.write(b"x" * 1_000_000); print("bye", file=sys.stderr)
"""
    with sandbox.start(Program(arguments=("-c", code), seconds=LONG)) as running:
        for word in (b"abcd", b"1234"):
            running.write(word)
            assert running.read(4) == word[::-1]
        result = running.wait()
    assert (result.ending, result.exit_code, result.stderr) == ("exited", 0, b"bye\n")


def test_one_that_is_spoken_with_says_why_it_ended(sandbox: LayeredSandbox) -> None:
    with sandbox.start(Program(arguments=("-c", "raise SystemExit(3)"), seconds=LONG)) as over:
        with pytest.raises(EOFError):
            over.read(1)
        assert over.wait().exit_code == 3
    with sandbox.start(Program(arguments=("-c", "import time; time.sleep(600)"), seconds=0.5)) as late:
        with pytest.raises(TimeoutError):
            late.read(1)
        with pytest.raises(TimeoutError):
            late.write(b"x")
        assert late.wait().ending == "timeout"


def test_leaving_the_conversation_kills_it(sandbox: LayeredSandbox) -> None:
    mark = secrets.token_hex(8)
    code = "import signal; print('up', flush=True); signal.pause()"
    with sandbox.start(Program(arguments=("-c", code, mark), seconds=LONG)) as running:
        assert running.read(3) == b"up\n"
        assert processes_with(mark)
    assert processes_with(mark) == []


def test_what_cannot_be_started_is_refused_with_the_reason() -> None:
    program = Program(arguments=("-c", ""), packages=("no-such-distribution",))
    result = LayeredSandbox().run(program)
    assert result.ending == "refused"
    assert b"no-such-distribution" in result.stderr
    with LayeredSandbox().start(program) as running:
        with pytest.raises(EOFError):
            running.read(1)
        assert running.wait() == result


def test_without_a_sandbox_the_clock_and_the_limits_are_the_same() -> None:
    mark = secrets.token_hex(8)
    unsafe = UnsafeSandbox()
    assert told(ran(unsafe, "import json, os; print(json.dumps(os.getuid()))")) == os.getuid()
    code = "import os, signal; os.fork() or os.setsid(); signal.pause()"
    result = unsafe.run(Program(arguments=("-c", code, mark), seconds=0.5))
    assert result.ending == "timeout"
    assert processes_with(mark) == []
    assert ran(unsafe, "while True: print('x' * 999)", output_bytes=5000).ending == "output"
