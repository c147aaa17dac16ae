"""Signatures over exports and anchors: ed25519, with keys in PEM files that the environment names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from bascule.schemas.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNING_KEY: Final = "BASCULE_SIGNING_KEY"
VERIFY_KEY: Final = "BASCULE_VERIFY_KEY"


class Signer(Protocol):
    """Signs with one key."""

    @property
    def public_key(self) -> str:
        """The raw public key in hexadecimal."""
        ...

    def sign(self, data: bytes) -> str:
        """The signature in hexadecimal; equal data give equal signatures."""
        ...


class KeyFile:
    """A :class:`Signer` with the private key of a PEM file.

    Raises:
        ConfigError: the file is not readable, or holds no ed25519 key without a password.
    """

    def __init__(self, path: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(_read(path), password=None)
        except (ValueError, TypeError) as e:
            raise _no_key(path, "private") from e
        if not isinstance(key, Ed25519PrivateKey):
            raise _no_key(path, "private")
        self._key = key

    @property
    def public_key(self) -> str:
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, data: bytes) -> str:
        return self._key.sign(data).hex()


def signer_from_environment() -> Signer | None:
    """The signer with the key that BASCULE_SIGNING_KEY names; None if it is not set."""
    path = os.environ.get(SIGNING_KEY)
    return KeyFile(Path(path)) if path else None


def trusted_key_from_environment() -> str | None:
    """The raw public key, in hexadecimal, of the PEM file that BASCULE_VERIFY_KEY names; None if it is not set.

    Raises:
        ConfigError: the file is not readable or holds no ed25519 public key.
    """
    named = os.environ.get(VERIFY_KEY)
    if not named:
        return None
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read(Path(named)))
    except ValueError as e:
        raise _no_key(Path(named), "public") from e
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(Path(named), "public")
    return key.public_bytes_raw().hex()


def is_signed_by(public_key: str, signature: str, data: bytes) -> bool:
    """Whether ``signature`` is the one of ``data`` by the key; both in hexadecimal."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key: Ed25519PublicKey = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(signature), data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"The key {path} cannot be read: {e.strerror}.", next_step="Correct the path.") from e


def _no_key(path: Path, kind: str) -> ConfigError:
    return ConfigError(
        f"{path} holds no ed25519 {kind} key.",
        next_step="Make one: `openssl genpkey -algorithm ed25519 -out KEY.pem`; its public half: "
        "`openssl pkey -in KEY.pem -pubout`.",
    )
