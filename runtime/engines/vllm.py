"""The engine ``vllm``: a vLLM server that it starts, servers that run, or vLLM within this process.

Tokens in, tokens out: prompts are tokenised once by the model's own template and sent as ids, and the answers' ids and
log-probabilities come back as sampled. Adapters have a new name for each version and are on every replica before
anybody hears of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec

from bascule.plugins.engine import Engine, EngineInfo, Message, Sampled, SampleRequest
from bascule.plugins.models.endpoint import check_url
from bascule.plugins.params import read_params
from bascule.runtime.engines.adapter_files import AdapterFiles, adapter_rank
from bascule.runtime.engines.form import Form
from bascule.runtime.engines.phases import Door, Phases
from bascule.runtime.engines.presets import preset_of
from bascule.runtime.engines.refusals import (
    caller,
    cannot_start,
    check_size,
    not_loaded,
    not_started,
    other_content,
)
from bascule.runtime.engines.remote import LOCAL, Calls
from bascule.runtime.engines.replica import HttpReplica, Ids, Replica, Served
from bascule.runtime.engines.vllm_server import ServerProcess, find_python, start_server
from bascule.runtime.engines.wire import Unreachable, Wire, read_key
from bascule.schemas.errors import BasculeError, ConfigError, EngineError

T = TypeVar("T")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: What there is where a driver has found an NVIDIA or an AMD GPU.
_GPUS = ("/proc/driver/nvidia/version", "/dev/kfd")
_POLL_SECONDS = 0.5
_TELL_SECONDS = 10.0
_ENCODED = 1024
#: Log-probabilities at temperature 2 instead of 1 differ by far more than this where the temperature is in them.
_MOVED = 1e-3


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a configuration may set.

    Attributes:
        mode: ``server`` starts one, unless ``url`` or ``urls`` name some that run; ``inside`` needs no server.
        url: of a server that runs.
        urls: of several that serve the same model, the replicas.
        key_env: environment variable that holds the servers' key.
        served_model: name of the base model on the servers; by default the only one there.
        folder: where adapters lie for the servers, and the log of a server that is started. Workers that share
            servers share this.
        server_folder: the path of ``folder`` as the servers see it, where that is another.
        environment: folder of the virtual environment that has vLLM; see ``find_python``.
        arguments: further ones for vLLM's server; for ``inside`` see ``options``.
        options: further arguments of vLLM's ``AsyncEngineArgs``, for ``inside``.
        device: what the servers compute on, ``cuda`` or ``cpu``, by which their seconds are counted; by default a GPU
            where this machine has one, or a server is on another.
        dtype: of the weights, in vLLM's words.
        max_model_len: most tokens of a prompt and its answer; by default the model's own.
        eager: whether compilation and CUDA graphs are left out: a faster start and slower answers.
        adapters: whether a server that is started takes LoRA adapters.
        max_lora_rank: of an adapter; vLLM gets the next one above that it takes. A run gives the highest that its
            algorithms have.
        max_loras: adapters that compute in one batch: the one that is served, and the one before it.
        mixed: whether the base model and adapters may compute in one batch. vLLM's CPU build (0.32) gives rows without
            an adapter the weights of one there, and nothing shows it, so that they take turns by default.
        template: further arguments of the chat template, such as ``enable_thinking``.
        start_s: most seconds until a server answers.
        timeout_s: most seconds of one try of a call.
        retries: tries after the first, where the server failed or cannot be reached.
    """

    mode: Literal["server", "inside"] = "server"
    url: str = ""
    urls: tuple[str, ...] = ()
    key_env: str | None = None
    served_model: str = ""
    folder: str = ""
    server_folder: str = ""
    environment: str = ""
    arguments: tuple[str, ...] = ()
    options: dict[str, Any] = {}
    device: Literal["", "cuda", "cpu"] = ""
    dtype: str = "auto"
    max_model_len: Annotated[int, msgspec.Meta(ge=1)] | None = None
    eager: bool = False
    adapters: bool = True
    max_lora_rank: Annotated[int, msgspec.Meta(ge=1, le=RANKS[-1])] = 32
    max_loras: Annotated[int, msgspec.Meta(ge=2, le=1024)] = 2
    mixed: bool = False
    template: dict[str, Any] = {}
    start_s: Annotated[float, msgspec.Meta(gt=0)] = 900.0
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    retries: Annotated[int, msgspec.Meta(ge=0, le=10)] = 2


