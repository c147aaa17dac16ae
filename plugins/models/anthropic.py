"""Claude by Anthropic's own SDK: the Messages API as it is."""

from __future__ import annotations

from typing import Any

import msgspec

from bascule.plugins.models.attempts import said_by, through
from bascule.plugins.models.endpoint import Endpoint, not_understood
from bascule.plugins.policy import Performed
from bascule.schemas.budget import Count

_CACHED = {"type": "ephemeral"}


class _Usage(msgspec.Struct):
    input_tokens: Count
    output_tokens: Count
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None


class _Message(msgspec.Struct):
    content: list[dict[str, Any]]
    usage: _Usage
    stop_reason: str | None = None
    id: str = ""
    model: str = ""


async def ask(endpoint: Endpoint, key: str, request: dict[str, Any]) -> Performed:
    """See :class:`bascule.plugins.models.endpoint.Ask`."""

    async def send(sdk: Any, client: Any) -> bytes:
        return await _answered(sdk, client, request)

    return performed(endpoint, await through("anthropic", "AsyncAnthropic", endpoint, key, send))


async def _answered(sdk: Any, client: Any, request: dict[str, Any]) -> bytes:
    """The body of the answer. Models that cannot be made to use a tool are asked to use one of their own will."""
    # Without tools it is no conversation: nobody would read what is kept, and keeping it costs more than it.
    sent = cached(request) if request.get("tools") else request
    try:
        return await _sent(client, sent)
    except sdk.BadRequestError as e:
        forced = sent.get("tool_choice", {}).get("type") in ("tool", "any")
        if not forced or "tool_choice" not in said_by(e):
            raise
    return await _sent(client, {**sent, "tool_choice": {"type": "auto"}})


async def _sent(client: Any, request: dict[str, Any]) -> bytes:
    # Newer versions of the SDK have no parameter for it, since newer models refuse it.
    extra = {"extra_body": {"temperature": request["temperature"]}} if "temperature" in request else {}
    known = {name: value for name, value in request.items() if name != "temperature"}
    response = await client.messages.with_raw_response.create(**known, **extra)
    content: bytes = response.http_response.content
    return content


def cached(request: dict[str, Any]) -> dict[str, Any]:
    """The request with marks where the endpoint may keep its prefix for the next call.

    What comes first is the same in every call of a conversation: tools and system prompt, then the first message, then
    all that was said. At most four marks are allowed.
    """
    out = dict(request)
    if out.get("tools"):
        out["tools"] = [*out["tools"][:-1], {**out["tools"][-1], "cache_control": _CACHED}]
    if isinstance(out.get("system"), str):
        out["system"] = [{"type": "text", "text": out["system"], "cache_control": _CACHED}]
    messages = list(out["messages"])
    for index in sorted({0, len(messages) - 1}):
        messages[index] = _marked(messages[index])
    return {**out, "messages": messages}


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return {**message, "content": [*blocks[:-1], {**blocks[-1], "cache_control": _CACHED}]}


def performed(endpoint: Endpoint, body: bytes) -> Performed:
    """An answer of the Messages API.

    Raises:
        ModelError: it is none.
    """
    try:
        message = msgspec.json.decode(body, type=_Message)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise not_understood(endpoint, str(e)) from None
    usage = message.usage
    return Performed(
        answer={
            "id": message.id,
            "model": message.model,
            "role": "assistant",
            "content": message.content,
            "stop_reason": message.stop_reason,
        },
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_input_tokens or 0,
        cache_write_tokens=usage.cache_creation_input_tokens or 0,
        stop_reason=message.stop_reason,
    )
