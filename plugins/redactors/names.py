"""Which names say that their value is secret."""

from __future__ import annotations

import re
from functools import lru_cache

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
#: Endings of the last word that say it alone, also where words are run together (``PGPASSWORD``).
_ENDINGS = (
    *("password", "passwd", "passphrase", "secret", "credential", "authorization", "pwd"),
    *("apikey", "accesskey", "privatekey", "secretkey", "apitoken", "authtoken", "accesstoken", "refreshtoken"),
)
#: Keys that are not of a table or a dictionary.
_KEYS = frozenset(
    {"access", "account", "api", "app", "auth", "client", "deploy", "encryption", "master", "private", "secret"}
    | {"service", "shared", "signing", "ssh", "storage", "subscription", "webhook"}
)
#: Tokens that are pieces of text.
_PIECES = frozenset(
    {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "audio", "video", "special", "stop", "start", "end"}
    | {"begin", "next", "first", "last", "new", "max", "min", "per", "prompt", "output", "input", "completion", "eot"}
    | {"think", "word", "sub", "added", "fim", "prefix", "suffix", "middle", "user", "system", "assistant", "im"}
)

#: The same as a pattern, for names inside a text; there a bare ``token`` is left to the other rules.
SECRET = (
    r"(?:[a-z0-9]{1,32}[_-]){0,4}(?:[a-z0-9]{0,16}(?:password|passwd|passphrase|secret|credential)s?"
    rf"|(?:{'|'.join(sorted(_KEYS))})[_ -]?key|(?:access|api|auth|refresh|secret|session|bearer|id)[_ -]?token)"
)


@lru_cache(4096)
def secret_name(name: str) -> bool:
    """Whether a value of this name is secret, whatever the case and the separators: ``apiKey``, ``DB_PASSWORD``."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    one = last.removesuffix("s")
    if one.endswith(_ENDINGS):
        return True
    if one == "key":
        return before in _KEYS
    if last == "id":
        return words[-3:-1] == ["access", "key"]
    return last == "token" and before not in _PIECES
