"""Engines of a run: started, checked against what the run recorded, and told of adapters."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bascule.plugins.engine import CAPABILITIES, Engine, EngineInfo, Sampled, SampleRequest, Scoring
from bascule.runtime.services.adapter_probe import NotServed, probe_served
from bascule.runtime.spending import paid_target
from bascule.schemas.errors import ConfigError, EngineError
from bascule.schemas.events import AdapterProbe, ServedProbe
from bascule.schemas.run import PluginChoice, RunConfig

if TYPE_CHECKING:
    from bascule.runtime.runner import View
    from bascule.runtime.world import World


#: Capabilities of :class:`EngineInfo` without which no weights can be trained and served, and how messages call them.
_NEEDED = {"token_ids": "no token ids", "adapters": "no adapters"}
#: Engines that stand in for a model: they replay a run that trained, or are there to be compared with.
_STAND_INS = ("cassette", "constant")


def engine_params(config: RunConfig, choice: PluginChoice) -> dict[str, Any]:
    """An engine's parameters; the embedded one computes on the run's thread count."""
    if choice.name == "transformers" and config.threads:
        return {"threads": config.threads, **choice.params}
    return choice.params


def _placed(view: View, choice: PluginChoice, params: dict[str, Any]) -> dict[str, Any]:
    """An engine's parameters with the folder of the run's home where it may keep adapters and a log, and their rank."""
    if choice.name != "vllm":
        return params
    from bascule.runtime.engines.vllm import RANKS, Params

    ranks = (a.params.get("lora_r") for a in view.world.algorithms)
    rank = max((r for r in ranks if isinstance(r, int)), default=0)
    usual = {
        "folder": str(view.home.absolute() / "engines" / view.run),
        "max_lora_rank": min(max(rank, Params().max_lora_rank), RANKS[-1]),
    }
    return {**usual, **params}


def served_name(run: str, adapter: str) -> str:
    """The name that an engine knows an adapter by; never used twice."""
    return f"{run}.{adapter}"


def made_engine(view: View, choice: PluginChoice) -> Engine:
    """The engine, which is not started yet."""
    config = view.world.config
    params = _placed(view, choice, engine_params(config, choice))
    engine = view.plugins.registry.engines.get(choice.name)(config.model, params)
    if hasattr(engine, "tell"):
        engine.tell = view.logger.info
    return engine


def check_trainable(world: World, lacking: Collection[str]) -> None:
    """Refuse a run that is to train with an engine that gives nothing to train from.

    Args:
        lacking: what the engine can not, in the words of :class:`EngineInfo`'s fields.

    Raises:
        ConfigError: the levers or the policy's algorithm ask for what the engine lacks.
    """
    config = world.config
    if "weights" not in config.levers or not lacking:
        return
    if missing := [what for name, what in _NEEDED.items() if name in lacking]:
        raise ConfigError(
            f"The run is to train weights, and the engine {config.engine.name!r} has {', '.join(missing)}.",
            next_step="Give --levers harness, or use the engine 'transformers' or 'vllm'.",
        )
    wanted = config.policy.params.get("algorithm")
    if isinstance(wanted, str) and world.algorithm(wanted).requires.behaviour_logprobs and "logprobs" in lacking:
        raise ConfigError(
            f"The algorithm {wanted} needs the log-probability of every token at the sampling temperature, which the "
            f"engine {config.engine.name!r} does not give.",
            next_step="Choose best_of_n or dpo, harness as the only lever, or start vLLM with "
            "--logprobs-mode processed_logprobs.",
        )


def check_counted(config: RunConfig, info: EngineInfo) -> None:
    """Refuse a budget that counts tokens where nobody tells how many there are: it would never be reached.

    Raises:
        EngineError: the budget is in tokens, or in dollars that they cost.
    """
    price = config.prices.get(paid_target(config) or "")
    costly = price is not None and max(price.input, price.output) > 0
    budgets = (config.budget, *config.budget.levers.values())
    bounded = any(b.tokens is not None or (b.dollars is not None and costly) for b in budgets)
    if bounded and info.versions.get("usage") == "none":
        raise EngineError(
            f"The budget counts tokens, and the endpoint of the engine {info.name!r} tells neither how many there are "
            "nor which.",
            next_step="Have the endpoint report usage, then `bascule resume RUN`; or start one whose budget is in "
            "rollouts, seconds or generations.",
        )


async def start_engine(view: View, engine: Engine, choice: PluginChoice) -> EngineInfo:
    """Start an engine.

    Raises:
        EngineError: it does not start, its model is another one than the run started with, or the budget counts tokens
            that it does not.
        ConfigError: the run is to train, and the engine gives nothing to train from.
    """
    config, started = view.world.config, view.state.started
    try:
        info = await engine.start()
    except ConfigError as error:  # such as a key that this machine lacks
        raise EngineError(error.message, next_step=error.next_step) from error
    if choice == config.engine and choice.name not in _STAND_INS:
        check_trainable(view.world, [name for name in CAPABILITIES if not getattr(info, name)])
    if choice == config.engine:
        check_counted(config, info)
    recorded = started.model_digest if started is not None and choice == config.engine else ""
    if recorded and info.model_digest not in ("", recorded):
        raise EngineError(
            f"The model {config.model!r} is not the one that {view.run} started with "
            f"(digest {info.model_digest}, recorded {recorded}).",
            next_step="Put the recorded model back; a run keeps its model.",
        )
    view.logger.info("engine.started", engine=info.name, model=info.model, versions=info.versions)
    return info


async def load_adapter(
    view: View, engine: Engine, adapter: str, others: Mapping[str, AdapterProbe] | None = None
) -> ServedProbe | None:
    """Give an engine an adapter's files and see that it serves them; it is unloaded again if it does not, twice.

    Nothing is done for an adapter that the run has forgotten.

    Args:
        others: what the trainer said of adapters that the engine had before; those of the run are known.

    Returns:
        How it is served; None where the trainer recorded nothing to compare, or the engine cannot tell.

    Raises:
        EngineError: the engine does not take it, or serves other weights.
    """
    found = view.state.adapters.get(adapter)
    if found is None:
        return None
    known = {**(others or {}), **{n: a.probe for n, a in view.state.adapters.items() if a.probe is not None}}
    known.pop(adapter, None)
    name = served_name(view.run, adapter)
    with tempfile.TemporaryDirectory(dir=view.home, prefix="adapter-") as folder:
        for file, ref in found.files.items():
            data = await view.blobs.get(ref)
            await asyncio.to_thread((Path(folder) / file).write_bytes, data)
        for last in (False, True):
            await engine.load_adapter(name, Path(folder))
            if found.probe is None or not isinstance(engine, Scoring):
                return None
            try:
                return await probe_served(engine, await engine.start(), name, found.probe, known)
            except NotServed as error:
                await engine.unload_adapter(name)
                if last:
                    raise
                view.logger.warning("adapter.not_served", adapter=adapter, error=str(error))
    return None


@dataclass
class _Held:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    engine: Engine | None = None
    info: EngineInfo | None = None
    users: set[int] = field(default_factory=set)


class Engines:
    """The engines of a process: services that ask for the same one share it, so that a model has memory once."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    async def take(self, view: View, choice: PluginChoice, user: object) -> tuple[Engine, EngineInfo]:
        """The engine of a choice, started for the first who takes it; it is closed when its last user leaves.

        Raises:
            EngineError, ConfigError: as :func:`start_engine`.
        """
        held = self._held.setdefault(msgspec.json.encode(choice, order="sorted").decode(), _Held())
        async with held.lock:
            if held.engine is None or held.info is None:
                engine = made_engine(view, choice)
                try:
                    held.info = await start_engine(view, engine, choice)
                except BaseException:
                    await engine.close()
                    raise
                held.engine = engine
            held.users.add(id(user))
            return held.engine, held.info

    async def leave(self, user: object) -> None:
        """Close all engines that nobody else uses."""
        for held in list(self._held.values()):
            if id(user) not in held.users:
                continue  # nor does it wait for one that somebody else is starting
            async with held.lock:
                held.users.discard(id(user))
                if not held.users and held.engine is not None:
                    engine, held.engine, held.info = held.engine, None, None
                    await engine.close()


