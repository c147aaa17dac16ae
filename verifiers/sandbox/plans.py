"""Plans: what ``confine.seal`` is told, made from what a program may have and what the machine offers. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from bascule.verifiers.sandbox.confine import seal
from bascule.verifiers.sandbox.packages import PACKAGES, Mount, Sight, unmasked

FIRST_UID = 61440
"""User ids from here on are programs' own: part of a range that no distribution gives to people or services
(systemd's for short-lived users, 61184 to 65519)."""
UIDS = 4080

WORK = "/work"
SCRATCH = (WORK, "/tmp", "/dev/shm")  # noqa: S108
_MIB = 1 << 20
# Libraries reserve more than they use; what is resident is watched from outside.
_ADDRESS_SPACE = 2 << 30
# Not /dev/zero: mapped, it gives memory that counts as nobody's.
_DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")


class Mechanisms(msgspec.Struct, frozen=True):
    """What :func:`confine.available.available` found.

    Attributes:
        mechanisms: for a plan.
        landlock: its version, 0 where it is not used.
        missing: what is not there, and why.
    """

    mechanisms: tuple[str, ...]
    landlock: int
    missing: tuple[str, ...]

    @property
    def own_root(self) -> bool:
        return seal.ROOT in self.mechanisms

    def __contains__(self, name: str) -> bool:
        return name in self.mechanisms


class Box(msgspec.Struct, frozen=True):
    """Folders of this machine that a program gets where it has no root of its own."""

    work: str
    temporary: str
    packages: str


def limits(
    *, seconds: float, memory_mb: int, disk_mb: int, processes: int | None, devices: bool = False, cores: int = 1
) -> dict[str, int]:
    """Resource limits: bounds by the kernel behind what is watched from outside.

    Args:
        seconds: of wall-clock time; processor time is bounded by what ``cores`` cores can give in it.
        processes: None: not bounded.
        devices: CUDA reserves more address space than there is memory.
    """
    bounds = {"cpu_seconds": int(seconds * cores) + 10, "file_bytes": disk_mb * _MIB, "open_files": 128}
    if not devices:
        bounds["address_space"] = 2 * memory_mb * _MIB + _ADDRESS_SPACE
    if processes is not None:
        bounds["processes"] = processes
    return bounds


def inodes(disk_mb: int) -> int:
    """Files and folders that a program may have, the empty ones too."""
    return 1024 + 256 * disk_mb


def plan(
    mechanisms: Mechanisms,
    sight: Sight,
    packages: Iterable[Mount] = (),
    *,
    uid: int,
    disk_mb: int,
    bounds: Mapping[str, int],
    box: Box | None = None,
    root: bool = False,
    capabilities: int = 0,
    forks: bool = True,
    core: int | None = None,
    cuda: Iterable[str] = (),
) -> dict[str, Any]:
    """A plan, without ``arguments`` and ``environment``.

    Args:
        sight: of the interpreter.
        packages: distributions' files.
        uid: to become, or to be called.
        bounds: of :func:`limits`.
        box: needed where there is no own root.
        root: whether this is planned by root.
        capabilities: kept where only Landlock says what is read and written, since the interpreter lies where only
            root may look.
        core: to stay on.
        cuda: device files and folders of CUDA.
    """
    packages, cuda = tuple(packages), tuple(cuda)
    made: dict[str, Any] = {
        "mechanisms": list(mechanisms.mechanisms),
        "uid": uid,
        "gid": uid,
        "devices": [*_DEVICES, *cuda],
        "limits": dict(bounds),
        "forks": forks,
        "core": core,
        "cuda": bool(cuda),
        "front": True,
    }
    if mechanisms.own_root:
        made |= {
            "read_only": [*sight.read_only, *packages],
            "masked": list(sight.masked),
            "scratch": {"bytes": disk_mb * _MIB, "inodes": inodes(disk_mb), "folders": list(SCRATCH)},
            "folder": WORK,
        }
    else:
        if box is None:
            raise ValueError("Without an own root a program needs folders of this machine.")
        readable, listed = unmasked(sight)
        sources = [*readable, *(source for source, _ in packages), box.packages]
        made |= {
            "read_only": [(source, source) for source in sources],
            "listed": list(listed),
            "writable": [box.work, box.temporary],
            "folder": box.work,
        }
    if not root and seal.PROCESSES not in mechanisms and mechanisms.landlock < 6:
        made["signals"] = "own"
    if seal.LANDLOCK in mechanisms and not mechanisms.own_root:
        made["capabilities"] = capabilities
    return made


def environment(box: Box | None = None) -> dict[str, str]:
    """The whole environment of a program: one thread for each numeric library, one order for each set."""
    home, temporary, packages = (box.work, box.temporary, box.packages) if box else (WORK, "/tmp", PACKAGES)  # noqa: S108
    names = ("OMP", "OPENBLAS", "MKL", "NUMBA")
    return {
        "HOME": home,
        "TMPDIR": temporary,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "USER": "sandbox",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": packages,
        **{f"{name}_NUM_THREADS": "1" for name in names},
    }
