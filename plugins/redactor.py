"""The redactor protocol: who keeps secrets out of what is recorded."""

from __future__ import annotations

from typing import Protocol


class Redactor(Protocol):
    """Replaces secrets in texts before they are recorded, logged or shown to the model.

    Every registered redactor sees every text, in the order of their names. It must leave alone what it has redacted
    before. One that raises stops the append: nothing is ever recorded unredacted.

    A redactor may also have ``suspects(payload: bytes) -> bool``, which is given a whole value as JSON, without
    whitespace and with non-ASCII as it is: False promises that ``redact`` would change none of its texts, and saves it
    from being asked about each.
    """

    name: str
    version: str

    def redact(self, text: str, key: str | None) -> str:
        """``text`` with ``[redacted:<rule>]`` in place of each secret.

        Args:
            key: the name under which the text stands (a JSON key, a field); None if it stands under none.
        """
        ...
