"""A call through an SDK: a log line at each retry, no waiting for longer than it may take, and one kind of error.

Both SDKs retry by themselves and say in a header which attempt it is; they would also wait as long as an endpoint tells
them to, which may be hours.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bascule.plugins.models.endpoint import Endpoint, failure, out_of_time

#: The feedback service listens to it.
LOGGER = "bascule.models"
#: Seconds between two lines that say the same.
PATIENCE = 30.0
_COUNT = "x-stainless-retry-count"


async def through(
    name: str, client_class: str, endpoint: Endpoint, key: str, send: Callable[[Any, Any], Awaitable[bytes]]
) -> bytes:
    """The body of the answer to ``send(sdk, client)``; the SDK is imported now.

    Args:
        name: of the SDK's module; ``client_class`` is its client.

    Raises:
        ModelError: there is no answer; says why.
    """
    sdk: Any = await asyncio.to_thread(import_module, name)
    seen = Seen()
    client = getattr(sdk, client_class)(
        api_key=key,
        base_url=endpoint.url,
        timeout=endpoint.timeout_s,
        max_retries=endpoint.max_retries,
        http_client=sdk.DefaultAsyncHttpxClient(event_hooks=hooks(endpoint, seen)),
    )
    try:
        async with asyncio.timeout(endpoint.total_s), client, told_while_waiting(endpoint.said):
            return await send(sdk, client)
    except TimeoutError:
        raise out_of_time(endpoint, seen.failed) from None
    except sdk.APIStatusError as e:
        raise failure(endpoint, key, e.status_code, said_by(e)) from None
    except sdk.APIConnectionError as e:
        raise failure(endpoint, key, None, str(e.__cause__ or e)) from None


@asynccontextmanager
async def told_while_waiting(said: str) -> AsyncIterator[None]:
    """A log line every :data:`PATIENCE` seconds as long as an endpoint has not answered."""

    async def tell() -> None:
        while True:
            await asyncio.sleep(PATIENCE)
            logging.getLogger(LOGGER).warning("%s has not answered yet", said)

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()


def said_by(error: Any) -> str:
    """The endpoint's own words, where the SDK keeps them apart."""
    return str(getattr(error, "api_message", None) or error.message)


@dataclass
class Seen:
    """What came of the attempts of a call.

    Attributes:
        failed: how the last one failed that has ended; empty if none has.
        open: an attempt has no answer yet.
    """

    failed: str = ""
    open: bool = False


def hooks(endpoint: Endpoint, seen: Seen, clock: Callable[[], float] = time.monotonic) -> dict[str, list[Any]]:
    """Event hooks for the HTTP client of one call, which keep ``seen``."""
    logger = logging.getLogger(LOGGER)
    started = clock()

    async def asked(request: Any) -> None:
        if seen.open:
            seen.failed = "had no connection, or lost it"
        seen.open = True
        attempt = request.headers.get(_COUNT, "0")
        if attempt not in ("0", ""):
            logger.warning("%s is asked again: retry %s of %d", endpoint.said, attempt, endpoint.max_retries)

    async def answered(response: Any) -> None:
        seen.open = False
        if response.status_code < 400:
            return
        seen.failed = f"was answered with status {response.status_code}"
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
