"""What is seen of a call's attempts: a log line at each retry, and no waiting for longer than the call may take.

Both SDKs retry by themselves and say in a header which attempt it is; they would also wait as long as an endpoint tells
them to, which may be hours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from bascule.plugins.models.endpoint import Endpoint

#: The feedback service listens to it.
LOGGER = "bascule.models"
_COUNT = "x-stainless-retry-count"


def hooks(endpoint: Endpoint, clock: Callable[[], float] = time.monotonic) -> dict[str, list[Any]]:
    """Event hooks for the HTTP client of one call."""
    logger = logging.getLogger(LOGGER)
    started = clock()

    async def asked(request: Any) -> None:
        attempt = request.headers.get(_COUNT, "0")
        if attempt not in ("0", ""):
            logger.warning("%s is asked again: retry %s of %d", endpoint.said, attempt, endpoint.max_retries)

    async def answered(response: Any) -> None:
        if response.status_code < 400:
            return
        wait = _seconds(response.headers)
        logger.warning("%s answered with status %d%s", endpoint.said, response.status_code, _wish(wait))
        if wait is not None and clock() - started + wait > endpoint.total_s:
            response.headers["x-should-retry"] = "false"

    return {"request": [asked], "response": [answered]}


def _seconds(headers: Any) -> float | None:
    """How long the endpoint wants to be left alone, if it says so in seconds."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            return float(headers[name]) * unit
    return None


def _wish(wait: float | None) -> str:
    return "" if wait is None else f", to be asked again after {wait:g} s"
