"""A harness sees itself, its example and its channel: no file of ours, no process, no network, no other episode.

Each attempt is made unconfined as well, where it must succeed, or the test would prove nothing. The same holds for an
ordinary user (``test_all_of_it_holds_for_an_ordinary_user``).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bascule.runtime.episodes import confinement, host
from bascule.runtime.episodes.batch import Batch
from bascule.runtime.episodes.broker import EpisodeSpec, run_episode
from bascule.runtime.episodes.episode import Limits
from bascule.runtime.episodes.host import EpisodeProcessError
from bascule.runtime.episodes.pool import HarnessPool
from bascule.schemas.harness import Harness, make_harness
from bascule.schemas.trajectory import EpisodeError, Sampling
from bascule.verifiers.privileges import SCORING_UID
from bascule.verifiers.sandbox import plans
from bascule.verifiers.sandbox.confine import seal
from bascule.verifiers.sandbox.layered import mechanisms_here
from tests import ordinary_user
from tests.episodes.test_broker import CannedEngine
from tests.episodes.test_pool import PATIENT, Heard, play

ATTEMPTS = """
import ctypes, os, socket, subprocess, sys, time

def attempts(given):
    def readable(path):
        with open(path, 'rb') as file:
            return given['secret'].encode() in file.read(1 << 20)
    def linked():
        os.symlink(given['file'], 'link')
        return readable('link')
    def connected(family, address):
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.settimeout(10)
            s.connect(address)
        return True
    def sent():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            return s.sendto(b'x', ('127.0.0.1', given['port'])) == 1
    def written(path):
        with open(path, 'w') as file:
            file.write('x')
        os.unlink(path)
        return True
    def listed():
        return any(given['mark'] in open(f'/proc/{n}/cmdline').read() for n in os.listdir('/proc') if n.isdecimal())
    runtime = given['runtime']
    yield 'secret by path', lambda: readable(given['file'])
    yield 'secret by ..', lambda: readable('../' * 40 + given['file'])
    yield 'secret by link', linked
    yield 'secret by root of the runtime', lambda: readable(f"/proc/{runtime}/root{given['file']}")
    yield 'secret by descriptor of the runtime', lambda: readable(f"/proc/{runtime}/fd/{given['descriptor']}")
    yield 'environment of the runtime', lambda: readable(f'/proc/{runtime}/environ')
    yield 'the runtime among the processes', listed
    yield 'write beside the secret', lambda: written(given['file'] + '-more')
    yield 'tcp', lambda: connected(socket.AF_INET, ('127.0.0.1', given['port']))
    yield 'udp', sent
    yield 'unix', lambda: connected(socket.AF_UNIX, given['socket'])
    yield 'abstract', lambda: connected(socket.AF_UNIX, chr(0) + given['abstract'])
    yield 'signal', lambda: os.kill(runtime, 0) is None

def solve(example, model, tools, context):
    done = []
    for name, attempt in attempts(example):
        try:
            if attempt():
                done.append(name)
        except Exception:
            pass
    return '|'.join(done)
"""
ALL = {
    *("secret by path", "secret by ..", "secret by link", "secret by root of the runtime"),
    *("secret by descriptor of the runtime", "environment of the runtime", "the runtime among the processes"),
    *("write beside the secret", "tcp", "udp", "unix", "abstract", "signal"),
}
NAMES = ["all", "no-namespaces", "unsafe"]
LEAVING = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)

def solve(example, model, tools, context):
    found = []
    for folder in {os.path.realpath(name) for name in ('/tmp', '/dev/shm', '/var/tmp', '.', os.environ['HOME'])}:
        path = os.path.join(folder, example['mark'])
        try:
            if os.path.exists(path):
                found.append(path)
            open(path, 'w').close()
        except OSError:
            pass
    key = example['key']
    if libc.shmget(key, 4096, 0) >= 0:
        found.append('shm')
    libc.shmget(key, 4096, 0o1666)
    if libc.msgget(key, 0) >= 0:
        found.append('msg')
    libc.msgget(key, 0o1666)
    return repr(found)
"""


def harness(code: str) -> Harness:
    return make_harness({"harness.py": code, "system_prompt.md": "", "manifest.json": json.dumps({"name": "x"})})


async def error_of(pool: HarnessPool, code: str, **manifest: Any) -> EpisodeError:
    """What an episode ends by."""
    text = json.dumps({"name": "x", "timeout_seconds": 60.0, **manifest})
    spec = EpisodeSpec(
        trajectory="g00-dev-0001-n0",
        harness=make_harness({"harness.py": code, "system_prompt.md": "", "manifest.json": text}),
        example={},
        sampling=Sampling(),
        seed=1,
        batch=Batch(key="g00-dev") if manifest.get("isolation") == "batch" else None,
    )
    played = await run_episode(spec, CannedEngine(), pool, dict)
    assert played.error is not None, played.answer
    return played.error


