"""What an episode's process is left with: the plan by which it is sealed.

The standard library only: loaded by path in the zygote, as ``child.py`` is. What carries a plan out lies in
``verifiers/sandbox/confine`` and is handed in. A harness is ``given`` as a JSON object: ``files``, ``mounts`` (what it
imports, as (source, target)) and ``bases`` (the folders in which these sources lie).
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from typing import Any

# User ids, one for each running episode: far above those that are given to people and services one after the other, and
# below the scorer's (``verifiers/privileges``) and those of programs (``verifiers/sandbox/plans``).
FIRST_UID, UIDS = 57344, 3839
# Not /dev/zero: mapped, it gives memory that counts as nobody's.
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")
PACKAGES = "/packages"
WORK, SHARED_MEMORY = "/tmp", "/dev/shm"  # noqa: S108
INODES = 16384
# A guest forks its episodes under its own user id: their processes are counted together.
GUEST_PROCESSES = 1024
# A guest goes on forking after the processor time of its prepare.
GUEST_SECONDS = 3600
# What it writes and what its episodes write at one time lies in one place, this many times as large as what each may.
GUEST_DISK = 4

# Since this version Landlock keeps signals in.
_SIGNALS = 6
RLIMITS = {
    "cpu_seconds": resource.RLIMIT_CPU,
    "file_bytes": resource.RLIMIT_FSIZE,
    "open_files": resource.RLIMIT_NOFILE,
    "address_space": resource.RLIMIT_AS,
}

Limits = dict[str, int]


class Confinement:
    """How the processes below one zygote are confined.

    Args:
        confine: the package that carries plans out.
        found: ``mechanisms`` that work here, and the version of Landlock; without any, processes are left unconfined,
            with their limits only.
        sight: what every Python program needs to read: ``system``, as (source, target), and ``masked``, folders below
            these that are not for it; or, where there is no root of its own, ``readable`` and ``listed``.
        folder: where folders of episodes lie that have no root of their own.
    """

    def __init__(self, confine: Any, found: dict[str, Any], sight: dict[str, Any], folder: str) -> None:
        self._confine = confine
        self._mechanisms = mechanisms = tuple(found["mechanisms"])
        self._landlock = found["landlock"]
        self._sight = sight
        self._folder = folder
        self._guest = ""
        self.rooted = confine.seal.ROOT in mechanisms
        self.fronted = confine.seal.PROCESSES in mechanisms
        if confine.seal.UID in mechanisms:
            os.chmod(folder, 0o711)  # noqa: S103

    def enter(
        self, number: int, limits: Limits, given: dict[str, Any], keep: Sequence[int], *, guest: bool = False
    ) -> str:
        """Seal this process, freshly forked or started; returns in the sealed one.

        Returns:
            The folder that it works in.
        """
        folder = WORK if self.rooted else f"{self._folder}/{number}"
        plan = self._plan(number, folder, limits, given, guest=guest)
        if not self.rooted:
            os.mkdir(folder, 0o700)
            if self._confine.seal.UID in self._mechanisms:
                os.chown(folder, plan["uid"], plan["gid"])
        # The folders of the root that is made are for the identity that is taken; afterwards nothing is for others.
        os.umask(0o022)
        self._confine.seal.seal(plan, keep)
        if not guest:
            return folder
        self._guest = folder
        os.mkdir(f"{folder}/episodes", 0o700)
        return _made(f"{folder}/prepared")

    def enter_again(self, number: int, limits: Limits, given: dict[str, Any]) -> str:
        """Seal the process of an episode off from the guest that forked it, and from what else runs there.

        By Landlock and seccomp, which can be laid over one another; the namespaces are the guest's. The episode may
        write to a folder of its own only, and read, besides what any episode may, what ``prepare`` wrote.
        """
        folder = _made(self.private(number))
        seal, landlock, syscalls = self._confine.seal, self._confine.landlock, self._confine.syscalls
        if seal.LANDLOCK in self._mechanisms:
            rules = [(device, landlock.USE) for device in DEVICES]
            if self.rooted:
                seen = [target for _, target in (*self._sight["system"], *given["mounts"])]
                rules += [(path, landlock.READ) for path in seen]
            else:
                rules += [(source, landlock.READ) for source in self._readable(given)]
                rules += [(source, landlock.LIST) for source in (*self._sight["listed"], *given["bases"])]
            rules.append((f"{self._guest}/prepared", landlock.READ))
            rules.append((f"/proc/{os.getpid()}", landlock.READ))
            landlock.restrict(rules, [folder])
        if seal.SECCOMP in self._mechanisms:
            syscalls.install(syscalls.program(signals_to=os.getpid(), devices=True))
        for name, which in RLIMITS.items():
            if (value := self._limits(limits).get(name)) is not None:
                value = min(value, resource.getrlimit(which)[1])
                resource.setrlimit(which, (value, value))
        return folder

    def private(self, number: int) -> str:
        """Where an episode's folder lies that is to be removed after it; with its own root, it goes by itself."""
        return f"{self._guest}/episodes/{number}" if self._guest else f"{self._folder}/{number}"

    def paths(self, given: dict[str, Any]) -> list[str]:
        """Where the packages of a harness are imported from."""
        return ([PACKAGES] if given["mounts"] else []) if self.rooted else given["bases"]

    def _readable(self, given: dict[str, Any]) -> list[str]:
        return [*self._sight["readable"], *(source for source, _ in given["mounts"])]

    def _plan(self, number: int, folder: str, limits: Limits, given: dict[str, Any], *, guest: bool) -> dict[str, Any]:
        seal = self._confine.seal
        uid = FIRST_UID + (os.getpid() * 61 + number) % UIDS
        own = self._limits(limits)
        if {seal.UID, seal.USER} & set(self._mechanisms):
            # Counted by user id, so only where that is the episode's own; elsewhere ``watch.py`` counts.
            own["processes"] = limits["processes"] + (GUEST_PROCESSES if guest else 0)
        if guest:
            own["cpu_seconds"] += GUEST_SECONDS
        plan = {
            "mechanisms": self._mechanisms,
            "uid": uid,
            "gid": uid,
            "devices": DEVICES,
            "folder": folder,
            "limits": own,
        }
        if not guest and seal.PROCESSES not in self._mechanisms and self._landlock < _SIGNALS:
            plan["signals"] = "own"
        if self.rooted:
            plan["read_only"] = [*self._sight["system"], *given["mounts"]]
            plan["masked"] = self._sight["masked"]
            size = limits["disk_bytes"] * (GUEST_DISK if guest else 1)
            plan["scratch"] = {"bytes": size, "inodes": INODES, "folders": (WORK, SHARED_MEMORY)}
        else:
            plan["read_only"] = [(source, source) for source in self._readable(given)]
            plan["listed"] = [*self._sight["listed"], *given["bases"]]
            plan["writable"] = (folder,)
            if seal.LANDLOCK in self._mechanisms:
                plan["capabilities"] = self._to_read(given)
        return plan

    def _to_read(self, given: dict[str, Any]) -> int:
        """The least of our capabilities with which what only root may look at can be read; none where nothing is such.

        What is read and written is then up to Landlock alone. The root of a container often has the second only.
        """
        sources = (
            sys.executable,
            os.path.dirname(os.__file__),
            self._folder,
            *(source for source, _ in given["mounts"]),
        )
        if all(open_to_all(os.path.realpath(source)) for source in sources):
            return 0
        kernel = self._confine.kernel
        ours = kernel.permitted_capabilities()
        return next((c for c in (kernel.CAP_DAC_READ_SEARCH, kernel.CAP_DAC_OVERRIDE) if ours & c), 0)

    def _limits(self, limits: Limits) -> Limits:
        return {
            "cpu_seconds": limits["cpu_seconds"],
            "file_bytes": limits["disk_bytes"],
            "open_files": limits["open_files"],
            "address_space": limits["address_bytes"],
        }


def open_to_all(path: str) -> bool:
    """Whether any user may read a file or enter a folder, given by its real path."""
    mode = 0o001 if os.path.isdir(path) else 0o004
    while os.stat(path).st_mode & mode:
        if path == "/":
            return True
        path, mode = os.path.dirname(path), 0o001
    return False


def _made(folder: str) -> str:
    """A new folder to work in."""
    os.mkdir(folder, 0o700)
    os.chdir(folder)
    return folder
