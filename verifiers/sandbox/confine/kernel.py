"""System calls that Python has no function for, by ctypes. Each raises OSError with the call's name.

Numbers and flags: the kernel's uapi headers (``linux/sched.h``, ``mount.h``, ``prctl.h``, ``capability.h``,
``asm/unistd_64.h``, ``asm-generic/unistd.h``).
"""

# ruff: noqa: SIM105 (contextlib would be loaded for it)
from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2

# NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE, each with its lock: no user id brings capabilities back.
SECUREBITS = 0b1100_1111
CAP_DAC_OVERRIDE = 1 << 1
CAP_DAC_READ_SEARCH = 1 << 2

_SYS_MOUNT_SETATTR = 442
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *arguments: object) -> int:
    """A system call by number; ``what`` names it in the error. Arguments are integers, pointers or None."""
    words = [a if not isinstance(a, int) else ctypes.c_long(a) for a in arguments]
    return _checked(int(_libc.syscall(ctypes.c_long(number), *words)), what)


def prctl(option: int, *arguments: int) -> int:
    words = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(int(_libc.prctl(option, *words)), f"prctl {option}")


def unshare(flags: int) -> None:
    """Leave the namespaces of ``flags`` for new ones."""
    _checked(int(_libc.unshare(flags)), f"unshare {flags:#x}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    words = [text.encode() if text else None for text in (source, target, kind)]
    result = _libc.mount(*words, ctypes.c_ulong(flags), options.encode() if options else None)
    _checked(int(result), f"mount {source} on {target}")


def set_mount_flags(target: str, flags: int) -> None:
    """Add MS_RDONLY, MS_NOSUID, MS_NODEV and MS_NOEXEC to a mount and, where the kernel can, to all below it."""
    # The attributes of mount_setattr have the same bits as these four flags.
    attributes = _MountAttributes(flags & 0xF, 0, 0, 0)
    try:
        syscall(
            f"mount_setattr {target}",
            _SYS_MOUNT_SETATTR,
            *(_AT_FDCWD, target.encode(), _AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)),
        )
    except OSError:
        # Before Linux 5.12: flags that are there already must be named again, or the kernel refuses.
        there = os.statvfs(target).f_flag
        mount("none", target, flags=MS_REMOUNT | MS_BIND | flags | (there & 0xF) | _times(there))


def _times(there: int) -> int:
    # statvfs reports noatime, nodiratime and relatime by other bits than mount takes.
    return sum(to for bit, to in ((1024, 1024), (2048, 2048), (4096, 1 << 21)) if there & bit)


def umount(target: str) -> None:
    _checked(int(_libc.umount2(target.encode(), MNT_DETACH)), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    syscall(f"pivot_root {new}", number, new.encode(), old.encode())


def set_hostname(name: str) -> None:
    _checked(int(_libc.sethostname(name.encode(), ctypes.c_size_t(len(name)))), "sethostname")


def die_with_parent(signal_number: int) -> None:
    """Get this signal when the parent's thread ends. A change of identity takes it back: ask again after one."""
    prctl(PR_SET_PDEATHSIG, signal_number)


def read_small(path: str) -> bytes:
    """The beginning of a file of /proc. ``open`` would first load a codec, in every process anew."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def write_small(path: str, text: str) -> None:
    """Write a file of /proc in one piece, as the kernel wants it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def permitted_capabilities() -> int:
    """The capabilities of this process, those of bits 0 to 31, as a bit set."""
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    data = (_CapabilityData * 2)()
    _checked(int(_libc.capget(ctypes.byref(header), ctypes.byref(data))), "capget")
    return int(data[0].permitted)


def set_capabilities(kept: int = 0, meanwhile: int = 0) -> None:
    """Have the capabilities of these bit sets only (bits 0 to 31), those of ``kept`` inheritable too."""
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    data = (_CapabilityData * 2)()
    data[0] = _CapabilityData(kept | meanwhile, kept | meanwhile, kept)
    _checked(int(_libc.capset(ctypes.byref(header), ctypes.byref(data))), "capset")


def drop_privileges(uid: int, gid: int, *, become: bool, kept: int = 0) -> None:
    """Give up identity and capabilities for good, so that no program that is executed gets any back (no_new_privs).

    Args:
        become: change to ``uid`` and ``gid`` and leave all groups; otherwise the identity stays.
        kept: capabilities that are kept, also by programs, as a bit set.
    """
    _set_securebits(_UNTIL_AMBIENT)
    if become:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    if kept:
        # What is not in the bounding set any more cannot be inheritable.
        set_capabilities(kept, 1 << _CAP_SETPCAP)
        for capability in range(32):
            if kept >> capability & 1:
                prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)
    _set_securebits(SECUREBITS)
    set_capabilities(kept)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def _set_securebits(bits: int) -> None:
    # Without CAP_SETPCAP they are not ours to set, and there is nothing that they would keep away.
    try:
        prctl(PR_SET_SECUREBITS, bits)
    except OSError:
        pass


_UNTIL_AMBIENT = 0b1111
_CAP_SETPCAP = 8
