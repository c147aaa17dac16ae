"""Runs commands as an ordinary user, from root or as the user that one is.

As root, the command gets a user id of its own, no groups and no capabilities. Where the interpreter or the checkout lie
in folders that only root may enter, as below /root, a mount namespace of the command alone shows them at their paths.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bascule.verifiers.sandbox.confine import kernel

# One of 200 that nobody has, so that two test runs at one time do not count as one user's processes.
UID = 61200 + os.getpid() % 200
ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 600


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


def main() -> None:
    base = sysconfig.get_config_var("installed_base")
    _show([os.path.realpath(p) for p in dict.fromkeys((base, sys.prefix, str(ROOT)))])
    # The folder that we came in is the one that was covered.
    os.chdir(ROOT)
    uid, *command = sys.argv[1:]
    kernel.drop_privileges(int(uid), int(uid), become=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
