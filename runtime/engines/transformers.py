"""The embedded engine: transformers' models, batched over concurrent episodes.

Calls of :meth:`TransformersEngine.sample` queue; one task collects what waits, adapter by adapter in turn, and one
worker thread computes. Equal rows of a batch are computed once. The module is light: the model libraries are imported
when the engine starts.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from bascule.plugins.engine import Engine, EngineInfo, Message, Sampled, SampleRequest
from bascule.schemas.errors import BasculeError, ConfigError, EngineError, PromptError
from bascule.schemas.trajectory import Output
from bascule.trainers.base_model import DEFAULT_MODEL

if TYPE_CHECKING:
    from bascule.runtime.engines.generate import Row

T = TypeVar("T")
_CLOSED = "The engine was closed before it answered."


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a configuration may set.

    Attributes:
        gather_ms: how long calls must have paused before an idle engine computes.
        rows: most samples that decode together.
        tokens: most tokens of one prefill pass.
        kv_mib: most MiB of keys and values of samples that decode together.
        prefix_tokens: tokens of shared prefixes that are kept between batches.
        merged_adapters: adapters whose merged weights are kept.
        threads: threads of torch; None leaves its own choice.
    """

    gather_ms: float = 15.0
    rows: int = 256
    tokens: int = 1024
    kv_mib: int = 384
    prefix_tokens: int = 2048
    merged_adapters: int = 2
    threads: int | None = None


@dataclass(eq=False)
class _Call:
    """One request that waits: the rows still to hand out, and the answers in order."""

    request: SampleRequest
    rows: tuple[Row, ...]
    future: asyncio.Future[Sampled]
    given: int = 0
    outputs: dict[int, Output] = field(default_factory=dict)


def make(model: str, params: dict[str, Any]) -> Engine:
    """An engine for a model name or folder; see :class:`Params`.

    Raises:
        ConfigError: a parameter is unknown or of a wrong type.
    """
    try:
        checked = msgspec.convert(params, Params)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"The engine 'transformers' cannot use its parameters: {error}.",
            next_step=f"It knows {', '.join(Params.__struct_fields__)}.",
        ) from error
    return TransformersEngine(model or DEFAULT_MODEL, checked)


