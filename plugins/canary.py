"""Canaries: tokens that stand beside the dev and sealed answers, and that only the scoring process may ever hold.

An answer such as ``True`` or ``7`` cannot be searched for in a log; its canary can. Tokens follow from a key of this
machine's cache, so a search needs no list of what was planted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec

from bascule.plugins.task import PublicFace
from bascule.plugins.wheels import cache_folder
from bascule.plugins.whole import whole_file
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split

PREFIX = "bcanary-"
#: Hexadecimal digits after the prefix.
DIGITS = 32
#: The splits whose answers nobody but the scoring process may know.
HIDDEN: tuple[Split, ...] = ("dev", "sealed", "regression")
_KEY_BYTES = 32


def private_folder() -> Path:
    """The folder of the cache that holds truths and the key; nobody but its owner may enter it.

    Raises:
        ConfigError: it cannot be made, is somebody else's, or is open to others.
    """
    folder = cache_folder() / "private"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as e:
        raise ConfigError(
            f"{folder}, which holds what only scorers may see, cannot be used: {e.strerror}.",
            next_step="Remove what stands there, or name another cache with BASCULE_CACHE.",
        ) from e
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{folder} is no folder.", next_step="Remove it; a new one is made.")
    # A scoring process that was root's has become another user, and still trusts what root keeps.
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{folder}, which holds what only scorers may see, belongs to the user {found.st_uid}.",
            next_step="Remove it, or name a cache of your own with BASCULE_CACHE.",
        )
    if found.st_mode & 0o077:
        raise ConfigError(
            f"{folder}, which holds what only scorers may see, is open to others (mode {found.st_mode & 0o777:o}).",
            next_step=f"See who read it, then `chmod 700 {folder}`.",
        )
    return folder


def canary_key() -> bytes:
    """The key of this machine's cache, made by whoever needs it first.

    Raises:
        ConfigError: the file that holds it is damaged or cannot be made, or :func:`private_folder` cannot be used.
    """
    path = private_folder() / "canary.key"
    try:
        if not path.exists():
            _make_key(path)
        key = path.read_bytes()
    except OSError as e:
        raise ConfigError(
            f"The key of the canaries, {path}, cannot be used: {e.strerror}.",
            next_step="Make the folder writable, or name another cache with BASCULE_CACHE.",
        ) from e
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"The key of the canaries, {path}, is damaged.", next_step="Delete it; a new one is made.")
    return key


def _make_key(path: Path) -> None:
    """Put a key in place; where another process is first, its key counts."""
    with suppress(FileExistsError), whole_file(path, replace=False) as file:
        file.write(secrets.token_bytes(_KEY_BYTES))


def canary(key: bytes, task: str, split: str, example: str) -> str:
    """The token that stands beside the answer to one example: ``bcanary-`` and 32 hexadecimal digits."""
    text = "\0".join((task, split, example)).encode()
    return PREFIX + hmac.new(key, text, hashlib.sha256).hexdigest()[:DIGITS]


class Planted(msgspec.Struct, frozen=True):
    """What a canary stands beside."""

    task: str
    split: str
    example: str


class Canaries(msgspec.Struct, frozen=True):
    """The canaries of a task, by token."""

    tokens: dict[str, Planted]

    @classmethod
    def of(cls, key: bytes, task: str, public: PublicFace, splits: Sequence[Split] = HIDDEN) -> Self:
        """Those of ``task``, which is the name that it is registered under: of the examples whose answers are hidden.

        Args:
            splits: of which examples; files of truths hold those of ``train`` too.
        """
        found = [Planted(task, split, example.id) for split in splits for example in public.split(split)]
        return cls({canary(key, p.task, p.split, p.example): p for p in found})

    def find(self, digits: str) -> Planted | None:
        """What a token stands beside, given its digits or at least the first eight of them; None if it is none."""
        whole = self.tokens.get(PREFIX + digits)
        if whole is not None or not 8 <= len(digits) < DIGITS:
            return whole
        return next((p for token, p in self.tokens.items() if token.startswith(PREFIX + digits)), None)
