"""One bit or the end of one file, damaged by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

#: Kinds of files in a home with an export beside it, and which paths they are.
GROUPS: Mapping[str, Callable[[Path], bool]] = {
    "messages": lambda p: p.suffix == ".blk",
    "index": lambda p: p.name == "index.db",
    "settings": lambda p: "nats" in p.parts and p.name in ("meta.inf", "meta.sum") and "obs" not in p.parts,
    "consumers": lambda p: "obs" in p.parts,
    "blobs": lambda p: "blobs" in p.parts and not p.name.startswith("."),
    "anchor": lambda p: p.name == "anchor.jsonl",
    "export": lambda p: p.suffix == ".tar",
}


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to a file.

    Attributes:
        path: below the damaged folder.
        at: which bit is flipped, or how many bytes are left.
        crashed: the server had no time to write its index, which is gone as well.
    """

    group: str
    path: str
    kind: Literal["flip", "truncate"]
    at: int
    crashed: bool

    def __str__(self) -> str:
        done = f"flips bit {self.at}" if self.kind == "flip" else f"leaves {self.at} bytes"
        return f"{self.group}: {self.path} {done}{' and the index is gone' if self.crashed else ''}"


#: The copy that is made before a server starts holds nothing that anybody reads.
COPY = "nats-before-recovery"


def drawn(number: int, folder: Path, rng: random.Random) -> Damage:
    """The damage number ``number``: all groups in turn, with every other one in the messages."""
    others = [g for g in GROUPS if g != "messages"]
    group = "messages" if number % 2 else others[number // 2 % len(others)]
    files = (p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and COPY not in p.parts)
    paths = sorted(p for p in files if GROUPS[group](p))
    path = rng.choice(paths)
    size = path.stat().st_size
    kind = rng.choice(("flip", "flip", "truncate"))
    return Damage(
        group=group,
        path=str(path.relative_to(folder)),
        kind=kind,
        at=rng.randrange(8 * size) if kind == "flip" else rng.randrange(size),
        crashed=group == "messages" and rng.random() < 0.5,
    )


def damage(damage_: Damage, folder: Path) -> None:
    path = folder / damage_.path
    data = bytearray(path.read_bytes())
    if damage_.kind == "flip":
        data[damage_.at // 8] ^= 1 << damage_.at % 8
    else:
        del data[damage_.at :]
    path.write_bytes(data)
    if damage_.crashed:
        for index in folder.rglob("index.db"):
            index.unlink()
