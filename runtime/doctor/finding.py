"""What a check is given and what it finds."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from bascule.schemas.errors import BasculeError
from bascule.schemas.run import RunConfig

Outcome = Literal["ok", "warns", "fails", "skipped"]
#: What is found of something that is looked at next and may end the process that looks; no line of the report.
BEGUN = "begun"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report.

    Attributes:
        about: what was looked at.
        outcome: ``fails`` only for what the asked configuration needs; ``skipped`` with the reason in ``found``.
        found: in words, with the figures that matter.
        next_step: what to do about it, for whatever is not ``ok``.
        figures: the same for programs, bytes and counts by name.
    """

    about: str
    outcome: Outcome
    found: str
    next_step: str = ""
    figures: dict[str, Any] = {}


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a check needs to know.

    Attributes:
        home: the home folder.
        profile, task, engine, policy, author, overrides: as on the command line.
        online: whether endpoints may be called.
        patience: seconds that an endpoint may take.
        config: what that makes; None where it could not be made, or was not yet.
        gpu_free: bytes that are free on the GPU with the most of them; None without one, or where nobody looked yet.
    """

    home: str
    profile: str | None = None
    task: str | None = None
    engine: str | None = None
    policy: str | None = None
    author: str | None = None
    overrides: tuple[str, ...] = ()
    online: bool = False
    patience: float = 5.0
    config: RunConfig | None = None
    gpu_free: int | None = None


def failed(about: str, error: BasculeError) -> Finding:
    """An error that says what to do, as a line."""
    return Finding(about=about, outcome="fails", found=error.message, next_step=error.next_step or "")


def untold(about: str, error: BasculeError) -> Finding:
    """Of something that cannot be told, since the configuration is refused; that has a failing line of its own."""
    found = f"cannot be told, since the configuration is refused: {error.message}"
    return Finding(about=about, outcome="skipped", found=found, next_step=error.next_step or "")


def learns(config: RunConfig) -> bool:
    """Whether the trainer is needed."""
    return "weights" in config.levers


def embeds(config: RunConfig) -> bool:
    """Whether the embedded engine is."""
    return config.engine.name == "transformers"


def in_gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB"
