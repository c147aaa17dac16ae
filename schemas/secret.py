"""A secret in memory: shown nowhere and recorded nowhere unless somebody asks for it by name."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from bascule.schemas.errors import SchemaError


class Secret:
    """A text that prints as ``[secret]``; msgspec, json and pickle refuse it.

    >>> key = Secret("sk-1")
    >>> f"{key} {key!r}", key.reveal()
    ('[secret] [secret]', 'sk-1')
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The text itself, for the one call that needs it."""
        return self._value

    def __repr__(self) -> str:
        return "[secret]"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __bool__(self) -> bool:
        return bool(self._value)

    def __reduce__(self) -> NoReturn:
        raise SchemaError("A secret is not written anywhere.", next_step="Pass it on in memory, or read it again.")


def secret_path(value: Any, path: str = "$") -> str | None:
    """Where in a value, as ``$.arguments.key[0]``, the first secret stands; None if there is none."""
    if isinstance(value, Secret):
        return path
    inner: list[tuple[str, Any]] = []
    if isinstance(value, msgspec.Struct):
        inner = [(f"{path}.{name}", getattr(value, name)) for name in value.__struct_fields__]
    elif isinstance(value, Mapping):
        inner = [(f"{path}.{k}", x) for k, v in value.items() for x in (k, v)]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    return next((found for where, v in inner if (found := secret_path(v, where))), None)
