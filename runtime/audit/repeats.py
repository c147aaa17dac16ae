"""What was done again although the log held it already, counted from the services' own log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                yield decoder.decode(line)


class Outcomes:
    """When each episode and update was recorded."""

    def __init__(self) -> None:
        self._episodes: dict[str, float] = {}
        self._updates: dict[tuple[int, int], float] = {}

    def add(self, event: Recorded) -> None:
        """Take an event; only outcomes count."""
        match event.data:
            case TrajectoryLogged(trajectory=trajectory):
                self._episodes[trajectory] = _moment(event)
            case AdapterCheckpointed(generation=generation, iteration=iteration):
                self._updates[generation, iteration] = _moment(event)
            case _:
                pass

    def repeated(self, path: Path) -> tuple[int, int]:
        """Episodes and updates that the service log at ``path`` says were started after their outcome was recorded."""
        again = [0, 0]
        for line in lines(path):
            if line.event == "episode.started":
                recorded = self._episodes.get(line.trajectory)
            elif line.event == "update.started":
                recorded = self._updates.get((line.generation, line.iteration))
            else:
                continue
            if recorded is not None and line.timestamp.timestamp() > recorded:
                again[line.event == "update.started"] += 1
        return again[0], again[1]


def _moment(event: Recorded) -> float:
    return datetime.fromisoformat(event.envelope.time).timestamp()
