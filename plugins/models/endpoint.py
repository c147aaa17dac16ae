"""Where a model is, how it is asked, and what a person is told when that fails."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from ipaddress import IPv4Address
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec

from bascule.plugins.extras import install_command
from bascule.plugins.params import read_params
from bascule.plugins.policy import Performed
from bascule.schemas.errors import ConfigError, ModelError

Provider = Literal["anthropic", "openai"]
#: The extra of ``pyproject.toml`` that brings a provider's package, which is named like the provider.
_EXTRAS: dict[Provider, str] = {"anthropic": "claude", "openai": "openai"}
_URLS: dict[Provider, str] = {"anthropic": "https://api.anthropic.com", "openai": "https://api.openai.com/v1"}
_KEYS: dict[Provider, str] = {"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}
CLAUDE = "claude-sonnet-5-5"
#: What is sent for a key to an endpoint that wants none.
NO_KEY = "none"
_QUOTED = 300
_SHORTER = "Start again with a lower max_tokens, less evidence, or a model with a larger context."
#: Bytes of an answer that is kept; an event has room for twice as much.
MOST_ANSWER = 1 << 18
_TOO_LONG = (
    "maximum context length",
    "context length",
    "context limit",
    "max_model_len",
    "too long",
    "maximum model length",
)


#: Why an answer ended, or there is none: what was asked, and it, do not fit into the model's context.
OVER_CONTEXT: Final = "model_context_window_exceeded"


class TooLong(ModelError):
    """What was asked is longer than the model or its endpoint takes."""

    code = "bascule.model.too_long"


class Refused(ModelError):
    """The endpoint does not take what was asked, as it was asked."""

    code = "bascule.model.refused"


Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of every policy and author that asks a model; recorded with the run, and so never the key itself.

    Attributes:
        provider: ``anthropic`` for the Messages API, ``openai`` for any endpoint with ``/chat/completions``.
        model: its name there; ``openai`` has no usual one.
        base_url: of the endpoint; the provider's own if empty.
        key_env: name of the environment variable that holds the key; the provider's usual one if None, and where it
            is empty no key is sent.
        max_tokens: of one answer, thinking included.
        timeout_s: how long one attempt may take.
        total_s: how long one call may take with all its attempts and the pauses between them.
        max_retries: further attempts where the endpoint is busy, fails or cannot be reached.
        temperature: sent only if given: newer models refuse it.
    """

    provider: Provider = "anthropic"
    model: str = ""
    base_url: str = ""
    key_env: str | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=256, le=32_000)] = 8192
    timeout_s: Seconds = 300.0
    total_s: Seconds = 900.0
    max_retries: Annotated[int, msgspec.Meta(ge=0, le=20)] = 4
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None

    @property
    def named(self) -> str:
        """The model's name, where none is given the usual one."""
        return self.model or CLAUDE

    @property
    def url(self) -> str:
        return self.base_url or _URLS[self.provider]

    @property
    def key_name(self) -> str:
        return _KEYS[self.provider] if self.key_env is None else self.key_env

    @property
    def said(self) -> str:
        """The model and its endpoint, as messages name them."""
        return f"{self.named} at {self.url}"


E = TypeVar("E", bound=Endpoint)


class Ask(Protocol):
    """One call to a model."""

    async def __call__(self, endpoint: Endpoint, key: str, request: dict[str, Any]) -> Performed:
        """Send a request in the form of the Messages API, and give the answer in that form.

        Raises:
            ModelError: there is no answer; says why, and what to do.
        """
        ...


def check_endpoint(endpoint: Endpoint, who: str) -> None:
    """Refuse parameters that no call could be made with.

    Raises:
        ConfigError: names the parameter.
    """
    if endpoint.provider == "openai" and not endpoint.model:
        raise ConfigError(f"{who} asks an OpenAI-compatible endpoint for no model.", next_step="Set its model.")
    check_url(endpoint.url, who, "base_url")


