"""The schema lock: a recorded type cannot change by accident.

``python -m bascule.schemas.lock`` compares the schema of every (type, version) with ``schema.lock`` and fails on a
difference; ``--write`` records them anew, which is right for a new type or version only.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import msgspec

from bascule.schemas.envelope import Envelope
from bascule.schemas.events import TYPES

LOCK = Path(__file__).with_name("schema.lock")


def current() -> dict[str, str]:
    """Hash of the JSON schema of the envelope and of each (type, version)."""
    found = {"envelope/1": _hash(Envelope)} | {f"{t}/{v}": _hash(s) for (t, v), s in TYPES.items()}
    return dict(sorted(found.items()))


def _hash(type_: type) -> str:
    schema = msgspec.json.schema(type_)
    return hashlib.sha256(msgspec.json.encode(schema, order="sorted")).hexdigest()[:32]


def differences() -> list[str]:
    """What differs from the lock, a line each."""
    locked: dict[str, str] = msgspec.json.decode(LOCK.read_bytes()) if LOCK.exists() else {}
    found = current()
    lines = [f"{name}: changed" for name in found if name in locked and locked[name] != found[name]]
    lines += [f"{name}: new" for name in found if name not in locked]
    return lines + [f"{name}: gone, though logs hold it" for name in locked if name not in found]


def main() -> int:
    if "--write" in sys.argv[1:]:
        LOCK.write_bytes(msgspec.json.format(msgspec.json.encode(current()), indent=1) + b"\n")
        return 0
    lines = differences()
    for line in lines:
        sys.stdout.write(f"schema lock: {line}\n")
    if lines:
        sys.stdout.write(
            "A recorded type changed. Give it a new version with an upcaster, or, if no log can hold it yet, run\n"
            "`python -m bascule.schemas.lock --write`.\n"
        )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
