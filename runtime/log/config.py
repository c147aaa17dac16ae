"""The configuration of nats-server: one text for the embedded server and for one that somebody else runs.

The streams are in the account of the admin; all other users are in an account without streams that imports the subjects
they need. Within one account a user could have the server write what the user may not: a request for a stored message,
with the subject of another's event as the place for the answer. An answer does not leave the account of its asker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bascule.runtime.log.permissions import ADMIN, SHARED, server_permissions

LOG_ACCOUNT: Final = "BASCULE"
SERVICE_ACCOUNT: Final = "SERVICES"
MAX_FILE_STORE: Final = 64 * 1024**3


def configuration(
    store: Path,
    *,
    name: str,
    listen: str,
    identities: Mapping[str, Mapping[str, str]],
    max_file_store: int = MAX_FILE_STORE,
    logfile: Path | None = None,
    tls: Mapping[str, str] | None = None,
) -> str:
    """The configuration. ``sync_interval: always`` makes the server fsync before it acknowledges.

    Args:
        store: folder of the streams.
        listen: ``host:port``; port -1 lets the server choose.
        identities: for each of our users how the server knows it: ``{"user", "password"}`` or ``{"nkey"}``.
        max_file_store: bytes that all streams together may take.
        tls: the server's ``tls`` block.
    """
    lines = [
        f"server_name: {_quoted(name)}",
        f"listen: {_quoted(listen)}",
        "max_payload: 1MB",
        *([f"logfile: {_quoted(str(logfile))}"] if logfile is not None else []),
        *([f"tls: {_block(tls)}"] if tls is not None else []),
        f"accounts: {_block(_accounts(identities))}",
        "jetstream {",
        f"  store_dir: {_quoted(str(store))}",
        f"  max_file_store: {max_file_store}",
        f"  max_memory_store: {64 * 1024**2}",
        "  sync_interval: always",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _accounts(identities: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    users = {user: {**identity, "permissions": server_permissions(user)} for user, identity in identities.items()}
    return {
        LOG_ACCOUNT: {
            "jetstream": "enabled",
            "users": [entry for user, entry in users.items() if user == ADMIN],
            "exports": [
                {"service": subject, "response_type": "stream" if many else "singleton", "accounts": [SERVICE_ACCOUNT]}
                for subject, many in SHARED.items()
            ],
        },
        SERVICE_ACCOUNT: {
            "users": [entry for user, entry in users.items() if user != ADMIN],
            "imports": [{"service": {"account": LOG_ACCOUNT, "subject": subject}} for subject in SHARED],
        },
    }


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _block(value: Any) -> str:
    """JSON, which the server's format contains."""
    return json.dumps(value, ensure_ascii=False, indent=2)
