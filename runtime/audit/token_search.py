"""Finds canaries in bytes, in every form that programs write text in: plain, UTF-16 and UTF-32, escaped, hexadecimal,
base64; and inside compressed files and archives.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import lzma
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, Final, NamedTuple, cast

from bascule.plugins.canary import DIGITS, PREFIX

#: Fewer digits than these may be chance.
FEWEST: Final = 8
#: A token takes at most so many bytes in any of the forms; two neighbouring chunks share as many.
SPAN: Final = 4096
CHUNK: Final = 16 * 1024 * 1024
#: What is inside of something inside of something ..., and how much of it is looked at.
DEPTH: Final = 4
MOST: Final = 8 * 1024**3

Form = str


class Found(NamedTuple):
    """A token: its hexadecimal digits, at least eight of them, and the form that it had."""

    digits: str
    form: Form


def _escaped(code: int) -> str:
    """A pattern of one ASCII character as JSON, Python, URLs and HTML may write it."""
    return rf"(?:{re.escape(chr(code))}|\\+u00{code:02x}|\\+x{code:02x}|%{code:02x}|&#{code};|&#x{code:02x};)"


#: What stands between two characters where each takes two or four bytes.
_ZEROS: Final = r"(?:\x00|\\+u0000|\\+x00)*"
_DIGIT: Final = "(?:" + "|".join(_escaped(ord(c)) for c in "0123456789abcdef") + ")"
_TEXT: Final = re.compile(
    ("".join(_escaped(ord(c)) + _ZEROS for c in PREFIX) + rf"((?:{_DIGIT}{_ZEROS}){{{FEWEST},{DIGITS}}})").encode()
)
_ONE: Final = re.compile(rb"\\+u00([0-9a-f]{2})|\\+x([0-9a-f]{2})|%([0-9a-f]{2})|&#x([0-9a-f]{2});|&#([0-9]{2,3});")
#: One of these is in whatever ``_TEXT`` finds; looking for them is much faster.
_HINTS: Final = (
    *(b"canary", b"c\0a\0", b"c\0\0\0a\0", rb"c\u0000a", rb"c\x00a"),
    *(b"u0063", b"x63", b"%63", b"&#99;"),
)
_HEX: Final = PREFIX.encode().hex().encode()
_HEX_DIGITS: Final = re.compile(rb"(?:3[0-9]|6[1-6]){%d,%d}" % (FEWEST, DIGITS))
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/]*")


def _cores() -> tuple[tuple[bytes, int, int], ...]:
    """The base64 of the prefix at each of three alignments: what does not depend on its neighbours, the characters of
    its first group that come before that, and the bytes that come before the prefix."""
    out = []
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + PREFIX.encode())
        first = -(-shift * 8 // 6)
        last = (shift + len(PREFIX)) * 8 // 6
        out.append((encoded[first:last], first, shift))
    return tuple(out)


_CORES: Final = _cores()
_TOKEN_BYTES: Final = len(PREFIX) + DIGITS


def tokens_in(data: bytes) -> Iterator[Found]:
    """The tokens in ``data``, each as often as it is there."""
    lowered = data.lower()
    if any(hint in lowered for hint in _HINTS):
        yield from _in_text(lowered)
    at = lowered.find(_HEX)
    while at >= 0:
        digits = _HEX_DIGITS.match(lowered, at + len(_HEX))
        if digits is not None:
            yield Found(bytes.fromhex(digits[0].decode()).decode(), "hexadecimal")
        at = lowered.find(_HEX, at + 1)
    # Mail breaks its lines, and JSON writes a break as two characters; of the two alphabets one is enough.
    joined = data.replace(rb"\r", b"").replace(rb"\n", b"").translate(bytes.maketrans(b"-_", b"+/"), b"\r\n")
    for core, first, shift in _CORES:
        at = joined.find(core)
        while at >= 0:
            yield from _in_base64(joined, at, first, shift)
            at = joined.find(core, at + 1)


def _in_text(lowered: bytes) -> Iterator[Found]:
    for match in _TEXT.finditer(lowered):
        whole = match[0]
        digits = _ONE.sub(_unescaped, match[1].replace(rb"\u0000", b"").replace(rb"\x00", b"")).replace(b"\0", b"")
        plain = len(whole) == len(PREFIX) + len(match[1]) and b"\0" not in whole
        form = "plain" if plain and b"\\" not in whole else "UTF-16 or UTF-32" if b"\0" in whole else "escaped"
        yield Found(digits.decode("ascii", "replace")[:DIGITS], form)


def _unescaped(match: re.Match[bytes]) -> bytes:
    *hexadecimal, decimal = match.groups()
    return bytes([int(decimal) if decimal else int(next(h for h in hexadecimal if h), 16)])


def _in_base64(joined: bytes, at: int, first: int, shift: int) -> Iterator[Found]:
    start = max(0, at - first)
    # Whatever stands before the prefix in its group does not matter, and may be missing in a fragment.
    group = b"A" * (first - (at - start)) + joined[start:at]
    length = 4 * -(-(shift + _TOKEN_BYTES) // 3)
    run = _BASE64.match(joined, at)
    text = (group + (run[0] if run is not None else b""))[:length]
    if not _BASE64.fullmatch(group):
        text = b"A" * first + text[first:]
    decoded = base64.b64decode(text + b"A" * (-len(text) % 4)).lower()
    for found in _in_text(decoded):
        yield Found(found.digits, "base64")


def search(source: IO[bytes], inside: str = "", depth: int = DEPTH) -> Iterator[tuple[str, Found]]:
    """The tokens in a file that can be read again and again, and in what it packs: archives and compressed files.

    Yields:
        Where inside the file (empty for the file itself), and what; near a border of chunks the same may come again,
        also cut off.
    """
    source.seek(0)
    kept = b""
    while chunk := source.read(CHUNK):
        for found in tokens_in(kept + chunk):
            yield inside, found
        kept = chunk[-SPAN:]
    if depth:
        for name, part in _unpacked(source):
            with part:
                yield from search(part, f"{inside}/{name}".lstrip("/"), depth - 1)


def _unpacked(source: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    """What a file packs; one that is cut off gives what can be had of it."""
    source.seek(0)
    head = source.read(512)
    source.seek(0)
    try:
        if head.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(source) as archive:
                for member in archive.infolist():
                    if not member.is_dir():
                        with archive.open(member) as packed:
                            yield member.filename, _spooled(packed)
        elif head[257:262] == b"ustar":
            with tarfile.open(fileobj=source, mode="r:") as tar:
                for entry in tar:
                    content = tar.extractfile(entry) if entry.isfile() else None
                    if content is not None:
                        yield entry.name, _spooled(content)
        elif (opened := _decompressor(head, source)) is not None:
            yield "content", _spooled(opened)
    except (zipfile.BadZipFile, tarfile.TarError, RuntimeError, NotImplementedError, OSError, EOFError, zlib.error):
        return


def _decompressor(head: bytes, source: IO[bytes]) -> IO[bytes] | None:
    if head.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=source, mode="rb"))
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.open(source)
    if head.startswith(b"BZh"):
        return bz2.open(source)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        unpacker = zstandard.ZstdDecompressor()
        return cast("IO[bytes]", unpacker.stream_reader(source, read_across_frames=True, closefd=False))
    return None


def _spooled(packed: IO[bytes]) -> IO[bytes]:
    """A copy that can be read again and again; of something that is damaged, as far as it goes."""
    out: Any = tempfile.SpooledTemporaryFile(max_size=4 * CHUNK)  # noqa: SIM115 - whoever reads it closes it
    size = 0
    try:
        while size < MOST and (chunk := packed.read(CHUNK)):
            out.write(chunk)
            size += len(chunk)
    except Exception:  # noqa: S110 - each format has errors of its own
        pass
    return cast("IO[bytes]", out)
