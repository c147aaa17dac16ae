"""What a service found out about its sandbox, recorded once for each of its processes."""

from __future__ import annotations

import secrets
from functools import cache
from typing import TYPE_CHECKING

from bascule.schemas import subjects
from bascule.schemas.envelope import Draft
from bascule.schemas.events import SandboxProbed
from bascule.schemas.sandbox import SandboxReport

if TYPE_CHECKING:
    from bascule.runtime.runner import View


@cache
def worker() -> str:
    """The name of this process in its reports: 12 hexadecimal digits, drawn anew by each."""
    return secrets.token_hex(6)


async def probed(view: View, service: str, report: SandboxReport) -> None:
    """Record what confines the code that ``service`` runs for others in this process; again is harmless."""
    data = SandboxProbed(service=service, worker=worker(), report=report)
    subject = subjects.sandbox_probed(view.run, service, worker())
    cause = view.state.root
    await view.append(service, [Draft(subject=subject, step=0, data=data, cause=cause)])
