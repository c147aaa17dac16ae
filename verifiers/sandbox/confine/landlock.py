"""Landlock: what a process may do with files, sockets and signals, given up for good and without any privilege.

Source: ``linux/landlock.h`` and the kernel's ``Documentation/userspace-api/landlock.rst``.
"""

from __future__ import annotations

import ctypes
import os
import stat

from . import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
# 0 to 12 since version 1, refer with 2, truncate with 3, ioctl of devices with 5.
_FILES = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_TCP = 0b11
_SCOPES = 0b11
# What a rule on a plain file may name.
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

READ = _EXECUTE | _READ_FILE | _READ_DIR
LIST = _READ_DIR
USE = _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def version() -> int:
    """Landlock's version in this kernel, 0 where there is none."""
    try:
        return kernel.syscall("landlock", _CREATE, None, 0, _VERSION)
    except OSError:
        return 0


def restrict(rules: Iterable[tuple[str, int]], everything: Iterable[str] = ()) -> None:
    """Allow what the rules name, and no other file, no TCP, no signal or abstract socket to processes outside.

    Args:
        rules: path, and what of :data:`READ`, :data:`LIST` and :data:`USE` is allowed at and below it; a path that
            is not there is passed over.
        everything: folders in which all is allowed.

    Raises:
        OSError: the kernel has no Landlock, or refuses; no_new_privs must be set.
    """
    there = version()
    if not there:
        raise OSError("Landlock is not available")
    files = (1 << _FILES[min(there, 5)]) - 1
    asked = _Ruleset(files, _TCP if there >= 4 else 0, _SCOPES if there >= 6 else 0)
    size = 24 if there >= 6 else 16 if there >= 4 else 8
    ruleset = kernel.syscall("landlock_create_ruleset", _CREATE, ctypes.byref(asked), size, 0)
    try:
        for path, named in [*rules, *((folder, files) for folder in everything)]:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
                if allowed := named & files & (~0 if folder else _OF_A_FILE):
                    rule = _PathBeneath(allowed, descriptor)
                    kernel.syscall(f"landlock {path}", _ADD, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
            finally:
                os.close(descriptor)
        kernel.syscall("landlock_restrict_self", _RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)
