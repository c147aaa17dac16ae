"""One hash chain per run, over the recorded bytes.

``head(n) = blake2b-256(head(n-1) || n || len(subject) || subject || len(payload) || payload)`` with 8-byte big-endian
numbers; ``n`` counts the events of the run from 1, and ``head(0)`` is zero. It holds nothing of the store that the run
lies in, so an export carries it along.
"""

from __future__ import annotations

import hashlib

import msgspec

from bascule.schemas.envelope import Recorded

START = bytes(32)


def link(head: bytes, count: int, subject: str, payload: bytes) -> bytes:
    """The head after the event number ``count``."""
    name = subject.encode()
    h = hashlib.blake2b(head, digest_size=32)
    h.update(count.to_bytes(8, "big") + len(name).to_bytes(8, "big") + name + len(payload).to_bytes(8, "big"))
    h.update(payload)
    return h.digest()


class Chain(msgspec.Struct):
    """How far a run's chain was computed.

    Attributes:
        count: events so far.
        seq: place of the last of them in the store; 0 before the first.
    """

    count: int = 0
    head: bytes = START
    seq: int = 0

    def add(self, event: Recorded) -> bytes:
        """Take the run's next event; the new head."""
        self.count += 1
        self.head = link(self.head, self.count, event.subject, event.payload)
        self.seq = event.seq
        return self.head
