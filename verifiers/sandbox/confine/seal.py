"""Confine this process: the one entry for whoever runs what somebody else wrote."""

# ruff: noqa: SIM105 (contextlib would be loaded for it)
from __future__ import annotations

import os
import resource
import select
import struct

from . import kernel, landlock, own_root, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

USER, NETWORK, IPC, HOST, PROCESSES = (
    "user namespace",
    "network namespace",
    "ipc namespace",
    "uts namespace",
    "process namespace",
)
ROOT, PROC, LANDLOCK, SECCOMP, UID = "own root", "own proc", "landlock", "seccomp", "unprivileged uid"
NAMESPACES = {
    USER: kernel.CLONE_NEWUSER,
    NETWORK: kernel.CLONE_NEWNET,
    IPC: kernel.CLONE_NEWIPC,
    HOST: kernel.CLONE_NEWUTS,
    PROCESSES: kernel.CLONE_NEWPID,
    ROOT: kernel.CLONE_NEWNS,
}

# The module signal would load a good part of the standard library for its names.
_SIGKILL = 9

_filters: dict[tuple[bool, bool, int | None, bool], bytes] = {}

_RLIMITS = {
    "cpu_seconds": resource.RLIMIT_CPU,
    "file_bytes": resource.RLIMIT_FSIZE,
    "open_files": resource.RLIMIT_NOFILE,
    "address_space": resource.RLIMIT_AS,
    "processes": resource.RLIMIT_NPROC,
}


def seal(plan: dict[str, Any], keep: Sequence[int] = ()) -> None:
    """Confine the calling process, which was forked for this and has one thread. Returns in the confined process.

    With a process namespace, or where the plan asks for a ``front``, it forks. The process that called stays in
    front: it waits, ends as the confined one does (status or signal), dies with its parent, and when it ends nothing
    of what it confined is alive. What it had open it closes. In a process namespace the first process, which takes
    orphans, is confined as well.

    The plan is JSON:

    - ``mechanisms``: which of the constants of this module to use, as :func:`available.available` found them.
    - ``uid``, ``gid``: to become, with ``unprivileged uid`` or, as names inside only, with ``user namespace``.
    - ``read_only``: (source, target) pairs, real paths. Without ``own root`` the sources are what can be read.
    - ``listed``: folders whose names can be read, but not the files (without ``own root`` only).
    - ``masked``: folders among those that are to be seen empty (with ``own root`` only).
    - ``writable``: folders that may be written.
    - ``devices``: device files.
    - ``scratch``: ``bytes``, ``inodes`` and ``folders``: writable folders in memory (with ``own root`` only).
    - ``folder``: the working folder.
    - ``limits``: ``cpu_seconds``, ``file_bytes``, ``open_files``, ``address_space`` and ``processes``, each optional.
    - ``forks``: whether further processes may be started; by default they may.
    - ``core``: the processor core to stay on.
    - ``signals``: ``own`` where only the process itself may be sent signals.
    - ``capabilities``: those that are kept, as a bit set; none by default.
    - ``cuda``: CUDA devices are used.
    - ``front``: have a process in front in any case.
    - ``lifeline``: a descriptor, read by the process in front; its end of file kills everything.

    Args:
        keep: descriptors besides 0, 1 and 2 that stay open in the confined process.

    Raises:
        OSError, KeyError: a mechanism that the plan names cannot be had; the process is fit for nothing more.
    """
    use = set(plan["mechanisms"])
    parent = os.getppid()
    _leave_namespaces(use, plan)
    told = None
    if PROCESSES in use or plan.get("front"):
        told = _stay_in_front(plan, use, parent)
    close_all_but([*keep, -1 if told is None else told])
    _prefer_to_be_killed()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    if HOST in use:
        kernel.set_hostname("sandbox")
    if ROOT in use:
        os.umask(0o022)
        own_root.build(plan, proc=PROC in use)
    _give_up(plan, use)
    if told is None:
        _bound(plan, extra=0)
        return
    # The change of identity took this back.
    _die_with_front(told)
    if PROCESSES in use:
        # The first process of a namespace is not the program's own: it has signals of its own and gets all orphans.
        program = os.fork()
        if program:
            _guard(program, told)
    os.close(told)
    # The one in front has the program's user id where none is changed.
    _bound(plan, extra=(PROCESSES in use) + (UID not in use))


def prepare(plan: dict[str, Any]) -> None:
    """Work out beforehand what is the same for each process with such a plan; for whoever forks many of them."""
    if SECCOMP in plan["mechanisms"] and plan.get("signals") != "own":
        _filter(plan)


def _filter(plan: dict[str, Any]) -> bytes:
    asked = (
        PROCESSES not in plan["mechanisms"],
        plan.get("core") is not None,
        os.getpid() if plan.get("signals") == "own" else None,
        bool(plan.get("cuda")),
    )
    if asked not in _filters:
        own_group, pinned, signals_to, devices = asked
        _filters[asked] = syscalls.program(own_group=own_group, pinned=pinned, signals_to=signals_to, devices=devices)
    return _filters[asked]


def _leave_namespaces(use: set[str], plan: dict[str, Any]) -> None:
    """Leave the shared namespaces."""
    flags = 0
    for name in use & NAMESPACES.keys():
        flags |= NAMESPACES[name]
    if USER not in use:
        if flags:
            kernel.unshare(flags)
        return
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(flags)
    # The maps belong to root while the process may not be looked into.
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{plan['uid']} {uid} 1"),
        ("gid_map", f"{plan['gid']} {gid} 1"),
    ):
        kernel.write_small(f"/proc/self/{name}", text)