def check_url(url: str, who: str, parameter: str) -> None:
    """Refuse an address that nothing can be asked at, or that holds a password.

    Args:
        who: whose parameter it is, as errors name it, ``The author claude``.

    Raises:
        ConfigError: names the parameter and the address, without what may be a password.
    """
    said = f"{who} has the {parameter} {url.rpartition('@')[2]!r}"
    if not _is_address(url):
        raise ConfigError(
            f"{said}, which is no http or https address.",
            next_step="Give one such as https://host.example/v1 or http://127.0.0.1:8000.",
        )
    if "@" in urlsplit(url).netloc:
        raise ConfigError(
            f"{said} with a user's name or a password before it, which would be recorded.",
            next_step="Put a key into an environment variable and name that in key_env.",
        )


def _is_address(url: str) -> bool:
    """Whether HTTP clients take it: they refuse more than ``urlsplit``, and only when they are to ask."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        if re.fullmatch(r"\d+(\.\d+){3}", host):
            IPv4Address(host)
        named = bool(host) and parts.port != 0
    except ValueError:  # brackets, a port or a name that are none
        return False
    return named and parts.scheme in ("http", "https") and url.isprintable() and " " not in url


def parameters(given: dict[str, Any], type_: type[E], who: str) -> E:
    """The parameters of a policy or an author that asks a model, checked.

    Args:
        who: as errors name it, ``The author claude``.

    Raises:
        ConfigError: one is unknown or out of range, or no call could be made with them.
    """
    found = read_params(given, type_, who)
    check_endpoint(found, who)
    return found


def check_ready(endpoint: Endpoint) -> None:
    """See whether this process can ask: the package is installed and the key is there.

    Raises:
        ModelError: one is not.
    """
    if find_spec(endpoint.provider) is None:
        raise ModelError(
            f"To ask {endpoint.said}, the package {endpoint.provider} is needed, and it is not installed.",
            next_step=f"Install it: {install_command(_EXTRAS[endpoint.provider])}",
        )
    key_of(endpoint)


def key_of(endpoint: Endpoint) -> str:
    """The key, from the environment.

    Raises:
        ModelError: the variable is not set, or holds what no header takes.
    """
    if not endpoint.key_name:
        return NO_KEY
    fault = key_fault(endpoint.key_name)
    if fault is not None:
        raise ModelError(
            f"There is no key for {endpoint.said}: the environment variable {endpoint.key_name} {fault}.",
            next_step=f"Set {endpoint.key_name} to the key alone where the service runs that asks, "
            "then `bascule resume RUN`.",
        )
    return os.environ[endpoint.key_name]


def key_fault(name: str) -> str | None:
    """What is wrong with the key in the environment variable ``name``, without the key; None if nothing is."""
    key = os.environ.get(name, "")
    if not key.strip():
        return "is not set"
    if not all("!" <= character <= "~" for character in key):
        return "holds white space or other characters that no header takes"
    return None


def too_long(status: int | None, said: str) -> bool:
    """Whether an endpoint that answers with ``status`` and these words refuses the prompt for its length."""
    return status == 413 or (status in (400, 422) and any(mark in said.lower() for mark in _TOO_LONG))


async def ask(endpoint: Endpoint, request: dict[str, Any]) -> Performed:
    """Ask the model of an endpoint.

    Returns:
        The answer; ``pause`` says so where it was refused or cut off, since nothing can be made of it then. Where the
        endpoint refuses the request as too long, an empty one whose ``stop_reason`` is :data:`OVER_CONTEXT`, and whose
        ``pause`` has the endpoint's words.

    Raises:
        ModelError: there is no answer.
    """
    check_ready(endpoint)
    asking: Ask
    if endpoint.provider == "anthropic":
        from bascule.plugins.models.anthropic import ask as asking
    else:
        from bascule.plugins.models.openai import ask as asking
    try:
        performed = await asking(endpoint, key_of(endpoint), request)
    except TooLong as error:
        answer = {"content": [], "stop_reason": OVER_CONTEXT, "error": error.message}
        return Performed(answer=answer, stop_reason=OVER_CONTEXT, pause=str(error))
    if len(msgspec.json.encode(performed.answer)) > MOST_ANSWER:
        answer = {**performed.answer, "content": [], "stop_reason": "too_large"}
        performed = msgspec.structs.replace(performed, answer=answer, stop_reason="too_large")
    return msgspec.structs.replace(performed, pause=unusable(endpoint, performed.stop_reason))


def unusable(endpoint: Endpoint, stop_reason: str | None) -> str | None:
    """Why nothing can be made of an answer that ended so; None if something can."""
    match stop_reason:
        case "max_tokens":
            what = f"The answer of {endpoint.said} was cut off at max_tokens = {endpoint.max_tokens}."
            step = "`bascule resume RUN` asks again; for more room start with a higher max_tokens, or a shorter prompt."
        case "refusal":
            what = f"{endpoint.said} refused to answer."
            step = "`bascule log RUN --type model.called --json` shows what was asked, `bascule resume RUN` asks again."
        case "too_large":
            what = f"The answer of {endpoint.said} is over {MOST_ANSWER} bytes; what it said is not kept."
            step = "`bascule resume RUN` asks again; start with a lower max_tokens if that does not help."
        case _ if stop_reason == OVER_CONTEXT:
            what = f"What was asked does not fit into the context of {endpoint.said}."
            step = "Choose a model with a larger one, or fewer calls and less evidence."
        case _:
            return None
    return f"{what} {step}"


def failure(endpoint: Endpoint, key: str, status: int | None, said: str) -> ModelError:
    """What a person is told of a call that failed.

    Args:
        status: of the endpoint's last response; None if there was none.
        said: by the endpoint or by the connection; quoted without the key.

    Returns:
        A :class:`TooLong` where the length of the request is why, a :class:`Refused` where anything else in it is.
    """
    quoted = " ".join((said.replace(key, "[key]") if key != NO_KEY else said).split())[:_QUOTED].rstrip(".")
    resume = "then `bascule resume RUN`"
    tries = f"after {endpoint.max_retries + 1} attempts" if endpoint.max_retries else "at the first attempt"
    match status:
        case None:
            what = f"{endpoint.said} cannot be reached, {tries}: {quoted}."
            step = f"Check base_url and the network, {resume}."
        case 401 | 403:
            # What the endpoint says here may hold a part of the key.
            what = f"{endpoint.said} refuses the key in {endpoint.key_name or 'no variable'} (status {status})."
            step = f"Set {endpoint.key_name or 'key_env'} to a key that may use this model, {resume}."
        case 404:
            what = f"{endpoint.url} knows no model {endpoint.named!r}, or no such path (status 404): {quoted}."
            step = "Start again with another model or base_url; a run keeps those that it was started with."
        case 413:
            what = f"What was asked is too large for {endpoint.said} (status 413): {quoted}."
            step = _SHORTER
        case _ if status in (408, 409, 429) or status >= 500:
            what = f"{endpoint.said} gave no answer {tries}; the last one failed with status {status}: {quoted}."
            step = "Wait and `bascule resume RUN`; max_retries and total_s say how long it is tried."
        case _:
            what = f"{endpoint.said} refuses the request (status {status}): {quoted}."
            step = _SHORTER if too_long(status, said) else f"Correct what it names, {resume}."
    kind = TooLong if too_long(status, said) else Refused if status in (400, 422) else ModelError
    return kind(what, next_step=step)


def out_of_time(endpoint: Endpoint, failed: str) -> ModelError:
    """The call took longer than it may; ``failed`` says how an attempt before the last one did, or is empty."""
    before = f"; an attempt before {failed}" if failed else ""
    return ModelError(
        f"{endpoint.said} gave no answer within {endpoint.total_s:g} s, all attempts together{before}.",
        next_step="Wait and `bascule resume RUN`; total_s and timeout_s say how long it may take.",
    )


def not_understood(endpoint: Endpoint, why: str) -> ModelError:
    """An answer that does not have the form of the API."""
    return ModelError(
        f"What {endpoint.said} answers is not of the provider {endpoint.provider}: {why}.",
        next_step="Check base_url and provider: a run keeps those that it was started with; start with others, "
        "or `bascule resume RUN` once the endpoint answers as it should.",
    )
