"""Who logs in at a NATS server, whom a client trusts, and what it is told when either fails."""

from __future__ import annotations

import ssl
from pathlib import Path

import msgspec

from bascule.plugins.extras import install_command
from bascule.schemas.errors import ConfigError, LogError, NotPermitted


class Credential(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What proves who a user is: a password, or the seed of an nkey, by whose public key the server knows the user."""

    password: str | None = None
    nkey_seed: str | None = None

    def check(self, user: str | None) -> None:
        """Raise ConfigError if the seed is none, or cannot be used here."""
        if self.nkey_seed is None:
            return
        try:
            import nkeys
        except ImportError as e:
            raise ConfigError(
                "A login by seed needs the package nkeys.", next_step=f"Install it: {install_command('ops')}"
            ) from e
        try:
            nkeys.from_seed(bytearray(self.nkey_seed.encode())).wipe()
        except (nkeys.NkeysError, ValueError) as e:
            raise ConfigError(
                f"The nkey_seed of the user {user or '(unnamed)'} is not one.",
                next_step="A seed begins with SU; `bascule ops nats-config` makes them.",
            ) from e


def unknown_user(url: str, user: str | None) -> NotPermitted:
    return NotPermitted(
        f"The server at {url} refuses the user {user or '(none)'}: authorization violation.",
        next_step="Check the credentials: in the URL, or in the file that --credentials or BASCULE_CREDENTIALS names.",
    )


def untrusted(url: str, error: ssl.SSLError) -> LogError:
    reason = getattr(error, "verify_message", "") or error.reason or str(error)
    return LogError(
        f"The certificate of the server at {url} is not trusted: {reason}.",
        next_step="Set BASCULE_TLS_CA to the certificate of the authority that signed it.",
    )


def plain(url: str) -> LogError:
    return LogError(
        f"The server at {url} offers no TLS, so nothing was sent to it.",
        next_step="Have the server demand TLS (`bascule ops nats-config --tls-cert`), or use it in plain text by a "
        "nats:// address and without BASCULE_TLS_CA.",
    )


def trust(ca: Path | None) -> ssl.SSLContext:
    """The certificates in ``ca``, else the system's.

    Raises:
        ConfigError: ``ca`` cannot be used.
    """
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as e:
        raise ConfigError(
            f"{ca} holds no certificates that can be used: {e.strerror or e}.",
            next_step="Set BASCULE_TLS_CA to a PEM file.",
        ) from e