def _prefer_to_be_killed() -> None:
    """Where memory runs out, the kernel is to choose this process and not the runtime."""
    # The file belongs to root while the process may not be looked into.
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    try:
        kernel.write_small("/proc/self/oom_score_adj", "1000")
    except OSError:
        pass


def _give_up(plan: dict[str, Any], use: set[str]) -> None:
    """Identity, capabilities, files, system calls; in this order, since each step takes what the one before needs."""
    os.umask(0o077)
    if use:
        kernel.drop_privileges(plan["uid"], plan["gid"], become=UID in use, kept=plan.get("capabilities", 0))
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    if plan.get("core") is not None:
        os.sched_setaffinity(0, {plan["core"]})
    if folder := plan.get("folder"):
        os.chdir(folder)
    if LANDLOCK in use:
        _restrict_files(plan, ROOT in use)
    if SECCOMP in use:
        syscalls.install(_filter(plan))


def _restrict_files(plan: dict[str, Any], rooted: bool) -> None:
    rules = [(path, landlock.USE) for path in plan.get("devices", ())]
    if rooted:
        rules.append(("/", landlock.READ))
    else:
        rules += [(source, landlock.READ) for source, _ in plan["read_only"]]
        rules += [(path, landlock.LIST) for path in plan.get("listed", ())]
    landlock.restrict(rules, [*plan.get("writable", ()), *plan.get("scratch", {}).get("folders", ())])


def _bound(plan: dict[str, Any], *, extra: int) -> None:
    """The limits, and no further processes where there may be none.

    Args:
        extra: how many processes of ours are counted with the program's own.
    """
    limits = plan.get("limits", {})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, which in _RLIMITS.items():
        if (value := limits.get(name)) is not None:
            # Above the hard limit of whoever started this, that one stays.
            hard = resource.getrlimit(which)[1]
            value += extra if name == "processes" else 0
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))
    if SECCOMP in plan["mechanisms"] and not plan.get("forks", True):
        syscalls.install(syscalls.only_threads())


def close_all_but(keep: Sequence[int]) -> None:
    """Close every descriptor but 0, 1, 2 and these."""
    start = 3
    for descriptor in [*sorted(d for d in set(keep) if d > 2), 2**20]:
        os.closerange(start, descriptor)
        start = descriptor + 1


def _stay_in_front(plan: dict[str, Any], use: set[str], parent: int) -> int:
    """Fork, and return in the child; the parent waits and ends as the program does.

    Returns:
        A descriptor on which the parent is told the program's end; while it can be written, the parent lives.
    """
    lifeline = plan.get("lifeline")
    if lifeline is None:
        kernel.die_with_parent(_SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    group = PROCESSES not in use
    if group:
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    ending, told = os.pipe()
    child = os.fork()
    if not child:
        if group:
            os.setpgid(0, 0)
        _die_with_front(told)
        os.close(ending)
        return told
    status = 1 << 8
    try:
        status = _attend(child, ending, lifeline, group)
    finally:
        _end_as(status)


def _die_with_front(told: int) -> None:
    kernel.die_with_parent(_SIGKILL)
    poll = select.poll()
    poll.register(told, 0)
    if poll.poll(0):
        os._exit(1)


def _attend(child: int, ending: int, lifeline: int | None, group: bool) -> int:
    """Wait for the end of ``child``, or of the lifeline; then see to it that nothing is left.

    Returns:
        The wait status of the program.
    """
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.closerange(0, 3)
    ended, kept = _end_of(child)
    close_all_but([ending, *kept, -1 if lifeline is None else lifeline])
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    if lifeline is not None:
        poll.register(lifeline, select.POLLIN)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if lifeline in ready:
            os.kill(child, _SIGKILL)
            poll.unregister(lifeline)
        elif len(kept) > 1:
            os.read(ended, 4096)
    if group:
        # Not yet waited for: the number still names this group and no other.
        try:
            os.killpg(child, _SIGKILL)
        except OSError:
            pass
    status = os.waitpid(child, 0)[1]
    if group:
        _bury_children()
        return status
    if status == 0 and (said := os.read(ending, 4)):
        status = struct.unpack("i", said)[0]
    return status


def _end_of(child: int) -> tuple[int, list[int]]:
    """A descriptor that can be read when a child may have ended, and all that it needs."""
    try:
        ended = os.pidfd_open(child)
    except OSError:
        import signal

        # Before Linux 5.3, and where a container forbids the call.
        ended, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        return ended, [ended, waker]
    return ended, [ended]


def _bury_children() -> None:
    """Wait until all that came to us as orphans is over; the group is killed already, the rest is killed here."""
    while True:
        try:
            for child in _children():
                os.kill(child, _SIGKILL)
        except OSError:
            # Without /proc the group was all.
            pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """The processes whose parent this one is."""
    try:
        return [int(name) for name in kernel.read_small(f"/proc/self/task/{os.getpid()}/children").split()]
    except OSError:
        return _children_by_parent()


def _children_by_parent() -> list[int]:
    """The same, where the kernel is built without a list of them."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                # After the name, which may have parentheses in it: state, parent.
                parent = kernel.read_small(f"/proc/{name}/stat").rpartition(b")")[2].split()[1]
            except (OSError, IndexError):
                continue
            if int(parent) == os.getpid():
                found.append(int(name))
    return found


def _end_as(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != _SIGKILL:
            import signal

            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _guard(program: int, told: int) -> NoReturn:
    """The first process of the namespace: takes orphans, and ends with the program, which ends everything."""
    try:
        os.closerange(0, 3)
        close_all_but([told])
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == program:
                os.write(told, struct.pack("i", status))
                os._exit(0)
    finally:
        os._exit(1)
