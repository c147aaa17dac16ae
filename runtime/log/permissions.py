"""Who may write what: the NATS users, the subjects that each may append, and the least that its server must allow.

A pattern is a subject in which ``*`` stands for one token. What a service may append follows from what it decides and
does (``runtime/services``); the server enforces it, and an audit checks the recorded producers by the same table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from bascule.runtime.log.rules import matches
from bascule.runtime.log.streams import (
    BLOB_BUCKET,
    BLOB_STREAM,
    DEAD_LETTER_ROOT,
    DEAD_LETTERS,
    STREAM,
    TELEMETRY,
    TELEMETRY_ROOT,
)
from bascule.schemas.subjects import ROOT

SERVICES: Final = ("meta", "rollout", "verifier", "feedback", "trainer")
ADMIN: Final = "admin"
READER: Final = "reader"
CLI: Final = "cli"
USERS: Final = (*SERVICES, CLI, READER, ADMIN)

#: Services that share work, and so acknowledge deliveries.
_QUEUED: Final = ("rollout", "verifier")
_BLOB_WRITERS: Final = ("rollout", "trainer", CLI)
_TELEMETRY: Final = {"trainer": f"{TELEMETRY_ROOT}.*.train.>"}
_API: Final = "$JS.API"


class Appends(msgspec.Struct, frozen=True):
    """Patterns of the events that a user may append: those of ``allow`` without those of ``deny``."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


def _events(*patterns: str) -> tuple[str, ...]:
    """``<aggregate>.<id>.<event>`` of any run."""
    return tuple(f"{ROOT}.*.{pattern}" for pattern in patterns)


APPENDS: Final = {
    # The first harness, its candidate and its episodes; the end of a run whose task has no usable harness.
    "meta": Appends(_events("harness.g00.outcome", "candidate.g00.proposed", "episodes.*.requested", "run.run.end")),
    "rollout": Appends(_events("traj.*.logged", "adapter.*.served", "sandbox.*.probed")),
    # The verifier is the notary too: it checkpoints the log.
    "verifier": Appends(
        _events(
            "traj.*.scored",
            "eval.*.completed",
            "episodes.*.requested",
            "candidate.*.gate",
            "log.*.*",
            "sandbox.*.probed",
        )
    ),
    "feedback": Appends(
        _events(
            "decision.*.lever",
            "harness.*.outcome",
            "candidate.*.proposed",
            "episodes.*.requested",
            "train.*.requested",
            "call.*.outcome",
            "sandbox.*.probed",
            "run.run.end",
            "run.*.paused",
        )
    ),
    # An attempt and an iteration are in the last token, which no pattern can look into.
    "trainer": Appends(
        _events("train.*.*", "episodes.*.requested", "candidate.*.proposed"), _events("train.*.requested")
    ),
    CLI: Appends(
        _events(
            "run.run.started",
            "run.run.end",
            "run.*.paused",
            "run.*.resumed",
            "run.*.forked",
            "run.*.changed",
            "run.*.rolled_back",
            "ablation.*.requested",
            "blob.*.erased",
        )
    ),
    READER: Appends(),
    # Whole runs: an import, and a run forked from another.
    ADMIN: Appends(_events("*.*.*")),
}


def may_append(service: str, subject: str) -> bool:
    """Whether the user ``service`` may append an event under ``subject``; False for a user that does not exist."""
    rights = APPENDS.get(service, Appends())
    return _under(rights.allow, subject) and not _under(rights.deny, subject)


def _under(patterns: Sequence[str], subject: str) -> bool:
    return any(matches(pattern, subject) for pattern in patterns)


def inbox(user: str | None) -> str:
    """The prefix under which ``user`` gets answers: its own, so that nobody else can read or forge them."""
    return f"_INBOX_{user}" if user in USERS else "_INBOX"


def server_permissions(user: str) -> dict[str, dict[str, list[str]]]:
    """The ``permissions`` of a user in a nats-server configuration: what it appends, how it reads, its own inbox.

    The admin, who alone makes streams, may do everything; what is recorded is safe from it by the streams' settings.
    """
    if user == ADMIN:
        return {"publish": {"allow": [">"]}, "subscribe": {"allow": [">"]}}
    rights = APPENDS[user]
    allow = [*rights.allow, *_lookups(STREAM), *_consuming(STREAM), *_lookups(DEAD_LETTERS), *_lookups(BLOB_STREAM)]
    if user in SERVICES:
        allow.append(f"{DEAD_LETTER_ROOT}.*.{user}.>")
    allow += [*_lookups(TELEMETRY), *_consuming(TELEMETRY)]
    if user in _TELEMETRY:
        allow.append(_TELEMETRY[user])
    if user in _QUEUED:
        allow.append(_ACKS)
    if user in _BLOB_WRITERS:
        allow.append(f"$O.{BLOB_BUCKET}.>")
    if user == CLI:
        # A person retries dead letters, and erases and sweeps blobs.
        allow += [f"{DEAD_LETTER_ROOT}.*.*.>", *_deleting(BLOB_STREAM)]
    publish = {"allow": allow}
    if rights.deny:
        publish["deny"] = list(rights.deny)
    return {"publish": publish, "subscribe": {"allow": [f"{inbox(user)}.>"]}}


def _lookups(stream: str) -> list[str]:
    """Reading single messages."""
    return [
        f"{_API}.STREAM.INFO.{stream}",
        f"{_API}.STREAM.MSG.GET.{stream}",
        f"{_API}.DIRECT.GET.{stream}",
        f"{_API}.DIRECT.GET.{stream}.>",
    ]


def _consuming(stream: str) -> list[str]:
    """Reading on and on. The name of a consumer is one token, so that no pattern tells whose it is."""
    return [
        f"{_API}.CONSUMER.CREATE.{stream}.>",
        f"{_API}.CONSUMER.INFO.{stream}.*",
        f"{_API}.CONSUMER.DELETE.{stream}.*",
        f"{_API}.CONSUMER.MSG.NEXT.{stream}.*",
    ]


def _deleting(stream: str) -> list[str]:
    return [f"{_API}.STREAM.MSG.DELETE.{stream}", f"{_API}.STREAM.PURGE.{stream}"]


_ACKS: Final = f"$JS.ACK.{STREAM}.>"

#: What the users other than the admin reach of the log's account, and whether a request may have many answers. The API
#: as a whole, since a part of it would be asked of the users' own account as well, which has none.
SHARED: Final = {
    f"{ROOT}.>": False,
    f"{DEAD_LETTER_ROOT}.>": False,
    f"{TELEMETRY_ROOT}.>": False,
    f"$O.{BLOB_BUCKET}.>": False,
    _ACKS: False,
    f"{_API}.>": True,
}
