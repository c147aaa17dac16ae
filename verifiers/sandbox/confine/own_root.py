"""A root folder of one's own: nothing is there but what is put there. Needs a mount namespace of one's own."""

from __future__ import annotations

import os
import stat

from . import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

_OLD = "/.old"
_SCRATCH = "/.scratch"
# Where the new root is put together before it becomes the root; anything that exists, nothing of it is covered.
_PLACES = ("/tmp", "/var/tmp", "/mnt", "/run", "/dev")  # noqa: S108
_DEVICE = kernel.MS_NOSUID | kernel.MS_NOEXEC
_PROC = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
_PLAIN = kernel.MS_NOSUID | kernel.MS_NODEV


def build(plan: dict[str, Any], *, proc: bool) -> None:
    """Make the root that the plan describes, and go there; the old one is gone afterwards.

    Args:
        plan: of :func:`seal.seal`; used are ``read_only``, ``masked``, ``devices``, ``writable``, ``scratch``, ``uid``
            and ``gid``.
        proc: mount a /proc, which shows the process namespace of the caller.

    Raises:
        OSError: naming the mount that was refused.
    """
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    place = next(p for p in _PLACES if os.path.isdir(p))
    kernel.mount("root", place, "tmpfs", _PLAIN, "mode=0755,size=1m,nr_inodes=4096")
    os.mkdir(place + _OLD, 0o700)
    kernel.pivot_root(place, place + _OLD)
    os.chdir("/")
    _bind(plan["read_only"], _PLAIN | kernel.MS_RDONLY)
    _bind(((path, path) for path in plan.get("devices", ())), _DEVICE)
    _bind(((path, path) for path in plan.get("writable", ())), _PLAIN)
    for path in plan.get("masked", ()):
        if os.path.isdir(path):
            kernel.mount("masked", path, "tmpfs", _PLAIN | kernel.MS_RDONLY, "mode=0555,size=4k,nr_inodes=2")
    if scratch := plan.get("scratch"):
        _scratch(scratch, plan["uid"], plan["gid"])
    if proc:
        _make("/proc")
        kernel.mount("proc", "/proc", "proc", _PROC)
    kernel.umount(_OLD)
    os.rmdir(_OLD)
    kernel.mount("none", "/", flags=kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _PLAIN)


def _bind(pairs: Iterable[Sequence[str]], flags: int) -> None:
    for source, target in pairs:
        old = _OLD + source
        try:
            folder = stat.S_ISDIR(os.stat(old).st_mode)
        except OSError:
            continue
        if folder:
            _make(target)
        else:
            _make(os.path.dirname(target))
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        kernel.mount(old, target, flags=kernel.MS_BIND | kernel.MS_REC)
        kernel.set_mount_flags(target, flags)


def _make(folder: str) -> None:
    """Make a folder and those above it; what is there stays."""
    try:
        os.mkdir(folder, 0o755)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make(os.path.dirname(folder))
        os.mkdir(folder, 0o755)


def _scratch(scratch: dict[str, Any], uid: int, gid: int) -> None:
    """One file system of limited size in memory; each of its folders is mounted where the plan wants it.

    It stays mounted: to unmount it would cost as much as all else, and there is nothing more to be seen in it.
    """
    os.mkdir(_SCRATCH, 0o700)
    options = f"mode=0700,size={scratch['bytes']},nr_inodes={scratch['inodes']}"
    kernel.mount("scratch", _SCRATCH, "tmpfs", _PLAIN, options)
    for number, target in enumerate(scratch["folders"]):
        folder = f"{_SCRATCH}/{number}"
        os.mkdir(folder, 0o700)
        os.chown(folder, uid, gid)
        _make(target)
        kernel.mount(folder, target, flags=kernel.MS_BIND)
        kernel.set_mount_flags(target, _PLAIN)