def make(model: str, params: dict[str, Any]) -> Engine:
    """An engine for a model's name or folder; see :class:`Params`.

    Raises:
        ConfigError: a parameter is unknown or not usable.
    """
    checked = read_params(params, Params, "The engine 'vllm'")
    if (checked.url or checked.urls) and checked.mode == "inside":
        raise ConfigError(
            "The engine 'vllm' is told to run inside and to use a server.", next_step="Leave mode or url out."
        )
    for url in (*checked.urls, *filter(None, [checked.url])):
        check_url(url, "The engine 'vllm'", "url")
    rank = next(rank for rank in RANKS if rank >= checked.max_lora_rank)
    return VllmEngine(model, msgspec.structs.replace(checked, max_lora_rank=rank))


class VllmEngine:
    """Satisfies :class:`bascule.plugins.engine.Engine`.

    Attributes:
        tell: is told of progress while a server starts, as a structured logger's ``info``.
    """

    def __init__(self, model: str, params: Params) -> None:
        self.model_name = model
        self.params = params
        self.info: EngineInfo | None = None
        self.tell: Callable[..., Any] = lambda event, **figures: None
        self._server: ServerProcess | None = None
        self._replicas: list[Replica] = []
        self._served: dict[str, Served] = {}
        self._files: AdapterFiles | None = None
        self._temporary: Path | None = None
        self._phases: dict[str, Phases] = {}
        self._busy: Counter[str] = Counter()
        self._asked: Counter[str | None] = Counter()
        self._loaded: dict[str, str] = {}
        self._leaving: set[str] = set()
        self._lock = asyncio.Lock()
        self._calls = Calls()
        self._prompts: dict[tuple[Message, ...] | str, Ids] = {}
        self._form = Form(preset_of(model), params.template)
        self._logprobs = True

    async def start(self) -> EngineInfo:
        if self.info is None:
            try:
                self.info = await self._start()
            except BaseException as error:
                await self._release()
                if isinstance(error, BasculeError):
                    raise cannot_start(self.model_name, error) from error
                raise
        return self.info

    async def close(self) -> None:
        """End the calls that are open, and a server that this engine started."""
        self.info = None
        await self._calls.close()
        await self._release()

    async def load_adapter(self, name: str, folder: Path) -> None:
        """See the protocol; raises EngineError for an unusable folder, or other content under a loaded name.

        The adapter is on every replica, and each of them has said so, before this returns; if one does not take it, it
        is on none.
        """
        self._started()
        assert self._files is not None
        async with self._lock:
            path, seen = await asyncio.to_thread(self._files.keep, name, folder)
            if name in self._loaded:
                if self._loaded[name] == seen:
                    self._leaving.discard(name)
                    return
                await asyncio.to_thread(self._files.forget, path)
                raise other_content(name)
            took: list[Replica] = []
            try:
                self._check_rank(name, path)
                await self._each(lambda replica: self._load_on(replica, seen, took))
            except BaseException:
                await self._remove(seen, took if self._shared else self._replicas)
                raise
            self._loaded[name] = seen
            self._leaving.discard(name)

    async def unload_adapter(self, name: str) -> None:
        """Refuse further calls of an adapter, and free it once those that are open have ended."""
        self._started()
        if name in self._loaded:
            self._leaving.add(name)
            await self._let_go(name)

    async def sample(self, request: SampleRequest) -> Sampled:
        self._started()
        return await self._call(partial(self._sample, request))

    async def score(self, adapter: str | None, ids: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """See :class:`bascule.plugins.engine.Scoring`; one tuple for each replica."""
        self._started()
        if adapter is not None and adapter not in self._loaded:
            raise not_loaded("A probe", adapter, self._loaded)

        name = None if adapter is None else _served_as(self._loaded[adapter])

        async def score(replica: Replica) -> tuple[float, ...]:
            # By itself: prompt log-probabilities beside other calls of adapters end vLLM 0.32 on a CPU.
            async with self._phase(replica, object()):
                return await replica.score(name or self._served[replica.name].model, tuple(ids))

        return tuple(await self._call(partial(self._each, score)))

    def _phase(self, replica: Replica, kind: object) -> AbstractAsyncContextManager[None]:
        """Keeps calls of one kind on a replica apart from those of others, unless ``mixed`` says otherwise.

        Raises:
            EngineError: the lock for that cannot be made.
        """
        if self.params.mixed:
            return contextlib.nullcontext()
        if replica.name not in self._phases:
            self._phases[replica.name] = Phases(self._door(replica) if self._shared else None)
        return self._phases[replica.name].of(kind)

    def _door(self, replica: Replica) -> Door:
        """What the run's workers share whose calls may not be on a replica together."""
        assert self._files is not None
        path = self._files.folder.parent / f"{hashlib.sha256(replica.name.encode()).hexdigest()[:16]}.lock"
        try:
            return Door(path)
        except OSError as error:
            raise EngineError(
                f"The lock {path} cannot be made: {error}.", next_step="Correct engine.folder."
            ) from error

    async def _sample(self, request: SampleRequest) -> Sampled:
        adapter = request.adapter
        if adapter is not None and adapter not in (usable := set(self._loaded) - self._leaving):
            raise not_loaded(caller(request), adapter, usable)
        self._asked[adapter] += 1  # from here on the adapter stays
        try:
            replica = min(self._replicas, key=lambda r: self._busy[r.name])
            self._busy[replica.name] += request.n
            try:
                prompt = await self._encode(replica, request.prompt)
                check_size(request, prompt, min(s.context for s in self._served.values()))
                asked = 1 if request.sampling.temperature == 0 else request.n  # vLLM takes no n > 1 when greedy
                sampling, ends = self._form.asked(request.sampling)
                model = self._served[replica.name].model if adapter is None else _served_as(self._loaded[adapter])
                async with self._phase(replica, "base" if adapter is None else "adapters"):
                    outputs = await replica.complete(model, prompt, asked, sampling, request.seed, ends)
                outputs = tuple(self._form.read(o, request.sampling, request.prompt) for o in outputs) * (
                    request.n // asked
                )
            finally:
                self._busy[replica.name] -= request.n
        finally:
            self._asked[adapter] -= 1
            if adapter in self._leaving and not self._asked[adapter]:
                self._calls.begin(self._let_go(adapter))
        if not self._logprobs:
            outputs = tuple(msgspec.structs.replace(o, logprobs=b"") for o in outputs)
        return Sampled(prompt_ids=prompt, outputs=outputs)

    async def _encode(self, replica: Replica, prompt: tuple[Message, ...] | str) -> Ids:
        """The episodes of a group send the same prompt, each by itself."""
        if prompt not in self._prompts:
            ids = self._form.rendered(prompt)
            if ids is None:
                ids = await replica.encode(prompt, self._form.template)
            if len(self._prompts) >= _ENCODED:
                self._prompts.pop(next(iter(self._prompts)), None)
            self._prompts[prompt] = ids
            return ids
        return self._prompts[prompt]

    async def _call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            return await self._calls.run(work)
        except Unreachable as error:
            if self._server is not None:
                await self._server.settle()
            raise self._ended() or error from error

    async def _each(self, ask: Callable[[Replica], Coroutine[Any, Any, T]]) -> list[T]:
        """Ask all replicas at once; all have answered before the first failure is raised."""
        found = await asyncio.gather(*map(ask, self._replicas), return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return [one for one in found if not isinstance(one, BaseException)]

    # Adapters.

    def _check_rank(self, name: str, folder: Path) -> None:
        rank = adapter_rank(name, folder)
        if self._server is not None and rank > self.params.max_lora_rank:
            raise EngineError(
                f"The adapter {name!r} has rank {rank}; the server takes up to {self.params.max_lora_rank}.",
                next_step=f"Start a run with an engine.max_lora_rank of {rank} or more.",
            )

    async def _load_on(self, replica: Replica, folder: str, took: list[Replica]) -> None:
        """Load an adapter, unless the replica has it; ``took`` gets the replica if it was this engine that did."""
        name = _served_as(folder)
        if name not in (await replica.served()).adapters:
            try:
                await replica.load(name, folder)
                took.append(replica)
            except EngineError:
                if name not in (await replica.served()).adapters:  # else another worker was first
                    raise
        if name not in (await replica.served()).adapters:
            raise EngineError(
                f"{replica.name} took the adapter {name!r} and does not list it.",
                next_step="Name every replica in engine.params.urls: one address in front of several hides the others.",
            )

    async def _let_go(self, name: str) -> None:
        async with self._lock:
            if name in self._leaving and not self._asked[name]:
                self._leaving.discard(name)
                seen = self._loaded.pop(name)
                await self._remove(seen, self._replicas)

    async def _remove(self, seen: str, replicas: Sequence[Replica]) -> None:
        """Take an adapter from those of the replicas that have it, and its files once none has it any more."""
        assert self._files is not None
        name, left = _served_as(seen), False
        for replica in self._replicas:
            with contextlib.suppress(EngineError):  # a server that is gone has none
                there = name in (await replica.served()).adapters
                if there and replica in replicas:
                    await replica.unload(name)
                left = left or (there and replica not in replicas)
        if not left:
            await asyncio.to_thread(self._files.forget, self._files.here(seen))

    # Start and end.

    async def _start(self) -> EngineInfo:
        p, self._calls = self.params, Calls()
        folder = Path(p.folder) if p.folder else await asyncio.to_thread(self._temporary_folder)
        if not self._shared:  # our own: another process's adapters are not ours to delete, nor is its log
            folder /= str(os.getpid())
        self._files = AdapterFiles(folder / "adapters", f"{p.server_folder}/adapters" if p.server_folder else "")
        digest = await asyncio.to_thread(self._digest)
        with contextlib.suppress(ConfigError):  # a server's model need not be here
            preset = preset_of(self.model_name, await asyncio.to_thread(self._model_folder))
            self._form = Form(preset, p.template)
        await asyncio.to_thread(self._form.check)
        self._replicas = await self._opened(folder)
        await self._wait()
        first = self._replicas[0]
        odd = [name for name, served in self._served.items() if served.model != self._served[first.name].model]
        if odd:
            raise EngineError(
                f"{odd[0]} serves {self._served[odd[0]].model!r} and {first.name} {self._served[first.name].model!r}.",
                next_step="Replicas serve the same model under the same name.",
            )
        self._logprobs = all(await self._each(self._heated))
        adapters = all(await self._each(lambda r: r.takes_adapters()))
        versions = {
            "vllm": self._served[first.name].version,
            "replicas": str(len(self._replicas)),
            "dtype": p.dtype,
            "device": computes_on(p),
        }
        if not self._logprobs:
            versions["logprobs"] = "raw"
        return EngineInfo(
            name="vllm",
            model=self.model_name,
            model_digest=digest,
            versions=versions,
            logprobs=self._logprobs,
            adapters=adapters,
        )

    async def _opened(self, folder: Path) -> list[Replica]:
        p = self.params
        if p.mode == "inside":
            from bascule.runtime.engines.vllm_inside import open_inside

            return [await open_inside(str(await asyncio.to_thread(self._model_folder)), p)]
        urls = (*p.urls, *((p.url,) if p.url else ()))
        if urls:
            key = read_key(p.key_env)
            return [HttpReplica(self._wire(url, key), p.served_model) for url in urls]
        python = find_python(p.environment)
        model = str(await asyncio.to_thread(self._model_folder))
        variables = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._server = await start_server(python, model, _arguments(p), variables, folder / "vllm.log")
        self.tell("engine.server_started", python=python, url=self._server.url, log=str(self._server.log))
        return [HttpReplica(self._wire(self._server.url, self._server.key), p.served_model)]

    def _wire(self, url: str, key: str | None) -> Wire:
        return Wire(url, key=key, timeout_s=self.params.timeout_s, retries=self.params.retries)

    async def _wait(self) -> None:
        """Until every replica answers.

        Raises:
            EngineError: one has ended, refuses, or does not answer in time.
        """
        clock = asyncio.get_running_loop().time
        began = told = clock()
        for replica in self._replicas:
            while replica.name not in self._served:
                try:
                    self._served[replica.name] = await replica.served()
                    break
                except Unreachable as error:
                    waited = clock() - began
                    if (ended := self._ended()) is not None:
                        raise ended from error
                    if waited > self.params.start_s:
                        raise EngineError(
                            f"{replica.name} did not answer within {self.params.start_s:g} s. {self._log()}".strip(),
                            next_step="Raise engine.params.start_s if the model takes that long to load.",
                        ) from error
                    if self._server is None and waited > _TELL_SECONDS:
                        raise  # somebody else's server is there or is not
                if clock() - told >= _TELL_SECONDS:
                    told = clock()
                    self.tell("engine.starting", seconds=round(told - began), log=self._last_line())
                await asyncio.sleep(_POLL_SECONDS)

    async def _heated(self, replica: Replica) -> bool:
        """Whether log-probabilities are those at the sampling temperature: at 2 they must not be those at 1."""
        prompt = await self._encode(replica, "A balance with two arms")
        model = self._served[replica.name].model
        cold, hot = [await replica.likeliest(model, prompt, heat) for heat in (1.0, 2.0)]
        both = cold.keys() & hot.keys()
        return any(abs(cold[token] - hot[token]) > _MOVED for token in both)

    def _model_folder(self) -> Path:
        from bascule.trainers.base_model import DEFAULT_MODEL, resolve_model

        return resolve_model(self.model_name or DEFAULT_MODEL)

    def _digest(self) -> str:
        """Of the model's folder, if it is here; a server's model is known by its name only."""
        from bascule.trainers.base_model import model_digest

        try:
            return model_digest(self._model_folder())
        except ConfigError:
            if self.params.url or self.params.urls:
                return ""
            raise

    def _temporary_folder(self) -> Path:
        self._temporary = Path(tempfile.mkdtemp(prefix="bascule-vllm-"))
        return self._temporary

    def _ended(self) -> EngineError | None:
        """The error for a server that was started and has ended."""
        if self._server is None or not self._server.ended:
            return None
        return EngineError(
            f"The vLLM server ended by itself. {self._log()}",
            next_step="Correct what it complains of; the parameters of the engine reach it (engine.params).",
        )

    def _log(self) -> str:
        return f"The end of {self._server.log}:\n{self._server.last_lines()}\n" if self._server is not None else ""

    def _last_line(self) -> str:
        return self._server.last_lines().rpartition("\n")[2] if self._server is not None else ""

    def _started(self) -> None:
        if self.info is None:
            raise not_started()

    @property
    def _shared(self) -> bool:
        """Whether the servers are somebody else's, who may serve other workers of the run."""
        return bool(self.params.url or self.params.urls)

    async def _release(self) -> None:
        """Let go of the servers; those that are shared keep the adapters that other workers may be using."""
        for replica in self._replicas:
            await replica.close()
        if self._server is not None:
            await self._server.close()
        if self._files is not None and not self._shared:
            for seen in self._loaded.values():
                await asyncio.to_thread(self._files.forget, self._files.here(seen))
        if self._temporary is not None:
            await asyncio.to_thread(shutil.rmtree, self._temporary, ignore_errors=True)
        self._replicas, self._server, self._temporary, self._files = [], None, None, None
        self._served.clear()
        for phases in self._phases.values():
            phases.close()
        self._phases.clear()
        self._loaded.clear()
        self._leaving.clear()
        self._prompts.clear()


def computes_on(p: Params) -> str:
    """What servers compute on: as is said, or a GPU where there is one here, or a server is on another machine."""
    if p.device:
        return p.device
    hosts = {urlsplit(url).hostname for url in (*p.urls, p.url) if url}
    return "cuda" if hosts - LOCAL or any(Path(one).exists() for one in _GPUS) else "cpu"


def _served_as(folder: str) -> str:
    """The name of an adapter on servers, by its folder there: runs of one name, in two homes, may share them."""
    return f"{folder.rpartition('/')[2]}.{hashlib.sha256(folder.encode()).hexdigest()[:8]}"


def _arguments(p: Params) -> list[str]:
    """Of ``vllm serve``, after the model."""
    given = ["--dtype", p.dtype, "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    given += ["--served-model-name", p.served_model] if p.served_model else ["--served-model-name", "base"]
    given += ["--max-model-len", str(p.max_model_len)] if p.max_model_len else []
    given += ["--enforce-eager"] if p.eager else []
    if p.adapters:
        given += ["--enable-lora", "--max-lora-rank", str(p.max_lora_rank), "--max-loras", str(p.max_loras)]
        given += ["--max-cpu-loras", str(2 * p.max_loras)]
    return [*given, "--disable-uvicorn-access-log", *p.arguments]
