"""The log's files as they were before nats-server could repair them.

A server that finds a damaged record when it starts cuts its block off there, or drops it: one flipped bit takes along
what lies behind it, before anybody could hold the log against its anchor. So its files are copied before the start. The
copy goes once the log has proved to be whole, and stays if it is not.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from bascule.runtime.log.config import LOG_ACCOUNT
from bascule.runtime.log.notes import Anchored
from bascule.runtime.log.streams import STREAM

#: Up to these sizes the files are copied: after a crash, when the server reads all of them, and otherwise.
_AFTER_CRASH_BYTES: Final = 4 * 1024**3
_BYTES: Final = 64 * 1024**2


def copy_place(home: Path) -> Path:
    return home / "nats-before-recovery"


def stream_folder(home: Path) -> Path:
    return home / "nats" / "jetstream" / LOG_ACCOUNT / "streams" / STREAM


def keep_copy(home: Path) -> str | None:
    """Copy the log's files, unless a copy is there: what it holds may be gone by now. The server must not run.

    It is not synced: it guards against the server, not against a loss of power.

    Returns:
        Why there is no copy of what there is.
    """
    source, place = stream_folder(home), copy_place(home)
    torn = place.with_suffix(".tmp")
    try:
        if torn.exists():
            shutil.rmtree(torn)
        size = sum(p.stat().st_size for p in (source / "msgs").glob("*"))
        if size == 0 or place.exists():
            return None
        crashed = (home / "server.json").exists() or not (source / "msgs" / "index.db").exists()
        limit = _AFTER_CRASH_BYTES if crashed else _BYTES
        if size > limit:
            return f"its files are larger than {limit // 1024**2} MiB"
        if shutil.disk_usage(home).free < 2 * size:  # the log itself needs to grow
            return "the disk has too little space"
        # A consumer's folder holds nothing of runs.
        shutil.copytree(source, torn / STREAM, ignore=shutil.ignore_patterns("obs"))
        torn.rename(place)
    except OSError as e:  # shutil.Error, of many files, is one
        shutil.rmtree(torn, ignore_errors=True)
        return f"copying failed: {e.strerror or e}"
    return None


def drop_copy(home: Path, anchored: Anchored) -> None:
    """Remove the copy of a log that has proved to be whole; not if it was damage that somebody accepted since then."""
    place = copy_place(home)
    if not place.is_dir():
        return
    made = datetime.fromtimestamp(place.stat().st_ctime, UTC).isoformat()
    if not any(a.time > made for of_run in anchored.accepted.values() for a in of_run):
        shutil.rmtree(place, ignore_errors=True)


def where_copied(home: Path, why_not: str | None) -> str:
    """Where the files are as they were, for whoever is told of damage."""
    place = copy_place(home)
    if place.is_dir():
        return f"The log's files as they were before the server started on them are in {place}."
    return f"The log's files were not copied before the server started on them: {why_not}." if why_not else ""
