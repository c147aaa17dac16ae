"""Processes that start programs, and finding those that should be over."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bascule.verifiers.sandbox.layered import LayeredSandbox

_LIMIT = 60.0


def processes_with(mark: str) -> list[int]:
    """Processes that have ``mark`` among their arguments."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                if mark.encode() in Path("/proc", name, "cmdline").read_bytes():
                    found.append(int(name))
    return found


def wait_until_gone(mark: str) -> bool:
    """Whether they are gone before a minute is over."""
    deadline = time.monotonic() + _LIMIT
    while time.monotonic() < deadline:
        if not processes_with(mark):
            return True
        os.sched_yield()
    return False


@contextlib.contextmanager
def starter(sandbox: LayeredSandbox, code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has a sandbox like this one, under the name ``sandbox``.

    It runs ``code``; once that is done the process is here, and stays until it is killed or leaves the context.
    """
    without = ("namespaces",) if not sandbox.mechanisms.own_root else ()
    text = f"""
import sys
from bascule.plugins.sandbox import Program
from bascule.verifiers.sandbox.layered import LayeredSandbox
sandbox = LayeredSandbox(without={without!r})
{code}
print("up", flush=True)
sys.stdin.read()
"""
    # What a starter that is killed leaves lies in here; programs of root's must be able to pass.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        with subprocess.Popen(
            [sys.executable, "-c", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": folder},
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield process
