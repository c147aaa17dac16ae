"""An HTTP server that speaks the Messages API, ``/chat/completions`` and ``/completions`` over real sockets.

What it answers is a function of the request's JSON, or a fault. Every request is kept, so that tests can count them.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

KEY = "sk-test-0123456789abcdef"
MODEL = "claude-test-1"


@dataclass(frozen=True)
class Fault:
    """An answer that is an error.

    Attributes:
        status: of the response; 0 closes the connection without one.
        cut: sends half of a good body and closes the connection.
        hang: never answers.
    """

    status: int = 0
    message: str = "something is wrong"
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    hang: bool = False
    raw: bytes | None = None


Answer = dict[str, Any] | Fault
Script = Callable[[dict[str, Any], int], Answer]
"""The answer to a request: its JSON, and how many came before it."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


def message(*content: dict[str, Any], stop_reason: str | None = None, **usage: int) -> dict[str, Any]:
    """A message of the Messages API."""
    stop = stop_reason or ("tool_use" if any(b["type"] == "tool_use" for b in content) else "end_turn")
    return {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": list(content),
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": 100, "output_tokens": 20, **usage},
    }


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def use(name: str, given: Any, ident: str = "toolu_01") -> dict[str, Any]:
    return {"type": "tool_use", "id": ident, "name": name, "input": given}


def completion(
    said: str | None = None, calls: dict[str, str] | None = None, finish_reason: str | None = None, **rest: Any
) -> dict[str, Any]:
    """An answer of ``/chat/completions``; ``calls`` are arguments, as text, by the name of the tool."""
    tool_calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate((calls or {}).items())
    ]
    spoken: dict[str, Any] = {"role": "assistant", "content": said, **({"tool_calls": tool_calls} if calls else {})}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [
            {"index": 0, "message": spoken, "finish_reason": finish_reason or ("tool_calls" if calls else "stop")}
        ],
        "usage": {
            "prompt_tokens": 120,
            "completion_tokens": 7,
            "total_tokens": 127,
            "prompt_tokens_details": {"cached_tokens": 50},
        },
        **rest,
    }


class Server:
    """A running server.

    Attributes:
        requests: the JSON of each request, in order; ``paths`` and ``headers`` of the same.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self.changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def wait_for(self, count: int) -> None:
        """Wait until so many requests have come."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.requests) >= count, timeout=120)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(60)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        refused = self._refused(method, path, headers)
        if refused is not None:
            await _send(writer, refused, path)
            return True
        request = json.loads(body)
        with self.changed:
            number = len(self.requests)
            self.requests.append(request)
            self.paths.append(path)
            self.headers.append(headers)
            self.changed.notify_all()
        answer = self.script(request, number)
        if isinstance(answer, Fault) and answer.hang:
            await self._stop.wait()
            return False
        return await _send(writer, answer, path)

    def _refused(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        """What a server says to a request that is none of its API, or has no right key."""
        if method != "POST" or path not in ("/v1/messages", "/v1/chat/completions", "/v1/completions"):
            return Fault(404, f"no route for {method} {path}")
        if path == "/v1/messages" and "anthropic-version" not in headers:
            return Fault(400, "anthropic-version: header is required")
        # The Messages API takes either; the SDK says the key in one way in some versions, in the other in others.
        given = {headers.get("authorization")}
        if path == "/v1/messages":
            given.add(f"Bearer {headers.get('x-api-key')}")
        return None if f"Bearer {KEY}" in given else Fault(401, f"invalid key {given}")


async def _send(writer: asyncio.StreamWriter, answer: Answer, path: str) -> bool:
    if isinstance(answer, Fault) and not answer.status and not answer.cut and answer.raw is None:
        return False
    status, headers = (answer.status or 200, answer.headers) if isinstance(answer, Fault) else (200, {})
    body = _body(answer, path)
    lines = [
        f"HTTP/1.1 {status} Status",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "request-id: req_01",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    cut = isinstance(answer, Fault) and answer.cut
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (body[: len(body) // 2] if cut else body))
    await writer.drain()
    return not cut


def _body(answer: Answer, path: str) -> bytes:
    if not isinstance(answer, Fault):
        return json.dumps(answer).encode()
    if answer.raw is not None:
        return answer.raw
    if answer.cut:
        return json.dumps(message(text("cut"))).encode()
    error: dict[str, Any] = {"type": _TYPES.get(answer.status, "api_error"), "message": answer.message}
    outer = {"type": "error", "request_id": "req_01"} if path == "/v1/messages" else {}
    return json.dumps({**outer, "error": error}).encode()


@contextmanager
def serving(script: Script) -> Iterator[Server]:
    """A server for a test."""
    server = Server(script)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def in_turn(*answers: Answer) -> Script:
    """Each answer once, in order; the last one for good."""
    return lambda _, number: answers[min(number, len(answers) - 1)]