class TransformersEngine:
    """Satisfies :class:`bascule.plugins.engine.Engine`."""

    def __init__(self, model: str, params: Params) -> None:
        self.model_name = model
        self.params = params
        self.info: EngineInfo | None = None
        # The episodes of a group send the same prompt, each by itself.
        self._encode = lru_cache(maxsize=256)(self.encode)
        self._queues: OrderedDict[str | None, list[_Call]] = OrderedDict()
        self._wake = asyncio.Event()
        self._worker: ThreadPoolExecutor | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> EngineInfo:
        if self.info is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="bascule-engine")
            try:
                self.info = await self._off_loop(self._load)
            except BasculeError as error:
                self._worker.shutdown(wait=False)
                raise EngineError(
                    f"The engine cannot start with {self.model_name!r}: {error.message}", next_step=error.next_step
                ) from error
            self._task = asyncio.create_task(self._dispatch(), name="bascule-engine")
        return self.info

    async def close(self) -> None:
        """End the worker after the batch that it computes; calls that wait fail."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for call in itertools.chain(*self._queues.values()):
            self._fail(call, EngineError(_CLOSED))
        self._queues.clear()
        if self._worker is not None:
            await asyncio.to_thread(self._worker.shutdown)
        self._task = self._worker = self.info = None

    def encode(self, prompt: tuple[Message, ...] | str) -> tuple[int, ...]:
        """Token ids of a raw completion's text, or of a chat with its generation prompt.

        Raises:
            EngineError: the engine is not started, or a chat is asked of a model without a chat template.
        """
        self._started()
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt))
        if not self._tokenizer.chat_template:
            what = f"The model {self.model_name!r} has no chat template."
            raise PromptError(what, next_step="Use completion calls, or an instruct model.")
        messages = [{"role": m.role, "content": m.content} for m in prompt]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is code of the model's
            what = f"The chat template of {self.model_name!r} refuses the prompt: {error}."
            raise PromptError(what, next_step="Send the roles that the template takes, in its order.") from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        self._started()
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def forget(self) -> None:
        """Drop the kept prefixes, so that a benchmark starts cold. Call while nothing is asked."""
        self._started()
        self._generator.forget()

    async def load_adapter(self, name: str, folder: Path) -> None:
        """See the protocol; raises EngineError for an unusable folder, or other content under a loaded name."""
        self._started()
        await self._off_loop(partial(self._read_adapter, name, folder))

    async def unload_adapter(self, name: str) -> None:
        self._started()
        await self._off_loop(partial(self._adapters.remove, name))

    async def sample(self, request: SampleRequest) -> Sampled:
        self._started()
        from bascule.runtime.engines.generate import Row

        prompt = self._encode(request.prompt)
        self._check(request, prompt)
        greedy = request.sampling.temperature == 0
        rows = tuple(
            Row(prompt, request.sampling, 0 if greedy else request.seed, 0 if greedy else i) for i in range(request.n)
        )
        call = _Call(request, rows, asyncio.get_running_loop().create_future())
        self._queues.setdefault(request.adapter, []).append(call)
        self._wake.set()
        return await call.future

    def _check(self, request: SampleRequest, prompt: tuple[int, ...]) -> None:
        who = f"Call {request.call} of {request.trajectory!r}"
        size, wanted = len(prompt), request.sampling.max_tokens
        if request.adapter is not None and request.adapter not in self._adapters:
            known = ", ".join(self._adapters.names()) or "none"
            raise EngineError(
                f"{who} asks for the adapter {request.adapter!r}, which is not loaded (loaded: {known}).",
                next_step="Load the adapter before it is asked for.",
            )
        if size + wanted > self._context:
            raise PromptError(
                f"{who} has {size} prompt tokens and asks for {wanted} more: over the context of {self._context}.",
                next_step="Shorten the prompt or lower max_tokens.",
            )
        if not size or request.n < 1:
            raise PromptError(
                f"{who} has {size} prompt tokens and asks for {request.n} samples.",
                next_step="Ask for at least one sample of a prompt that is not empty.",
            )

    async def _dispatch(self) -> None:
        while True:
            await self._wake.wait()
            await self._gather()
            while self._queues:
                # Each adapter gives one batch in its turn, so that a long queue delays the others by one batch only.
                adapter, queue = self._queues.popitem(last=False)
                batch = self._take(queue)
                if queue:
                    self._queues[adapter] = queue
                if batch:
                    await self._answer(adapter, batch)
            self._wake.clear()

    async def _gather(self) -> None:
        """Wait until requests have paused for ``gather_ms``: episodes start one by one, and one batch beats many."""
        asked = -1
        while asked < (now := sum(call.request.n for queue in self._queues.values() for call in queue)):
            if now >= self.params.rows:
                return
            asked = now
            await asyncio.sleep(self.params.gather_ms / 1000)

    def _take(self, queue: list[_Call]) -> list[tuple[_Call, int]]:
        """Remove from a queue what makes one batch: calls, and the indices of their rows."""
        batch: list[tuple[_Call, int]] = []
        rows: set[Row] = set()
        while queue and len(rows) < self.params.rows:
            call = queue[0]
            if not call.future.done():
                while call.given < len(call.rows) and len(rows) < self.params.rows:
                    rows.add(call.rows[call.given])
                    batch.append((call, call.given))
                    call.given += 1
                if call.given < len(call.rows):
                    break
            queue.pop(0)
        return batch

    async def _answer(self, adapter: str | None, batch: list[tuple[_Call, int]]) -> None:
        waiting: dict[Row, list[tuple[_Call, int]]] = {}
        for call, i in batch:
            waiting.setdefault(call.rows[i], []).append((call, i))
        post = asyncio.get_running_loop().call_soon_threadsafe

        def deliver(row: Row, output: Output) -> None:
            for call, i in waiting[row]:
                call.outputs[i] = output
                if len(call.outputs) == len(call.rows) and not call.future.done():
                    outputs = tuple(call.outputs[j] for j in range(len(call.rows)))
                    call.future.set_result(Sampled(prompt_ids=row.prompt, outputs=outputs))

        def done(row: Row, output: Output) -> None:
            post(deliver, row, output)

        try:
            await self._off_loop(partial(self._compute, adapter, list(waiting), done))
        except asyncio.CancelledError:
            for call, _ in batch:
                self._fail(call, EngineError(_CLOSED))
            raise
        except Exception as error:
            for call, _ in batch:
                request = call.request
                reason = f"{type(error).__name__}: {error}"
                what = f"Call {request.call} of {request.trajectory!r} failed in the model: {reason}"
                failure = EngineError(what, next_step="Ask again; lower rows, tokens or kv_mib if memory ran out.")
                failure.__cause__ = error
                self._fail(call, failure)

    @staticmethod
    def _fail(call: _Call, error: EngineError) -> None:
        if not call.future.done():
            call.future.set_exception(error)

    def _started(self) -> None:
        if self.info is None:
            raise EngineError("The engine is not started.", next_step="Await start() first.")

    async def _off_loop(self, work: Callable[[], T]) -> T:
        assert self._worker is not None
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    # What follows runs in the worker thread.

    def _load(self) -> EngineInfo:
        import torch

        from bascule.runtime.engines.adapters import Adapters
        from bascule.runtime.engines.generate import Generator, Limits
        from bascule.trainers import base_model

        if self.params.threads:
            torch.set_num_threads(self.params.threads)
        folder = base_model.resolve_model(self.model_name)
        model = base_model.load_model(folder)
        self._tokenizer = tokenizer = base_model.load_tokenizer(folder)
        self._context = int(model.config.max_position_embeddings)
        self._adapters = Adapters(model, self.params.merged_adapters)
        p = self.params
        self._generator = Generator(
            model,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)),
            base_model.end_tokens(model, tokenizer),
            Limits(rows=p.rows, tokens=p.tokens, kv_mib=p.kv_mib, prefix_tokens=p.prefix_tokens),
        )
        return EngineInfo(
            name="transformers",
            model=self.model_name,
            model_digest=base_model.model_digest(folder),
            versions=base_model.versions(model),
        )

    def _read_adapter(self, name: str, folder: Path) -> None:
        from bascule.runtime.engines.adapters import read_adapter

        self._adapters.add(read_adapter(name, folder, self._generator.model))

    def _compute(self, adapter: str | None, rows: Sequence[Row], done: Callable[[Row, Output], None]) -> None:
        self._adapters.activate(adapter)
        self._generator.run(adapter, rows, done)
