"""What a call to a model waits for: a line in the service's log and on standard error at each refusal and retry.

Many episodes that wait for one endpoint say the same; it is told once in a while.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bascule.plugins.models.attempts import LOGGER, PATIENCE
from bascule.runtime.redaction import redact_message


class _Told(logging.Handler):
    def __init__(self, logger: Any) -> None:
        super().__init__(logging.WARNING)
        self._logger = logger
        self._told: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = redact_message(record.getMessage())
        now = time.monotonic()
        if now - self._told.get(text, -PATIENCE) < PATIENCE:
            return
        self._told[text] = now
        self._logger.warning("call.waiting", message=text)
        sys.stderr.write(f"bascule: {text}\n")


@contextmanager
def told_of_waiting(logger: Any) -> Iterator[None]:
    """While it is open, what is said of a call's attempts is told; by one service where several are in a process."""
    handler, source = _Told(logger), logging.getLogger(LOGGER)
    if any(isinstance(other, _Told) for other in source.handlers):
        yield
        return
    source.addHandler(handler)
    try:
        yield
    finally:
        source.removeHandler(handler)
