"""Start a program by ``confine/launcher.py``: its plan, its folders, its streams, its files."""

from __future__ import annotations

import contextlib
import functools
import marshal
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from bascule.plugins.sandbox import Program, Ran
from bascule.verifiers.sandbox import folder, front, plans, processes
from bascule.verifiers.sandbox.confine.launcher import LENGTH
from bascule.verifiers.sandbox.confine.removal import remove_tree
from bascule.verifiers.sandbox.front import Front
from bascule.verifiers.sandbox.packages import Mount, executable
from bascule.verifiers.sandbox.watched import Started

_START_SECONDS = 60.0
_MOST_SAID = 4000


class NotStarted(Exception):
    """A program could not be started; the message says why."""


def refused(why: str) -> Ran:
    return Ran(ending="refused", stderr=why.encode("utf-8", "replace"))


def launch(
    plan: Mapping[str, Any],
    program: Program,
    *,
    ours: int,
    stdin: bool,
    box: Path | None,
    owner: int | None,
    environment: Mapping[str, str],
    release: Callable[[], object],
) -> Started:
    """Start a program, confined as the plan says.

    Args:
        plan: of :func:`plans.plan`.
        ours: processes besides the program's below the one in front.
        stdin: whether its standard input is a pipe; otherwise it is empty.
        box: the folder of this machine that holds its folders; None where it has its own root.
        owner: whom the files are to belong to.
        release: called when all is over.

    Raises:
        NotStarted: with the reason; ``release`` has been called.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(release)
        plan = {
            **msgspec.to_builtins(plan),
            # Where the installation's own site-packages cannot be hidden, they are not looked for.
            "arguments": [executable(), *(("-S",) if box else ()), "-s", "-B", *program.arguments],
            "environment": dict(environment),
        }
        try:
            process, control = front.fork(stdin=stdin)
        except (front.NotForked, OSError) as e:
            raise NotStarted(str(e)) from e
        undo.callback(_end, process)
        undo.enter_context(control)
        control.settimeout(_START_SECONDS)
        try:
            data = marshal.dumps(plan)
            control.sendall(len(data).to_bytes(LENGTH, "big") + data)
            said, descriptors, _, _ = socket.recv_fds(control, _MOST_SAID, 1)
            if not descriptors:
                raise NotStarted(_reason(said, process))
            undo.callback(os.close, descriptors[0])
            folder.put(descriptors[0], program.files, owner)
            control.sendall(b"g")
            if said := control.recv(_MOST_SAID):
                raise NotStarted(_reason(said, process))
        except (OSError, ValueError) as e:
            raise NotStarted(f"{type(e).__name__}: {e}") from e
        undo.pop_all()
        control.close()
    return Started(
        process=process,
        folder=descriptors[0],
        ours=ours,
        used=(
            functools.partial(folder.used, str(box), plans.inodes(program.disk_mb))
            if box is not None
            else functools.partial(_used_of_file_system, descriptors[0])
        ),
        disk=program.disk_mb << 20,
        release=release,
    )


def _reason(said: bytes, process: Front) -> str:
    if said:
        return said.decode("utf-8", "replace")
    ended = process.wait(_START_SECONDS)
    if ended is None:
        return "the launcher gave no answer"
    # It is over, and so is all that could have this pipe open.
    printed = process.stderr.readall() or b""
    return f"the launcher ended with {ended}: {printed.decode('utf-8', 'replace')[-_MOST_SAID:]}"


def _end(process: Front) -> None:
    process.kill()
    process.stop()
    process.wait(_START_SECONDS)
    process.close()


def _used_of_file_system(descriptor: int) -> int:
    status = os.fstatvfs(descriptor)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def make_box(owner: int | None, packages: tuple[Mount, ...] = ()) -> Path:
    """Folders of this machine for a program without a root of its own: to work in, and links to its packages.

    Raises:
        OSError: there is no room, or no right.
    """
    base = Path(tempfile.mkdtemp(prefix="bascule-box-"))
    try:
        # Its owner is we, who let others through but not look around.
        base.chmod(0o711)
        for name in ("work", "tmp"):
            (base / name).mkdir(0o700)
            if owner is not None:
                os.chown(base / name, owner, owner)
        (base / "packages").mkdir(0o755)
        (base / "packages").chmod(0o755)
        for source, target in packages:
            link = base / target.lstrip("/")
            link.parent.mkdir(0o755, parents=True, exist_ok=True)
            link.symlink_to(source)
    except OSError:
        remove_tree(str(base))
        raise
    return base


def folders_of(box: Path) -> plans.Box:
    return plans.Box(str(box / "work"), str(box / "tmp"), str(box / "packages"))


_uids_lock = threading.Lock()
_uids_taken: set[int] = set()


def take_uid() -> int:
    """A user id for one program alone, so that what the kernel counts by user is counted by program."""
    with _uids_lock:
        used = _uids_taken | processes.uids_in_use()
        first = secrets.randbelow(plans.UIDS)
        for step in range(plans.UIDS):
            uid = plans.FIRST_UID + (first + step) % plans.UIDS
            if uid not in used:
                _uids_taken.add(uid)
                return uid
    raise NotStarted(f"All {plans.UIDS} user ids from {plans.FIRST_UID} on are in use.")


def give_uid(uid: int) -> None:
    with _uids_lock:
        _uids_taken.discard(uid)
