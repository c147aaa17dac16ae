"""One vLLM behind a URL: what its HTTP protocol says of tokens, log-probabilities and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from bascule.plugins.engine import Message
from bascule.runtime.engines.form import plain
from bascule.runtime.engines.wire import Wire
from bascule.schemas.errors import EngineError, PromptError
from bascule.schemas.trajectory import Output, Sampling, pack_floats, pack_ids

_T = TypeVar("_T")
Ids = tuple[int, ...]
_UPDATE = "vLLM takes adapters when it is started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."


class Served(msgspec.Struct, frozen=True):
    """What a replica serves.

    Attributes:
        model: name of the base model there.
        context: most tokens of a prompt and its answer.
        adapters: the names of those that are loaded.
        version: of vLLM; empty if it does not say.
    """

    model: str
    context: int
    adapters: frozenset[str]
    version: str = ""


class Replica(Protocol):
    """One vLLM. Every method raises EngineError for what it refuses or cannot do."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    async def served(self) -> Served:
        """What it serves at this moment."""
        ...

    async def encode(self, prompt: tuple[Message, ...] | str, template: Mapping[str, Any]) -> Ids:
        """Token ids of a raw text, or of a chat by the model's own template.

        Raises:
            PromptError: the template refuses the chat.
        """
        ...

    async def complete(
        self, model: str, prompt: Ids, n: int, sampling: Sampling, seed: int, ends: Ids = ()
    ) -> tuple[Output, ...]:
        """``n`` continuations by the base model or an adapter, with their log-probabilities.

        Args:
            ends: ids of tokens that end an answer besides the model's own.
        """
        ...

    async def likeliest(self, model: str, prompt: Ids, temperature: float) -> dict[int, float]:
        """Log-probabilities of the next token's two likeliest values at a temperature."""
        ...

    async def score(self, model: str, ids: Ids) -> tuple[float, ...]:
        """Log-probabilities, at temperature 1, of each of ``ids`` but the first after those before it."""
        ...

    async def takes_adapters(self) -> bool:
        """Whether adapters can be loaded."""
        ...

    async def load(self, name: str, folder: str) -> None:
        """Load an adapter from a folder that the replica sees."""
        ...

    async def unload(self, name: str) -> None: ...

    async def close(self) -> None: ...


