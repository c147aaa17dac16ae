"""Which mechanisms this machine offers to this user: each is tried, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

from . import kernel, landlock, seal, syscalls

_IN_ORDER = (seal.NETWORK, seal.IPC, seal.HOST, seal.ROOT, seal.PROCESSES, seal.PROC)


def available(without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What :func:`seal.seal` can use.

    The calling process must have one thread.

    Args:
        without: mechanisms that are not to be used; ``namespaces`` stands for all that are namespaces.

    Returns:
        ``mechanisms``, for a plan; ``landlock``: its version; ``missing``: what is not there, and why.
    """
    found: list[str] = []
    missing: list[str] = []
    spaces = "namespaces" not in without
    root = os.geteuid() == 0
    if not root and spaces and seal.USER not in without:
        _note(seal.USER, _tried([seal.USER]), found, missing)
    if spaces and (root or seal.USER in found):
        for name in _IN_ORDER:
            if name == seal.PROC and not {seal.ROOT, seal.PROCESSES} <= set(found):
                continue
            if name not in without:
                _note(name, _tried([*found, name]), found, missing)
        if found == [seal.USER]:
            found.clear()
    else:
        missing += [f"{name}: not tried" for name in _IN_ORDER if name != seal.PROC]
    if root:
        _note(seal.UID, _in_a_fork(lambda _: kernel.drop_privileges(61184, 61184, become=True)), found, missing)
    version = landlock.version()
    if version and seal.LANDLOCK not in without:
        _note(seal.LANDLOCK, _in_a_fork(_landlock), found, missing)
    else:
        missing.append(f"{seal.LANDLOCK}: {'not to be used' if version else 'not in this kernel'}")
    if not syscalls.supported():
        missing.append(f"{seal.SECCOMP}: no table of system calls for {os.uname().machine}")
    elif seal.SECCOMP in without:
        missing.append(f"{seal.SECCOMP}: not to be used")
    else:
        _note(seal.SECCOMP, _in_a_fork(_seccomp), found, missing)
    return {"mechanisms": found, "landlock": version if seal.LANDLOCK in found else 0, "missing": missing}


def _note(name: str, error: str, found: list[str], missing: list[str]) -> None:
    if error:
        missing.append(f"{name}: {error}")
    else:
        found.append(name)


def _tried(mechanisms: list[str]) -> str:
    """Confine a process by these, with one folder to see.

    Returns:
        Why it could not be done; empty if it could.
    """
    with tempfile.TemporaryDirectory(prefix="bascule-") as folder:
        plan = {
            "mechanisms": mechanisms,
            "uid": 61184,
            "gid": 61184,
            "read_only": [[os.path.realpath(folder), os.path.realpath(folder)]],
            "devices": ["/dev/null"],
            "scratch": {"bytes": 1 << 20, "inodes": 16, "folders": ["/work"]},
        }
        return _in_a_fork(lambda says: seal.seal(plan, [says]))


def _landlock(_: int) -> None:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    landlock.restrict([("/usr", landlock.READ)])
    with contextlib.suppress(PermissionError):
        os.listdir("/")
        raise OSError("it does not restrict")


def _seccomp(_: int) -> None:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.install(syscalls.program())
    with contextlib.suppress(PermissionError):
        kernel.unshare(0)
        raise OSError("it does not restrict")


def _in_a_fork(action: Callable[[int], None]) -> str:
    """Do it in a process of its own, which may say why not on a descriptor; the reason why it failed, or nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reading)
            try:
                action(writing)
                status = 0
            except (OSError, ValueError, KeyError) as e:
                os.write(writing, f"{e}".encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said or ("" if ended == 0 else f"ended with {ended}")
