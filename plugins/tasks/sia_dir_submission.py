"""What an agent of a SIA directory hands in: files under the names that evaluators look for, as the text of one answer.

Also a file of the harness of ``sia-dir`` (``submission.py`` there): the standard library only. The files of an agent
are hostile: no link is followed, nothing but plain files of bounded size with UTF-8 text is read.

An answer is a line that says its form, then JSON ``{name: text}``, or where that is too long the same compressed. Where
an evaluator reads only some fields of JSON records, only those are handed in.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fnmatch
import json
import os
import stat
import zlib
from collections.abc import Sequence
from typing import Any

#: What one answer may be long, bytes.
MAX_ANSWER = 16 * 1024
#: What the files of one submission may be long together, bytes.
MAX_FILES = 8 * 1024 * 1024
#: Where evaluators look; of each pattern the newest file counts.
PATTERNS = (
    "results/*.json",
    "submission.csv",
    "predictions.csv",
    "responses.json",
    "submission*.json",
    "output*.json",
    "submission*.csv",
)
PLAIN = "sia-submission\n"
PACKED = "sia-submission zlib\n"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class NotASubmission(ValueError):
    """What there is cannot be handed in, or is none; the message names the file and the reason."""


def collect(folder: str, patterns: Sequence[str] = PATTERNS) -> dict[str, str]:
    """The submission in a folder: for each pattern the newest plain file, by relative name.

    Raises:
        NotASubmission: one of them is a link, no text or too long.
        OSError: the folder itself cannot be read.
    """
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found: dict[str, str] = {}
        left = MAX_FILES
        for pattern in patterns:
            name = _newest(root, pattern)
            if name is None or name in found:
                continue
            data = _read(root, name, left)
            left -= len(data)
            try:
                found[name] = data.decode("utf-8-sig")
            except UnicodeDecodeError as e:
                raise NotASubmission(f"{name} is no UTF-8 text: {e.reason} at byte {e.start}") from e
        return found
    finally:
        os.close(root)


def _inner(root: int, name: str) -> tuple[int, str]:
    """A descriptor of the folder in which ``name`` lies, and its last part."""
    inner, _, last = name.rpartition("/")
    if inner and ("/" in inner or inner in (".", "..")):
        raise NotASubmission(f"{name} lies too deep")
    return (os.open(inner, _FOLDER, dir_fd=root) if inner else os.dup(root)), last


def _newest(root: int, pattern: str) -> str | None:
    try:
        at, last = _inner(root, pattern)
    except OSError:
        return None
    prefix = pattern[: -len(last)]
    try:
        names = sorted(n for n in os.listdir(at) if fnmatch.fnmatchcase(n, last))
        if not names:
            return None
        times = {}
        for name in names:
            with contextlib.suppress(OSError):
                times[name] = os.stat(name, dir_fd=at, follow_symlinks=False).st_mtime_ns
        return prefix + max(times, key=lambda n: (times[n], n)) if times else None
    finally:
        os.close(at)


def _read(root: int, name: str, most: int) -> bytes:
    at, last = _inner(root, name)
    try:
        descriptor = os.open(last, _FILE, dir_fd=at)
    except OSError as e:
        raise NotASubmission(f"{name} is a link, or cannot be read: {e.strerror}") from e
    finally:
        os.close(at)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotASubmission(f"{name} is no plain file")
        data = file.read(most + 1)
    if len(data) > most:
        raise NotASubmission(f"{name} is too long: with it there are more than {MAX_FILES} bytes")
    return data


def kept(text: str, fields: Sequence[str]) -> str:
    """JSON with those fields of its records alone; what is no JSON stays as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, list):
        value = [_only(item, fields) for item in value]
    elif isinstance(value, dict) and isinstance(value.get("details"), list):
        value = {"details": [_only(item, fields) for item in value["details"]]}
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _only(item: Any, fields: Sequence[str]) -> Any:
    return {name: item[name] for name in fields if name in item} if isinstance(item, dict) else item


def pack(files: dict[str, str], fields: Sequence[str] = (), *, compress: bool = True, limit: int = MAX_ANSWER) -> str:
    """The files as one answer.

    Args:
        fields: of JSON records that are handed in; all if there are none.
        compress: whether it may be compressed. Texts of a restricted task must stay readable, so that quoted items
            are seen.
        limit: how long the answer may be, bytes.

    Raises:
        NotASubmission: there is no file, or it is too long.
    """
    if not files:
        raise NotASubmission("there is no file to hand in")
    slim = {n: kept(text, fields) if fields and n.endswith(".json") else text for n, text in files.items()}
    body = json.dumps(slim, ensure_ascii=False, separators=(",", ":"))
    plain = PLAIN + body
    size = len(plain.encode("utf-8", "replace"))
    if size <= limit:
        return plain
    if compress:
        packed = PACKED + base64.b85encode(zlib.compress(body.encode("utf-8", "replace"), 9)).decode()
        if len(packed) <= limit:
            return packed
        size = len(packed)
    raise NotASubmission(f"{', '.join(slim)}: as an answer {size} bytes long; the limit is {limit}")


def unpack(answer: str) -> dict[str, str]:
    """The files of an answer.

    Raises:
        NotASubmission: it is none, or would be longer than a submission may be.
    """
    if answer.startswith(PLAIN):
        body = answer.removeprefix(PLAIN)
    elif answer.startswith(PACKED):
        body = _inflated(answer.removeprefix(PACKED))
    else:
        raise NotASubmission("the answer is no submission")
    try:
        files = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise NotASubmission("the answer holds no JSON") from e
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
        raise NotASubmission("the answer names no files")
    for name in files:
        parts = name.split("/")
        if len(parts) > 2 or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise NotASubmission(f"the answer names the file {name[:80]!r}")
    if not files:
        raise NotASubmission("the answer names no files")
    return files


def _inflated(text: str) -> str:
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b85decode(text), MAX_FILES)
        if inflate.unconsumed_tail or not inflate.eof:
            raise NotASubmission(f"the answer does not end within {MAX_FILES} bytes")
        return data.decode("utf-8")
    except (ValueError, binascii.Error, zlib.error) as e:
        if isinstance(e, NotASubmission):
            raise
        raise NotASubmission("the answer cannot be unpacked") from e
