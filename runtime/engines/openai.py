"""The engine ``openai``: any endpoint with ``/chat/completions``, as it is.

What such an endpoint gives besides text is found out by asking once at the start: token ids and log-probabilities where
it has them, otherwise declared absent. It takes no adapters, so that the harness is the lever.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bascule.plugins.engine import Engine, EngineInfo, Sampled, SampleRequest, before_stop
from bascule.plugins.models.endpoint import check_url
from bascule.plugins.params import read_params
from bascule.runtime.engines.form import plain
from bascule.runtime.engines.presets import preset_of
from bascule.runtime.engines.refusals import no_adapters, not_started, refused_prompt
from bascule.runtime.engines.remote import HELLO, HELLO_TOKENS, Calls, target_model
from bascule.runtime.engines.wire import Missing, Refused, Wire, read_key
from bascule.schemas.errors import ConfigError, EngineError
from bascule.schemas.trajectory import Output, Sampling, pack_floats, pack_ids

_PLAIN = {"messages": [{"role": "user", "content": HELLO}]}
#: What OpenAI takes at most: answers of one call, and stop strings; further ones are looked for in what it answers.
_MOST_ANSWERS = 128
_MOST_STOPS = 4


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a configuration may set.

    Attributes:
        url: of the endpoint, with its ``/v1`` where it has one.
        model: its name there; by default the run's ``model``.
        key_env: environment variable that holds the key; empty sends none.
        concurrency: calls at one time.
        timeout_s: most seconds of one try.
        retries: tries after the first.
        many: whether the endpoint takes ``n`` > 1; otherwise each sample is a call.
        temperature: whether it is sent: newer models of OpenAI's refuse any but 1, and without it sample at that.
    """

    url: str = "https://api.openai.com/v1"
    model: str = ""
    key_env: str = "OPENAI_API_KEY"
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 32
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    retries: Annotated[int, msgspec.Meta(ge=0, le=20)] = 4
    many: bool = True
    temperature: bool = True


class _Place(msgspec.Struct):
    logprob: float


