"""Keys and endpoints that a configuration names: is a key there, does the endpoint take it, does it know the model."""

from __future__ import annotations

import difflib
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone
from http.client import HTTPException, HTTPMessage
from importlib.util import find_spec
from typing import IO, Any, get_args
from urllib.parse import quote, urlsplit

import msgspec

from bascule.plugins.models.endpoint import Endpoint, Provider, check_url, key_fault
from bascule.plugins.params import read_params
from bascule.runtime.doctor.finding import Asked, Finding, untold
from bascule.runtime.engines.openai import Params as OpenAI
from bascule.runtime.engines.remote import target_model
from bascule.schemas.errors import ConfigError
from bascule.schemas.run import RunConfig

_MOST_BYTES = 4 << 20
_SHOWN = 5


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint that a configuration names.

    Attributes:
        who: asks it, as ``policy, author``.
        url: to which ``models`` is added.
        model: its name there; empty where any will do.
        key_env: the environment variable with the key; empty where none is sent.
        patience: seconds that it may take.
    """

    who: str
    provider: Provider
    url: str
    model: str
    key_env: str = ""
    patience: float = 5.0

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc


def wanted(config: RunConfig) -> tuple[Wanted, ...]:
    """The endpoints of a configuration; one that several ask alike stands there once.

    Raises:
        ConfigError: parameters that name one are not usable.
    """
    found: dict[Wanted, list[str]] = {}
    for who, choice in (("policy", config.policy), ("author", config.author)):
        if choice.name == "claude" or choice.params.get("provider") in get_args(Provider):
            found.setdefault(_thinking(who, choice.params), []).append(who)
    for one in _serving(config):
        found.setdefault(one, []).append("engine")
    return tuple(msgspec.structs.replace(one, who=", ".join(who)) for one, who in found.items())


def _thinking(who: str, params: Mapping[str, Any]) -> Wanted:
    """What is asked by who takes the parameters of :class:`Endpoint`."""
    named = ("provider", "model", "base_url", "key_env")
    endpoint = read_params({k: v for k, v in params.items() if k in named}, Endpoint, f"The {who}")
    check_url(endpoint.url, f"The {who}", "base_url")
    url = endpoint.url.rstrip("/") + ("/v1" if endpoint.provider == "anthropic" else "")
    return Wanted(who="", provider=endpoint.provider, url=url, model=endpoint.named, key_env=endpoint.key_name)


def _serving(config: RunConfig) -> list[Wanted]:
    """What an engine asks; nothing for one that computes here or starts its own server."""
    name, params = config.engine.name, config.engine.params
    asked = target_model(name, params, config.model)
    if name == "anthropic":
        return [_thinking("engine", {**params, "provider": "anthropic", "model": asked})]
    if name == "openai":
        params = {"url": OpenAI().url, "key_env": OpenAI().key_env, **params, "model": asked}
    url, urls = params.get("url") or "", params.get("urls") or ()
    if not isinstance(urls, list | tuple) or not all(isinstance(one, str) for one in (url, *urls)):
        raise ConfigError(
            "The engine cannot take its parameters: url is no text, or urls no list of texts.",
            next_step="Correct engine.params.url or engine.params.urls.",
        )
    model, key = params.get("served_model" if name == "vllm" else "model") or "", params.get("key_env") or ""
    addresses = [one for one in (url, *urls) if one]
    for one in addresses:
        check_url(one, f"The engine {name!r}", "url")
    return [
        Wanted(who="", provider="openai", url=_base(name, one), model=str(model), key_env=str(key)) for one in addresses
    ]


def _base(engine: str, url: str) -> str:
    """Where an engine asks that was given an address: vLLM's beside a ``/v1`` of their own, any other as it is."""
    base = url.rstrip("/")
    return f"{base.removesuffix('/v1')}/v1" if engine == "vllm" else base


def check_endpoints(asked: Asked) -> Iterator[Finding]:
    """Keys in any case; the endpoints themselves if ``online``, all at one time."""
    if asked.config is None:
        return
    try:
        every = [msgspec.structs.replace(one, patience=asked.patience) for one in wanted(asked.config)]
    except ConfigError as e:
        yield untold("endpoints", e)
        return
    for name in dict.fromkeys(one.key_env for one in every if one.key_env):
        yield _key_is_set(name, [one for one in every if one.key_env == name])
    if not every:
        yield Finding(about="endpoints", outcome="skipped", found="this configuration names none")
        return
    if not asked.online:
        hosts = ", ".join(sorted({one.host for one in every}))
        yield Finding(
            about="endpoints", outcome="skipped", found=f"not asked: {hosts}", next_step="--online asks them."
        )
        return
    pool = ThreadPoolExecutor(len(every))
    try:
        under_way = [(one, pool.submit(_asked, one)) for one in every]
        end = time.monotonic() + asked.patience + 1
        for one, future in under_way:
            try:
                yield from future.result(max(end - time.monotonic(), 0))
            except NotDone:
                yield _unreachable(one, f"no answer within {asked.patience:g} s")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _key_is_set(name: str, users: list[Wanted]) -> Finding:
    who = ", ".join(one.who for one in users)
    fault = key_fault(name)
    if fault is None:
        return Finding(about=f"key {name}", outcome="ok", found=f"is set, for {who}")
    return Finding(
        about=f"key {name}",
        outcome="fails",
        found=f"the environment variable {fault}; {who} needs it",
        next_step=f"Set {name} to the key alone where bascule runs.",
    )


