"""The SDK names that SIA's agents import, in the sandbox: their calls go to the episode's model and nowhere else.

A file of the harness of ``sia-dir`` (``sdk.py`` there): the standard library only. It has what chat agents use of
``openai``, ``anthropic`` and ``google.genai``, and says so where an agent asks for more. The name of the model, the
address and the key that an agent gives are ignored: the run decides which model answers. Token counts are 0 here; the
runtime records the real ones. Progress bars (``tqdm``) and ``dotenv`` have nothing to do.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from importlib.machinery import PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

Ask = Callable[..., list[Any]]
_TOOLS = (
    "You may use one of these tools by replying with one JSON object and nothing else: "
    '{"tool": NAME, "input": {...}}. Reply without such an object when you are done.\n'
)


class APIError(Exception):
    """The model could not be asked, or refused."""


class _Only:
    """An object of an SDK that has these attributes and no others."""

    def __init__(self, name: str, **attributes: Any) -> None:
        self.__dict__.update(attributes, _name=name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise APIError(f"{self._name}.{name} is not to be had here; there is {', '.join(self._known())}.")

    def _known(self) -> list[str]:
        return sorted(name for name in self.__dict__ if not name.startswith("_"))


class Config(SimpleNamespace):
    """A configuration object of an SDK: keeps what it is given."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def text_of(content: Any) -> str:
    """The text of a message's content, which may come in parts.

    Raises:
        APIError: a part is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "\n".join(part for part in map(text_of, content) if part)
    held = content if isinstance(content, dict) else getattr(content, "__dict__", {})
    kind = held.get("type", "text")
    if kind == "tool_use":
        return json.dumps({"tool": held.get("name"), "input": held.get("input")}, ensure_ascii=False)
    if kind == "tool_result":
        return f"Result: {text_of(held.get('content'))}"
    for name in ("text", "content", "parts"):
        if kind in ("text", "input_text", "output_text") and held.get(name) is not None:
            return text_of(held[name])
    raise APIError(f"A message has a part of the type {kind!r}; the model here takes text.")


def _options(given: dict[str, Any], *limits: str) -> dict[str, Any]:
    if given.get("stream"):
        raise APIError("Streaming is not to be had here: leave stream out.")
    limit = next((given[name] for name in limits if given.get(name)), None)
    stop = given.get("stop") or given.get("stop_sequences") or ()
    found = {"max_tokens": limit, "temperature": given.get("temperature"), "stop": stop, "n": given.get("n") or 1}
    return {name: value for name, value in found.items() if value is not None}


def _chat(ask: Ask, messages: list[dict[str, str]], options: dict[str, Any]) -> list[Any]:
    if not messages:
        raise APIError("There is no message.")
    try:
        return ask(messages, **options)
    except APIError:
        raise
    except Exception as e:
        raise APIError(str(e)) from e


def _turns(messages: Any) -> list[dict[str, str]]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    roles = {"model": "assistant", "developer": "system", "tool": "user"}
    turns = []
    for message in messages:
        held = message if isinstance(message, dict) else vars(message)
        role = str(held.get("role") or "user")
        turns.append({"role": roles.get(role, role), "content": text_of(held.get("content", held.get("parts")))})
    return turns


_numbers = itertools.count(1)


def _openai_create(ask: Ask) -> Callable[..., Any]:
    def create(*, messages: Any, model: str = "", **given: Any) -> Any:
        if given.get("tools") or given.get("functions"):
            raise APIError("Tools of the openai SDK are not to be had here.")
        outputs = _chat(ask, _turns(messages), _options(given, "max_completion_tokens", "max_tokens"))
        choices = [
            SimpleNamespace(
                index=i,
                finish_reason=output.finish_reason,
                message=SimpleNamespace(role="assistant", content=output.text, tool_calls=None, refusal=None),
            )
            for i, output in enumerate(outputs)
        ]
        usage = SimpleNamespace(prompt_tokens=0, completion_tokens=0, total_tokens=0)
        return SimpleNamespace(id=f"chat-{next(_numbers)}", model=model, choices=choices, usage=usage)

    return create


def _tool_use(text: str, tools: Iterable[dict[str, Any]]) -> Any:
    """The call that a reply is, or None."""
    stripped = text.strip().removeprefix("```json").removesuffix("```").strip()
    try:
        found = json.loads(stripped)
    except (ValueError, RecursionError):
        return None
    names = {tool.get("name") for tool in tools}
    if not isinstance(found, dict) or found.get("tool") not in names or not isinstance(found.get("input", {}), dict):
        return None
    number = f"tool-{next(_numbers)}"
    return SimpleNamespace(type="tool_use", id=number, name=found["tool"], input=found.get("input", {}))


def _anthropic_create(ask: Ask) -> Callable[..., Any]:
    def create(*, messages: Any, model: str = "", system: Any = None, tools: Any = (), **given: Any) -> Any:
        head = [text_of(system)] if system else []
        if tools:
            head.append(_TOOLS + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        turns = [{"role": "system", "content": "\n\n".join(head)}] if head else []
        output = _chat(ask, [*turns, *_turns(messages)], _options(given, "max_tokens"))[0]
        use = _tool_use(output.text, tools) if tools else None
        block = use or SimpleNamespace(type="text", text=output.text)
        ended = "end_turn" if output.finish_reason == "stop" else "max_tokens"
        usage = SimpleNamespace(input_tokens=0, output_tokens=0)
        return SimpleNamespace(
            id=f"message-{next(_numbers)}",
            model=model,
            role="assistant",
            content=[block],
            stop_reason="tool_use" if use else ended,
            usage=usage,
        )

    return create


def _google_create(ask: Ask) -> Callable[..., Any]:
    def generate_content(*, contents: Any, model: str = "", config: Any = None) -> Any:
        del model
        held = config if isinstance(config, dict) else vars(config) if config is not None else {}
        if held.get("tools"):
            raise APIError("Tools of the google.genai SDK are not to be had here.")
        system = held.get("system_instruction")
        turns = [{"role": "system", "content": text_of(system)}] if system else []
        if isinstance(contents, list) and all(isinstance(part, str) for part in contents):
            contents = "\n".join(contents)
        given = {**held, "stop": held.get("stop_sequences"), "n": held.get("candidate_count")}
        outputs = _chat(ask, [*turns, *_turns(contents)], _options(given, "max_output_tokens"))
        candidates = [
            SimpleNamespace(
                content=SimpleNamespace(role="model", parts=[SimpleNamespace(text=output.text, thought=False)]),
                finish_reason="STOP" if output.finish_reason == "stop" else "MAX_TOKENS",
            )
            for output in outputs
        ]
        usage = SimpleNamespace(prompt_token_count=0, candidates_token_count=0, total_token_count=0)
        return SimpleNamespace(candidates=candidates, text=outputs[0].text, usage_metadata=usage)

    return generate_content


def _later(call: Callable[..., Any]) -> Callable[..., Any]:
    async def later(**given: Any) -> Any:
        # Calls are answered one at a time in any case; the others get to run between two of them.
        await asyncio.sleep(0)
        return call(**given)

    return later


def _client(name: str, **attributes: Any) -> type:
    """A client class of an SDK: whatever it is made with, it asks the same model."""

    class Client(_Only):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(name, api_key=None, base_url=None, **attributes)

        def with_options(self, **_: Any) -> Any:
            return self

        def close(self) -> None:
            pass

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

    Client.__name__ = name.rpartition(".")[2]
    return Client


def _module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(attributes)
    return made


class Bar:
    """A progress bar that nobody sees."""

    def __init__(self, iterable: Iterable[Any] = (), *_: Any, **__: Any) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for item in self._iterable:  # type: ignore[attr-defined]
            yield item

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None

    @staticmethod
    def write(*texts: Any, **_: Any) -> None:
        print(*texts)

    @staticmethod
    async def gather(*awaitables: Any, **_: Any) -> list[Any]:
        return await asyncio.gather(*awaitables)

    @staticmethod
    def as_completed(awaitables: Any, **_: Any) -> Any:
        return asyncio.as_completed(awaitables)


class BaseModel:
    """The little of pydantic that a schema in an agent needs, where pydantic is not to be had: nothing is validated."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    @classmethod
    def model_validate(cls, values: Any) -> Any:
        return cls(**values)

    @classmethod
    def model_validate_json(cls, text: str) -> Any:
        return cls(**json.loads(text))

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return dict(self.__dict__)


