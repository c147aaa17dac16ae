"""Items that must not be published: kept out of events, and so out of exports and pages.

The texts of a restricted task's items are in blobs that are marked as restricted. Whatever else quotes an item, an
answer or an error message for instance, is replaced in what is recorded. This guards against quoting, not against a
harness that disguises what it quotes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

from bascule.plugins.task import PublicFace
from bascule.runtime.redaction import Redaction

#: So many words in a row are a quotation.
WORDS = 8
#: Texts of fewer words are quoted if they stand there whole, and have at least so many characters.
SHORT = 24
_WORD = re.compile(r"\w+")


class Quotations:
    """Knows the texts of a task's items; a redactor of what is recorded."""

    name = "restricted"
    version = "1"

    def __init__(self, public: PublicFace) -> None:
        self._runs: set[tuple[str, ...]] = set()
        self._short: set[str] = set()
        for example in (*public.train, *public.dev, *public.sealed):
            for text in _texts(example.input):
                words = _words(text)
                if len(words) >= WORDS:
                    self._runs.update(_runs(words))
                elif len(joined := " ".join(words)) >= SHORT:
                    self._short.add(joined)

    def quoted(self, text: str) -> bool:
        """Whether ``text`` holds eight words in a row of an item, or a shorter text of one whole."""
        words = _words(text)
        if any(run in self._runs for run in _runs(words)):
            return True
        joined = f" {' '.join(words)} "
        return any(f" {short} " in joined for short in self._short)

    def redact(self, text: str, key: str | None) -> str:
        """``[restricted:<first digits of its SHA-256>]`` for a text that quotes an item."""
        del key
        return f"[restricted:{hashlib.sha256(text.encode()).hexdigest()[:12]}]" if self.quoted(text) else text


def withholding(public: PublicFace) -> Redaction | None:
    """What keeps the items of a restricted task out of what is recorded; None for any other task."""
    return Redaction([Quotations(public)]) if public.restricted else None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
