"""Requests and conversations in the form of Anthropic's Messages API, as pure functions over plain JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from bascule.plugins.models.endpoint import Endpoint, unusable
from bascule.plugins.policy import READ, CallModel, CallResult, CallTool
from bascule.schemas.events import ModelCalled, ToolCalled

#: Under this name stands what a model gave for a tool's input and what is no JSON object.
NO_JSON = "(no JSON object)"

Message = dict[str, Any]


class Said(msgspec.Struct, frozen=True):
    """What a tool answers."""

    text: str
    error: bool = False


class Perform(msgspec.Struct, frozen=True):
    """A tool that is an effect: the call, and how its recorded result is told."""

    call: CallTool
    told: Callable[[ToolCalled], Said]


class Ended(msgspec.Struct, frozen=True):
    """The tool ended the conversation; ``result`` is what came of it."""

    result: Any


Act = Callable[[str, dict[str, Any]], Said | Perform | Ended]
"""What comes of using a tool, by its name and input."""


def tool(name: str, description: str, properties: dict[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """The definition of a tool."""
    schema = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {"name": name, "description": description, "input_schema": schema}


def call_of(
    endpoint: Endpoint,
    *,
    system: str,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    tool_choice: dict[str, Any],
) -> CallModel:
    """The call that asks for the next message."""
    request: dict[str, Any] = {
        "model": endpoint.named,
        "max_tokens": endpoint.max_tokens,
        "system": system,
        "messages": list(messages),
        "tools": list(tools),
        "tool_choice": tool_choice,
    }
    if endpoint.temperature is not None:
        request["temperature"] = endpoint.temperature
    return CallModel(model=endpoint.named, request=request)


def uses(content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ``tool_use`` blocks of an answer."""
    return [block for block in content if block.get("type") == "tool_use"]


def conversation(
    endpoint: Endpoint, first: str, results: Sequence[CallResult], act: Act, *, nudge: str
) -> list[Message] | CallTool | Ended:
    """Replay a conversation from the results of all its calls.

    Answers that were cut off or refused are left out, as if they had not been asked for.

    Args:
        first: what the model was told at first.
        act: makes what tools do, in the order in which they were used; may keep a state of its own.
        nudge: what a model is told that used no tool.

    Returns:
        The messages that the next answer is to be asked for with, the effect that has to come before that, or what the
        conversation ended with.
    """
    messages: list[Message] = [{"role": "user", "content": first}]
    waiting = list(results)
    while waiting:
        called = waiting.pop(0)
        assert isinstance(called, ModelCalled)
        if unusable(endpoint, called.stop_reason) is not None:
            continue
        # An empty message would be refused.
        content = called.answer.get("content") or [{"type": "text", "text": "(nothing)"}]
        replies: list[dict[str, Any]] = []
        for use in uses(content):
            said = act(str(use.get("name")), _object(use.get("input")))
            if isinstance(said, Ended):
                return said
            if isinstance(said, Perform):
                if not waiting:
                    return said.call
                performed = waiting.pop(0)
                assert isinstance(performed, ToolCalled)
                said = said.told(performed)
            error = {"is_error": True} if said.error else {}
            replies.append({"type": "tool_result", "tool_use_id": use.get("id"), "content": said.text, **error})
        messages.append({"role": "assistant", "content": content})
        messages.append({"role": "user", "content": replies or [{"type": "text", "text": nudge}]})
    return messages


def faults(messages: Sequence[Message]) -> int:
    """How many answers of a conversation used no tool, or one in a way that was an error."""
    return sum(
        any(block.get("type") == "text" or block.get("is_error") for block in message["content"])
        for message in messages
        if message["role"] == "user" and not isinstance(message["content"], str)
    )


def _object(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else {NO_JSON: given}


def no_object(given: dict[str, Any]) -> str | None:
    """What to tell a model whose input of a tool is no JSON object; None if it is one."""
    return "The input of the tool was not a JSON object. Give one." if NO_JSON in given else None


def reading(trajectory: str) -> Perform:
    """The call that reads the record of an episode, and what the model is told of it."""

    def said(called: ToolCalled) -> Said:
        if called.result is None:
            return Said(called.error or "There is no record of it.", error=True)
        return Said(as_data("trajectory", called.result))

    return Perform(CallTool(name=READ, arguments={"trajectory": trajectory}), said)


def as_data(name: str, value: Any) -> str:
    """A value as a marked block of data that no text within it can end: JSON on one line without angle brackets."""
    text = msgspec.json.encode(value).decode().replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<{name}>{text}</{name}>"
