"""Canaries are found in every form that programs write text in, and nothing else is."""

from __future__ import annotations

import base64
import bz2
import gzip
import html
import io
import json
import lzma
import quopri
import random
import tarfile
import urllib.parse
import zipfile
from collections.abc import Callable

import pytest
import zstandard

from bascule.plugins.canary import DIGITS, PREFIX, Canaries, Planted, canary
from bascule.runtime.audit.token_search import CHUNK, search, tokens_in

TOKEN = canary(b"k" * 32, "task", "dev", "example-7")
DIGITS_OF = TOKEN.removeprefix(PREFIX)
AROUND = b'{"reason":"the scorer said '


def _packed_tar(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as archive:
        entry = tarfile.TarInfo("events.jsonl")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _packed_zip(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("array.npy", data)
    return out.getvalue()


FORMS: dict[str, Callable[[str], bytes]] = {
    "plain": lambda t: t.encode(),
    "upper case": lambda t: t.upper().encode(),
    "utf-16 little": lambda t: t.encode("utf-16-le"),
    "utf-16 big": lambda t: t.encode("utf-16-be"),
    "utf-32": lambda t: t.encode("utf-32"),
    "hexadecimal": lambda t: t.encode().hex().encode(),
    "upper-case hexadecimal": lambda t: t.encode().hex().upper().encode(),
    "JSON within JSON": lambda t: json.dumps(json.dumps({"said": t})).encode(),
    "every character escaped": lambda t: "".join(f"\\u{ord(c):04x}" for c in t).encode(),
    "escaped twice": lambda t: json.dumps("".join(f"\\u{ord(c):04X}" for c in t)).encode(),
    "the dash escaped": lambda t: t.replace("-", "\\u002d").encode(),
    "UTF-16 as JSON text": lambda t: json.dumps(t.encode("utf-16-le").decode("latin-1")).encode(),
    "Python's repr of UTF-16": lambda t: repr(t.encode("utf-16-le")).encode(),
    "as bytes in Python": lambda t: "".join(f"\\x{ord(c):02x}" for c in t).encode(),
    "in an address": lambda t: urllib.parse.quote(t).replace("-", "%2D").encode(),
    "in HTML": lambda t: html.escape(t).replace("-", "&#45;").encode(),
    "all of it in HTML": lambda t: "".join(f"&#x{ord(c):x};" for c in t).encode(),
    "MIME base64 with line breaks": lambda t: base64.encodebytes(b"x" * 50 + t.encode() + b"y" * 50),
    "base64 with line breaks in JSON": lambda t: json.dumps(base64.encodebytes(b"x" * 50 + t.encode()).decode()).encode(),  # noqa: E501
    "quoted printable": lambda t: quopri.encodestring(t.encode()),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_token_is_found_in_each_form(form: str) -> None:
    written = FORMS[form](TOKEN)
    for data in (written, AROUND + written + b'"}'):
        found = {f.digits for f in tokens_in(data)}
        assert found == {DIGITS_OF}, data


@pytest.mark.parametrize("before", range(6))
@pytest.mark.parametrize("after", range(3))
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_token_is_found_in_base64_at_each_alignment(
    before: int, after: int, encode: Callable[[bytes], bytes]
) -> None:
    # Neighbours that give the two characters in which the alphabets differ.
    written = encode(b"\xfb\xef\xff\xfe\xfb"[:before] + TOKEN.encode() + b"\xff\xfe"[:after])
    for data in (written, written.rstrip(b"="), AROUND + written + b'"}'):
        assert {f.digits for f in tokens_in(data)} == {DIGITS_OF}


def test_the_beginning_of_a_token_is_found_too() -> None:
    cut = TOKEN[:-10]
    (found,) = tokens_in(f"… the scorer said {cut}".encode())
    planted = Planted("task", "dev", "example-7")
    assert Canaries({TOKEN: planted}).find(found.digits) == planted
    assert list(tokens_in(TOKEN[: len(PREFIX) + 5].encode())) == []


def test_nothing_is_found_where_nothing_is() -> None:
    noise = random.Random(1).randbytes(1 << 20)
    for data in (b"", noise, base64.b64encode(noise), noise.hex().encode(), PREFIX.encode(), b"canary bcanary- 012"):
        assert list(tokens_in(data)) == []


@pytest.mark.parametrize(
    "pack",
    [gzip.compress, lzma.compress, bz2.compress, zstandard.compress, _packed_tar, _packed_zip,
     lambda data: _packed_zip(_packed_tar(gzip.compress(data)))],
    ids=["gzip", "xz", "bzip2", "zstd", "tar.xz", "zip", "nested"],
)  # fmt: skip
def test_a_token_is_found_in_what_is_packed(pack: Callable[[bytes], bytes]) -> None:
    packed = pack(b"line\n" * 1000 + TOKEN.encode() + b"\nline" * 1000)
    found = list(search(io.BytesIO(packed)))
    assert {f.digits for _, f in found} == {DIGITS_OF}
    assert found[-1][0], "says what it lies in"


def test_what_is_damaged_is_read_as_far_as_it_goes() -> None:
    packed = gzip.compress(TOKEN.encode() + random.Random(1).randbytes(1 << 20))
    assert [f.digits for _, f in search(io.BytesIO(packed[:-1000]))] == [DIGITS_OF]
    assert list(search(io.BytesIO(b"PK\x03\x04 is no archive"))) == []


def test_a_token_across_the_border_of_two_chunks_is_found() -> None:
    data = b"-" * (CHUNK - DIGITS) + TOKEN.encode() + b"-" * 100
    found = {f.digits for _, f in search(io.BytesIO(data))}
    assert DIGITS_OF in found
    assert all(DIGITS_OF.startswith(digits) for digits in found), "the part before the border is of the same token"
