"""New credentials for the users of a server that somebody else runs, and what that server is told of them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final, Literal

from bascule.plugins.extras import install_command
from bascule.runtime.log.login import Credential
from bascule.runtime.log.permissions import USERS
from bascule.schemas.errors import ConfigError

# Nobody guesses 32 random bytes, and the server spends this at each login: 2**6 rounds.
_BCRYPT_COST: Final = 6


def new_credentials(kind: Literal["nkeys", "password"]) -> dict[str, Credential]:
    """Random credentials for each user.

    Raises:
        ConfigError: the package nkeys is not installed.
    """
    if kind == "password":
        return {user: Credential(password=secrets.token_urlsafe(32)) for user in USERS}
    nkeys = _nkeys()
    seeds = {user: nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER) for user in USERS}
    return {user: Credential(nkey_seed=seed.decode()) for user, seed in seeds.items()}


def identities(credentials: Mapping[str, Credential]) -> dict[str, dict[str, str]]:
    """How the server knows each user: by a public key, or a name and the bcrypt hash of a password. Holds no secret.

    Raises:
        ConfigError: a package is not installed.
    """
    return {user: _identity(user, credential) for user, credential in credentials.items()}


def _identity(user: str, credential: Credential) -> dict[str, str]:
    if credential.nkey_seed is not None:
        pair = _nkeys().from_seed(bytearray(credential.nkey_seed.encode()))
        public: str = pair.public_key.decode()
        pair.wipe()
        return {"nkey": public}
    assert credential.password is not None
    try:
        import bcrypt
    except ImportError as e:
        raise _missing("bcrypt") from e
    # Only this prefix tells every version of the server that it is a hash.
    salt = bcrypt.gensalt(_BCRYPT_COST, prefix=b"2a")
    return {"user": user, "password": bcrypt.hashpw(credential.password.encode(), salt).decode()}


def _nkeys() -> Any:
    try:
        import nkeys
    except ImportError as e:
        raise _missing("nkeys") from e
    return nkeys


def _missing(package: str) -> ConfigError:
    return ConfigError(f"This needs the package {package}.", next_step=f"Install it: {install_command('ops')}")
