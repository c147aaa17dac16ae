"""What holds for every log, as pure functions: which appends are well formed, adopted, in conflict or fenced off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from msgspec.structs import replace

from bascule.runtime.log.protocol import Fence, NewEvent
from bascule.schemas.codec import MAX_EVENT_BYTES, decode
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import Conflict, SchemaError
from bascule.schemas.subjects import is_event_subject

MAX_BATCH = 1000


def matches(filter_: str, subject: str) -> bool:
    """Whether ``subject`` is under ``filter_``, where ``*`` stands for one token and a last ``>`` for one or more.

    >>> matches("bascule.r1.train.g01.>", "bascule.r1.train.g01.outcome")
    True
    >>> matches("bascule.*.train.>", "bascule.r1.train")
    False
    """
    return _pattern(filter_).fullmatch(subject) is not None


@lru_cache(1024)
def _pattern(filter_: str) -> re.Pattern[str]:
    tokens = filter_.split(".")
    rest = [".*"] if tokens[-1] == ">" else []
    parts = ("[^.]*" if t == "*" else re.escape(t) for t in tokens[: len(tokens) - len(rest)])
    return re.compile(r"\.".join([*parts, *rest]), re.DOTALL)


def checked(events: Sequence[NewEvent], fence: Fence | None) -> list[Recorded]:
    """The events as they will be recorded, at sequence 0.

    Raises:
        ValueError: an empty or too long batch, one subject twice, or a fence that does not cover a single event.
        Corrupt: a payload that is not the envelope of its subject.
        SchemaError: a subject that is none, a payload over 512 KiB, or one that this version could not read back.
    """
    if not 1 <= len(events) <= MAX_BATCH:
        raise ValueError(f"an append takes 1 to {MAX_BATCH} events, not {len(events)}")
    if len({e.subject for e in events}) < len(events):
        raise ValueError("a batch names one subject twice")
    # An event outside the filter could be stored a second time: the fence replaces the check on the event's subject.
    if fence is not None and (len(events) != 1 or not matches(fence.filter, events[0].subject)):
        raise ValueError(f"the fence {fence.filter} is for one event under it")
    for e in events:
        if not is_event_subject(e.subject):
            raise SchemaError(
                f"{e.subject!r} cannot be the subject of an event.",
                next_step="It is bascule.<run>.<aggregate>.<id>.<event>, each 1 to 64 of a-z, 0-9, '-' and '_'.",
            )
        if len(e.payload) > MAX_EVENT_BYTES:
            raise SchemaError(
                f"The event {e.subject} is {len(e.payload)} bytes; the limit is {MAX_EVENT_BYTES}.",
                next_step="Put the large part into a blob.",
            )
    return [decode(0, e.subject, e.payload) for e in events]


def adopted(
    mine: Sequence[Recorded], stored: Sequence[Recorded | None], *, unconfirmed: bool = False
) -> list[Recorded] | None:
    """What an append answers when its subjects hold ``stored``; None if nothing is stored and it may write.

    Args:
        unconfirmed: an earlier try of the same append was never answered, so equal bytes are its own, no duplicate.

    Raises:
        Conflict: only some of a batch are stored.
    """
    there = [s for s in stored if s is not None]
    if not there:
        return None
    if len(there) < len(mine):
        missing = [m.subject for m, s in zip(mine, stored, strict=True) if s is None]
        raise Conflict(
            f"Only a part of a batch is in the log: {_names([s.subject for s in there])}; missing: {_names(missing)}.",
            next_step="Fold the log again and decide from what it holds.",
        )
    return [
        replace(s, duplicate=not (unconfirmed and s.payload == m.payload)) for m, s in zip(mine, there, strict=True)
    ]


def fenced_off(subject: str, fence: Fence, newest: tuple[int, str] | None) -> Conflict:
    """The refusal of an append whose fence does not hold; ``newest`` is what stands at the head of its filter."""
    what = "nothing is there" if newest is None else f"{newest[1]} is there at sequence {newest[0]}"
    return Conflict(
        f"{subject} was refused: it expects sequence {fence.seq} as the newest under {fence.filter}, but {what}.",
        next_step="A newer attempt has taken over; stop this one.",
    )


def _names(subjects: Sequence[str]) -> str:
    shown = ", ".join(subjects[:5])
    return shown if len(subjects) <= 5 else f"{shown} and {len(subjects) - 5} more"