@pytest.fixture
def given(tmp_path: Path) -> Iterator[dict[str, object]]:
    """A secret in a file and in the runtime's environment, and doors of three kinds to knock at."""
    secret = os.urandom(16).hex()
    file = tmp_path / "secret"
    file.write_text(secret)
    abstract = f"bascule-{secret}"
    with (
        file.open() as opened,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as hidden,
    ):
        # A socket's path is short, and a test's folder may be long.
        unix.bind("/tmp/" + abstract)
        unix.listen()
        hidden.bind("\0" + abstract)
        hidden.listen()
        yield {
            "secret": secret,
            "mark": "pytest",
            "file": str(file),
            "runtime": os.getpid(),
            "descriptor": opened.fileno(),
            "port": tcp.getsockname()[1],
            "socket": "/tmp/" + abstract,
            "abstract": abstract,
        }
        Path("/tmp/" + abstract).unlink()


async def tried(pool: HarnessPool, given: dict[str, object]) -> set[str]:
    heard = Heard()
    opening = json.dumps({"example": given, "seed": 1, "tools": []}).encode()
    outcome = await pool.run(harness(ATTEMPTS), opening, heard, limits=PATIENT)
    await pool.close()
    assert heard.answer is not None, outcome
    return set(filter(None, heard.answer.split("|")))


@pytest.mark.parametrize("without", [(), ("namespaces",), ("landlock",)], ids=["all", "no-namespaces", "no-landlock"])
async def test_nothing_of_ours_can_be_reached(given: dict[str, object], without: tuple[str, ...]) -> None:
    pool = HarnessPool(without=without)
    here = mechanisms_here(without)
    if not (here.own_root or seal.LANDLOCK in here) or not (seal.NETWORK in here or seal.SECCOMP in here):
        with pytest.raises(EpisodeProcessError, match="cannot be confined"):
            await pool.start()
        return
    await pool.start()
    assert await tried(pool, given) == set()


async def test_unconfined_all_of_it_can_be_reached(given: dict[str, object]) -> None:
    # The environment is the one that the process began with: a secret set since then is not there.
    assert await tried(HarnessPool(unsafe=True), given) >= ALL - {"environment of the runtime", "signal"}


@pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["all", "no-namespaces"])
async def test_an_episode_finds_nothing_that_the_one_before_it_left(without: tuple[str, ...]) -> None:
    mark = f"left-{os.urandom(8).hex()}"
    key = int.from_bytes(os.urandom(3), "big") + 1
    opening = json.dumps({"example": {"mark": mark, "key": key}, "seed": 1, "tools": []}).encode()
    pool = HarnessPool(without=without)
    for _ in range(2):
        heard = Heard()
        await pool.run(harness(LEAVING), opening, heard, limits=PATIENT)
        assert heard.answer == "[]"
    await pool.close()


@pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["all", "no-namespaces"])
async def test_packages_are_those_that_the_manifest_names(without: tuple[str, ...]) -> None:
    code = """
import importlib

def solve(example, model, tools, context):
    there = []
    for name in ('numpy', 'bascule.schemas', 'msgspec', 'pytest'):
        try:
            importlib.import_module(name)
            there.append(name)
        except (ImportError, PermissionError):
            pass
    return repr(there)
"""
    pool = HarnessPool(without=without)
    for packages, expected in ((["numpy"], "['numpy']"), ([], "[]")):
        manifest = json.dumps({"name": "x", "packages": packages})
        files = {"harness.py": code, "system_prompt.md": "", "manifest.json": manifest}
        outcome, heard = await play(pool, make_harness(files))
        assert heard.answer == expected, outcome
    await pool.close()


async def test_memory_of_all_processes_of_an_episode_together_is_limited() -> None:
    code = """
import os, time

def solve(example, model, tools, context):
    for _ in range(8):
        if os.fork() == 0:
            break
    kept = bytearray(os.urandom(1 << 20) * 32)
    time.sleep(1000)
"""
    pool = HarnessPool()
    outcome, _ = await play(pool, harness(code), Limits(seconds=60.0, memory_bytes=128 << 20))
    await pool.close()
    assert outcome.ending == "memory"


