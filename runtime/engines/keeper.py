"""Run as a script: a program, and all that it starts, end when this process's standard input does.

A server like vLLM's starts processes of its own, which outlive it when it is killed. They stay in the process group
that this process leads; the pipe's other end closes with its owner, however that one ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

_PATIENCE_SECONDS = 10.0


def keep(argv: list[str]) -> None:
    """Run ``argv`` until it ends or standard input does, then kill the whole group, this process included."""
    os.setsid()
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    threading.Thread(target=_watch, args=(child,), daemon=True).start()
    status = child.wait()
    sys.stderr.write(f"{argv[0]} ended with status {status}\n")
    sys.stderr.flush()
    os.killpg(0, signal.SIGKILL)


def _watch(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_PATIENCE_SECONDS)
        return
    child.kill()


if __name__ == "__main__":
    keep(sys.argv[1:])
