"""Canaries: tokens that stand beside the sealed answers, and that nothing but the scoring process may ever hold.

An answer such as ``True`` or ``7`` cannot be searched for in a log; its canary can. Tokens follow from a key of this
machine's cache, so a search needs no list of what was planted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

from bascule.plugins.wheels import cache_folder
from bascule.schemas.errors import ConfigError

PREFIX = "bcanary-"
_KEY_BYTES = 32


def private_folder() -> Path:
    """The folder of the cache that holds truths and the key; nobody but its owner may enter it."""
    folder = cache_folder() / "private"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def canary_key() -> bytes:
    """The key of this machine's cache, made by whoever needs it first.

    Raises:
        ConfigError: the file that holds it is damaged.
    """
    path = private_folder() / "canary.key"
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".key-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # another process was first: its key counts
        finally:
            os.unlink(temporary)
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"The key of the canaries, {path}, is damaged.", next_step="Delete it; a new one is made.")
    return key


def canary(key: bytes, task: str, split: str, example: str) -> str:
    """The token that stands beside the answer to one example: ``bcanary-`` and 32 hexadecimal digits."""
    text = "\0".join((task, split, example)).encode()
    return PREFIX + hmac.new(key, text, hashlib.sha256).hexdigest()[:32]
