"""The envelope of every event: CloudEvents 1.0 structured JSON with ``data`` kept as raw bytes.

The payload bytes are what is stored, hashed and exported; decoding is a second step by (type, version), so that a
reader keeps events of types that it does not know.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from bascule.schemas.events import Data

Origin = Literal["live", "whatif"]


class Producer(msgspec.Struct, frozen=True, kw_only=True):
    """Who wrote an event: service, version, and the hash of the installed code."""

    service: str
    version: str
    hash: str


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event as recorded.

    Attributes:
        id: hash of the subject; the identity.
        type, schemaversion: what ``data`` is.
        step: the generation.
        causationid: the event that this one follows from; correlationid: the run's first event.
        attempt: for outcomes of effects, which attempt made it.
    """

    id: str
    type: str
    source: str
    subject: str
    time: str
    run: str
    step: int
    schemaversion: int
    producer: Producer
    data: msgspec.Raw
    specversion: str = "1.0"
    datacontenttype: str = "application/json"
    causationid: str | None = None
    correlationid: str | None = None
    attempt: int = 0
    origin: Origin = "live"


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """An event that has been decided on but not yet recorded: subject, generation and data."""

    subject: str
    step: int
    data: Data
    cause: str | None = None
    attempt: int = 0


class Unknown(msgspec.Struct, frozen=True):
    """Data of a type that this version does not know: kept and shown, ignored by folds."""

    raw: bytes


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """An event as read from the log.

    Attributes:
        seq: its place in the log.
        payload: the recorded bytes.
        duplicate: set on the answer to an append if the event was there before (first write wins).
    """

    seq: int
    subject: str
    payload: bytes
    envelope: Envelope
    data: Data | Unknown
    duplicate: bool = False