def _asked(one: Wanted) -> list[Finding]:
    """The lines of one endpoint: that it answers, that it takes the key, that it knows the model."""
    try:
        status, body = _get(one, "models?limit=1000" if one.provider == "anthropic" else "models")
    except ssl.SSLError as e:
        return [_unreachable(one, f"TLS fails: {e.reason or e}")]
    except ValueError:
        what = f"{one.url} is no address (for {one.who})"
        return [Finding(about=f"endpoint {one.host}", outcome="fails", found=what, next_step="Correct it.")]
    except (OSError, HTTPException) as e:
        reason = e.reason if isinstance(e, urllib.error.URLError) else e
        if isinstance(reason, ssl.SSLError):
            return [_unreachable(one, f"TLS fails: {reason.reason or reason}")]
        return [_unreachable(one, "no answer in time" if isinstance(reason, TimeoutError) else str(reason))]
    return _understood(one, status, body)


def _unreachable(one: Wanted, why: str) -> Finding:
    return Finding(
        about=f"endpoint {one.host}",
        outcome="fails",
        found=f"{one.url} cannot be reached: {why} (for {one.who})",
        next_step="See that the address is right, that a server runs there and that the network lets this host in.",
    )


def _understood(one: Wanted, status: int, body: bytes) -> list[Finding]:
    reached = Finding(about=f"endpoint {one.host}", outcome="ok", found=f"answers (for {one.who})")
    key = bool(_key(one))
    if status in (401, 403):
        # What the endpoint says to it may quote a part of the key.
        if not key and one.key_env:
            return [reached]  # that there is no key to send has a line already
        refused = Finding(
            about=f"key {one.key_env or '(none is sent)'}",
            outcome="fails",
            found=f"{one.host} refuses it (status {status})",
            next_step=f"Set {one.key_env or 'key_env'} to a key that this endpoint takes.",
        )
        return [reached, refused]
    if status in (404, 405, 501):
        what = f"{one.url} has no list of models (status {status}); nothing is known of key and model"
        step = "See that the address is right: it is often one that ends in /v1."
        return [Finding(about=f"endpoint {one.host}", outcome="warns", found=what, next_step=step)]
    if status != 200:
        what = f"answers with status {status} (for {one.who})"
        return [Finding(about=f"endpoint {one.host}", outcome="warns", found=what, next_step="Try again later.")]
    names = _names(body)
    if names is None:
        what = f"what {one.url} answers is not of the provider {one.provider}"
        step = "Check provider and address."
        return [Finding(about=f"endpoint {one.host}", outcome="fails", found=what, next_step=step)]
    lines = [reached]
    if key:
        lines.append(Finding(about=f"key {one.key_env}", outcome="ok", found=f"{one.host} takes it"))
    return [*lines, _model(one, names)] if one.model else lines


def _names(body: bytes) -> list[str] | None:
    """The ids of a list of models; None for anything else."""
    try:
        data = json.loads(body)["data"]
        return [str(item["id"]) for item in data]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _model(one: Wanted, names: list[str]) -> Finding:
    about = f"model {one.model}"
    if one.model in names or _known_alone(one):
        return Finding(about=about, outcome="ok", found=f"{one.host} has it", figures={"models": len(names)})
    near = difflib.get_close_matches(one.model, names, _SHOWN, 0.4) or names[:_SHOWN]
    return Finding(
        about=about,
        outcome="fails",
        found=f"{one.host} does not list it among its {len(names)} models",
        next_step=f"Name one that it has, such as {', '.join(near)}." if near else "See what the server serves.",
        figures={"models": len(names)},
    )


def _known_alone(one: Wanted) -> bool:
    """Whether the endpoint knows a model that it does not list, under another name for instance."""
    try:
        return _get(one, f"models/{quote(one.model, safe='')}")[0] == 200
    except (OSError, HTTPException, ValueError):
        return False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the key to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def _get(one: Wanted, path: str) -> tuple[int, bytes]:
    """Status and body of a GET with the key in the provider's header."""
    headers = {"accept": "application/json", "user-agent": "bascule-doctor"}
    if key := _key(one):
        headers |= {"x-api-key": key} if one.provider == "anthropic" else {"authorization": f"Bearer {key}"}
    if one.provider == "anthropic":
        headers["anthropic-version"] = "2023-06-01"
    handlers: list[Any] = [_NoRedirect(), urllib.request.HTTPSHandler(context=_trusted())]
    opener = urllib.request.build_opener(*handlers)
    request = urllib.request.Request(f"{one.url}/{path}", headers=headers)  # noqa: S310
    try:
        with opener.open(request, timeout=one.patience) as response:
            return int(response.status), response.read(_MOST_BYTES)
    except urllib.error.HTTPError as e:
        with e:
            return int(e.code), b""


def _key(one: Wanted) -> str:
    """What is sent for a key; empty for none, also where the variable holds what cannot be sent."""
    return os.environ[one.key_env] if one.key_env and key_fault(one.key_env) is None else ""


def _trusted() -> ssl.SSLContext:
    """The system's authorities, and those that the providers' own clients bring along."""
    context = ssl.create_default_context()
    if find_spec("certifi") is not None:
        import certifi

        context.load_verify_locations(certifi.where())
    return context