class EngineOnDemand:
    """The run's engine for whoever may not need it: a model is loaded, and an adapter, when it is asked for.

    A harness that asks no model costs none.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._lock = asyncio.Lock()
        self._engine: Engine | None = None
        self._info: EngineInfo | None = None
        self._loaded: set[str] = set()

    async def start(self) -> EngineInfo:
        """Start the engine, if that is not done.

        Raises:
            EngineError: as :func:`start_engine`.
        """
        async with self._lock:
            if self._engine is None or self._info is None:
                choice = self._view.world.config.engine
                self._engine, self._info = await self._view.engines.take(self._view, choice, self)
            return self._info

    @property
    def device(self) -> str:
        """What its model computes on; empty while none does."""
        return self._info.versions.get("device", "") if self._info is not None else ""

    async def close(self) -> None:
        self._engine = self._info = None
        self._loaded.clear()
        await self._view.engines.leave(self)

    async def load_adapter(self, name: str, folder: Path) -> None:
        await self.start()
        assert self._engine is not None
        await self._engine.load_adapter(name, folder)

    async def unload_adapter(self, name: str) -> None:
        if self._engine is not None:
            await self._engine.unload_adapter(name)

    async def sample(self, request: SampleRequest) -> Sampled:
        await self.start()
        engine = self._engine
        assert engine is not None
        if request.adapter is not None:
            async with self._lock:
                if request.adapter not in self._loaded:
                    await load_adapter(self._view, engine, request.adapter.removeprefix(f"{self._view.run}."))
                    self._loaded.add(request.adapter)
        return await engine.sample(request)
