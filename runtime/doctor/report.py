"""All checks at one time, each in its own process and within the time that is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from bascule.plugins.redactors.secrets import Secrets
from bascule.runtime.doctor.finding import BEGUN, Asked, Finding, Outcome
from bascule.runtime.redaction import Redaction
from bascule.schemas.run import RunConfig

SECONDS = 15.0
_LAST = 300


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a check's process says: a finding, the configuration, or that it is done."""

    finding: Finding | None = None
    config: RunConfig | None = None
    done: bool = False


class Check(NamedTuple):
    """A check.

    Attributes:
        function: ``module:function`` that yields findings.
        about: what a person is told where it does not come to an end.
        when: it can begin: ``at once``, once the configuration is made, or once the GPU is known as well.
        late: what it counts as if its time is up.
    """

    function: str
    about: str
    when: str = "configuration"
    late: Outcome = "fails"


_HERE = "bascule.runtime.doctor"
#: In the order of the report.
CHECKS: dict[str, Check] = {
    "versions": Check(f"{_HERE}.packages:check_versions", "versions", "configuration or none"),
    "imports": Check(f"{_HERE}.packages:check_imports", "imports", "configuration or none", "warns"),
    "plugins": Check(f"{_HERE}.configured:check_plugins", "plugins", "at once"),
    "configuration": Check(f"{_HERE}.configured:check_configuration", "configuration"),
    "task": Check(f"{_HERE}.configured:check_task", "task"),
    "model": Check(f"{_HERE}.configured:check_model", "model"),
    "gpu": Check(f"{_HERE}.machine:check_gpu", "gpu", "at once", "warns"),
    "memory": Check(f"{_HERE}.room:check_memory", "memory", "gpu"),
    "disk": Check(f"{_HERE}.room:check_disk", "disk", "configuration or none"),
    "sandbox": Check(f"{_HERE}.machine:check_sandbox", "sandbox", "configuration or none"),
    "server": Check(f"{_HERE}.machine:check_server", "nats-server", "at once"),
    "home": Check(f"{_HERE}.home:check_home", "home", "at once"),
    "endpoints": Check(f"{_HERE}.endpoints:check_endpoints", "endpoints"),
}


def examine(asked: Asked, *, seconds: float = SECONDS, told: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Run every check that can be run.

    Args:
        seconds: bound for all of it; a check that is not done then is a finding.
        told: is given the name of each check that has ended.
    """
    deadline = time.monotonic() + seconds

    def run(name: str, given: Asked) -> list[Line]:
        lines = _bounded(name, given, deadline - time.monotonic(), seconds)
        told(name)
        return lines

    with ThreadPoolExecutor(len(CHECKS) + 1) as pool:
        making = pool.submit(run, "configure", asked)
        found: dict[str, Future[list[Line]]] = {
            name: pool.submit(run, name, asked) for name, check in CHECKS.items() if check.when == "at once"
        }
        made = making.result()
        config = next((line.config for line in made if line.config is not None), None)
        known = msgspec.structs.replace(asked, config=config)
        for name, check in CHECKS.items():
            if check.when == "configuration or none" or (check.when == "configuration" and config is not None):
                found[name] = pool.submit(run, name, known)
        if config is not None:
            free = [line.finding.figures.get("free") for line in found["gpu"].result() if line.finding is not None]
            most = max((size for size in free if size is not None), default=None)
            found["memory"] = pool.submit(run, "memory", msgspec.structs.replace(known, gpu_free=most))
        results = {name: future.result() for name, future in found.items()}
    refused = [line.finding for line in made if line.finding is not None]
    lines: list[Finding] = []
    for name in CHECKS:
        if name == "configuration":
            lines += refused
        findings = (line.finding for line in results.get(name, []))
        lines += [finding for finding in findings if finding is not None and finding.found != BEGUN]
    return lines


def _bounded(name: str, asked: Asked, left: float, allowed: float) -> list[Line]:
    """The lines of one check; a last one says so if it did not come to its end."""
    check = CHECKS.get(name, Check("", "configuration"))
    try:
        process = subprocess.Popen(
            # Not from the working folder: a file there may have any name.
            [sys.executable, "-P", "-m", __package__ or "bascule.runtime.doctor", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as e:
        what = f"no process can be started: {e}"
        return [_broken(check.about, what, "See the limits of this user (`ulimit -a`).", "fails")]
    late = False
    try:
        out, err = process.communicate(msgspec.json.encode(asked), timeout=max(left, 0.1))
    except subprocess.TimeoutExpired:
        late = True
        _kill(process)
        out, err = _rest(process)
    finally:
        _kill(process)
    lines = [msgspec.json.decode(line, type=Line) for line in out.splitlines() if line.endswith(b"}")]
    if lines and lines[-1].done:
        return lines
    # Something that is begun is what it hung or ended in.
    last = lines[-1].finding if lines else None
    about = last.about if last is not None and last.found == BEGUN else check.about
    if late:
        what = f"was not done when the {allowed:g} s for all checks were over"
        return [*lines, _broken(about, what, f"Run it again with --seconds {allowed * 4:g}.", check.late)]
    # Before it is cut: a part of a key is not known for one.
    told = Redaction([Secrets()]).text(err.decode("utf-8", "replace"))
    said = " ".join(told.split())[-_LAST:]
    what = f"the process that looked ended with status {process.returncode}" + (f": {said}" if said else "")
    return [*lines, _broken(about, what, "Run it again with BASCULE_DEBUG=1 `bascule plugins`.", "fails")]


def _broken(about: str, found: str, next_step: str, outcome: Outcome) -> Line:
    return Line(finding=Finding(about=about, outcome=outcome, found=found, next_step=next_step))


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _rest(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What it had said; without waiting for who else may hold its output."""
    try:
        return process.communicate(timeout=1)
    except subprocess.TimeoutExpired as e:
        return e.stdout or b"", e.stderr or b""
