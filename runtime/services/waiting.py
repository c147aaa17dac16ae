"""What a call to a model waits for: a line in the service's log and on standard error at each refusal and retry.

Many episodes that wait for one endpoint say the same; it is told once in a while.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from bascule.plugins.models.attempts import LOGGER, PATIENCE
from bascule.runtime.redaction import redact_message


class _Told(logging.Handler):
    told: ClassVar[dict[str, float]] = {}  # by all services of this process, and when

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.WARNING)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        text = redact_message(record.getMessage())
        now = time.monotonic()
        for old in [said for said, at in self.told.items() if now - at >= PATIENCE]:
            del self.told[old]
        if text in self.told:
            return
        self.told[text] = now
        self._logger.warning("call.waiting", message=text)
        sys.stderr.write(f"bascule: {text}\n")


@contextmanager
def told_of_waiting(logger: Any) -> Iterator[None]:
    """While it is open, what is said of a call's attempts is told, once where several services are in a process."""
    handler, source = _Told(logger), logging.getLogger(LOGGER)
    source.addHandler(handler)
    try:
        yield
    finally:
        source.removeHandler(handler)
