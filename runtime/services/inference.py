"""Engines of a run: started, checked against what the run recorded, and told of adapters."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.plugins.engine import Engine, EngineInfo, Sampled, SampleRequest
from bascule.schemas.errors import EngineError
from bascule.schemas.run import PluginChoice, RunConfig

if TYPE_CHECKING:
    from bascule.runtime.runner import View


def engine_params(config: RunConfig, choice: PluginChoice) -> dict[str, Any]:
    """An engine's parameters; the embedded one computes on the run's thread count."""
    if choice.name == "transformers" and config.threads:
        return {"threads": config.threads, **choice.params}
    return choice.params


def served_name(run: str, adapter: str) -> str:
    """The name that an engine knows an adapter by; never used twice."""
    return f"{run}.{adapter}"


def made_engine(view: View, choice: PluginChoice) -> Engine:
    """The engine, which is not started yet."""
    config = view.world.config
    return view.plugins.registry.engines.get(choice.name)(config.model, engine_params(config, choice))


async def start_engine(view: View, engine: Engine, choice: PluginChoice) -> EngineInfo:
    """Start an engine.

    Raises:
        EngineError: it does not start, or its model is another one than the run started with.
    """
    config, started = view.world.config, view.state.started
    info = await engine.start()
    if choice == config.engine and started is not None and info.model_digest not in ("", started.model_digest):
        raise EngineError(
            f"The model {config.model!r} is not the one that {view.run} started with "
            f"(digest {info.model_digest}, recorded {started.model_digest}).",
            next_step="Put the recorded model back; a run keeps its model.",
        )
    view.logger.info("engine.started", engine=info.name, model=info.model, versions=info.versions)
    return info


async def load_adapter(view: View, engine: Engine, adapter: str) -> None:
    """Give an engine an adapter's files; nothing is done for one that the run has forgotten."""
    found = view.state.adapters.get(adapter)
    if found is None:
        return
    with tempfile.TemporaryDirectory(dir=view.home, prefix="adapter-") as folder:
        for name, ref in found.files.items():
            data = await view.blobs.get(ref)
            await asyncio.to_thread((Path(folder) / name).write_bytes, data)
        await engine.load_adapter(served_name(view.run, adapter), Path(folder))


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
                self._engine = made_engine(self._view, choice)
                self._info = await start_engine(self._view, self._engine, choice)
            return self._info

    async def close(self) -> None:
        engine, self._engine, self._info = self._engine, None, None
        self._loaded.clear()
        if engine is not None:
            await engine.close()

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
