"""The streams: the log, dead letters, telemetry, and the blobs that hosts share; their settings, how they are made."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bascule.schemas.codec import MAX_EVENT_BYTES
from bascule.schemas.errors import Corrupt, LogError
from bascule.schemas.subjects import ROOT

if TYPE_CHECKING:
    from bascule.runtime.log.link import Link

STREAM: Final = "BASCULE"
DEAD_LETTERS: Final = "BASCULE_DLQ"
DEAD_LETTER_ROOT: Final = "basculedlq"
TELEMETRY: Final = "BASCULE_TELEMETRY"
TELEMETRY_ROOT: Final = "bascule-telemetry"
BLOB_BUCKET: Final = "bascule-blobs"
BLOB_STREAM: Final = f"OBJ_{BLOB_BUCKET}"

MAX_BYTES: Final = 32 * 1024**3
DUPLICATE_WINDOW_SECONDS: Final = 7 * 86400
_DEAD_LETTERS_SHARE: Final = 32
_TELEMETRY_SHARE: Final = 512
_TELEMETRY_SECONDS: Final = 7 * 86400

# Error codes of the JetStream API.
WRONG_SEQUENCE: Final = (10071, 10164)
_NO_STORAGE, _STREAM_NOT_FOUND, _STREAM_EXISTS, _STREAM_OFFLINE = 10047, 10059, 10058, 10194


def stream_config(max_bytes: int, replicas: int) -> dict[str, Any]:
    """The log: a stream that forgets nothing. When it is full it refuses; nobody can delete from it or purge it."""
    return {
        "name": STREAM,
        "subjects": [f"{ROOT}.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_age": 0,
        "max_msgs": -1,
        "max_bytes": max_bytes,
        "max_msg_size": MAX_EVENT_BYTES + 4096,
        "max_consumers": -1,
        "duplicate_window": DUPLICATE_WINDOW_SECONDS * 1_000_000_000,
        "deny_delete": True,
        "deny_purge": True,
        "allow_rollup_hdrs": False,
        "allow_direct": True,
        "allow_atomic": True,
        "num_replicas": replicas,
        "metadata": {"bascule.schema": "1", "bascule.log_id": str(uuid.uuid4())},
    }


def dead_letters_config(max_bytes: int, replicas: int) -> dict[str, Any]:
    """Pointers to events that no worker could handle: as lasting as the log that they point into, and far smaller."""
    config = stream_config(max_bytes // _DEAD_LETTERS_SHARE, replicas)
    return config | {"name": DEAD_LETTERS, "subjects": [f"{DEAD_LETTER_ROOT}.>"]}


def telemetry_config(max_bytes: int, replicas: int) -> dict[str, Any]:
    """What people watch: a stream that forgets what is a week old and, when it is full, the oldest."""
    return {
        "name": TELEMETRY,
        "subjects": [f"{TELEMETRY_ROOT}.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_age": _TELEMETRY_SECONDS * 1_000_000_000,
        "max_bytes": max_bytes // _TELEMETRY_SHARE,
        "max_msg_size": 64 * 1024,
        "deny_delete": False,
        "deny_purge": False,
        "allow_direct": True,
        "allow_atomic": False,
        "num_replicas": replicas,
    }


def bucket_config(replicas: int) -> dict[str, Any]:
    """The object store for blobs. It forgets nothing by itself either; what no event needs can be deleted."""
    return {
        "name": BLOB_STREAM,
        "subjects": [f"$O.{BLOB_BUCKET}.C.>", f"$O.{BLOB_BUCKET}.M.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_age": 0,
        "max_bytes": -1,
        "deny_delete": False,
        "deny_purge": False,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "allow_atomic": False,
        "num_replicas": replicas,
    }


async def open_streams(link: Link, *, make: bool, max_bytes: int, replicas: int, store: Path | None = None) -> None:
    """Check the log's streams, and that this user may read them.

    Args:
        make: make a stream that is not there.
        max_bytes, replicas: of streams that are made.
        store: the server's folder of the streams, if it can be looked at.

    Raises:
        Corrupt: a stream has its messages in ``store``, and the server does not know it.
        NotPermitted: the user may not read.
        LogError: a stream is not there and may not be made, or could lose history.
    """
    for config in (stream_config(max_bytes, replicas), dead_letters_config(max_bytes, replicas)):
        await _open_stream(link, config, make=make, store=store)

    if make:
        await _open_stream(link, telemetry_config(max_bytes, replicas), make=True, store=store)
        await open_bucket(link, replicas, store)

    async def readable() -> bool:
        # Under this subject nothing can be: an answer without content, or a refusal.
        await link.request(f"$JS.API.DIRECT.GET.{STREAM}", msgspec.json.encode({"last_by_subj": f"{ROOT}.none"}))
        return True

    await link.persist(f"Reading the stream {STREAM}", readable)


async def open_bucket(link: Link, replicas: int | None = None, store: Path | None = None) -> None:
    """Check the object store for blobs, and make it if it is not there and ``replicas`` is given.

    Raises:
        LogError: it is not there, or could lose blobs.
        Corrupt: as :func:`open_streams`.
    """
    await _open_stream(link, bucket_config(replicas or 1), make=replicas is not None, store=store)


async def _open_stream(link: Link, config: dict[str, Any], *, make: bool, store: Path | None) -> None:
    name = config["name"]

    async def attempt() -> bool | None:
        answer = await link.api(f"STREAM.INFO.{name}", {})
        if "error" not in answer:
            _check_stream(answer["config"], config)
            return True
        if answer["error"]["err_code"] == _STREAM_NOT_FOUND:
            if not make:
                raise LogError(
                    f"The server has no stream {name}, and this user may not make it.",
                    next_step="`bascule ops init --url URL --credentials FILE` makes it as the user admin.",
                )
            if store is not None:
                _refuse_to_replace(store / name)
            answer = await link.api(f"STREAM.CREATE.{name}", config)
        error = answer.get("error")
        if error is None:
            return True
        if error["err_code"] == _NO_STORAGE:
            raise LogError(
                f"The server has no room for the stream {name} of {config['max_bytes']} bytes.",
                next_step="Raise its max_file_store, or ask for a smaller log.",
            )
        if error["err_code"] == _STREAM_OFFLINE:
            raise LogError(
                f"The server cannot open the stream {name}: {error['description']}.",
                next_step="A file of its store is damaged; its log names it. A consumer's folder holds nothing of runs "
                "and may be deleted while the server is stopped; restore any other from a backup.",
            )
        # Another client was faster, or the server is still starting.
        if error["err_code"] == _STREAM_EXISTS or error["code"] >= 500:
            return None
        raise LogError(f"The stream {name} could not be opened: {error['description']}.")

    await link.persist(f"Opening the stream {name}", attempt)


def _refuse_to_replace(folder: Path) -> None:
    """Raise Corrupt if ``folder`` holds messages: over them the server would make a new log, with a new identity."""
    if any(block.stat().st_size for block in folder.glob("msgs/*.blk")):
        raise Corrupt(
            f"The server does not know the stream whose messages are in {folder}: its meta.inf or meta.sum is damaged.",
            next_step="Stop the server and restore the folder from a backup, these two files at least. To begin a new "
            "log instead, move the folder away.",
        )


def _check_stream(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise LogError if a stream that was found could lose history or cannot do what the log needs."""
    keys = ("subjects", "retention", "discard", "max_age", "deny_delete", "deny_purge", "allow_direct", "allow_atomic")
    # The server leaves out what is false or 0.
    wrong = [key for key in keys if (actual.get(key) or 0) != (wanted[key] or 0)]
    if wrong:
        raise LogError(
            f"The stream {wanted['name']} was made by somebody else: "
            f"{', '.join(f'{k}={actual.get(k)}' for k in wrong)}.",
            next_step="Use another server or account, or make the stream with the settings of bascule.",
        )
