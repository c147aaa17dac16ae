"""What a confined interpreter may see of this machine: itself, the system's libraries, and named distributions.

All are found outside, in the interpreter of bascule; inside there is no list of what else is installed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from bascule.schemas.errors import ConfigError

PACKAGES = "/packages"
"""Where distributions are mounted; it stands on the module search path of a confined interpreter."""

Mount = tuple[str, str]

_SYSTEM = ("/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32")
# torch and OpenMP ask for the processor's kind and number.
_ALSO = ("/etc/ld.so.cache", "/usr/share/zoneinfo", "/sys/devices/system/cpu")
_OTHERS = ("site-packages", "dist-packages")
_WHOLE = (".dist-info", ".egg-info", ".libs", ".data")


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """Folders and files that are read, never written.

    Attributes:
        read_only: (source, target), real paths; nothing of ``masked`` is to be seen in them.
        masked: folders below targets that are seen empty.
    """

    read_only: tuple[Mount, ...]
    masked: tuple[str, ...] = ()


@functools.cache
def executable() -> str:
    """The real interpreter behind a virtual environment's."""
    return os.path.realpath(sys.executable)


@functools.cache
def interpreter() -> Sight:
    """The interpreter, its standard library and the shared libraries of the system; no installed distribution.

    Paths are the same inside.
    """
    prefix = os.path.realpath(sys.base_prefix)
    paths = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_exec_prefix})
    wanted = [executable(), os.path.realpath(paths["stdlib"]), os.path.realpath(paths["platstdlib"])]
    wanted += [f"{prefix}/{name}" for name in ("lib", "lib64")] + [*_SYSTEM, *_ALSO]
    mounts: dict[str, str] = {}
    for target in sorted(set(wanted)):
        inside = any(target.startswith(f"{outer}/") for outer in mounts)
        if os.path.exists(target) and not inside:
            mounts[target] = os.path.realpath(target)
    masked = [
        str(found)
        for target, source in mounts.items()
        if os.path.isdir(source)
        for pattern in ("{}", "python*/{}", "*/python*/{}")
        for name in _OTHERS
        for found in Path(target).glob(pattern.format(name))
    ]
    return Sight(read_only=tuple((source, target) for target, source in mounts.items()), masked=tuple(sorted(masked)))


def unmasked(sight: Sight) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same sight where nothing can be masked: single entries instead of each folder that holds a masked one.

    Returns:
        What may be read, and the folders of which only the names may be.
    """
    masked = {os.path.realpath(path) for path in sight.masked}
    readable: list[str] = []
    listed: set[str] = set()

    def take(path: str) -> None:
        if path in masked:
            return
        if not any(other.startswith(f"{path}/") for other in masked):
            readable.append(path)
            return
        listed.add(path)
        for entry in sorted(os.listdir(path)):
            take(f"{path}/{entry}")

    for source, _ in sight.read_only:
        take(source)
    return tuple(dict.fromkeys(readable)), tuple(sorted(listed))


@functools.cache
def distributions(names: tuple[str, ...]) -> tuple[Mount, ...]:
    """What belongs to these distributions and to all that they require, each to be mounted below :data:`PACKAGES`.

    Raises:
        ConfigError: one is not installed here, or its files are not known.
    """
    mounts: dict[str, str] = {}
    for distribution in _closure(names):
        base = os.path.realpath(str(distribution.locate_file("")))
        for entry in _entries(distribution):
            source = f"{base}/{entry}"
            if os.path.exists(source):
                mounts.setdefault(f"{PACKAGES}/{entry}", os.path.realpath(source))
    return tuple((source, target) for target, source in sorted(mounts.items()))


def _closure(names: Sequence[str]) -> list[importlib.metadata.Distribution]:
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    waiting: list[tuple[str, tuple[str, ...], str]] = []
    for name in names:
        try:
            asked = Requirement(name)
        except InvalidRequirement as e:
            raise ConfigError(
                f"{name!r} is no name of a distribution.", next_step="Give names as pip takes them."
            ) from e
        waiting.append((asked.name, tuple(sorted(asked.extras)), ""))
    while waiting:
        name, extras, by = waiting.pop()
        key = canonicalize_name(name)
        if (key, extras) in seen:
            continue
        seen.add((key, extras))
        try:
            distribution = found.get(key) or importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as e:
            raise ConfigError(
                f"The distribution {name}{by} is not installed here, so no program can be given it.",
                next_step=f"Install it: pip install {name}",
            ) from e
        found[key] = distribution
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if _applies(requirement, extras):
                waiting.append((requirement.name, tuple(sorted(requirement.extras)), f", which {name} requires,"))
    return list(found.values())


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _entries(distribution: importlib.metadata.Distribution) -> set[str]:
    """Files and folders that are this distribution's alone; of a folder that several share, its own entries."""
    name = distribution.metadata["Name"]
    files = [path.parts for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__", "/")]
    if (
        not files
        or distribution.read_text("RECORD") is None
        or any(parts[0].startswith("__editable__") for parts in files)
    ):
        raise ConfigError(
            f"The files of the distribution {name} are not known, so no program can be given it.",
            next_step=f"Install it from a wheel, not editable: pip install --force-reinstall {name}",
        )
    packages = {parts[0] for parts in files if parts[1:] == ("__init__.py",)}
    out = set()
    for parts in files:
        whole = len(parts) == 1 or parts[0] in packages or parts[0].endswith(_WHOLE)
        out.add(parts[0] if whole else "/".join(parts[:2]))
    return out
