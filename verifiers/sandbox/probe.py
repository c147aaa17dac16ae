"""Does the sandbox hold? Canaries are tried in it, and outside it, where they must get through."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from bascule.plugins.sandbox import Program, Programs, Ran
from bascule.schemas.errors import ConfigError
from bascule.schemas.sandbox import LAYERS, Canary, Layer, SandboxConfig, SandboxReport
from bascule.verifiers.sandbox import plans
from bascule.verifiers.sandbox.confine import seal
from bascule.verifiers.sandbox.layered import LayeredSandbox
from bascule.verifiers.sandbox.packages import executable
from bascule.verifiers.sandbox.plans import Mechanisms
from bascule.verifiers.sandbox.unsafe import UnsafeSandbox

_SOURCE = Path(__file__).with_name("canaries.py")
_CONTROL_SECONDS = 120.0
_SECONDS = 120.0
_MEMORY_MB, _DISK_MB, _OUTPUT = 64, 2, 65536
_LAYER: dict[str, Layer] = {
    "read-planted-secret": "files",
    "read-through-symlink": "files",
    "read-through-dots": "files",
    "read-through-proc-root": "files",
    "read-parent-environment": "files",
    "read-parent-folder": "files",
    "read-parent-descriptor": "files",
    "find-inherited-descriptor": "files",
    "write-outside": "files",
    "tcp": "network",
    "udp": "network",
    "dns": "network",
    "unix-socket": "network",
    "abstract-unix-socket": "network",
    "signal-parent": "processes",
    "signal-other": "processes",
    "trace-other": "processes",
    "see-processes": "processes",
    "fork-many": "processes",
    "fork-where-forbidden": "processes",
    "outlive": "processes",
    "become-root": "privileges",
    "hold-capabilities": "privileges",
    "make-user-namespace": "privileges",
    "mount": "privileges",
    "memory": "memory",
    "output": "memory",
    "disk": "disk",
    "ignore-signals": "time",
}
_WAYS = {
    "EPERM": (seal.SECCOMP, seal.UID, seal.USER),
    "ENOSYS": (seal.SECCOMP,),
    "ENOENT": (seal.ROOT,),
    "ENOTDIR": (seal.ROOT,),
    "EROFS": (seal.ROOT,),
    "ESRCH": (seal.PROCESSES,),
    "EACCES": (seal.LANDLOCK, seal.UID),
    "ENETUNREACH": (seal.NETWORK,),
}
_OTHERWISE = {
    "become-root": (seal.UID, seal.USER),
    "signal-parent": (seal.PROCESSES, seal.UID, seal.LANDLOCK, seal.SECCOMP),
    "signal-other": (seal.PROCESSES, seal.UID, seal.LANDLOCK, seal.SECCOMP),
}
_OF_LIMITS = {"EAGAIN": "limits", "MemoryError": "limits", "ENOSPC": "limits", "EFBIG": "limits"}


# By what matters of a sandbox: its mechanisms, whether it is none, and whose programs they are.
_reports: dict[tuple[Mechanisms, bool, int], SandboxReport] = {}


class Sandbox(Programs, Protocol):
    """A sandbox that can say what it is made of."""

    @property
    def mechanisms(self) -> Mechanisms: ...


def choose(config: SandboxConfig) -> tuple[Programs, SandboxReport]:
    """The sandbox of a run: probed and good enough, or none at all where the run says so.

    Raises:
        ConfigError: a layer that the run requires does not hold.
    """
    if config.unsafe:
        return UnsafeSandbox(), unsafe_report()
    sandbox = LayeredSandbox()
    report = probe(sandbox)
    require(report, config)
    return sandbox, report


def unsafe_report() -> SandboxReport:
    """What there is where there is no sandbox."""
    return SandboxReport(
        kind="unsafe", mechanisms=(), missing=("all layers: the run says unsafe",), holds=(), uid=os.getuid()
    )


def require(report: SandboxReport, config: SandboxConfig) -> None:
    """See to it that every layer holds that the run requires.

    Raises:
        ConfigError: naming each that does not, and what got through.
    """
    if config.unsafe:
        return
    failing = [layer for layer in config.require if layer not in report.holds]
    if not failing:
        return
    through = {
        layer: [canary.name for canary in report.canaries if canary.layer == layer and not canary.held]
        for layer in failing
    }
    told = "; ".join(f"{layer} ({', '.join(names) or 'not probed'})" for layer, names in through.items())
    missing = f" Missing on this machine: {'; '.join(report.missing)}." if report.missing else ""
    raise ConfigError(
        f"The sandbox does not hold what the run requires: {told}.{missing}",
        next_step="Let this user have user namespaces (sysctl user.max_user_namespaces, "
        "kernel.apparmor_restrict_unprivileged_userns) or run as root, require fewer layers "
        "(--set sandbox.require=...), or run without a sandbox: --unsafe-no-sandbox.",
    )


def probe(sandbox: Sandbox) -> SandboxReport:
    """Try all canaries, once per process for each kind of sandbox."""
    kind = (sandbox.mechanisms, isinstance(sandbox, UnsafeSandbox), os.getuid())
    if kind not in _reports:
        _reports[kind] = _probed(sandbox, *kind)
    return _reports[kind]


def _probed(sandbox: Sandbox, mechanisms: Mechanisms, unsafe: bool, uid: int) -> SandboxReport:
    found, unable = tried(sandbox)
    named = tuple(f"{m} {mechanisms.landlock}" if m == seal.LANDLOCK else m for m in mechanisms.mechanisms)
    return SandboxReport(
        kind="unsafe" if unsafe else "layered",
        mechanisms=named,
        missing=(*mechanisms.missing, *unable),
        holds=tuple(layer for layer in LAYERS if all(c.held for c in found if c.layer == layer)),
        canaries=found,
        uid=plans.FIRST_UID if seal.UID in mechanisms else uid,
    )


def tried(sandbox: Sandbox) -> tuple[tuple[Canary, ...], tuple[str, ...]]:
    """The canaries, tried in the sandbox and outside it.

    Returns:
        All of them, and why some could not be tried; those held nothing up.
    """
    with _planted() as given, ThreadPoolExecutor(5) as pool:
        programs = _programs({**given, "confined": True, "orphan": _orphan(given)})
        # Where the kernel counts all processes of a user, those of the others would stand before its forks.
        alone = programs.pop("threads_only")
        inside = {which: pool.submit(sandbox.run, program) for which, program in programs.items()}
        outside = _controls({**given, "confined": False, "orphan": _orphan(given, "un")})
        ran = {which: running.result() for which, running in inside.items()}
        ran["threads_only"] = sandbox.run(alone)
        met = _judged(ran, given)
    canaries = tuple(
        Canary(
            name=name,
            layer=layer,
            held=met[name] is not None,
            control=outside.get(name),
            by=_by(name, met[name], sandbox.mechanisms),
        )
        for name, layer in _LAYER.items()
    )
    return canaries, tuple(
        f"canaries of {which!r}: {one.stderr.decode('utf-8', 'replace')[-500:]}"
        for which, one in ran.items()
        if one.ending == "refused" or (one.ending == "exited" and one.exit_code)
    )


def _programs(given: Mapping[str, Any]) -> dict[str, Program]:
    source = {"canaries.py": _SOURCE.read_bytes()}

    def program(which: str, **more: Any) -> Program:
        limits = {"seconds": _SECONDS, "memory_mb": 512, "disk_mb": 16, "processes": 16, **more}
        arguments = ("canaries.py", json.dumps({**given, "which": which}))
        return Program(files=source, arguments=arguments, **limits)

    return {
        "everything": program("everything"),
        "memory": program("memory", memory_mb=_MEMORY_MB),
        "disk": program("disk", disk_mb=_DISK_MB),
        "output": program("output", output_bytes=_OUTPUT),
        "deaf": program("deaf", seconds=0.4),
        "threads_only": program("threads_only", forks=False),
    }


def _judged(ran: Mapping[str, Ran], given: Mapping[str, Any]) -> dict[str, str | None]:
    """By canary: what it met, None where it got through. One that could not be tried held nothing up."""
    met: dict[str, str | None] = dict.fromkeys(_LAYER, None)
    for which in ("everything", "threads_only"):
        with contextlib.suppress(ValueError):
            met |= json.loads(ran[which].stdout)
    for which, name, ending in (
        ("memory", "memory", "memory"),
        ("disk", "disk", "disk"),
        ("output", "output", "output"),
        ("deaf", "ignore-signals", "timeout"),
    ):
        met[name] = "limits" if ran[which].ending == ending else None
    with contextlib.suppress(ValueError):
        # Refused by the limit of its address space instead of stopped.
        met["memory"] = met["memory"] or json.loads(ran["memory"].stdout)["memory"]
    if Path(given["outside"]).exists():
        met["write-outside"] = None
    met["outlive"] = None if _orphans(_orphan(given)) else "ended with the program"
    return met


def _by(name: str, met: str | None, mechanisms: Mechanisms) -> str:
    """What stopped it, as far as the error tells."""
    if met is None:
        return ""
    if met in _OF_LIMITS:
        return _OF_LIMITS[met]
    return next((way for way in _OTHERWISE.get(name, _WAYS.get(met, ())) if way in mechanisms), met)


@contextlib.contextmanager
def _planted() -> Iterator[dict[str, Any]]:
    """Things to find: a secret, sockets, a process, all ours and harmless."""
    token = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        folder = Path(os.path.realpath(stack.enter_context(tempfile.TemporaryDirectory(prefix="bascule-probe-"))))
        # Open to all: that it cannot be read is to be the sandbox's doing.
        folder.chmod(0o777)
        secret = folder / "secret"
        secret.write_text(token, encoding="utf-8")
        secret.chmod(0o644)
        descriptor = os.open(secret, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        ports = {}
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("dns", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("unix", socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "socket")),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, f"\0bascule-{token}"),
        ):
            listener = stack.enter_context(socket.socket(family, kind))
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen(64)
            ports[name] = listener.getsockname()
        (folder / "socket").chmod(0o777)
        victim = subprocess.Popen(
            [executable(), "-S", "-s", "-c", "import sys;sys.stdin.read()", f"victim-{token}"],
            stdin=subprocess.PIPE,
            env={},
            cwd="/",
        )
        stack.callback(_end, victim)
        here = os.stat(".")
        yield {
            "token": token,
            "secret": str(secret),
            "outside": str(folder / "written"),
            "parent": os.getpid(),
            "victim": victim.pid,
            "descriptor": descriptor,
            "environment": hashlib.sha256(Path("/proc/self/environ").read_bytes()).hexdigest(),
            "folder": [here.st_dev, here.st_ino],
            **{name: ports[name][1] for name in ("tcp", "udp", "dns")},
            "unix": ports["unix"],
            "abstract": f"bascule-{token}",
            "bytes": 192 << 20,
            "files": 8,
            "pieces": 16,
        }


def _controls(given: Mapping[str, Any]) -> dict[str, bool]:
    """The same, unconfined: by canary, whether it got through. Those that could do harm are not tried."""
    outside = Path(given["outside"]).with_name("control")
    given = {**given, "outside": str(outside)}
    found: dict[str, bool] = {}
    with tempfile.TemporaryDirectory(prefix="bascule-probe-") as folder:
        for which in ("everything", "memory", "disk", "threads_only"):
            command = [executable(), "-S", "-s", str(_SOURCE), json.dumps({**given, "which": which})]
            with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
                ran = subprocess.run(
                    command,
                    cwd=folder,
                    pass_fds=(given["descriptor"],),
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    timeout=_CONTROL_SECONDS,
                    check=False,
                )
                found |= {name: met is None for name, met in json.loads(ran.stdout).items()}
    orphans = _orphans(given["orphan"])
    found["outlive"] = bool(orphans)
    for pid in orphans:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return found


def _orphan(given: Mapping[str, Any], how: str = "") -> str:
    return f"orphan-{how}confined-{given['token']}"


def _orphans(mark: str) -> list[int]:
    """Processes that a canary left behind."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                if mark.encode() in Path("/proc", name, "cmdline").read_bytes():
                    found.append(int(name))
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
