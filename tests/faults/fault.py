"""A fault, and what came of it, as data."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how often a fault is injected.

    Attributes:
        folder: empty, and the fault's own.
        count: how many faults to inject.
        say: prints what is injected.
    """

    folder: Path
    seed: int
    count: int
    say: Callable[[str], None]

    def rng(self, *parts: object) -> random.Random:
        """A generator that depends on the seed and on ``parts`` only."""
        return random.Random(":".join(str(p) for p in (self.seed, *parts)))


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a fault did.

    Attributes:
        injected: faults that were injected.
        lost: acknowledged events that are not in the log as they were acknowledged.
        duplicated: effects or events that are there more than once.
        detected, harmless, silent: of damages to stored bytes: reported; without effect on what is read; neither.
        equal: whether the runs' decisions have the hash of those of a run without faults.
        broken: other promises that did not hold, in words.
        skipped: why the fault cannot be injected on this machine; empty if it was.
    """

    injected: int
    lost: int = 0
    duplicated: int = 0
    detected: int | None = None
    harmless: int | None = None
    silent: int = 0
    equal: bool | None = None
    broken: tuple[str, ...] = ()
    note: str = ""
    skipped: str = ""

    @property
    def kept(self) -> bool:
        """Whether every promise held under the faults, or none could be injected here."""
        if self.skipped:
            return True
        failed = self.lost or self.duplicated or self.silent or self.broken or self.equal is False
        return self.injected > 0 and not failed


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of fault.

    Attributes:
        does: what is injected, and under which load.
        inject: injects ``count`` of them into a system of its own and checks the promises.
        full, quick: how many in a whole and in a quick round; 0 leaves it out of quick ones.
    """

    name: str
    does: str
    inject: Callable[[Setting], Awaitable[Outcome]]
    full: int
    quick: int
