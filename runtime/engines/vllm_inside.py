"""vLLM within this process: no server and no HTTP; the model computes in a process of vLLM's own.

``AsyncLLM`` starts that process itself and keeps only tokens and queues here, so the event loop stays free.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from bascule.plugins.engine import Message
from bascule.plugins.extras import install_command
from bascule.runtime.engines.form import encoded
from bascule.runtime.engines.replica import WHOLE, Ids, Served
from bascule.schemas.errors import EngineError
from bascule.schemas.trajectory import Output, Sampling, pack_floats, pack_ids

if TYPE_CHECKING:
    from bascule.runtime.engines.vllm import Params

_BASE = "base"


class InsideReplica:
    """Satisfies :class:`bascule.runtime.engines.replica.Replica`."""

    name = "vLLM in this process"

    def __init__(self, engine: Any, tokenizer: Any, context: int, *, adapters: bool) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._context = context
        self._adapters = adapters
        self._numbers = itertools.count(1)
        self._requests = itertools.count()
        self._loaded: dict[str, Any] = {}

    async def served(self) -> Served:
        from vllm import __version__

        there = await self._engine.list_loras() if self._loaded else set()
        adapters = frozenset(name for name, lora in self._loaded.items() if lora.lora_int_id in there)
        return Served(_BASE, self._context, adapters, __version__)

    async def encode(self, prompt: tuple[Message, ...] | str, template: Mapping[str, Any]) -> Ids:
        return encoded(self._tokenizer, prompt, template, "the served model")

    async def complete(
        self, model: str, prompt: Ids, n: int, sampling: Sampling, seed: int, ends: Ids = ()
    ) -> tuple[Output, ...]:
        result = await self._generate(
            model,
            prompt,
            n=n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            stop_token_ids=list(ends),
            seed=seed,
            logprobs=0,
        )
        if len(result.outputs) != n:
            raise EngineError(f"{self.name} gave {len(result.outputs)} answers for {n}.")
        return tuple(self._output(one) for one in sorted(result.outputs, key=lambda o: o.index))

    async def likeliest(self, model: str, prompt: Ids, temperature: float) -> dict[int, float]:
        result = await self._generate(model, prompt, temperature=temperature, max_tokens=1, seed=0, logprobs=2)
        return {int(token): float(found.logprob) for token, found in result.outputs[0].logprobs[0].items()}

    async def score(self, model: str, ids: Ids) -> tuple[float, ...]:
        result = await self._generate(model, ids, temperature=0.0, max_tokens=1, prompt_logprobs=0)
        places = result.prompt_logprobs[1:]
        return tuple(float(place[i].logprob) for place, i in zip(places, ids[1:], strict=True))

    async def takes_adapters(self) -> bool:
        return self._adapters

    async def load(self, name: str, folder: str) -> None:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest(name, next(self._numbers), folder)
        try:
            await self._engine.add_lora(lora)
        except Exception as error:
            raise EngineError(
                f"The adapter {name!r} was not loaded: {error}.", next_step="Serve it with the base model it is of."
            ) from error
        self._loaded[name] = lora

    async def unload(self, name: str) -> None:
        lora = self._loaded.pop(name, None)
        if lora is not None:
            await self._engine.remove_lora(lora.lora_int_id)

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.shutdown)

    async def _generate(self, model: str, prompt: Ids, **more: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if model != _BASE and model not in self._loaded:
            raise EngineError(f"{self.name} has no adapter {model!r}.", next_step="Load it before it is asked for.")
        params = SamplingParams(**WHOLE, **more, output_kind=RequestOutputKind.FINAL_ONLY)
        last = None
        try:
            async for result in self._engine.generate(
                {"prompt_token_ids": list(prompt)},
                params,
                f"bascule-{next(self._requests)}",
                lora_request=self._loaded.get(model),
            ):
                last = result
        except Exception as error:  # vLLM's own have no base class of theirs
            raise EngineError(f"{self.name} failed: {error}.", next_step="Look at what it printed.") from error
        if last is None:
            raise EngineError(f"{self.name} gave no answer.", next_step="Look at what it printed.")
        return last

    def _output(self, one: Any) -> Output:
        ids = [int(t) for t in one.token_ids]
        if one.finish_reason not in ("stop", "length"):
            raise EngineError(f"{self.name} broke an answer off: {one.finish_reason}.")
        return Output(
            token_ids=pack_ids(ids),
            logprobs=pack_floats(float(place[t].logprob) for place, t in zip(one.logprobs, ids, strict=True)),
            text=one.text,
            finish_reason=one.finish_reason,
        )


async def open_inside(model: str, params: Params) -> InsideReplica:
    """Start vLLM here; raises EngineError if it is not installed or does not start."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise EngineError(
            "vLLM is not installed in this environment.",
            next_step=f"Install it: {install_command('vllm')}; or leave engine.params.mode out.",
        ) from error
    try:
        return await asyncio.to_thread(partial(_open, model, params))
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        raise EngineError(f"vLLM does not start: {error}.", next_step="Correct engine.params.options.") from error


def _open(model: str, p: Params) -> InsideReplica:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options: dict[str, Any] = {
        "model": model,
        "dtype": p.dtype,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "enforce_eager": p.eager,
        "disable_log_stats": True,
        **({"max_model_len": p.max_model_len} if p.max_model_len else {}),
        **(
            {
                "enable_lora": True,
                "max_lora_rank": p.max_lora_rank,
                "max_loras": p.max_loras,
                "max_cpu_loras": 2 * p.max_loras,
            }
            if p.adapters
            else {}
        ),
        **p.options,
    }
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    return InsideReplica(engine, engine.get_tokenizer(), engine.model_config.max_model_len, adapters=p.adapters)
