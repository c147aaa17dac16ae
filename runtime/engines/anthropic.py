"""The engine ``anthropic``: a model behind the Messages API as the target.

It gives text and counts of tokens, and nothing that weights could be trained from: no token ids, no log-probabilities,
no seeds, no adapters. The harness is the lever.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bascule.plugins.engine import Engine, EngineInfo, Sampled, SampleRequest, before_stop
from bascule.plugins.models.endpoint import OVER_CONTEXT, Endpoint, Refused, ask, check_endpoint, check_ready
from bascule.plugins.params import read_params
from bascule.plugins.policy import Performed
from bascule.runtime.engines.refusals import no_adapters, not_started, refused_prompt
from bascule.runtime.engines.remote import HELLO, HELLO_TOKENS, Calls, target_model
from bascule.schemas.errors import EngineError, ModelError, PromptError
from bascule.schemas.trajectory import Output

#: What the API takes; a request for a higher temperature gets this one.
_HOTTEST = 1.0


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a configuration may set; see :class:`bascule.plugins.models.endpoint.Endpoint`.

    Attributes:
        model: its name there; by default the run's ``model``, and where the run names none the usual Claude.
        concurrency: calls at one time.
        temperature: whether it is sent: newer models refuse it.
    """

    model: str = ""
    base_url: str = ""
    key_env: str | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 300.0
    total_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 900.0
    max_retries: Annotated[int, msgspec.Meta(ge=0, le=20)] = 4
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8
    temperature: bool = False


class AnthropicEngine:
    """Satisfies :class:`bascule.plugins.engine.Engine`."""

    cannot = frozenset({"token_ids", "logprobs", "seeds", "adapters"})

    def __init__(self, params: Params) -> None:
        self.params = params
        self.info: EngineInfo | None = None
        self._calls = Calls(params.concurrency)
        self._answered = False
        self._endpoint = Endpoint(
            provider="anthropic",
            model=params.model,
            base_url=params.base_url,
            key_env=params.key_env,
            timeout_s=params.timeout_s,
            total_s=params.total_s,
            max_retries=params.max_retries,
        )
        check_endpoint(self._endpoint, "The engine 'anthropic'")

    async def start(self) -> EngineInfo:
        if self.info is None:
            try:
                check_ready(self._endpoint)
            except ModelError as error:
                raise EngineError(error.message, next_step=error.next_step) from error
            self._calls = Calls(self.params.concurrency)
            self.info = EngineInfo(
                name="anthropic",
                model=self._endpoint.named,
                model_digest="",
                versions={"endpoint": self._endpoint.url},
                token_ids=False,
                logprobs=False,
                seeds=False,
                adapters=False,
            )
        return self.info

    async def close(self) -> None:
        self.info = None
        await self._calls.close()

    async def load_adapter(self, name: str, folder: Path) -> None:
        raise no_adapters("anthropic", name)

    async def unload_adapter(self, name: str) -> None:
        del name

    async def sample(self, request: SampleRequest) -> Sampled:
        if self.info is None:
            raise not_started()
        if request.adapter is not None:
            raise no_adapters("anthropic", request.adapter)
        message = self._message(request)
        answers = await self._calls.all([partial(self._ask, message)] * request.n)
        spent = sum(a.input_tokens + a.cache_read_tokens + a.cache_write_tokens for a in answers)
        return Sampled(
            prompt_ids=(),
            outputs=tuple(_output(a, request.sampling.stop) for a in answers),
            usage=(spent, sum(a.output_tokens for a in answers)),
        )

    async def _ask(self, message: dict[str, Any]) -> Performed:
        try:
            answer = await ask(self._endpoint, message)
        except ModelError as error:
            if isinstance(error, Refused) and await self._takes_plain(message):
                raise refused_prompt(error) from error
            raise EngineError(error.message, next_step=error.next_step) from error
        # An answer that is cut off is one of its length; one that is refused is an answer, and scored as such.
        if answer.stop_reason == OVER_CONTEXT:
            said = answer.answer.get("error") or f"The prompt does not fit into the context of {self._endpoint.said}."
            raise PromptError(said, next_step="Shorten the prompt or lower max_tokens.")
        self._answered = True
        return answer

    async def _takes_plain(self, message: dict[str, Any]) -> bool:
        """Whether the endpoint answers a plain question, asked as this message is as far as a configuration says."""
        configured: dict[str, Any] = {k: message[k] for k in ("model", "temperature") if k in message}
        # Until something was answered, what a configuration allows of an answer may be more than the model gives.
        most = HELLO_TOKENS if self._answered else message["max_tokens"]
        plain = [{"role": "user", "content": HELLO}]
        try:
            answer = await ask(self._endpoint, {**configured, "max_tokens": most, "messages": plain})
        except ModelError:
            return False
        return answer.stop_reason != OVER_CONTEXT

    def _message(self, request: SampleRequest) -> dict[str, Any]:
        prompt, sampling = request.prompt, request.sampling
        messages = [("user", prompt)] if isinstance(prompt, str) else [(m.role, m.content) for m in prompt]
        system = "\n\n".join(text for role, text in messages if role == "system")
        said = [{"role": role, "content": text} for role, text in messages if role != "system"]
        odd = sorted({m["role"] for m in said} - {"user", "assistant"})
        if not said or odd or not all(m["content"].strip() for m in said):
            what = f"the role {odd[0]!r}" if odd else "an empty message, or none of a user"
            raise PromptError(
                f"Call {request.call} of {request.trajectory!r} has {what}, which the Messages API does not take.",
                next_step="Send messages of system, user and assistant that say something.",
            )
        return {
            "model": self._endpoint.named,
            "max_tokens": sampling.max_tokens,
            "messages": said,
            **({"system": system} if system else {}),
            **({"temperature": min(sampling.temperature, _HOTTEST)} if self.params.temperature else {}),
            # It takes none that are only white space.
            **({"stop_sequences": stops} if (stops := [s for s in sampling.stop if s.strip()]) else {}),
        }


def _output(answer: Performed, stop: tuple[str, ...]) -> Output:
    blocks = answer.answer.get("content", [])
    text = "".join(b["text"] for b in blocks if b.get("type") == "text")
    cut = before_stop(text, stop)
    return Output(
        token_ids=b"",
        logprobs=b"",
        text=text if cut is None else cut,
        finish_reason="length" if answer.stop_reason == "max_tokens" and cut is None else "stop",
    )


def make(model: str, params: dict[str, Any]) -> Engine:
    """An engine for a model behind the Messages API; see :class:`Params`.

    Raises:
        ConfigError: a parameter is unknown or not usable.
    """
    checked = read_params(params, Params, "The engine 'anthropic'")
    asked = target_model("anthropic", params, model) or ""
    return AnthropicEngine(msgspec.structs.replace(checked, model=asked))
