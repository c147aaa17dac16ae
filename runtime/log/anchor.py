"""The anchor: a file outside the server's store that says how far the chain of each run goes.

A log alone cannot show that its end is missing, or that all of it was written anew. The anchor is one JSON line for
each note of the notary. Every line holds the hash of the line before it, and a digest over the heads of all runs; where
a key is configured it is signed. What it claims: accidental damage is always found. Somebody who may write both the
store and the anchor is found out by a copy of the anchor, or by the lack of the key.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from bascule.runtime.log.notes import Anchored, Head, Line, digest
from bascule.runtime.signing import (
    SIGNING_KEY,
    VERIFY_KEY,
    Signer,
    is_signed_by,
    signer_from_environment,
    trusted_key_from_environment,
)
from bascule.schemas.errors import Corrupt, LogError

__all__ = ["Anchor", "Anchored", "Head", "anchor_path", "other_log"]

ANCHOR_ENV: Final = "BASCULE_ANCHOR"
_NOTHING: Final = "0" * 64


def anchor_path(home: Path) -> Path:
    """``BASCULE_ANCHOR``, else ``anchor.jsonl`` in the home."""
    named = os.environ.get(ANCHOR_ENV)
    return Path(named).expanduser().absolute() if named else home / "anchor.jsonl"


class Anchor:
    """The anchor of one log. Several processes may write; safe to use from several threads.

    Args:
        signer: signs what is written.
        trusted: the public key, in hexadecimal, whose signatures are demanded of what is read. Lines from before the
            first signed one are covered by its hash of them.
    """

    def __init__(self, path: Path, *, signer: Signer | None = None, trusted: str | None = None) -> None:
        self.path = path
        self.trusted = trusted
        self._signer = signer
        self._lock = threading.Lock()
        self._state = Anchored()
        self._previous = _NOTHING
        self._end = 0

    @classmethod
    def of_home(cls, home: Path) -> Anchor:
        """The anchor of a home's log: where and with which keys the environment says.

        Raises:
            ConfigError: a key cannot be read.
        """
        return cls(anchor_path(home), signer=signer_from_environment(), trusted=trusted_key_from_environment())

    def read(self) -> Anchored:
        """What the anchor says now; nothing if there is no file. A last line that was torn by a crash is passed over.

        Raises:
            Corrupt: a line was changed, removed or repeated, or lacks the signature that is demanded.
            LogError: the file cannot be read.
        """
        with self._lock:
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if self._end:
                    raise self._corrupt(self._state.n, "the file is gone") from None
                return self._state
            except OSError as e:
                raise self._unusable(e) from e
            try:
                self._take(fd)
            finally:
                os.close(fd)
            return self._state

    def append(self, log: str, heads: Mapping[str, Head], *, accepted: str | None = None, missing: int = 0) -> Anchored:
        """Note the heads that are ahead of what is noted, durably; without any, nothing is written.

        Args:
            accepted: note the heads whatever was noted before, for this reason.
            missing: with ``accepted``, how many events are gone from the store.

        Raises:
            Corrupt: as :meth:`read`, or the anchor belongs to another log.
            LogError: the file cannot be written.
        """
        with self._lock:
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as e:
                raise self._unusable(e) from e
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                self._take(fd)
                known = self._state.heads
                moved = {r: h for r, h in heads.items() if accepted is not None or h.count > _count(known.get(r))}
                if not moved:
                    return self._state
                if accepted is None and self._state.n and self._state.log != log:
                    raise other_log(self.path, self._state.log, log)
                os.ftruncate(fd, self._end)  # a line that a crash has torn
                self._write(fd, self._line(log, moved, accepted, missing))
                self._take(fd)
                return self._state
            except OSError as e:
                raise self._unusable(e) from e
            finally:
                os.close(fd)

    def _line(self, log: str, heads: dict[str, Head], accepted: str | None, missing: int) -> bytes:
        line = Line(
            n=self._state.n + 1,
            time=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            log=log,
            heads=heads,
            all="",
            previous=self._previous,
            accepted=accepted,
            missing=missing,
            key=self._signer.public_key if self._signer else None,
        )
        line = msgspec.structs.replace(line, all=digest(line, self._state.heads | heads))
        encoded = msgspec.json.encode(line)
        if self._signer is not None:
            encoded = msgspec.json.encode(msgspec.structs.replace(line, signature=self._signer.sign(encoded)))
        return encoded + b"\n"

    def _write(self, fd: int, data: bytes) -> None:
        written = os.write(fd, data)
        if written != len(data):
            os.ftruncate(fd, self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
        if self._end == 0:
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _take(self, fd: int) -> None:
        """Fold the whole lines that were added since the last time."""
        size = os.fstat(fd).st_size
        if size < self._end:
            raise self._corrupt(self._state.n, "lines that were there are gone")
        text = b""
        while part := os.pread(fd, size - self._end - len(text), self._end + len(text)):
            text += part
        lines = text.split(b"\n")[:-1]
        for i, encoded in enumerate(lines):
            line = self._checked(encoded)
            self._state.add(line)
            # The lines before it are bound by their hashes.
            if i == len(lines) - 1 and line.all != digest(line, self._state.heads):
                raise self._corrupt(line.n, "it was changed: its digest is wrong")
            self._previous = _hash(encoded)
            self._end += len(encoded) + 1
        if lines and self.trusted is not None and self._state.signed_by is None:
            raise Corrupt(
                f"The anchor {self.path} is not signed at its end (line {self._state.n}), and {VERIFY_KEY} demands it.",
                next_step=f"If it was signed, restore it from a copy. If it never was, unset {VERIFY_KEY} and set "
                f"{SIGNING_KEY}: the next note is then signed, and covers all lines before it.",
            )

    def _checked(self, encoded: bytes) -> Line:
        n = self._state.n + 1
        try:
            line = msgspec.json.decode(encoded, type=Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise self._corrupt(n, f"it cannot be read ({e})") from e
        if msgspec.json.encode(line) != encoded:
            raise self._corrupt(n, "it was changed")
        if line.previous != self._previous or line.n != n:
            raise self._corrupt(n, "it does not follow the line before it; a line was changed, removed or repeated")
        if (line.key is None) != (line.signature is None):
            raise self._corrupt(n, "it has a key without a signature, or a signature without a key")
        if self.trusted is None:
            return line
        if line.signature is None:
            if self._state.signed_by is not None:
                raise self._corrupt(n, f"it is not signed, and {VERIFY_KEY} demands it")
            return line
        plain = msgspec.json.encode(msgspec.structs.replace(line, signature=None))
        if line.key != self.trusted or not is_signed_by(self.trusted, line.signature, plain):
            raise self._corrupt(n, f"its signature is not by the trusted key {self.trusted}")
        return line

    def _corrupt(self, n: int, what: str) -> Corrupt:
        return Corrupt(
            f"The anchor {self.path} is not intact at line {n}: {what}.",
            next_step="Restore it from a copy. Without one, nothing shows any more that the log is whole: check it "
            "with `bascule verify`, and move the anchor away to begin a new one.",
        )

    def _unusable(self, e: OSError) -> LogError:
        return LogError(
            f"The anchor {self.path} cannot be used: {e.strerror}.",
            next_step=f"Make it writable, or choose another place with {ANCHOR_ENV}.",
        )


def other_log(path: Path, known: str, found: str) -> Corrupt:
    return Corrupt(
        f"The anchor {path} belongs to the log {known}, and this is the log {found or '(without identity)'}.",
        next_step="Use the store or server of that log; another log needs another --home. If the log was lost, restore "
        'it, or accept that with `bascule verify RUN --accept "REASON"`, run by run.',
    )


def _count(head: Head | None) -> int:
    return 0 if head is None else head.count


def _hash(line: bytes) -> str:
    return hashlib.blake2b(line, digest_size=32).hexdigest()
