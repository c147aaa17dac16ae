"""How each user reaches a server: by the passwords of the embedded one, a credentials file, or one login for all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

import msgspec

from bascule.runtime.log.login import Credential
from bascule.runtime.log.permissions import USERS
from bascule.schemas.errors import ConfigError, LogError, NotPermitted

if TYPE_CHECKING:
    from bascule.runtime.log.home import Connection
    from bascule.runtime.log.nats import NatsLog

CREDENTIALS_ENV: Final = "BASCULE_CREDENTIALS"
CA_ENV: Final = "BASCULE_TLS_CA"


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """A server, and what its users log in with.

    Attributes:
        url: without credentials.
        ca: certificates to trust instead of the system's; with it, or with ``tls://``, the server must use TLS.
        store: the folder of the streams, if it can be looked at.
        credentials: by user; None if ``user`` and ``password`` (or nobody) stand for all.
        source: where the credentials come from, for messages.
    """

    url: str
    ca: Path | None = None
    store: Path | None = None
    credentials: dict[str, Credential] | None = None
    source: str = ""
    user: str | None = None
    password: str | None = None

    def has(self, user: str) -> bool:
        return self.credentials is None or user in self.credentials

    async def connect(self, user: str, *, max_bytes: int | None = None, replicas: int = 1) -> NatsLog:
        """The log as ``user``; for the rest see :meth:`NatsLog.connect`.

        Raises:
            NotPermitted: there are no credentials for this user, or the server refuses them.
        """
        from bascule.runtime.log.nats import NatsLog
        from bascule.runtime.log.streams import MAX_BYTES

        if not self.has(user):
            raise NotPermitted(
                f"{self.source} has no credentials of the user {user!r}.",
                next_step=f"Add them, or use a file that has them; `bascule ops nats-config` makes one for {_LISTED}.",
            )
        mine = self.credentials[user] if self.credentials is not None else Credential(password=self.password)
        return await NatsLog.connect(
            self.url,
            user=user if self.credentials is not None else self.user,
            password=mine.password,
            nkey_seed=mine.nkey_seed,
            ca=self.ca,
            store=self.store,
            name=f"bascule-{user}",
            max_bytes=MAX_BYTES if max_bytes is None else max_bytes,
            replicas=replicas,
        )


_LISTED: Final = ", ".join(USERS)


def embedded_access(connection: Connection) -> Access:
    """To the embedded server."""
    return Access(
        url=connection.url,
        store=Path(connection.store) if connection.store else None,
        credentials={user: Credential(password=password) for user, password in connection.passwords.items()},
        source="The embedded server",
    )


def remote_access(url: str, credentials: Path | None) -> Access:
    """To the server at ``url``: as the one user that it names, else by ``credentials`` or BASCULE_CREDENTIALS.

    Raises:
        LogError: ``url`` is none.
        ConfigError: the credentials cannot be read.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("nats", "tls") or not parts.hostname:
        # It may hold a password, and where that ends is not known where it is no address.
        raise LogError(
            "--url is not the address of a NATS server.", next_step="Use nats://HOST:PORT or tls://HOST:PORT."
        )
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if port is None:
        address += ":4222"
    ca = Path(named) if (named := os.environ.get(CA_ENV)) else None
    if parts.username:
        return Access(
            url=address,
            ca=ca,
            user=unquote(parts.username),
            password=unquote(parts.password) if parts.password is not None else None,
        )
    path = credentials or os.environ.get(CREDENTIALS_ENV)
    if not path:
        return Access(url=address, ca=ca)
    return Access(url=address, ca=ca, credentials=read_credentials(Path(path)), source=str(path))


def read_credentials(path: Path) -> dict[str, Credential]:
    """Credentials by user from a JSON file: ``{"rollout": {"password": ...} or {"nkey_seed": ...}, ...}``.

    Raises:
        ConfigError: it cannot be read, or holds something else; names no secret.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Credential])
    except OSError as e:
        raise ConfigError(
            f"The credentials {path} cannot be read: {e.strerror}.",
            next_step="Name a file that `bascule ops nats-config` or `bascule broker` has written.",
        ) from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"{path} holds no credentials: {e}.",
            next_step='Write {"USER": {"password": ...}} or {"USER": {"nkey_seed": ...}}.',
        ) from e
    for user, credential in found.items():
        if user not in USERS or (credential.password is None) == (credential.nkey_seed is None):
            raise ConfigError(
                f"{path} is wrong for the user {user!r}.",
                next_step=f"A user is one of {_LISTED}, and has either a password or an nkey_seed.",
            )
    return found


def written(credentials: dict[str, Credential]) -> str:
    """The text of a credentials file."""
    return msgspec.json.format(msgspec.json.encode(credentials), indent=2).decode() + "\n"
