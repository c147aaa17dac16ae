"""The embedded engine: transformers' models, batched over concurrent episodes.

Calls of :meth:`TransformersEngine.sample` join, between two passes, those that one thread computes; a second thread
makes tokens of prompts. Equal rows that are asked for at a time are computed once. The module is light: the model
libraries are imported when the engine starts.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from bascule.plugins.engine import Engine, EngineInfo, Message, Sampled, SampleRequest
from bascule.plugins.params import read_params
from bascule.runtime.engines.form import Form, encoded
from bascule.runtime.engines.presets import preset_of
from bascule.runtime.engines.refusals import (
    caller,
    cannot_start,
    check_size,
    closed,
    not_loaded,
    not_started,
)
from bascule.schemas.errors import BasculeError, EngineError
from bascule.schemas.trajectory import Output
from bascule.trainers.base_model import DEFAULT_MODEL

if TYPE_CHECKING:
    from bascule.runtime.engines.generate import Answer, Row

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=1)]
Whole = Annotated[int, msgspec.Meta(ge=0)]


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a configuration may set.

    Attributes:
        gather_ms: how long calls must have paused before an idle engine computes.
        rows: most samples that decode at a time.
        tokens: most tokens of prompts in one pass.
        kv_mib: most MiB of keys and values of samples that decode at a time.
        prefix_tokens: tokens of shared prefixes that are kept for later calls.
        merged_adapters: adapters whose merged weights are kept.
        threads: threads of torch; None or 0 leaves its own choice.
        template: further arguments of the chat template, such as ``enable_thinking``.
    """

    gather_ms: Annotated[float, msgspec.Meta(ge=0, le=60_000)] = 15.0
    rows: Count = 256
    tokens: Count = 1024
    kv_mib: Count = 384
    prefix_tokens: Whole = 2048
    merged_adapters: Count = 2
    threads: Whole | None = None
    template: dict[str, Any] = {}


@dataclass(eq=False)
class _Call:
    """One request that waits, and its outputs by their index."""

    request: SampleRequest
    rows: tuple[Row, ...]
    future: asyncio.Future[Sampled]
    outputs: dict[int, Output] = field(default_factory=dict)


def make(model: str, params: dict[str, Any]) -> Engine:
    """An engine for a model name or folder; see :class:`Params`.

    Raises:
        ConfigError: a parameter is unknown, of a wrong type or out of range.
    """
    return TransformersEngine(model or DEFAULT_MODEL, read_params(params, Params, "The engine 'transformers'"))