class _Model(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _LogProbs(msgspec.Struct):
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Tokens(msgspec.Struct):
    tokens: list[int]


#: What truncates or bends the distribution, switched off whatever the server's defaults are.
WHOLE = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class HttpReplica:
    """A server that runs. Satisfies :class:`Replica`.

    Args:
        model: name of the base model there; empty for the only one.
    """

    def __init__(self, wire: Wire, model: str = "") -> None:
        self._wire = wire
        self._model = model

    @property
    def name(self) -> str:
        return self._wire.root

    async def served(self) -> Served:
        models = self._read(await self._wire.get("/v1/models", retry=False), _Models).data
        bases = [m for m in models if m.parent is None]
        mine = [m for m in bases if m.id == self._model] if self._model else bases
        if len(mine) != 1:
            raise EngineError(
                f"{self.name} serves {', '.join(m.id for m in bases) or 'no model'}"
                + (f", not {self._model!r}." if self._model else "."),
                next_step="Name the base model as the server does in engine.params.served_model.",
            )
        if mine[0].max_model_len is None:
            raise EngineError(
                f"{self.name} does not say how many tokens its model takes, as vLLM does.",
                next_step="Use the engine 'openai' for an endpoint that is not vLLM's.",
            )
        try:
            version = str((await self._wire.get("/version", retry=False)).get("version", ""))
        except (EngineError, AttributeError):
            version = ""
        adapters = frozenset(m.id for m in models if m.parent is not None)
        return Served(mine[0].id, mine[0].max_model_len, adapters, version)

    async def encode(self, prompt: tuple[Message, ...] | str, template: Mapping[str, Any]) -> Ids:
        body: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"messages": plain(prompt)}
        if not isinstance(prompt, str):
            body |= {"add_generation_prompt": True}
            body |= {"chat_template_kwargs": dict(template)} if template else {}
        try:
            answer = await self._wire.post("/tokenize", body)
        except EngineError as error:
            if isinstance(prompt, str) or " answered 400" not in error.message:
                raise
            raise PromptError(
                f"The chat template of the served model refuses the prompt: {error.message}",
                next_step="Send the roles that the template takes, in its order.",
            ) from error
        return tuple(self._read(answer, _Tokens).tokens)

    async def complete(
        self, model: str, prompt: Ids, n: int, sampling: Sampling, seed: int, ends: Ids = ()
    ) -> tuple[Output, ...]:
        choices = await self._completion(
            model=model,
            prompt=prompt,
            n=n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            stop_token_ids=list(ends),
            seed=seed,
            logprobs=0,
        )
        if sorted(c.index for c in choices) != list(range(n)):
            raise EngineError(f"{self.name} gave {len(choices)} answers for {n}.")
        return tuple(self._output(c) for c in sorted(choices, key=lambda c: c.index))

    async def likeliest(self, model: str, prompt: Ids, temperature: float) -> dict[int, float]:
        (choice,) = await self._completion(
            model=model,
            prompt=prompt,
            temperature=temperature,
            max_tokens=1,
            seed=0,
            logprobs=2,
            return_tokens_as_token_ids=True,
        )
        top = (choice.logprobs.top_logprobs or [None])[0] if choice.logprobs else None
        if not top:
            raise EngineError(f"{self.name} gives no log-probabilities.", next_step="Use a newer vLLM.")
        return {int(token.removeprefix("token_id:")): logprob for token, logprob in top.items()}

    async def score(self, model: str, ids: Ids) -> tuple[float, ...]:
        (choice,) = await self._completion(model=model, prompt=ids, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        places = choice.prompt_logprobs or []
        try:
            found = [float(place[str(i)]["logprob"]) for place, i in zip(places[1:], ids[1:], strict=True) if place]
        except (KeyError, TypeError, ValueError) as error:
            raise self._odd(f"prompt_logprobs without {error}") from error
        if len(found) != len(ids) - 1:
            raise self._odd(f"{len(found)} prompt_logprobs for {len(ids)} tokens")
        return tuple(found)

    async def takes_adapters(self) -> bool:
        try:
            await self._wire.post("/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""}, retry=False)
        except EngineError as error:
            return " answered 404" not in error.message and " answered 405" not in error.message
        return True

    async def load(self, name: str, folder: str) -> None:
        try:
            await self._wire.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, retry=False)
        except EngineError as error:
            step = _UPDATE if " answered 404" in error.message else error.next_step
            raise EngineError(f"The adapter {name!r} was not loaded: {error.message}", next_step=step) from error

    async def unload(self, name: str) -> None:
        await self._wire.post("/v1/unload_lora_adapter", {"lora_name": name}, retry=False)

    async def close(self) -> None:
        await self._wire.close()

    async def _completion(self, *, model: str, prompt: Ids, **more: Any) -> list[_Choice]:
        body = {"model": model, "prompt": list(prompt), "return_token_ids": True, **WHOLE, **more}
        choices = self._read(await self._wire.post("/v1/completions", body), _Completion).choices
        if not choices:
            raise self._odd("no choices")
        for choice in choices:
            if choice.token_ids is None or choice.prompt_token_ids not in (None, list(prompt)):
                raise EngineError(
                    f"{self.name} does not give back the token ids of prompt and answer.",
                    next_step="Use vLLM 0.32 or newer, or the engine 'openai' where exact tokens are not needed.",
                )
        return choices

    def _output(self, choice: _Choice) -> Output:
        ids = choice.token_ids or []
        logprobs = choice.logprobs.token_logprobs if choice.logprobs else []
        if len(logprobs) != len(ids) or None in logprobs:
            raise self._odd(f"{len(logprobs)} log-probabilities for {len(ids)} tokens")
        if choice.finish_reason not in ("stop", "length"):
            raise EngineError(
                f"{self.name} broke an answer off: {choice.finish_reason}.", next_step="Look at the server's log."
            )
        return Output(
            token_ids=pack_ids(ids),
            logprobs=pack_floats(p for p in logprobs if p is not None),
            text=choice.text,
            finish_reason="stop" if choice.finish_reason == "stop" else "length",
        )

    def _read(self, answer: Any, kind: type[_T]) -> _T:
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as error:
            raise self._odd(str(error)) from error

    def _odd(self, what: str) -> EngineError:
        return EngineError(
            f"{self.name} does not answer as vLLM does: {what}.", next_step="Use a vLLM of 0.32 or newer."
        )
