"""What the lines of an anchor say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """How far a run's chain goes.

    Attributes:
        count, head: events of the run, and the chain's value after them, hexadecimal.
        seq: place of the last of them in the store.
    """

    count: int
    seq: int
    head: str


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One note.

    Attributes:
        log: identity of the log.
        heads: of the runs that moved since the line before.
        all: digest over the heads of all runs, these included, and over the rest of the line.
        previous: hash of the line before.
        accepted: why somebody accepted a damaged log as it is; ``missing`` events of it are then known to be gone.
        key, signature: ed25519 over the line without its signature; hexadecimal.
    """

    n: int
    time: str
    log: str
    heads: dict[str, Head]
    all: str
    previous: str
    accepted: str | None = None
    missing: int = 0
    key: str | None = None
    signature: str | None = None


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody took a damaged run as it is: when, why, and how many events it had then."""

    time: str
    reason: str
    count: int


class Anchored(msgspec.Struct, kw_only=True):
    """What the lines of an anchor say together.

    Attributes:
        n, time: of the newest line.
        heads: newest head by run.
        points: all heads of a run that still stand, by run and count.
        missing: events known to be gone from the store.
        signed_by: public key of the newest line, None if it is not signed.
    """

    n: int = 0
    time: str = ""
    log: str = ""
    heads: dict[str, Head] = {}
    points: dict[str, dict[int, Head]] = {}
    accepted: dict[str, list[Acceptance]] = {}
    missing: int = 0
    signed_by: str | None = None

    @property
    def last(self) -> tuple[str, Head] | None:
        """The run with the highest anchored sequence, and its head."""
        return max(self.heads.items(), key=lambda item: item[1].seq, default=None)

    def add(self, line: Line) -> None:
        self.n, self.time, self.log = line.n, line.time, line.log
        self.signed_by = line.key if line.signature is not None else None
        if line.accepted is not None:
            self.missing = line.missing
        for run, head in line.heads.items():
            points = self.points.setdefault(run, {})
            if line.accepted is not None:
                points.clear()
                accepted = Acceptance(time=line.time, reason=line.accepted, count=head.count)
                self.accepted.setdefault(run, []).append(accepted)
            self.heads[run] = points[head.count] = head


def digest(line: Line, heads: Mapping[str, Head]) -> str:
    """Over a line without its digest and signature, and the heads of all runs in the order of their names."""
    h = hashlib.blake2b(msgspec.json.encode(msgspec.structs.replace(line, all="", signature=None)), digest_size=32)
    for run in sorted(heads):
        head = heads[run]
        h.update(f"{run} {head.count} {head.seq} {head.head}\n".encode())
    return h.hexdigest()
