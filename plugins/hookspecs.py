"""The hooks. All are synchronous registration; what they register satisfies a protocol of its kind."""

from __future__ import annotations

import pluggy

from bascule.plugins.registry import Registry

PROJECT = "bascule"
API = "1"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def bascule_register(registry: Registry) -> None:
    """Register algorithms, tasks, second verifiers, policies, authors, engines and redactors under their names.

    Heavy imports belong into the factories and methods, not here: ``bascule plugins`` calls this hook.
    """
