"""Programs against the sandbox: each unconfined, as a candidate program, and as a harness in an episode."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from bascule.plugins.sandbox import Program
from bascule.runtime.engines.constant import ConstantEngine
from bascule.runtime.episodes.broker import EpisodeSpec, run_episode
from bascule.runtime.episodes.pool import HarnessPool
from bascule.schemas.harness import Harness, make_harness
from bascule.schemas.trajectory import Sampling
from bascule.verifiers.sandbox.layered import LayeredSandbox
from tests.attacks.attack import HERE, Attack, Outcome, line_of, text_of, told
from tests.attacks.planted import Planted, planted
from tests.episodes.seen import episodes
from tests.verifiers.sandbox.remains import processes_with

_MAIN = """
import json, sys
import attack, trying
print(json.dumps(trying.tried(attack.attempts(json.loads(sys.argv[1])))))
"""
_HARNESS = """
import json
import attack, trying
def solve(example, model, tools, context):
    return json.dumps(trying.tried(attack.attempts(example)))
"""
_SECONDS = 300.0
# What an episode's error says where the watch has ended it.
_WATCHED = {"MiB of memory": "memory", "MiB of disk": "disk", "processes and threads": "processes"}


class Aims(msgspec.Struct, frozen=True, kw_only=True):
    """How an attack on the sandbox is made and judged.

    Attributes:
        inside, outside: what it is told at most to do, in the sandbox and out of it, where it must do no harm.
        program, manifest: limits of the candidate program and of the harness.
        ends: by what it may be stopped without having answered.
    """

    inside: dict[str, Any] = {}
    outside: dict[str, Any] = {}
    program: dict[str, Any] = {}
    manifest: dict[str, Any] = {}
    ends: tuple[str, ...] = ()


_FORKS = Aims(
    inside={"forks": 300},
    outside={"forks": 24},
    program={"processes": 16},
    manifest={"processes": 16},
    ends=("processes",),
)
AIMS: dict[str, Aims] = {
    "sealed_by_path": Aims(),
    "sealed_by_environment": Aims(),
    "sealed_by_proc": Aims(),
    "sealed_by_descriptors": Aims(),
    "sealed_by_symlink": Aims(program={"results": ("result",)}),
    "sealed_by_dots": Aims(),
    "network_tcp": Aims(),
    "network_udp": Aims(),
    "network_unix": Aims(),
    "network_dns": Aims(),
    "fork_bomb": _FORKS,
    "memory": Aims(
        inside={"memory_mb": 512},
        outside={"memory_mb": 128},
        program={"memory_mb": 64},
        manifest={"memory_mb": 64},
        ends=("memory",),
    ),
    "disk_fill": Aims(
        inside={"disk_mb": 64},
        outside={"disk_mb": 16},
        program={"disk_mb": 4, "memory_mb": 512},
        manifest={"disk_mb": 4, "memory_mb": 512},
        ends=("disk",),
    ),
    "endless_output": Aims(
        inside={"pieces": 0},
        outside={"pieces": 32},
        program={"output_bytes": 1 << 20},
        manifest={"max_output_bytes": 1 << 20, "timeout_seconds": _SECONDS},
        ends=("output", "output-limit"),
    ),
    "ignore_sigterm": Aims(program={"seconds": 1.0}, manifest={"timeout_seconds": 1.0}, ends=("timeout",)),
    "orphan_children": Aims(),
}
_QUICK = {
    "sealed_by_path",
    "sealed_by_descriptors",
    "sealed_by_symlink",
    "network_unix",
    "fork_bomb",
    "orphan_children",
}


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one play.

    Attributes:
        by: ``answered``, or what it was stopped by.
        got, met: by attempt.
        left: processes of it that are not over.
    """

    by: str
    got: dict[str, str] = {}
    met: dict[str, str] = {}
    said: str = ""
    left: tuple[int, ...] = ()


class Reply(msgspec.Struct):
    got: dict[str, str]
    met: dict[str, str]


def attacks() -> list[Attack]:
    return [
        Attack(name=name, tries=line_of(text_of("programs", name)), play=_player(name), quick=name in _QUICK)
        for name in AIMS
    ]


def _player(name: str) -> Any:
    async def play(folder: Path) -> list[Outcome]:
        with planted(folder) as things:
            control = await asyncio.to_thread(outside, name, things, folder)
            things.heard()
            program = await asyncio.to_thread(as_program, name, things)
            outcomes = [_judged(name, "program", control, program[0], things, program[1])]
            harness = await as_harness(name, things)
            outcomes.append(_judged(name, "harness", control, harness[0], things, harness[1]))
            return outcomes

    return play


def _given(name: str, things: Planted, *, confined: bool) -> dict[str, Any]:
    aims = AIMS[name]
    own = aims.inside if confined else aims.outside
    mark = f"attack-{secrets.token_hex(8)}"
    return {**things.given, **own, "confined": confined, "say": secrets.token_hex(16), "mark": mark}


