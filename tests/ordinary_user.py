"""Runs commands as an ordinary user, from root or as the user that one is.

As root, the command gets a user id of its own, no groups and no capabilities. Where the interpreter or the checkout lie
in folders that only root may enter, as below /root, a mount namespace of the command alone shows them at their paths.
Where root itself may not mount, the command keeps the capability to read them instead, and the one to pass it on; since
that counts for nothing in a user namespace, it gets none, as in most containers in which root may not mount.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bascule.verifiers.sandbox.confine import kernel, syscalls

# One of 200 that nobody has, so that two test runs at one time do not count as one user's processes.
UID = 61200 + os.getpid() % 200
ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 1800
_CAP_SETPCAP = 1 << 8


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder of the ordinary user's."""
    path = Path(tempfile.mkdtemp(prefix="bascule-user-"))
    try:
        if os.geteuid() == 0:
            os.chown(path, UID, UID)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def run(
    command: Sequence[str], *, home: Path, environment: Mapping[str, str] | None = None, seconds: float = _SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout; its output is text.

    Args:
        home: of :func:`folder`; home and temporary folder.
        environment: added to a small one.
    """
    given = {
        "HOME": str(home),
        "TMPDIR": str(home),
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(home / "hypothesis"),
        **(environment or {}),
    }
    if os.geteuid() == 0:
        command = [sys.executable, "-m", "tests.ordinary_user", str(UID), *command]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=given,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )


def _show(paths: Sequence[str]) -> None:
    """Make folders that lie behind closed ones enterable, in a mount namespace of this process's own."""
    hidden: dict[str, list[str]] = {}
    for path in paths:
        closed = [p for p in [*map(str, Path(path).parents), path][::-1] if not os.stat(p).st_mode & 0o001]
        if closed:
            hidden.setdefault(min(closed, key=len), []).append(path)
    if not hidden:
        return
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    for cover, inner in hidden.items():
        held = {path: os.open(path, os.O_PATH) for path in inner}
        kernel.mount("cover", cover, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0755")
        for path, descriptor in held.items():
            os.makedirs(path, 0o755, exist_ok=True)
            kernel.mount(f"/proc/self/fd/{descriptor}", path, flags=kernel.MS_BIND | kernel.MS_REC)
            os.close(descriptor)


def _become_reader(uid: int, kept: int) -> None:
    """Become a user who keeps these capabilities, a bit set, in all that he runs, and may pass them on once more."""
    kernel.prctl(kernel.PR_SET_SECUREBITS, 0b1111)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    kernel.set_capabilities(kept)
    for capability in range(32):
        if kept >> capability & 1:
            kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_RAISE, capability)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    _refuse_namespaces()


def _refuse_namespaces() -> None:
    """Have the kernel answer ``unshare`` with EPERM, as a filter of system calls says (``linux/seccomp.h``)."""
    number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
    # Load the number; if it is that one, go on to the error, else to the call.
    steps = ((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000))
    syscalls.install(b"".join(struct.pack("HBBI", *step) for step in steps))


def main() -> None:
    base = sysconfig.get_config_var("installed_base")
    kept = 0
    try:
        _show([os.path.realpath(p) for p in dict.fromkeys((base, sys.prefix, str(ROOT)))])
    except PermissionError:
        ours = kernel.permitted_capabilities()
        kept = next((c for c in (kernel.CAP_DAC_READ_SEARCH, kernel.CAP_DAC_OVERRIDE) if ours & c), 0) | _CAP_SETPCAP
    # The folder that we came in is the one that was covered.
    os.chdir(ROOT)
    uid, *command = sys.argv[1:]
    if kept:
        _become_reader(int(uid), kept)
    else:
        kernel.drop_privileges(int(uid), int(uid), become=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
