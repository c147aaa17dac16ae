"""A disturbed run, held against the same run without faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from bascule.schemas.envelope import Recorded
from bascule.schemas.events import ModelCalled, ToolCalled
from tests.faults.fault import Outcome
from tests.faults.fleet import undisturbed
from tests.faults.launcher import Acked, lines_of

CALLS, LEDGER = "calls.jsonl", "acked.jsonl"


class Performed(msgspec.Struct, frozen=True):
    """A line of the plugin's endpoint: what it was asked, and when."""

    key: str
    time: float


def judged(
    report: dict[str, Any],
    events: Sequence[Recorded],
    home: Path,
    *,
    injected: int,
    broken: Sequence[str] = (),
    note: str = "",
) -> Outcome:
    """What faults did to a run, from its report, its events, and what its processes wrote down in ``home``."""
    expected, decisions = undisturbed(report["seed"])
    subjects = Counter(e.subject for e in events)
    duplicated = report["repeated_rollouts"] + report["repeated_updates"] + repeated_calls(home, events)
    stored = {(e.seq, e.subject, e.payload.decode()) for e in events}
    run = f"bascule.{report['run']}."
    acked = [a for a in lines_of(home / LEDGER, Acked) if a.subject.startswith(run)]
    return Outcome(
        injected=injected,
        lost=len(decisions - set(subjects)) + sum((a.seq, a.subject, a.payload) not in stored for a in acked),
        duplicated=duplicated + sum(n - 1 for n in subjects.values()),
        equal=report["decision_hash"] == expected["decision_hash"],
        broken=(*broken, *([] if report["status"] == "completed" else [f"the run is {report['status']}"])),
        note=note,
    )


def repeated_calls(home: Path, events: Sequence[Recorded]) -> int:
    """Calls that were made although the log held their answers.

    An event's own time is taken before it is stored; that of what was decided on it, after.
    """
    keys = {}
    for e in events:
        if isinstance(e.data, ModelCalled | ToolCalled):
            asked = e.data.request if isinstance(e.data, ModelCalled) else e.data.arguments
            keys[e.envelope.id] = asked["key"]
    recorded = {
        keys[cause]: datetime.fromisoformat(e.envelope.time).timestamp()
        for e in reversed(events)
        if (cause := e.envelope.causationid or "") in keys
    }
    performed = lines_of(home / CALLS, Performed)
    return sum(p.time > recorded[p.key] for p in performed if p.key in recorded)


def both(first: Outcome, second: Outcome, *, note: str = "") -> Outcome:
    """Two runs under one kind of fault."""
    return Outcome(
        injected=first.injected + second.injected,
        lost=first.lost + second.lost,
        duplicated=first.duplicated + second.duplicated,
        equal=bool(first.equal) and bool(second.equal),
        broken=(*first.broken, *second.broken),
        note=note or "; ".join(filter(None, (first.note, second.note))),
    )