def _field(default: Any = None, **_: Any) -> Any:
    return default


def modules(ask: Ask) -> dict[str, ModuleType]:
    """The modules by name.

    Args:
        ask: takes chat messages and options (``n``, ``max_tokens``, ``temperature``, ``stop``), returns outputs with
            ``text`` and ``finish_reason``.
    """
    errors = dict.fromkeys(
        ("APIError", "OpenAIError", "BadRequestError", "RateLimitError", "APITimeoutError", "APIStatusError"), APIError
    )
    errors |= dict.fromkeys(("APIConnectionError", "AnthropicError", "AuthenticationError"), APIError)
    openai, claude, gemini = _openai_create(ask), _anthropic_create(ask), _google_create(ask)

    def completions(create: Callable[..., Any]) -> _Only:
        return _Only("openai.chat", completions=_Only("openai.chat.completions", create=create))

    gemini_now = _Only("google.genai.models", generate_content=gemini)
    gemini_later = _Only("google.genai.aio", models=_Only("google.genai.aio.models", generate_content=_later(gemini)))
    types = _module("google.genai.types", __getattr__=lambda _: Config)
    genai = _module(
        "google.genai", Client=_client("google.genai.Client", models=gemini_now, aio=gemini_later), types=types
    )
    tqdm = {"tqdm": Bar, "trange": lambda *a, **_: Bar(range(*a))}
    dotenv = {"load_dotenv": lambda *_, **__: False, "find_dotenv": lambda *_, **__: "", "dotenv_values": lambda *_: {}}
    return {
        "openai": _module(
            "openai",
            OpenAI=_client("openai.OpenAI", chat=completions(openai)),
            AsyncOpenAI=_client("openai.AsyncOpenAI", chat=completions(_later(openai))),
            **errors,
        ),
        "anthropic": _module(
            "anthropic",
            Anthropic=_client("anthropic.Anthropic", messages=_Only("anthropic.messages", create=claude)),
            AsyncAnthropic=_client(
                "anthropic.AsyncAnthropic", messages=_Only("anthropic.messages", create=_later(claude))
            ),
            **errors,
        ),
        "google": _module("google", genai=genai, __path__=[]),
        "google.genai": genai,
        "google.genai.types": types,
        "dotenv": _module("dotenv", **dotenv),
        "tqdm": _module("tqdm", __path__=[], **tqdm),
        "tqdm.asyncio": _module("tqdm.asyncio", tqdm_asyncio=Bar, **tqdm),
        "tqdm.auto": _module("tqdm.auto", **tqdm),
    }


class Unreadable:
    """An importer for installed packages that this sandbox does not let in: they are missing, not an error.

    Where the sandbox has no root of its own they are listed, and libraries that try them would fail with
    ``PermissionError``.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        del target
        found = PathFinder.find_spec(name) if path is None else None
        if found is None or found.origin is None or not found.has_location:
            return
        try:
            with open(found.origin, "rb"):
                pass
        except OSError as e:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name) from e


def install(ask: Ask) -> None:
    """Put the modules where imports find them, before what is installed; ``pydantic`` only where none is to be had."""
    sys.modules.update(modules(ask))
    sys.meta_path.insert(0, Unreadable())
    try:
        import pydantic  # noqa: F401
    except ImportError:
        sys.modules["pydantic"] = _module("pydantic", BaseModel=BaseModel, Field=_field, ValidationError=ValueError)
