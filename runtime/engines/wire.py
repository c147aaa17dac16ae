"""Calls to an HTTP endpoint that speaks OpenAI's protocol, through OpenAI's SDK; every failure in one clear paragraph.

The SDK retries what may pass (408, 409, 429, 5xx, cut connections), each call under a time limit. The key is read from
the environment variable that a parameter names, and stands in no message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import msgspec

from bascule.plugins.extras import install_command
from bascule.plugins.models.attempts import told_while_waiting
from bascule.plugins.models.endpoint import key_fault, too_long
from bascule.schemas.errors import ConfigError, EngineError, PromptError

_CONNECT_SECONDS = 10.0
_SAID = 600


class Refused(EngineError):
    """The server does not take what was asked."""

    code = "bascule.engine.refused"


class Missing(EngineError):
    """The server has no such path, or no such model."""

    code = "bascule.engine.missing"


class Unreachable(EngineError):
    """Nothing answered at the address."""

    code = "bascule.engine.unreachable"


def read_key(key_env: str | None) -> str | None:
    """The key in the environment variable ``key_env``; None where none is named, or the empty one.

    Raises:
        ConfigError: the variable is not set, or holds what no header takes.
    """
    if not key_env:
        return None
    fault = key_fault(key_env)
    if fault is not None:
        raise ConfigError(
            f"The environment variable {key_env}, which is to hold the endpoint's key, {fault}.",
            next_step=f"Set {key_env} to the key alone, or name another variable in engine.params.key_env.",
        )
    return os.environ[key_env]


class Wire:
    """One base URL.

    Args:
        url: of the server, with or without ``/v1``.
        key: sent as a bearer token; None sends none that means anything.
        timeout_s: most seconds of one try.
        retries: tries after the first.

    Raises:
        ConfigError: OpenAI's SDK is not installed, or the URL is no URL.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 600.0, retries: int = 2) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "This engine asks its server through the package openai, which is not installed.",
                next_step=f"Install it: {install_command('openai')}",
            ) from error
        root = url.rstrip("/").removesuffix("/v1")
        self.root = root
        self.base = f"{root}/v1"
        self._timeout_s = timeout_s
        self._key = key
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=self.base,
            timeout=openai.Timeout(timeout_s, connect=_CONNECT_SECONDS, pool=None),  # waits for a connection are ours
            max_retries=retries,
        )

    async def close(self) -> None:
        await self._client.close()

    async def get(self, path: str, *, retry: bool = True) -> Any:
        """The JSON at a path of the server, such as ``/v1/models``; raises as :meth:`post`."""
        return await self._ask("GET", path, None, retry=retry)

    async def post(self, path: str, body: Mapping[str, Any], *, retry: bool = True) -> Any:
        """What the server answers to a JSON body: JSON, or text where the answer is not said to be JSON.

        The path stands after the root; a whole URL of the server's is taken as it is. Cancelling the call closes its
        connection, which ends the work on a server that watches it.

        Raises:
            PromptError: the prompt is refused as too long.
            Refused: anything else in the request is.
            Missing: there is no such path, or no such model.
            Unreachable: nothing answers there, or not in time.
            EngineError: any other refusal or failure, in the server's words, save for one of the key; or what is said
                to be JSON is none.
        """
        return await self._ask("POST", path, body, retry=retry)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, *, retry: bool) -> Any:
        import openai

        client = self._client if retry else self._client.with_options(max_retries=0)
        url = path if path.startswith(self.root) else f"{self.root}{path}"
        try:
            if method == "GET":
                return await client.get(url, cast_to=object)
            async with told_while_waiting(url):
                return await client.post(url, body=dict(body or {}), cast_to=object)
        except openai.APITimeoutError as error:
            raise Unreachable(
                f"{url} did not answer within {self._timeout_s:g} s.",
                next_step="Look at the server's log; raise engine.params.timeout_s if answers take that long.",
            ) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise Unreachable(
                f"{url} cannot be reached: {type(cause).__name__}: {self._without_key(str(cause))}.",
                next_step="Start the server, or correct engine.params.url.",
            ) from error
        except openai.APIStatusError as error:
            words = self._without_key(_message(error.response.text))
            raise refused(url, error.status_code, words) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise EngineError(
                f"{url} does not answer in JSON, although it says so: {error}.",
                next_step="Look at what stands between here and the server, or correct engine.params.url.",
            ) from error

    def _without_key(self, said: str) -> str:
        return said.replace(self._key, "[key]") if self._key else said


def refused(url: str, status: int, said: str) -> EngineError:
    """The error for an answer of ``status`` other than 200, with the server's own words ``said``."""
    if status in (401, 403):
        # What the server says here may hold a part of the key.
        return EngineError(
            f"{url} answered {status}: the key is refused.",
            next_step="Put a valid key into the variable that engine.params.key_env names.",
        )
    words = " ".join(said.split())[:_SAID]
    what = f"{url} answered {status}: {words or 'nothing'}".rstrip(".") + "."
    if too_long(status, said):
        return PromptError(what, next_step="Shorten the prompt or lower max_tokens.")
    if status in (400, 422):
        return Refused(what, next_step="The server does not take this request; see its log.")
    if status in (404, 405):
        return Missing(what, next_step="Correct engine.params.url or the model's name, or load what is missing.")
    if status == 429:
        return EngineError(what, next_step="Wait until the endpoint's limit allows more, then `bascule resume RUN`.")
    return EngineError(what, next_step="Look at the server's log, then `bascule resume RUN`.")


def _message(said: str) -> str:
    """The message within an error's JSON, in any of the usual forms; else all of it."""
    try:
        found = msgspec.json.decode(said)
    except msgspec.DecodeError:
        return said
    inner = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or said
    return inner if isinstance(inner, str) else said