class TransformersEngine:
    """Satisfies :class:`bascule.plugins.engine.Engine` and :class:`bascule.plugins.engine.Scoring`."""

    def __init__(self, model: str, params: Params) -> None:
        self.model_name = model
        self.params = params
        self.info: EngineInfo | None = None
        # The episodes of a group send the same prompt, each by itself.
        self._encode = lru_cache(maxsize=256)(self.encode)
        # Who waits for what; touched on the event loop only.
        self._asked: dict[tuple[str | None, Row], list[tuple[_Call, int]]] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None ends the worker
        self._worker: threading.Thread | None = None
        self._text: ThreadPoolExecutor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loaded = False

    async def start(self) -> EngineInfo:
        if self.info is None:
            self._loop = asyncio.get_running_loop()
            self._jobs, self._loaded = queue.SimpleQueue(), False
            # A daemon, because the process may end without close().
            self._worker = threading.Thread(target=self._serve, name="bascule-engine", daemon=True)
            self._worker.start()
            try:
                self.info = await self._off_loop(self._load)
            except BaseException as error:
                self._jobs.put(None)
                if isinstance(error, BasculeError):
                    raise cannot_start(self.model_name, error) from error
                raise
            self._text = ThreadPoolExecutor(1, thread_name_prefix="bascule-engine-text")
        return self.info

    async def close(self) -> None:
        """End the worker after the pass that it computes, and let go of the weights; calls that wait fail."""
        worker, text = self._worker, self._text
        self._worker = self._text = self.info = None
        for call in {id(call): call for calls in self._asked.values() for call, _ in calls}.values():
            self._fail(call, closed())
        self._asked.clear()
        if text is not None:
            await asyncio.to_thread(text.shutdown)
        if worker is not None:
            self._jobs.put(None)
            await asyncio.to_thread(worker.join)
        if self._loaded:  # whoever holds a closed engine is not to hold its weights
            del self._generator, self._adapters
            self._loaded = False

    def encode(self, prompt: tuple[Message, ...] | str) -> tuple[int, ...]:
        """Token ids of a raw completion's text, or of a chat with its generation prompt.

        Raises:
            EngineError: the engine is not started, or the model's chat template is not there or refuses the chat.
        """
        self._started()
        return encoded(self._tokenizer, prompt, self._form.template, repr(self.model_name))

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
        for row in await self._off_loop(partial(self._remove_adapter, name)):
            gone = EngineError(
                f"The adapter {name!r} was unloaded while it was asked for.",
                next_step="Unload an adapter once its calls are answered.",
            )
            for call, _ in self._asked.pop((name, row), []):
                self._fail(call, gone)

    async def sample(self, request: SampleRequest) -> Sampled:
        self._started()
        from bascule.runtime.engines.generate import Row

        # Templates are slow, and many calls come at once: on the loop they would hold up everything else.
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._text, self._encode, request.prompt)
        if self.info is None:
            raise closed()
        if request.adapter is not None and request.adapter not in self._adapters:
            raise not_loaded(caller(request), request.adapter, self._adapters.names())
        check_size(request, prompt, self._context)
        sampling, _ = self._form.asked(request.sampling)
        greedy = sampling.temperature == 0
        rows = tuple(Row(prompt, sampling, 0 if greedy else request.seed, 0 if greedy else i) for i in range(request.n))
        call = _Call(request, rows, loop.create_future())
        for i, row in enumerate(rows):
            self._asked.setdefault((request.adapter, row), []).append((call, i))
        self._jobs.put(partial(self._generator.submit, request.adapter, rows))
        try:
            sampled = await call.future
        finally:
            self._withdraw(call)
        outputs = tuple(self._form.read(output, request.sampling, request.prompt) for output in sampled.outputs)
        return msgspec.structs.replace(sampled, outputs=outputs)

    async def score(self, adapter: str | None, ids: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """See :class:`bascule.plugins.engine.Scoring`."""
        self._started()
        return (tuple(await self._off_loop(partial(self._score, adapter, ids))),)

    def _deliver(self, answers: Iterable[Answer]) -> None:
        """Hand a pass's answers to whoever waits for them."""
        for answer in answers:
            outcome = answer.outcome
            for call, i in self._asked.pop((answer.adapter, answer.row), ()):
                if isinstance(outcome, Exception):
                    self._fail(call, _failure(call.request, outcome))
                    continue
                call.outputs[i] = outcome
                if len(call.outputs) == len(call.rows) and not call.future.done():
                    outputs = tuple(call.outputs[j] for j in range(len(call.rows)))
                    call.future.set_result(Sampled(prompt_ids=answer.row.prompt, outputs=outputs))

    def _withdraw(self, call: _Call) -> None:
        """Let go of what a call still waits for; what nobody else waits for is not computed further."""
        adapter, alone = call.request.adapter, []
        for row in dict.fromkeys(call.rows):
            waiting = self._asked.get((adapter, row))
            if waiting is None:
                continue
            waiting[:] = [one for one in waiting if one[0] is not call]
            if not waiting:
                del self._asked[adapter, row]
                alone.append(row)
        if alone:
            self._jobs.put(partial(self._generator.cancel, adapter, alone))

    @staticmethod
    def _fail(call: _Call, error: EngineError) -> None:
        if not call.future.done():
            call.future.set_exception(error)

    def _started(self) -> None:
        if self.info is None:
            raise not_started()

    async def _off_loop(self, work: Callable[[], T]) -> T:
        """Have the worker do something between two passes."""
        done: Future[T] = Future()

        def job() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        self._jobs.put(job)
        return await asyncio.wrap_future(done)

    # What follows runs in the worker thread.

    def _serve(self) -> None:
        assert self._loop is not None
        while self._work_off():
            answers = self._generator.step() if self._busy() else []
            if answers:
                try:
                    self._loop.call_soon_threadsafe(self._deliver, answers)
                except RuntimeError:  # the loop was closed, and the engine was not
                    return

    def _busy(self) -> bool:
        return self._loaded and self._generator.busy

    def _work_off(self) -> bool:
        """Do the jobs that wait; False once there is none left to come.

        An idle worker waits for the first, and goes on once they have paused for ``gather_ms``: episodes start one by
        one, and one pass beats many.
        """
        idle = not self._busy()
        while True:
            try:
                if not idle:
                    job = self._jobs.get_nowait()
                elif not self._busy():
                    job = self._jobs.get()
                elif self._generator.waiting >= self.params.rows:
                    return True
                else:
                    job = self._jobs.get(timeout=self.params.gather_ms / 1000)
            except queue.Empty:
                return True
            if job is None:
                return False
            job()

    def _load(self) -> EngineInfo:
        import torch

        from bascule.runtime.engines.adapters import Adapters
        from bascule.runtime.engines.generate import Generator, Limits
        from bascule.trainers import base_model

        if self.params.threads:
            torch.set_num_threads(self.params.threads)
        folder = base_model.resolve_model(self.model_name)
        preset = preset_of(self.model_name, folder)
        if preset.harmony:
            raise EngineError(
                f"{preset.family} answers in the harmony format and has attention that this engine does not compute.",
                next_step="Use the engine 'vllm'.",
            )
        self._form = Form(preset, self.params.template)
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
            self._adapters.activate,
        )
        self._loaded = True
        return EngineInfo(
            name="transformers",
            model=self.model_name,
            model_digest=base_model.model_digest(folder),
            versions=base_model.versions(model),
        )

    def _read_adapter(self, name: str, folder: Path) -> None:
        from bascule.runtime.engines.adapters import read_adapter

        self._adapters.add(read_adapter(name, folder, self._generator.model))

    def _score(self, adapter: str | None, ids: Sequence[int]) -> list[float]:
        if adapter is not None and adapter not in self._adapters:
            raise not_loaded("A probe", adapter, self._adapters.names())
        return self._generator.score(adapter, ids)

    def _remove_adapter(self, name: str) -> list[Row]:
        self._adapters.remove(name)
        return self._generator.drop(name)


def _failure(request: SampleRequest, error: Exception) -> EngineError:
    reason = f"{type(error).__name__}: {error}"
    what = f"Call {request.call} of {request.trajectory!r} failed in the model: {reason}"
    failure = EngineError(what, next_step="Ask again; lower rows, tokens or kv_mib if memory ran out.")
    failure.__cause__ = error
    return failure
