"""What each service decides, without what it performs: replay imports no engine and no trainer."""

from __future__ import annotations

from collections.abc import Callable

from bascule.runtime.services import feedback, meta, trainer, verifier
from bascule.runtime.state import RunState
from bascule.runtime.world import World
from bascule.schemas.envelope import Draft, Recorded

DECIDE: dict[str, Callable[[RunState, Recorded, World], list[Draft]]] = {
    m.NAME: m.decide for m in (meta, verifier, feedback, trainer)
}
