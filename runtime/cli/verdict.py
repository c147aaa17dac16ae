"""How a verification looks to people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from bascule.runtime.audit.verify import Fault, Verification

_SHOWN = 50


def show_faults(faults: Sequence[Fault], console: Console) -> None:
    """The first faults, one a line."""
    for f in faults[:_SHOWN]:
        place = f"{f.seq} ({f.subject})" if f.seq else f.subject
        console.print(f"[red]fault[/] at {escape(place)}: {escape(f.what)}", highlight=False, soft_wrap=True)
    if len(faults) > _SHOWN:
        console.print(f"and {len(faults) - _SHOWN} more; --json has all", highlight=False)


def show_verification(found: Verification, console: Console) -> None:
    """The faults, and what is known of the rest."""
    show_faults(found.faults, console)
    lines = [f"{found.run}: {found.events} events, {len(found.faults)} faults"]
    if found.anchor_time is None and found.checkpoints:
        console.print(
            f"[bold yellow]note[/] there is no anchor, although the log holds {found.checkpoints} checkpoints, and who "
            "writes those writes the anchor: it was removed, or is elsewhere (BASCULE_ANCHOR). Nothing shows that the "
            "log is not an older or a shorter one.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if found.anchor_time is None:
        lines.append("no anchor: a missing end would not show")
    else:
        tail = f"; {found.unanchored} after it are not anchored yet" if found.unanchored else ""
        lines.append(f"verified through event {found.anchored} by the anchor, {_signed(found)}{tail}")
    lines.append(f"{found.checkpoints} checkpoints in the log agree; head {found.head}")
    if found.blobs or found.erased:
        lines.append(f"{found.blobs} blobs match, {found.erased} were erased on request")
    if found.unknown:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(found.unknown.items()))
        lines.append(f"of types that this version does not know: {kinds}")
    lines += [f"accepted {accepted}" for accepted in found.accepted]
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)


def _signed(found: Verification) -> str:
    if found.signed_by is None:
        return "which is not signed"
    checked = "checked" if found.trusted else "not checked: BASCULE_VERIFY_KEY is not set"
    return f"signed by {found.signed_by[:16]} ({checked})"