# None goes on for ever: where it is not stopped, the test fails by the time limit, and the machine is whole.
FILLING = {
    "small files": "for n in range(4096): write(n, 1 << 14)",
    "empty files": "for n in range(20_000): write(n, 0)",
    "files in depth": "for n in range(100): os.mkdir('d' * 99); os.chdir('d' * 99); write(n, 1 << 19)",
}


@pytest.mark.parametrize("options", [{}, {"without": ("namespaces",)}, {"unsafe": True}], ids=NAMES)
@pytest.mark.parametrize("isolation", ["episode", "batch"])
@pytest.mark.parametrize("how", FILLING)
async def test_what_fills_the_disk_is_stopped(options: dict[str, Any], isolation: str, how: str) -> None:
    code = f"""
import os, time

def write(number, size):
    with open(str(number), 'wb') as file:
        file.write(bytes(size))

def solve(example, model, tools, context):
    {FILLING[how]}
    time.sleep(1000)
"""
    pool = HarnessPool(**options)
    error = await error_of(pool, code, isolation=isolation, disk_mb=4)
    await pool.close()
    rooted = not options.get("unsafe") and mechanisms_here(options.get("without", ())).own_root
    assert error.kind == "crash"
    assert ("No space left on device" if rooted else "4 MiB of disk") in error.message


@pytest.mark.parametrize("options", [{}, {"without": ("namespaces",)}, {"unsafe": True}], ids=NAMES)
@pytest.mark.parametrize(
    ("make", "refused"),
    [
        ("os.fork() or time.sleep(1000)", "Resource temporarily unavailable"),
        ("threading.Thread(target=time.sleep, args=(1000,)).start()", "can't start new thread"),
    ],
    ids=["processes", "threads"],
)
async def test_who_makes_processes_or_threads_without_end_is_stopped(
    options: dict[str, Any], make: str, refused: str
) -> None:
    code = f"""
import os, threading, time

def solve(example, model, tools, context):
    threading.stack_size(1 << 16)
    for _ in range(400):
        {make}
    time.sleep(1000)
"""
    pool = HarnessPool(**options)
    error = await error_of(pool, code)
    await pool.close()
    here = () if options.get("unsafe") else mechanisms_here(options.get("without", ())).mechanisms
    assert error.kind == "crash"
    assert (refused if {seal.UID, seal.USER} & set(here) else "32 processes and threads") in error.message


async def test_a_machine_that_offers_no_confinement_is_refused_unless_it_is_asked_to_be_unsafe() -> None:
    nothing = ("namespaces", "landlock", "seccomp")
    with pytest.raises(EpisodeProcessError, match="cannot be confined") as refused:
        await HarnessPool(without=nothing).start()
    assert "unsafe" in str(refused.value.next_step)
    pool = HarnessPool(unsafe=True)
    _, heard = await play(pool, harness("def solve(e, *_):\n    return e['q']\n"))
    await pool.close()
    assert heard.answer == "why"


def test_user_ids_of_episodes_programs_and_the_scorer_are_different_ones() -> None:
    episodes = range(confinement.FIRST_UID, confinement.FIRST_UID + confinement.UIDS)
    programs = range(plans.FIRST_UID, plans.FIRST_UID + plans.UIDS)
    kinds = [set(episodes), set(programs), {SCORING_UID}, {ordinary_user.UID}]
    assert len(set().union(*kinds)) == sum(map(len, kinds))
    assert all(0 < uid < 65534 for uid in episodes)


async def test_what_confines_is_told() -> None:
    zygote = await host.ZygoteHost.spawn()
    await zygote.close()
    assert "seccomp" in zygote.mechanisms
    assert all(": " in reason for reason in zygote.missing)


def test_all_of_it_holds_for_an_ordinary_user() -> None:
    with ordinary_user.folder() as home:
        chosen = "packages or reached or finds_nothing or runs_once or reach_one or stopped"
        files = ("tests/episodes/test_confined.py", "tests/episodes/test_batch.py")
        ran = ordinary_user.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files],
            home=home,
        )
    assert ran.returncode == 0, ran.stdout[-6000:]


def test_it_holds_for_the_root_of_a_container_which_may_not_mount_and_reads_by_override() -> None:
    """Without CAP_SYS_ADMIN (21) and CAP_DAC_READ_SEARCH (2); who has none of them anyway has none to drop."""
    program = """
import os, sys
from bascule.verifiers.sandbox.confine import kernel
for capability in (21, 2):
    if os.geteuid() == 0:
        kernel.prctl(24, capability)  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]])
"""
    chosen = "packages or reached or finds_nothing"
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen, "tests/episodes/test_confined.py"]
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ordinary_user.ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-6000:]
