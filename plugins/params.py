"""Parameters of plugins, in their types."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from bascule.schemas.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)


def read_params(given: dict[str, Any], kind: type[S], who: str) -> S:
    """Parameters as a configuration gives them, as a struct.

    Args:
        who: as errors name it, ``The author tuner``.

    Raises:
        ConfigError: one is unknown, of a wrong type or out of range.
    """
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as e:
        raise ConfigError(
            f"{who} cannot use its parameters: {e}.", next_step=f"It knows {', '.join(kind.__struct_fields__)}."
        ) from e
