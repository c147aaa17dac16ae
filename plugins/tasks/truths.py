"""Truths that come from files: kept in a private folder of the cache, a canary beside each.

Only private faces read them, and only the scoring process opens those.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from bascule.plugins.canary import canary, canary_key, private_folder
from bascule.plugins.whole import whole_file
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
        task: name that the task is registered under, which its canaries follow from.
        name: of the file, with everything that the truths depend on: task, layout, seed.

    Raises:
        ConfigError: the file is damaged, or ``make`` cannot get the data, or the private folder cannot be used.
    """
    path = private_folder() / f"{name}.jsonl"
    key = canary_key()
    if not path.exists():
        _keep(path, key, task, make())
    truths, found = _read(path)
    if found != [canary(key, task, split, example) for split, by_id in truths.items() for example in by_id]:
        _keep(path, key, task, truths)  # the key was made anew: a search would not know these canaries
    return truths


def _keep(path: Path, key: bytes, task: str, truths: Truths) -> None:
    lines = [
        msgspec.json.encode(_Kept(split, example, truth, canary(key, task, split, example)))
        for split, found in truths.items()
        for example, truth in found.items()
    ]
    with whole_file(path) as file:
        file.write(b"\n".join(lines))


def _read(path: Path) -> tuple[Truths, list[str]]:
    """The truths, and the canaries in the same order."""
    truths: Truths = {}
    canaries: list[str] = []
    try:
        for line in path.read_bytes().splitlines():
            kept = msgspec.json.decode(line, type=_Kept)
            truths.setdefault(kept.split, {})[kept.example] = kept.truth
            canaries.append(kept.canary)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"The truths in {path} are damaged: {e}.", next_step="Delete it; it is made again.") from e
    return truths, canaries