class _Places(msgspec.Struct):
    """Log-probabilities in the form of ``/chat/completions``, or in that of ``/completions``."""

    content: list[_Place] | None = None
    token_logprobs: list[float] | None = None

    @property
    def values(self) -> list[float]:
        return self.token_logprobs or [place.logprob for place in self.content or []]


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Places | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None
    prompt_token_ids: list[int] | None = None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Those of the prompt; ``/completions`` gives them with each choice."""
        return tuple(self.prompt_token_ids or (self.choices and self.choices[0].prompt_token_ids) or ())


class OpenAIEngine:
    """Satisfies :class:`bascule.plugins.engine.Engine`; see :class:`Params`."""

    cannot = frozenset({"adapters"})

    def __init__(self, model: str, params: Params) -> None:
        self.model_name = model
        self._preset = preset_of(model)
        self.params = params
        self.info: EngineInfo | None = None
        self._wire: Wire | None = None
        self._calls = Calls(params.concurrency)
        self._ids = self._logprobs = self._answered = False

    async def start(self) -> EngineInfo:
        if self.info is None:
            p = self.params
            self._wire = Wire(p.url, key=read_key(p.key_env), timeout_s=p.timeout_s, retries=p.retries)
            self._calls = Calls(p.concurrency)
            first = await self._capabilities()
            self._ids = bool(first.prompt_ids and all(c.token_ids for c in first.choices))
            # Without the ids of the tokens nothing can be trained from their log-probabilities.
            self._logprobs = self._ids and all(c.logprobs and c.logprobs.values for c in first.choices)
            counted = self._ids or (first.usage is not None and first.usage.prompt_tokens > 0)
            self.info = EngineInfo(
                name="openai",
                model=self.model_name,
                model_digest="",
                versions={"endpoint": p.url, **({} if counted else {"usage": "none"})},
                token_ids=self._ids,
                logprobs=self._logprobs,
                seeds=False,
                adapters=False,
            )
        return self.info

    async def close(self) -> None:
        self.info = None
        await self._calls.close()
        if self._wire is not None:
            await self._wire.close()

    async def load_adapter(self, name: str, folder: Path) -> None:
        raise no_adapters("openai", name)

    async def unload_adapter(self, name: str) -> None:
        del name

    async def sample(self, request: SampleRequest) -> Sampled:
        if self.info is None:
            raise not_started()
        if request.adapter is not None:
            raise no_adapters("openai", request.adapter)
        # Some endpoints take no n > 1 where the answer is greedy.
        greedy = self.params.temperature and request.sampling.temperature == 0
        most = _MOST_ANSWERS if self.params.many and not greedy else 1
        answers = await self._calls.all(
            partial(self._ask, request, min(most, request.n - before), request.seed + before)
            for before in range(0, request.n, most)
        )
        outputs = tuple(self._output(c, request.sampling) for a in answers for c in a.choices)
        if len(outputs) != request.n:
            raise EngineError(
                f"{self.params.url} gave {len(outputs)} answers for {request.n}.",
                next_step="Set engine.params.many to false for an endpoint that takes one at a time.",
            )
        usage = [a.usage or _Usage() for a in answers]
        return Sampled(
            prompt_ids=answers[0].prompt_ids if self._ids else (),
            outputs=outputs,
            usage=(sum(u.prompt_tokens for u in usage), sum(u.completion_tokens for u in usage)),
        )

    async def _ask(self, request: SampleRequest, n: int, seed: int) -> _Answer:
        sampling, chat = request.sampling, not isinstance(request.prompt, str)
        body: dict[str, Any] = {
            "n": n,
            "seed": seed % 2**31,
            **({"temperature": sampling.temperature} if self.params.temperature else {}),
            # Of a model that thinks they are for the answer alone, and so looked for afterwards.
            **({"stop": list(sampling.stop[:_MOST_STOPS])} if sampling.stop and not self._preset.thinking_ends else {}),
            **({"return_token_ids": True} if self._ids else {}),
        }
        if isinstance(request.prompt, str):
            body["prompt"] = request.prompt
        else:
            body["messages"] = plain(request.prompt)
        if self._logprobs:
            body["logprobs"] = True if chat else 1  # there a number: of the likeliest tokens beside the sampled one
        try:
            answer = await self._post("chat/completions" if chat else "completions", body, sampling.max_tokens)
        except (Refused, Missing) as error:
            configured: dict[str, Any] = {k: body[k] for k in ("n", "seed", "temperature") if k in body}
            # Until something was answered, what a configuration allows of an answer may be more than the model gives.
            most = HELLO_TOKENS if self._answered else sampling.max_tokens
            if (chat and isinstance(error, Missing)) or not await self._takes({**configured, **_PLAIN}, most):
                raise
            raise refused_prompt(error) from error
        self._answered = True
        return answer

    async def _takes(self, body: dict[str, Any], most: int) -> bool:
        try:
            await self._post("chat/completions", body, most)
        except EngineError:
            return False
        return True

    async def _post(self, path: str, body: dict[str, Any], most: int) -> _Answer:
        assert self._wire is not None
        # OpenAI's own newer models have another name for the limit of an answer.
        own = self.params.url == Params().url and path.startswith("chat")
        limit = "max_completion_tokens" if own else "max_tokens"
        url = f"{self.params.url.rstrip('/')}/{path}"
        found = await self._wire.post(url, {"model": self.model_name, limit: most, **body})
        try:
            return msgspec.convert(found, _Answer)
        except msgspec.ValidationError as error:
            raise EngineError(
                f"{url} does not answer as OpenAI's protocol has it: {error}.", next_step="Correct engine.params.url."
            ) from error

    async def _capabilities(self) -> _Answer:
        """A first answer, asked for all that an endpoint may give; one that refuses to is asked for less."""
        wishes = {"logprobs": True, "return_token_ids": True}
        try:
            return await self._post("chat/completions", {**_PLAIN, **wishes}, HELLO_TOKENS)
        except Refused:
            return await self._post("chat/completions", _PLAIN, HELLO_TOKENS)

    def _output(self, choice: _Choice, sampling: Sampling) -> Output:
        text = choice.message.content or "" if choice.message is not None else choice.text or ""
        text = self._preset.said(text)
        cut = before_stop(text, sampling.stop)
        ids = choice.token_ids or [] if self._ids else []
        logprobs = choice.logprobs.values if choice.logprobs and self._logprobs else []
        return Output(
            token_ids=pack_ids(ids),
            logprobs=pack_floats(logprobs) if len(logprobs) == len(ids) else b"",
            text=text if cut is None else cut,
            finish_reason="length" if choice.finish_reason == "length" else "stop",
        )


def make(model: str, params: dict[str, Any]) -> Engine:
    """An engine for an endpoint; see :class:`Params`.

    Raises:
        ConfigError: a parameter is unknown or not usable, or no model is named.
    """
    checked = read_params(params, Params, "The engine 'openai'")
    check_url(checked.url, "The engine 'openai'", "url")
    asked = target_model("openai", params, model)
    if not asked:
        raise ConfigError("The engine 'openai' is told no model.", next_step="Set engine.params.model.")
    return OpenAIEngine(asked, checked)
