"""What is recorded of a call to a model: the request inline, or in a blob where it is large."""

from __future__ import annotations

from typing import Any

import msgspec

from bascule.plugins.policy import CallModel, CallTool
from bascule.runtime.log.blobs import ref_of
from bascule.runtime.redaction import Redaction
from bascule.schemas.codec import INLINE_BYTES
from bascule.schemas.events import RESTRICTED, ModelCalled, ToolCalled

_MEDIA = "application/json"


def recorded_request(
    call: CallModel | CallTool, redaction: Redaction, withholding: Redaction | None
) -> tuple[dict[str, Any], bytes | None]:
    """What a call asks as the log holds it, without secrets and without what must not be published.

    Returns:
        What stands in the event, and the bytes of the blob that stands for it where it is over 64 KiB.
    """
    asked = call.request if isinstance(call, CallModel) else call.arguments
    if withholding is not None:
        asked = withholding.value(asked)
    asked = redaction.value(asked)
    if isinstance(call, CallTool):
        return asked, None
    data = msgspec.json.encode(asked)
    return (asked, None) if len(data) <= INLINE_BYTES else ({}, data)


def media(restricted: bool) -> str:
    """The media type of the blob of a request."""
    return f"{_MEDIA}{RESTRICTED}" if restricted else _MEDIA


def asks_the_same(
    recorded: ModelCalled | ToolCalled,
    call: CallModel | CallTool,
    redaction: Redaction,
    withholding: Redaction | None,
) -> bool:
    """Whether a recorded call asked just what ``call`` asks."""
    asked, blob = recorded_request(call, redaction, withholding)
    if isinstance(recorded, ToolCalled):
        return isinstance(call, CallTool) and recorded.name == call.name and recorded.arguments == asked
    if not isinstance(call, CallModel) or recorded.model != call.model or recorded.request != asked:
        return False
    there = None if recorded.request_blob is None else recorded.request_blob.sha256
    return there == (None if blob is None else ref_of(blob, _MEDIA).sha256)
