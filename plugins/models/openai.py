"""Any endpoint with ``/chat/completions``, by OpenAI's SDK: requests and answers are translated both ways."""

from __future__ import annotations

from typing import Any

import msgspec

from bascule.plugins.models.attempts import through
from bascule.plugins.models.endpoint import Endpoint, not_understood
from bascule.plugins.models.messages import NO_JSON
from bascule.plugins.policy import Performed
from bascule.schemas.budget import Count

_STOPS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens", "content_filter": "refusal"}


class _Function(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = ""


class _Call(msgspec.Struct):
    function: _Function
    id: str | None = None


class _Said(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    message: _Said
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    prompt_tokens_details: _Details | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None
    id: str | None = None
    model: str | None = None


async def ask(endpoint: Endpoint, key: str, request: dict[str, Any]) -> Performed:
    """See :class:`bascule.plugins.models.endpoint.Ask`."""
    sent = translated(request, own=not endpoint.base_url)

    async def send(_: Any, client: Any) -> bytes:
        response = await client.chat.completions.with_raw_response.create(**sent)
        body: bytes = response.http_response.content
        return body

    return performed(endpoint, await through("openai", "AsyncOpenAI", endpoint, key, send))


def translated(request: dict[str, Any], *, own: bool) -> dict[str, Any]:
    """A request in the form of the Messages API as one for ``/chat/completions``.

    Args:
        own: whether it is for OpenAI itself, whose newer models have another name for the limit of an answer.
    """
    messages: list[dict[str, Any]] = []
    if request.get("system"):
        messages.append({"role": "system", "content": request["system"]})
    for message in request["messages"]:
        messages += _messages(message)
    out: dict[str, Any] = {
        "model": request["model"],
        "messages": messages,
        "max_completion_tokens" if own else "max_tokens": request["max_tokens"],
    }
    if request.get("tools"):
        out["tools"] = [
            {
                "type": "function",
                "function": {"name": t["name"], "description": t["description"], "parameters": t["input_schema"]},
            }
            for t in request["tools"]
        ]
    match request.get("tool_choice"):
        case {"type": "tool", "name": name}:
            out["tool_choice"] = {"type": "function", "function": {"name": name}}
        case {"type": "any"}:
            out["tool_choice"] = "required"
        case _:
            pass
    if "temperature" in request:
        out["temperature"] = request["temperature"]
    return out


def _messages(message: dict[str, Any]) -> list[dict[str, Any]]:
    """One message as several: each result of a tool is a message of its own."""
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "\n\n".join(b["text"] for b in blocks if b["type"] == "text")
    if message["role"] == "assistant":
        calls = [_call(b) for b in blocks if b["type"] == "tool_use"]
        return [{"role": "assistant", "content": text or None, **({"tool_calls": calls} if calls else {})}]
    out = [
        {
            "role": "tool",
            "tool_call_id": b["tool_use_id"],
            "content": f"Error: {b['content']}" if b.get("is_error") else b["content"],
        }
        for b in blocks
        if b["type"] == "tool_result"
    ]
    return [*out, {"role": "user", "content": text}] if text else out


def _call(block: dict[str, Any]) -> dict[str, Any]:
    given = block["input"]
    arguments = given[NO_JSON] if NO_JSON in given else msgspec.json.encode(given).decode()
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": arguments}}


def performed(endpoint: Endpoint, body: bytes) -> Performed:
    """An answer of ``/chat/completions`` in the form of the Messages API.

    Raises:
        ModelError: it is none.
    """
    try:
        completion = msgspec.json.decode(body, type=_Completion)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise not_understood(endpoint, str(e)) from None
    if not completion.choices:
        raise not_understood(endpoint, "it has no choices")
    choice = completion.choices[0]
    said, usage = choice.message, completion.usage or _Usage()
    content: list[dict[str, Any]] = [{"type": "text", "text": said.content}] if said.content else []
    calls = said.tool_calls or []
    content += [
        {"type": "tool_use", "id": c.id or f"call_{n}", "name": c.function.name, "input": _input(c.function.arguments)}
        for n, c in enumerate(calls)
    ]
    stop = "refusal" if said.refusal else _STOPS.get(choice.finish_reason or "stop", choice.finish_reason)
    if calls and stop == "end_turn":  # a forced call ends so
        stop = "tool_use"
    details = usage.prompt_tokens_details or _Details()
    read, written = details.cached_tokens or 0, details.cache_write_tokens or 0
    return Performed(
        answer={
            "id": completion.id or "",
            "model": completion.model or "",
            "role": "assistant",
            "content": content,
            "stop_reason": stop,
        },
        input_tokens=max(usage.prompt_tokens - read - written, 0),
        output_tokens=usage.completion_tokens,
        cache_read_tokens=read,
        cache_write_tokens=written,
        stop_reason=stop,
    )


def _input(arguments: str | dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, which is text that may be anything."""
    if isinstance(arguments, dict):
        return arguments
    try:
        found = msgspec.json.decode(arguments or "{}")
    except msgspec.DecodeError:
        found = None
    return found if isinstance(found, dict) else {NO_JSON: arguments}
