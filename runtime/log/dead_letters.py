"""The dead-letter stream: pointers to events that a service cannot work off, and requests to try them again.

Subjects are ``basculedlq.<run>.<service>.<seq>.<dead|retry>-<ordinal>``, so each failure is recorded exactly once: what
fails again after a retry gets the next ordinal. The event itself stays in the log.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import msgspec

from bascule.runtime.log.link import Link, settled
from bascule.runtime.log.pull import status_of
from bascule.runtime.log.rules import matches
from bascule.runtime.log.streams import DEAD_LETTER_ROOT, DEAD_LETTERS, WRONG_SEQUENCE
from bascule.schemas.errors import ConfigError, LogError
from bascule.schemas.subjects import token


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A pointer to an event that failed.

    Attributes:
        seq, subject: of the event.
        error: what went wrong, in a line; ``trace`` is a hash over where, equal for equal failures.
        version: of the code that failed.
        retries: how often it was asked to try again.
        dead: whether the newest entry is a failure, not a request to try again.
    """

    run: str
    service: str
    seq: int
    subject: str
    error: str
    trace: str
    version: str
    time: str
    retries: int = 0
    dead: bool = True


class DeadLetters(Protocol):
    """Where dead letters are kept."""

    async def bury(self, letter: DeadLetter) -> None:
        """Record a failure; ``letter.retries`` says of which attempt. Harmless when repeated."""
        ...

    async def retry(self, letter: DeadLetter) -> None:
        """Ask for another attempt. Harmless when repeated for the same failure."""
        ...

    async def list(self, run: str = "*", service: str = "*") -> list[DeadLetter]:
        """The newest entry of each event that ever failed, oldest first."""
        ...


def _place(letter: DeadLetter, kind: str) -> str:
    return f"{DEAD_LETTER_ROOT}.{token(letter.run)}.{token(letter.service)}.{letter.seq}.{kind}-{letter.retries:03d}"


def _folded(entries: list[tuple[str, DeadLetter]]) -> list[DeadLetter]:
    """Per event, its newest entry; the kind stands in the subject."""
    newest: dict[tuple[str, str, int], DeadLetter] = {}
    for subject, letter in entries:
        dead = subject.rsplit(".", 1)[1].startswith("dead")
        retries = letter.retries if dead else letter.retries + 1
        newest[letter.run, letter.service, letter.seq] = msgspec.structs.replace(letter, dead=dead, retries=retries)
    return [newest[key] for key in newest]


def _readable(subject: str, payload: bytes) -> DeadLetter | None:
    """The entry under ``subject``; None for one that no service of ours wrote: it points nowhere."""
    try:
        letter = msgspec.json.decode(payload, type=DeadLetter)
        places = (_place(letter, "dead"), _place(letter, "retry"))
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError):
        return None
    return letter if subject in places else None


class MemoryDeadLetters:
    """Dead letters of a log in memory."""

    def __init__(self) -> None:
        self._entries: dict[str, DeadLetter] = {}

    async def bury(self, letter: DeadLetter) -> None:
        self._entries.setdefault(_place(letter, "dead"), letter)

    async def retry(self, letter: DeadLetter) -> None:
        self._entries.setdefault(_place(letter, "retry"), letter)

    async def list(self, run: str = "*", service: str = "*") -> list[DeadLetter]:
        wanted = f"{DEAD_LETTER_ROOT}.{run}.{service}.>"
        return _folded([(s, letter) for s, letter in self._entries.items() if matches(wanted, s)])


class NatsDeadLetters:
    """Dead letters on the stream ``BASCULE_DLQ``."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def bury(self, letter: DeadLetter) -> None:
        await self._append(_place(letter, "dead"), letter)

    async def retry(self, letter: DeadLetter) -> None:
        await self._append(_place(letter, "retry"), letter)

    async def list(self, run: str = "*", service: str = "*") -> list[DeadLetter]:
        wanted = f"{DEAD_LETTER_ROOT}.{run}.{service}.>"
        found: list[tuple[str, DeadLetter]] = []
        seq = 1
        while True:
            entry = await self._next(wanted, seq)
            if entry is None:
                return _folded(found)
            place, subject, payload = entry
            seq = place + 1
            letter = _readable(subject, payload)
            if letter is not None:
                found.append((subject, letter))

    async def _append(self, subject: str, letter: DeadLetter) -> None:
        payload = msgspec.json.encode(letter)
        headers = {"Nats-Expected-Stream": DEAD_LETTERS, "Nats-Expected-Last-Subject-Sequence": "0"}

        async def attempt() -> bool | None:
            reply = await self._link.request(subject, payload, headers=headers)
            answer = msgspec.json.decode(reply.data, type=dict[str, Any])
            there = answer.get("error", {}).get("err_code") in WRONG_SEQUENCE
            return True if there or settled(answer, f"The dead letter {subject}") else None

        await self._link.persist(f"Recording the dead letter {subject}", attempt)

    async def _next(self, wanted: str, seq: int) -> tuple[int, str, bytes] | None:
        request = msgspec.json.encode({"seq": seq, "next_by_subj": wanted})

        async def attempt() -> list[tuple[int, str, bytes]]:
            async with asyncio.timeout(5):
                msg = await self._link.request(f"$JS.API.DIRECT.GET.{DEAD_LETTERS}", request)
            if status_of(msg) == "404":
                return []
            if status_of(msg) is not None or msg.headers is None:
                raise LogError(f"Reading dead letters was refused: {msg.headers}.")
            return [(int(msg.headers["Nats-Sequence"]), msg.headers["Nats-Subject"], msg.data)]

        found = await self._link.persist(f"Reading dead letters under {wanted}", attempt)
        return found[0] if found else None
