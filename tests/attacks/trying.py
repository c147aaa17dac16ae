"""Makes every attempt of an attack and says what it got. Runs where the attack runs: the standard library only."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from typing import Any

_TOKEN = re.compile(rb"bcanary-[0-9a-f]{32}")


class Nothing(Exception):
    """The attempt met no error, and found nothing."""


def tokens(data: bytes) -> str:
    """The canaries in some bytes.

    Raises:
        Nothing: there are none.
    """
    if found := sorted(set(_TOKEN.findall(data))):
        return b" ".join(found).decode()
    raise Nothing("nothing found")


def read(path: str, most: int = 1 << 22) -> bytes:
    with open(path, "rb") as file:
        return file.read(most)


def tried(attempts: Iterable[tuple[str, Callable[[], Any]]]) -> dict[str, dict[str, str]]:
    """By attempt: what it ``got``, or what it ``met``."""
    got: dict[str, str] = {}
    met: dict[str, str] = {}
    for name, attempt in attempts:
        try:
            got[name] = str(attempt())[:1000]
        except Nothing as e:
            met[name] = str(e)
        except OSError as e:
            met[name] = errno.errorcode.get(e.errno or 0, type(e).__name__)
        except Exception as e:
            met[name] = type(e).__name__
    return {"got": got, "met": met}
