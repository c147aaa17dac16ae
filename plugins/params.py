"""Parameters of plugins, in their types."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from bascule.schemas.errors import ConfigError

T = TypeVar("T")


def read_params(given: dict[str, Any], kind: type[T], who: str) -> T:
    """Parameters as a configuration gives them, as a struct.

    Args:
        who: as errors name it, ``The author tuner``.

    Raises:
        ConfigError: one is unknown or out of range.
    """
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{who} cannot take these parameters: {e}.", next_step="Correct that value.") from e
