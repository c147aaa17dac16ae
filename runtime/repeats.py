"""What was done again although the log held it already, counted from the services' own log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec

from bascule.schemas.envelope import Recorded
from bascule.schemas.events import AdapterCheckpointed, TrajectoryLogged


class Line(msgspec.Struct, frozen=True):
    """The fields of a service log line that matter here."""

    event: str
    timestamp: Annotated[datetime, msgspec.Meta(tz=True)]
    trajectory: str = ""
    generation: int = -1
    iteration: int = -1


def lines(path: Path) -> Iterator[Line]:
    """The readable lines of a service log; a kill may have cut the last one short."""
    if not path.is_file():
        return
    decoder = msgspec.json.Decoder(Line)
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(msgspec.DecodeError):
                yield decoder.decode(line)


def repeated_work(path: Path, events: Sequence[Recorded]) -> tuple[int, int]:
    """Episodes and updates that were started after their outcome was recorded."""
    episodes = {e.data.trajectory: e.envelope.time for e in events if isinstance(e.data, TrajectoryLogged)}
    updates = {
        (e.data.generation, e.data.iteration): e.envelope.time
        for e in events
        if isinstance(e.data, AdapterCheckpointed)
    }
    again = [0, 0]
    for line in lines(path):
        if line.event == "episode.started":
            recorded = episodes.get(line.trajectory)
        elif line.event == "update.started":
            recorded = updates.get((line.generation, line.iteration))
        else:
            continue
        if recorded is not None and line.timestamp > datetime.fromisoformat(recorded):
            again[line.event == "update.started"] += 1
    return again[0], again[1]
