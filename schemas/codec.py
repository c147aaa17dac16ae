"""Bytes to events and back; canonical JSON; the decision hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, TypeGuard

import msgspec

from bascule.schemas.envelope import Draft, Envelope, Origin, Producer, Recorded, Unknown
from bascule.schemas.errors import Corrupt, SchemaError
from bascule.schemas.events import KNOWN_TYPES, TYPES, Data
from bascule.schemas.secret import secret_path
from bascule.schemas.subjects import event_id, is_event_id
from bascule.schemas.upcasters import STEPS, prove

MAX_EVENT_BYTES = 512 * 1024
INLINE_BYTES = 64 * 1024

_encoder = msgspec.json.Encoder()
_envelope_decoder = msgspec.json.Decoder(Envelope)
_decoders = {key: msgspec.json.Decoder(t) for key, t in TYPES.items()}

#: (type, version) to the function that turns its data into that of version + 1; proven whenever this is imported.
UPCASTERS = prove(TYPES, STEPS)


def encode(
    draft: Draft, *, run: str, producer: Producer, time: str, root: str | None, origin: Origin = "live"
) -> bytes:
    """The payload bytes of a draft.

    Raises:
        SchemaError: the event holds a secret or something else that is no data, or would be over 512 KiB.
    """
    try:
        data = _encoder.encode(draft.data)
    except TypeError as e:
        secret = secret_path(draft.data)
        if secret is None:
            raise SchemaError(f"The event {draft.subject} cannot be encoded: {e}.") from e
        raise SchemaError(
            f"The event {draft.subject} holds a secret in {secret}, and a secret is never recorded.",
            next_step="Record its name, not its value.",
        ) from None
    payload = _encoder.encode(
        Envelope(
            id=event_id(draft.subject),
            type=draft.data.TYPE,
            source=f"/bascule/{producer.service}",
            subject=draft.subject,
            time=time,
            run=run,
            step=draft.step,
            schemaversion=draft.data.VERSION,
            producer=producer,
            data=msgspec.Raw(data),
            causationid=draft.cause,
            correlationid=root,
            attempt=draft.attempt,
            origin=origin,
        )
    )
    if len(payload) > MAX_EVENT_BYTES:
        raise SchemaError(
            f"The event {draft.subject} is {len(payload)} bytes; the limit is {MAX_EVENT_BYTES}.",
            next_step="Put the large part into a blob.",
        )
    return payload


def decode(seq: int, subject: str | None, payload: bytes, *, duplicate: bool = False) -> Recorded:
    """Decode recorded bytes.

    Args:
        subject: what they are stored under; None for bytes that are stored under nothing but what they say.

    Raises:
        Corrupt: the payload is no envelope, or names another subject than it is stored under.
        SchemaError: a known type in a version that this code does not know, or data that does not fit it.
    """
    try:
        envelope = _envelope_decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        where = f"sequence {seq}" if subject is None else f"sequence {seq} ({subject})"
        raise Corrupt(f"The event at {where} is not an envelope: {e}.") from e
    if subject is None:
        subject = envelope.subject
    if envelope.subject != subject or not is_event_id(envelope.id, subject):
        raise Corrupt(f"The event at sequence {seq} is stored under {subject} but says it is {envelope.subject}.")
    return Recorded(
        seq=seq, subject=subject, payload=payload, envelope=envelope, data=_data(envelope), duplicate=duplicate
    )


def _data(envelope: Envelope) -> Data | Unknown:
    decoder = _decoders.get((envelope.type, envelope.schemaversion))
    if decoder is None and envelope.type not in KNOWN_TYPES:
        return Unknown(bytes(envelope.data))
    try:
        if decoder is not None:
            return decoder.decode(envelope.data)
        return _upcast(envelope.type, envelope.schemaversion, bytes(envelope.data))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise SchemaError(
            f"The data of {envelope.subject} ({envelope.type} version {envelope.schemaversion}) does not fit: {e}.",
            next_step="The log was written by other code under the same version; install that version.",
        ) from e


def _upcast(type_: str, version: int, raw: bytes) -> Data:
    current = max(v for t, v in TYPES if t == type_)
    data: dict[str, Any] = msgspec.json.decode(raw)
    for v in range(version, current):
        step = UPCASTERS.get((type_, v))
        if step is None:
            raise SchemaError(
                f"{type_} version {version} needs an upcaster from version {v} to {v + 1}, and there is none.",
                next_step="Install the version of bascule that wrote this log.",
            )
        data = step(data)
    if version > current:
        raise SchemaError(
            f"{type_} version {version} is newer than this code, which knows version {current}.",
            next_step="Install the version of bascule that wrote this log.",
        )
    return msgspec.convert(data, TYPES[type_, current])


def figures(value: Any) -> Any:
    """Builtins with every float rounded to 12 significant digits, so that equal decisions have equal bytes."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {k: figures(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [figures(v) for v in value]
    return value


def canonical(data: Any, *, measured: bool = True) -> bytes:
    """Canonical JSON: sorted keys, figures at 12 digits; without ``measured`` costs where asked."""
    builtins = figures(msgspec.to_builtins(data))
    if not measured and isinstance(builtins, dict):
        builtins = {k: v for k, v in builtins.items() if k != "measured"}
    return msgspec.json.encode(builtins, order="sorted")


_RUN_TOKEN = re.compile(r"^bascule\.[^.]+\.")


def is_compared(data: Data | Unknown) -> TypeGuard[Data]:
    """Whether it is a decision by which runs are compared: not one of an ablation, which is asked for afterwards."""
    return isinstance(data, Data) and data.KIND == "decision" and getattr(data, "purpose", None) != "ablation"


class DecisionHash:
    """Hash over the decisions by which runs are compared: type, subject and data, without time, attempt and costs.

    The run's own name is left out, so that two runs can be compared.
    Subjects are sorted, since the order in which independent decisions land is not a decision.
    """

    def __init__(self) -> None:
        self._lines: list[bytes] = []

    def add(self, event: Recorded) -> None:
        """Take an event; only decisions count."""
        data = event.data
        if not is_compared(data):
            return
        subject = _RUN_TOKEN.sub("", event.subject).encode()
        content = event.envelope.type.encode() + b"\0" + canonical(data, measured=False)
        self._lines.append(subject + b"\0" + hashlib.blake2b(content, digest_size=20).digest())

    def hexdigest(self) -> str:
        h = hashlib.blake2b(digest_size=20)
        for line in sorted(self._lines):
            h.update(len(line).to_bytes(8, "big") + line)
        return h.hexdigest()


def decision_hash(events: Iterable[Recorded]) -> str:
    """The :class:`DecisionHash` of a run's events."""
    found = DecisionHash()
    for event in events:
        found.add(event)
    return found.hexdigest()