def outside(name: str, things: Planted, folder: Path) -> str:
    """The same where nothing confines it: what it achieved, in words; empty if nothing."""
    given = _given(name, things, confined=False)
    place = folder / "unconfined"
    place.mkdir()
    for file, text in _files(name).items():
        (place / file).write_text(text)
    command = [sys.executable, "main.py", json.dumps(given)]
    with subprocess.Popen(
        command,
        cwd=place,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(things.descriptor,),
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        if name == "ignore_sigterm":
            assert process.stdout.readline() == b"deaf\n"
            process.terminate()
            # Whether a signal is ignored is a fact of the kernel's, without a wait for what does not happen.
            ignored = _ignores(process.pid, signal.SIGTERM) and process.poll() is None
            process.kill()
            return "went on after SIGTERM" if ignored else ""
        out = process.stdout.read()
    left = processes_with(given["mark"])
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    if name == "orphan_children":
        return "a process that outlived it" if left else ""
    reply = _reply(out.strip().rpartition(b"\n")[2])
    if reply is None:
        return ""
    things.heard()
    return ", ".join(reply.got)


def as_program(name: str, things: Planted) -> tuple[Ended, dict[str, Any]]:
    """In the sandbox, as what a scorer runs."""
    given = _given(name, things, confined=True)
    limits = {"seconds": _SECONDS, "memory_mb": 512, "disk_mb": 16, "processes": 32, **AIMS[name].program}
    files = {file: text.encode() for file, text in _files(name).items()}
    ran = LayeredSandbox().run(Program(files=files, arguments=("main.py", json.dumps(given)), **limits))
    found = _reply(ran.stdout)
    said = ran.stderr[-300:].decode(errors="replace")
    # Only what is taken from the folder afterwards is beyond the program's own report.
    taken = {f"result {file}": data.decode(errors="replace") for file, data in ran.results.items()}
    by = ran.ending if ran.ending != "exited" else "answered" if found is not None else f"exit {ran.exit_code}"
    return Ended(by=by, got={**(found.got if found else {}), **taken}, met=found.met if found else {}, said=said), given


async def as_harness(name: str, things: Planted) -> tuple[Ended, dict[str, Any]]:
    """In a real episode, as an agent's harness."""
    given = _given(name, things, confined=True)
    pool = HarnessPool()
    spec = EpisodeSpec(
        trajectory="g00-dev-0001-n0",
        harness=harness({**_files(name), "harness.py": _HARNESS}, **AIMS[name].manifest),
        example=given,
        sampling=Sampling(),
        seed=1,
    )
    try:
        trajectory = await run_episode(spec, ConstantEngine("7"), pool, dict)
        # Whatever they are called: what runs below the zygote is the episode's.
        left = await _left()
        if trajectory.error is not None:
            kind, message = trajectory.error.kind, trajectory.error.message
            by = next((what for words, what in _WATCHED.items() if words in message), kind)
            return Ended(by=by, said=message, left=left), given
        found = _reply((trajectory.answer or "").encode())
        assert found is not None
        return Ended(by="answered", got=found.got, met=found.met, left=left), given
    finally:
        await pool.close()


async def _left() -> tuple[int, ...]:
    """What still runs below the zygote; a busy machine has a minute to end it."""
    deadline = time.monotonic() + 60
    while (left := episodes()) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return tuple(left)


def harness(files: dict[str, str], **manifest: Any) -> Harness:
    """A harness of these files."""
    settings = {"name": "attack", "timeout_seconds": _SECONDS, "memory_mb": 512, **manifest}
    return make_harness({"system_prompt.md": "", "manifest.json": json.dumps(settings), **files})


def _judged(name: str, place: str, control: str, ended: Ended, things: Planted, given: dict[str, Any]) -> Outcome:
    problems = [f"{way}: {what}" for way, what in ended.got.items()]
    if name == "orphan_children":
        # That it runs for as long as its program is no fault; that it does not would prove nothing.
        problems = [] if "it runs" in ended.got.values() else [f"no orphan was made: {ended.got} {ended.met}"]
    if ended.by != "answered" and ended.by not in AIMS[name].ends:
        problems.append(f"it says nothing: {ended.by}. {ended.said}")
    if ended.by == "answered" and AIMS[name].ends in (("timeout",), ("output", "output-limit")):
        problems.append("it came to its own end")
    if heard := things.heard():
        problems.append(f"heard outside: {heard[:80]!r}")
    if left := [*ended.left, *processes_with(given["mark"])]:
        problems.append(f"processes {left} are left")
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    layers = [ended.by] if ended.by != "answered" else list(ended.met.values())
    if name == "orphan_children":
        layer = "death of all with the first"
        result = f"{', '.join([*ended.got.values(), *ended.met.values()])}; nothing is left after it"
    elif name == "fork_bomb" and ended.by == "answered":
        layer, result = "limit of processes", "; ".join(ended.met.values())
    else:
        layer = ", ".join(dict.fromkeys(filter(None, map(told, layers)))) or "nothing to be seen"
        result = f"stopped by {ended.by}" if ended.by != "answered" else f"{len(ended.met)} attempts, none got through"
    return Outcome(place=place, control=control, layer=layer, result=result, problems=tuple(problems))


def _files(name: str) -> dict[str, str]:
    return {
        "main.py": _MAIN,
        "attack.py": text_of("programs", name),
        "trying.py": (HERE / "trying.py").read_text(encoding="utf-8"),
    }


def _reply(text: bytes) -> Reply | None:
    try:
        return msgspec.json.decode(text, type=Reply)
    except msgspec.DecodeError:
        return None


def _ignores(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(mask, 16) >> (number - 1) & 1)
