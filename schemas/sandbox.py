"""What a sandbox is made of on a machine, and what its canaries found."""

from __future__ import annotations

from typing import Literal

import msgspec

Layer = Literal["files", "network", "processes", "privileges", "memory", "disk", "time"]
LAYERS: tuple[Layer, ...] = ("files", "network", "processes", "privileges", "memory", "disk", "time")


class SandboxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a run demands of the sandbox that harnesses and candidates run in.

    Attributes:
        require: layers whose canaries must all be stopped, or the run is refused.
        unsafe: run without a sandbox; every result is marked.
    """

    require: tuple[Layer, ...] = LAYERS
    unsafe: bool = False


class Canary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that was tried inside the sandbox.

    Attributes:
        name: what was tried, such as ``read-planted-secret``.
        layer: what it belongs to.
        held: whether the sandbox held.
        control: whether the same, tried without the sandbox, succeeded; None where it was not tried.
        by: what stopped it, as far as is known, such as ``own root`` or ``seccomp``.
    """

    name: str
    layer: Layer
    held: bool
    control: bool | None = None
    by: str = ""


class SandboxReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is in force, and what held.

    Attributes:
        mechanisms: what is in force, such as ``user namespace``, ``own root``, ``landlock 7``, ``seccomp``.
        missing: what is not, with the reason.
        holds: the layers all of whose canaries were stopped.
        uid: the user id that confined programs have.
    """

    kind: Literal["layered", "unsafe"]
    mechanisms: tuple[str, ...]
    missing: tuple[str, ...]
    holds: tuple[Layer, ...]
    canaries: tuple[Canary, ...] = ()
    uid: int = 0
