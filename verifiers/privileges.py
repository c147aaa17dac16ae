"""What the processes of the verifier give up, so that nobody else's code can look into them.

No process of another user can read the memory, the environment or the descriptors of the scoring process, and none of
the same user can either, since it cannot be traced (ptrace(2), "Ptrace access mode checking"). What harnesses and
programs run as is another user (:mod:`bascule.verifiers.sandbox`).
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from pathlib import Path

from bascule.verifiers.sandbox.confine import kernel

#: Whose process the scoring process is where it was root's. It is none of those that programs and harnesses get
#: (from :data:`bascule.verifiers.sandbox.plans.FIRST_UID` on), and the last below systemd's range of short-lived users.
SCORING_UID = 61183

_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2
_CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP = 1 << 6, 1 << 7, 1 << 8
_BECOMING = _CAP_SETGID | _CAP_SETUID | _CAP_SETPCAP


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; ends it if that has happened."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux: the end of standard input ends it too
        kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request reached the kernel
        os._exit(1)


def shield() -> None:
    """No core file of this process, and nobody without the rights of root may look into it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


def drop(uid: int = SCORING_UID) -> int:
    """Become ``uid`` for good, if this is root's process, with no right of root's but to read any file.

    Modules that are imported late and data lie below the home of root, which nobody else may enter; hence that right.
    Where a container's root cannot become somebody else, or could not read its own files then, it stays root without
    any right of root's. As an ordinary user nothing is dropped. Threads that run already lose everything.

    Returns:
        Whose process this is now.

    Raises:
        OSError: the kernel refuses what it says that this process may do.
    """
    parent = os.getppid()
    if os.geteuid() == 0:
        held = kernel.permitted_capabilities()
        # The second, which is more, only where a container's root lacks the first.
        reading = next((right for right in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE) if held & right), 0)
        become = reading != 0 and held & _BECOMING == _BECOMING and _mapped(uid)
        kernel.drop_privileges(uid, uid, become=become, kept=reading if become else 0)
    with contextlib.suppress(OSError, AttributeError):
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    # A change of identity makes a process traceable again, and lets it outlive its parent.
    shield()
    die_with(parent)
    return os.geteuid()


def _mapped(uid: int) -> bool:
    """Whether there are this user and this group in the user namespace that this process is in."""
    for name in ("uid_map", "gid_map"):
        ranges = [line.split() for line in Path("/proc/self", name).read_text(encoding="ascii").splitlines()]
        if not any(int(first) <= uid < int(first) + int(length) for first, _, length in ranges):
            return False
    return True
