"""Which system calls a confined program may not make: a seccomp filter.

Numbers: ``asm/unistd_64.h`` (x86-64) and ``asm-generic/unistd.h`` (AArch64); the filter's language and return values:
the kernel's ``Documentation/userspace-api/seccomp_filter.rst`` and ``linux/filter.h``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from . import kernel

# Name: number on x86-64, number on AArch64; -1 where there is none.
NUMBERS = {
    "socket": (41, 198),
    # What reaches into other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # What works around filters, and wide doors into the kernel.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "lookup_dcookie": (212, 18),
    "modify_ldt": (154, -1),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "personality": (135, 92),
    # Mounts and namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    # The machine's own.
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
}
# Memory that no process maps counts as nobody's.
UNCOUNTED_MEMORY = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
# The same of anonymous memory that is shared, of which a process can let go while another keeps it, or itself.
MMAP = (9, 222)
_FLAGS, _SHARED, _ANONYMOUS = 40, 0x01, 0x20
# What waits in sockets is nobody's either, and is bounded by their number if their size may not be chosen.
SETSOCKOPT = (54, 208)
_LEVEL, _OPTION, _SOL_SOCKET, _SEND_BUFFERS = 24, 32, 1, (7, 32)
NEW_GROUPS = {"setsid": (112, 157), "setpgid": (109, 154)}
AFFINITY = {"sched_setaffinity": (203, 122)}
# With a process id as the first argument.
SIGNALS = {
    "kill": (62, 129),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
BLIND_SIGNALS = {"tkill": (200, 130), "pidfd_send_signal": (424, 424)}
FORKS = {"fork": (57, -1), "vfork": (58, -1)}
CLONE, CLONE3 = (56, 220), (435, 435)

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000
_CLONE_THREAD = 0x00010000
_NAMESPACES = 0x7E020080

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _MACHINE, _FIRST = 0, 4, 16
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def supported() -> bool:
    """Whether there is a table for this machine."""
    return os.uname().machine in _MACHINES


def program(
    *,
    own_group: bool = False,
    pinned: bool = False,
    signals_to: int | None = None,
    devices: bool = False,
    machine: str | None = None,
) -> bytes:
    """The filter, as an array of ``struct sock_filter``.

    Args:
        own_group: no process may leave its process group and session, so that a signal to the group reaches all.
        pinned: the processor cores to run on may not be chosen.
        signals_to: the one process that may be sent signals (besides its group); None: any that the kernel allows.
        devices: allow what CUDA needs and is otherwise refused.
        machine: as ``os.uname`` names it; this one by default.

    Raises:
        KeyError: there is no table for the machine.
    """
    column, audit = _MACHINES[machine or os.uname().machine]
    denied = [numbers[column] for numbers in NUMBERS.values()]
    absent = [] if devices else [numbers[column] for numbers in UNCOUNTED_MEMORY.values()]
    for wanted, group in ((own_group, NEW_GROUPS), (pinned, AFFINITY)):
        denied += [numbers[column] for numbers in group.values()] if wanted else []
    steps = _opening(column, audit)
    if signals_to is not None:
        denied += [numbers[column] for numbers in BLIND_SIGNALS.values()]
        for numbers in SIGNALS.values():
            steps += [
                (_EQUAL, 0, 5, numbers[column]),
                (_LOAD, 0, 0, _FIRST),
                (_EQUAL, 2, 0, signals_to),
                (_EQUAL, 1, 0, 0),
                (_RETURN, 0, 0, _ERROR | errno.EPERM),
                (_RETURN, 0, 0, _ALLOW),
            ]
    if not devices:
        steps += [
            (_EQUAL, 0, 5, MMAP[column]),
            (_LOAD, 0, 0, _FLAGS),
            (_ANY_BIT, 0, 2, _ANONYMOUS),
            (_ANY_BIT, 0, 1, _SHARED),
            (_RETURN, 0, 0, _ERROR | errno.EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    steps += [
        (_EQUAL, 0, 7, SETSOCKOPT[column]),
        (_LOAD, 0, 0, _LEVEL),
        (_EQUAL, 0, 3, _SOL_SOCKET),
        (_LOAD, 0, 0, _OPTION),
        *((_EQUAL, after, 0, option) for after, option in zip((2, 1), _SEND_BUFFERS, strict=True)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
    ]
    # glibc makes a thread or process by clone where clone3, whose flags a filter cannot read, is not there.
    absent.append(CLONE3[column])
    for number, error in [(n, errno.EPERM) for n in denied] + [(n, errno.ENOSYS) for n in absent]:
        if number >= 0:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | error)]
    steps += [(_EQUAL, 0, 2, CLONE[column]), (_LOAD, 0, 0, _FIRST), (_ANY_BIT, 1, 0, _NAMESPACES)]
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERROR | errno.EPERM)]
    return _packed(steps)


def only_threads(machine: str | None = None) -> bytes:
    """A second filter: no further process, by whatever call; threads there may be."""
    column, audit = _MACHINES[machine or os.uname().machine]
    steps = _opening(column, audit)
    for numbers in FORKS.values():
        if numbers[column] >= 0:
            steps += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ERROR | errno.EPERM)]
    steps += [(_EQUAL, 0, 1, CLONE3[column]), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    steps += [(_EQUAL, 0, 2, CLONE[column]), (_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, _CLONE_THREAD)]
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERROR | errno.EPERM)]
    return _packed(steps)


def _opening(column: int, audit: int) -> list[tuple[int, int, int, int]]:
    """Another machine's calls end the process; then the number of the call is there to be compared."""
    steps = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    return [*steps, (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)] if column == 0 else steps


def _packed(steps: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def install(filter_: bytes) -> None:
    """Put a filter in force for this thread and all that it starts; no_new_privs must be set.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    memory = ctypes.create_string_buffer(filter_, len(filter_))
    loaded = _Program(len(filter_) // 8, ctypes.cast(memory, ctypes.c_void_p).value)
    kernel.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(loaded))
