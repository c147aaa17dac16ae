"""Truths that come from files: kept in a private folder of the cache, a canary beside each.

Only private faces read them, and only the scoring process opens those.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import msgspec

from bascule.plugins.canary import canary, canary_key, private_folder
from bascule.schemas.errors import ConfigError

Truths = dict[str, dict[str, str]]
"""Truths by split and example id."""


class _Kept(msgspec.Struct, frozen=True):
    """One line of the file; the canary is there to be found where it must not be."""

    split: str
    example: str
    truth: str
    canary: str


def kept_truths(task: str, name: str, make: Callable[[], Truths]) -> Truths:
    """The truths in the private file ``name``, which is written from ``make()`` if it is not there.

    Args:
        task: name of the task, which its canaries follow from.
        name: of the file, with everything that the truths depend on: task, layout, seed.

    Raises:
        ConfigError: the file is damaged, or ``make`` cannot get the data.
    """
    path = private_folder() / f"{name}.jsonl"
    if not path.exists():
        key = canary_key()
        lines = [
            msgspec.json.encode(_Kept(split, example, truth, canary(key, task, split, example)))
            for split, found in make().items()
            for example, truth in found.items()
        ]
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".truths-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(b"\n".join(lines))
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    out: Truths = {}
    try:
        for line in path.read_bytes().splitlines():
            kept = msgspec.json.decode(line, type=_Kept)
            out.setdefault(kept.split, {})[kept.example] = kept.truth
    except msgspec.DecodeError as e:
        raise ConfigError(f"The truths in {path} are damaged: {e}.", next_step="Delete it; it is made again.") from e
    return out
